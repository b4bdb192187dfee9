"""Handlers of aten operations, grouped by what they do. Importing this package fills `importer.ATEN`."""

from xllm_compiler.frontend.aten import elementwise, indexing, linear, shape, sizes

__all__ = ["elementwise", "indexing", "linear", "shape", "sizes"]
