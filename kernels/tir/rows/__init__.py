"""Kernels that work on rows one by one: norms, quantization, row gather."""
