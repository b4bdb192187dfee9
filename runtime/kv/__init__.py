"""Pages of the KV cache: which are free, and which belong to whom."""

from xllm_compiler.runtime.kv.pool import PagePool
from xllm_compiler.runtime.kv.table import BlockTable

__all__ = ["BlockTable", "PagePool"]
