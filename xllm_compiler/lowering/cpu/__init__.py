"""The CPU target: TensorIR kernels in one shared library per instruction set level, and packed weights."""
