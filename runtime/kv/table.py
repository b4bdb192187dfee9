"""A request's block table. Owns the map from its positions to pages; must not know how pages are handed out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.kv.pool import PagePool


class BlockTable:
    """Page `row[i]` holds positions `i * page_tokens ...` of one request; -1 where none is mapped.

    `row` is int32 and as wide as the longest request, so that a step copies it into its inputs in one go.
    """

    __slots__ = ("_owner", "_page_tokens", "_pages", "_pool", "row")

    def __init__(self, pool: PagePool, owner: int, width: int, page_tokens: int) -> None:
        self._pool = pool
        self._owner = owner
        self._page_tokens = page_tokens
        self._pages: list[int] = []
        self.row: NDArray[np.int32] = np.full(width, -1, np.int32)

    @property
    def count(self) -> int:
        """Pages held."""
        return len(self._pages)

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(self._pages)

    def ensure(self, tokens: int) -> None:
        """Hold pages for positions 0 .. tokens - 1. Raises XllmError("capacity") when the pool has too few."""
        held = len(self._pages)
        need = -(-tokens // self._page_tokens) - held
        if need <= 0:
            return
        if held + need > len(self.row):
            raise XllmError("internal", f"{tokens} tokens need more than the {len(self.row)} pages of a table")
        new = self._pool.alloc(need, self._owner)
        self.row[held : held + need] = new
        self._pages += new

    def clear(self) -> None:
        """Give every page back."""
        self._pool.release(self._pages, self._owner)
        self.row[: len(self._pages)] = -1
        self._pages = []
