"""Kernels for any pointwise tree, reduction or product: what an op gets when nothing better fits."""
