"""What an op costs: bytes and operations as formulas. Owns the counting rules; what they mean in seconds is analysis's.

Every tensor operand is read once from memory and every result written once: caches between ops are not modelled, caches
inside an op are perfect. An op that gathers reads the rows that it takes. An operation is one addition, multiplication,
comparison or function value; a product of [n, k] and [k, m] is 2 * n * k * m of them.

Attention depends on how long the requests already are, which no type says: `CONTEXT` is a symbol of its own, the tokens
that each request had before this step. The step's N tokens are taken to be shared evenly by its B requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from xllm_compiler.dims import Dim, DimLike, as_dim, sym
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.types import Tensor

CONTEXT: Final = sym("context")
"""Tokens that each request had before the step."""

ZERO: Final = as_dim(0)


@dataclass(frozen=True, slots=True)
class Cost:
    """Formulas over the module's symbols and CONTEXT. Bytes of activations and cells `read` and `written`, of
    `weights` read, of the KV cache; `flops` are operations; `comm` bytes that one rank sends, in `hops` messages one
    after the other. `free`: nothing runs at all."""

    read: Dim = ZERO
    written: Dim = ZERO
    weights: Dim = ZERO
    kv_read: Dim = ZERO
    kv_written: Dim = ZERO
    flops: Dim = ZERO
    comm: Dim = ZERO
    hops: int = 0
    free: bool = False

    @property
    def bytes(self) -> Dim:
        """All that crosses the memory bus."""
        return self.read + self.written + self.weights + self.kv_read + self.kv_written

    def at(self, dims: Mapping[str, int]) -> Amounts:
        """The numbers at given sizes, CONTEXT among them (0 when it is not given)."""
        env = {CONTEXT.symbols[0]: 0, **dims}
        return Amounts(
            self.read.evaluate(env),
            self.written.evaluate(env),
            self.weights.evaluate(env),
            self.kv_read.evaluate(env),
            self.kv_written.evaluate(env),
            self.flops.evaluate(env),
            self.comm.evaluate(env),
            self.hops,
            self.free,
        )


@dataclass(frozen=True, slots=True)
class Amounts:
    """A Cost in numbers."""

    read: int = 0
    written: int = 0
    weights: int = 0
    kv_read: int = 0
    kv_written: int = 0
    flops: int = 0
    comm: int = 0
    hops: int = 0
    free: bool = True

    @property
    def bytes(self) -> int:
        return self.read + self.written + self.weights + self.kv_read + self.kv_written

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(
            self.read + other.read,
            self.written + other.written,
            self.weights + other.weights,
            self.kv_read + other.kv_read,
            self.kv_written + other.kv_written,
            self.flops + other.flops,
            self.comm + other.comm,
            self.hops + other.hops,
            self.free and other.free,
        )


@dataclass(frozen=True, slots=True)
class CostContext:
    """What an op's `cost` may ask. `weights`: the values of the function that are known before any step."""

    weights: Mapping[Value, None]

    def count(self, op: Op, flops: DimLike) -> Cost:
        """The bytes of every operand and result by the rules above, and `flops` operations."""
        read = weights = written = ZERO
        gathered = op.field_index(op.SPEC.gathers) if op.SPEC.gathers else None
        seen: set[Value] = set()  # x * x reads x once
        for i, value in enumerate(op.operands):
            if not isinstance(value.type, Tensor) or (i != gathered and value in seen):
                continue
            if i != gathered:
                seen.add(value)
            nbytes = op.results[0].tensor.nbytes if i == gathered else value.type.nbytes
            if value in self.weights:
                weights = weights + nbytes
            else:
                read = read + nbytes
        for result in op.results:
            if isinstance(result.type, Tensor):
                written = written + result.type.nbytes
        return Cost(read, written, weights, flops=as_dim(flops))

    def narrow(self, w: Value) -> NarrowWeight | None:
        """The op that makes the weight `w`, where kernels read what it is made from instead."""
        return w.op if isinstance(w.op, NarrowWeight) and w in self.weights else None

    def widened(self, cost: Cost, w: Value) -> Cost:
        """`cost`, which counts the weight `w` in full, for kernels that read it as stored and widen it in registers."""
        made = self.narrow(w)
        return cost if made is None else replace(cost, weights=cost.weights - w.tensor.nbytes + made.stored_bytes())


class NarrowWeight(Op, ABC):
    """An op whose result, a weight, is stored in fewer bytes than its type says."""

    @abstractmethod
    def stored_bytes(self) -> Dim:
        """Bytes of all of it as stored."""

    @abstractmethod
    def stored_row_bytes(self) -> Dim:
        """Bytes of one row of it as stored."""
