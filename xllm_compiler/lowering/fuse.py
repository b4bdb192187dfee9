"""Fusion: which tensor ops are computed inside their consumer.

An elementwise or indexing op joins a group if all its consumers belong to that group. Then its value is never written.

The memory plan was made for one op at a time, and fusion moves a read to a later time. If something might write to that
place in between, the reader is not fused. The prover decides this, and "don't know" counts as might.
"""

from __future__ import annotations

from typing import Final

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.facts import Work
from xllm_compiler.kernels.tir.generic import nodes as generic_nodes
from xllm_compiler.lowering.storage import Storage, where

POINTWISE: Final = frozenset(f"t.{name}" for name in generic_nodes.POINTWISE)
MOVES: Final = frozenset(f"t.{name}" for name in generic_nodes.MOVES)
JOINING: Final = POINTWISE | MOVES | {"t.reduce", "t.concat", "t.pad"}  # consumers that take a fused operand
MAX_GROUP: Final = 64  # ops in one kernel: keeps compile time and register pressure bounded


def accepts(user: Op, index: int) -> bool:
    """Whether `user` can compute its operand `index` itself. The table that t.take gathers from must be in memory."""
    return user.name in JOINING and not (user.name == "t.take" and index == 0)


def is_literal(value: Value) -> bool:
    """Whether code repeats this value wherever it is used: a constant or a counter, cast or expanded or not."""
    op = value.op
    if op is None:
        return False
    return op.name in ("t.const", "t.iota") or (op.name in ("t.cast", "t.expand") and is_literal(op.operands[0]))


def _elements(shape: tuple[Dim, ...]) -> Dim:
    n = as_dim(1)
    for d in shape:
        n = n * d
    return n


def domain(op: Op) -> tuple[Dim, ...]:
    """The index space over which a group with root `op` is evaluated."""
    return op.operands[0].shape if op.name == "t.reduce" else op.results[0].shape


class Fusion:
    """`inlined`: ops computed by their consumers. `root[op]`: the op in whose kernel an inlined op is computed."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._pinned: set[Op] = set()
        self.root: dict[Op, Op] = {}
        while True:
            self.root = self._group()
            late = self._late_readers()
            if not late:
                break
            self._pinned |= late

    def is_inlined(self, op: Op) -> bool:
        return op in self.root

    def is_materialised(self, value: Value) -> bool:
        """Whether a step writes this op result to memory. It does not write weights, inlined values, and literals that
        all their users repeat."""
        op = value.op
        if op is None or value in self.storage.weights or op in self.root:
            return False
        return not is_literal(value) or any(not accepts(u, i) for u, i in value.uses)

    # ---- grouping

    def _group(self) -> dict[Op, Op]:
        root: dict[Op, Op] = {}
        size: dict[Op, int] = {}
        for op in reversed(self.storage.func.ops):
            if op.name not in POINTWISE | MOVES or op in self._pinned or is_literal(op.result):
                continue
            if op.result in self.storage.weights or not op.result.has_uses:
                continue
            if not all(accepts(user, i) for user, i in op.result.uses):
                continue
            roots = {root.get(user, user): None for user in op.result.users}
            if len(roots) != 1:
                continue
            (home,) = roots
            if size.get(home, 1) < MAX_GROUP and self._worth(op, home):
                root[op] = home
                size[home] = size.get(home, 1) + 1
        return root

    def _worth(self, op: Op, home: Op) -> bool:
        """False where fusing `op` would repeat costly work for every element of the group's domain."""
        shape = op.result.shape
        if op.work is not Work.HEAVY or not shape or shape[-1] == 1:  # along a row a single value is computed once
            return True
        return self.storage.scope.prove_le(_elements(domain(home)), _elements(shape)) is True

    # ---- the memory plan

    def _late_readers(self) -> set[Op]:
        """Inlined ops that read a place that may be overwritten before their group's kernel runs."""
        storage = self.storage
        writes = [
            (storage.order[op], op, storage.ref(r))
            for op in storage.func.ops
            for r in op.results
            if self.is_materialised(r) and storage.has_place(r) and storage.ref(r).space in ("arena", "output")
        ]
        late: set[Op] = set()
        members: dict[Op, list[Op]] = {}
        for op, home in self.root.items():
            members.setdefault(home, []).append(op)
        for op in storage.func.ops:
            if op not in members and not (op.name in JOINING and self.is_materialised(op.results[0])):
                continue
            for reader in [op, *members.get(op, [])]:
                for x in reader.operands:
                    if (
                        x in storage.weights
                        or not storage.has_place(x)
                        or storage.ref(x).space not in ("arena", "output")
                    ):
                        continue
                    if x.op in self.root:
                        continue
                    place = storage.ref(x)
                    for at, writer, target in writes:
                        if not storage.order[reader] < at <= storage.order[op] and writer is not op:
                            continue
                        if not storage.overlap(place, target):
                            continue
                        if writer is op and self._same_element(x, op, members.get(op, [])) and place == target:
                            continue
                        if reader is op:
                            raise XllmError(
                                "internal",
                                f"the plan puts the result of {op.name} over its operand %{x.name}",
                                where=where(op),
                            )
                        late.add(reader)
        return late

    def _same_element(self, x: Value, root: Op, members: list[Op]) -> bool:
        """Whether each element of the group reads only the element of `x` at its own index."""
        return x.shape == root.results[0].shape and all(op.name in POINTWISE for op in [root, *members])
