"""The page pool and block tables against a plain model: no page twice, freed pages come back, tables tell the truth."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.kv import BlockTable, PagePool

PAGES, WIDTH, PAGE_TOKENS = 13, 6, 4


class PoolMachine(RuleBasedStateMachine):
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.live: dict[int, tuple[BlockTable, int]] = {}  # owner -> (table, tokens)
        self.next = 0

    @rule(target=tables)
    def open(self) -> int:
        owner, self.next = self.next, self.next + 1
        self.live[owner] = (BlockTable(self.pool, owner, WIDTH, PAGE_TOKENS), 0)
        return owner

    @rule(owner=tables, more=st.integers(0, 9))
    def grow(self, owner: int, more: int) -> None:
        table, tokens = self.live[owner]
        want = min(tokens + more, WIDTH * PAGE_TOKENS)
        new_pages = -(-want // PAGE_TOKENS) - table.count
        if new_pages <= self.pool.free:
            table.ensure(want)
            self.live[owner] = (table, want)
        else:
            before = (table.pages, self.pool.free)
            with pytest.raises(XllmError) as caught:
                table.ensure(want)
            assert caught.value.kind == "capacity"
            assert before == (table.pages, self.pool.free)

    @rule(owner=consumes(tables))
    def close(self, owner: int) -> None:
        self.live.pop(owner)[0].clear()

    @rule(owner=tables)
    def clear(self, owner: int) -> None:
        table, _ = self.live[owner]
        table.clear()
        self.live[owner] = (table, 0)

    @invariant()
    def consistent(self) -> None:
        held = [page for table, _ in self.live.values() for page in table.pages]
        assert len(set(held)) == len(held)
        assert self.pool.free + len(held) == PAGES and self.pool.used == len(held)
        for owner, (table, tokens) in self.live.items():
            assert table.count == -(-tokens // PAGE_TOKENS)
            assert all(self.pool.owner(page) == owner for page in table.pages)
            assert table.row.tolist() == list(table.pages) + [-1] * (WIDTH - table.count)
        for page in range(PAGES):
            assert (self.pool.owner(page) is None) == (page not in held)


TestPool = PoolMachine.TestCase


def test_pages_are_freed_by_their_owner_only_and_once() -> None:
    pool = PagePool(4)
    mine, yours = pool.alloc(2, 1), pool.alloc(1, 2)
    for pages in (yours, [*mine, *yours], [mine[0], mine[0]]):
        with pytest.raises(XllmError) as caught:
            pool.release(pages, 1)
        assert caught.value.kind == "internal" and pool.free == 1
    pool.release(mine, 1)
    with pytest.raises(XllmError):
        pool.release(mine, 1)
    assert pool.free == 3


def test_the_pages_given_first_are_those_freed_last() -> None:
    pool = PagePool(100)
    first = pool.alloc(3, 0)
    assert first == [0, 1, 2]
    pool.release(first, 0)
    assert pool.alloc(3, 0) == first  # untouched pages stay untouched


def test_a_table_is_as_wide_as_the_longest_request() -> None:
    table = BlockTable(PagePool(9), 0, 2, 4)
    with pytest.raises(XllmError) as caught:
        table.ensure(9)
    assert caught.value.kind == "internal" and table.count == 0
