"""CPU kernels in TVM TensorIR. Its folders, each of which may import only those before it: isa, codegen, rows, then
attention, linear and generic, then native."""
