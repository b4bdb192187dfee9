"""Kernels of the KV cache: rotary embedding, writing it, attending over it."""
