"""Instruction set levels, and the LLVM text of small functions that TensorIR has no words for."""
