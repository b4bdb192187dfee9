"""Instruction set levels, and intrinsics: the LLVM text of small functions for what TensorIR cannot say."""
