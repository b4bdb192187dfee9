"""The page pool. Owns which page belongs to whom; must not know requests, tokens or the bytes of a page."""

from __future__ import annotations

from xllm_compiler.errors import XllmError

FREE = -1


class PagePool:
    """`total` pages, each free or owned by one integer owner.

    The page freed last is given first. So few pages are ever touched, and memory that is not needed is never faulted
    in.
    """

    __slots__ = ("_free", "_owner", "total")

    def __init__(self, total: int) -> None:
        if total < 1:
            raise XllmError("capacity", f"a KV pool needs at least one page, got {total}")
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._owner = [FREE] * total

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def owner(self, page: int) -> int | None:
        """Who holds the page, or None."""
        who = self._owner[page]
        return None if who == FREE else who

    def alloc(self, count: int, owner: int) -> list[int]:
        """`count` pages, all or none. Raises XllmError("capacity") when fewer are free, which the planner
        must prevent.
        """
        if not 0 <= count <= len(self._free) or owner < 0:
            raise XllmError("capacity", f"{count} pages wanted for {owner}, {len(self._free)} of {self.total} free")
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        for page in pages:
            self._owner[page] = owner
        return pages

    def release(self, pages: list[int], owner: int) -> None:
        """Give pages back. Raises XllmError("internal") before changing anything when one is not the owner's."""
        for page in pages:
            if self._owner[page] != owner:
                raise XllmError("internal", f"page {page} freed by {owner} but owned by {self._owner[page]}")
        if len(set(pages)) != len(pages):
            raise XllmError("internal", f"a page is freed twice by {owner}: {pages}")
        for page in pages:
            self._owner[page] = FREE
        self._free.extend(reversed(pages))
