"""What an op costs: bytes, operations and traffic as formulas, and the time that a machine's limits leave for them.

Owns the counting rules and the roofline estimate; must not run anything, and knows nothing of schedules.

Counting. Every tensor operand is read once from memory and every result written once: caches between ops are not
modelled, caches inside an op are perfect. Weight expressions cost nothing where they stand (they are computed while
compiling); the op that reads one pays for its bytes. Views and `param` cost nothing. A gather reads the rows that it
takes. An operation is one addition, multiplication, comparison or function value; a product of [n, k] and [k, m] is
2 * n * k * m of them. Ops without a rule of their own count one per result element.

Attention depends on how long the requests already are, which no type says: `CONTEXT` is a symbol of its own, the tokens
that each request had before this step. The step's N tokens are taken to be shared evenly by its B requests.

Time is a roofline: an op takes the longest of its operations at the machine's peak, its bytes at the memory's
bandwidth, and its traffic at the link's, plus a fixed cost of starting it (Williams, Waterman and Patterson, "Roofline:
an insightful visual performance model for multicore architectures", CACM 52(4), 2009). A ring all-reduce over R ranks
sends 2 * (R - 1) / R of its bytes per rank in 2 * (R - 1) hops (Patarasuk and Yuan, JPDC 69(2), 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from xllm_compiler.analysis.machine import Machine
from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.dims import Dim, as_dim, ceildiv, dmin, sym
from xllm_compiler.ir import quant
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.ops import (
    AddRmsNorm,
    AllReduceStart,
    BlockMax,
    Concat,
    Dequantize,
    Embedding,
    Expand,
    KvAppend,
    KvAttend,
    KvWrite,
    LayerNorm,
    Linear,
    LinearGlu,
    MatMul,
    Pad,
    QuantLinear,
    QuantLinearGlu,
    QuantNormRows,
    QuantRows,
    Reduce,
    RmsNorm,
    Rope,
    Slice,
    Softmax,
    Take,
    Transpose,
)
from xllm_compiler.ir.types import DTYPE_BYTES, Kv, Tensor

CONTEXT: Final = sym("context")
"""Tokens that each request had before the step."""


_ZERO: Final = as_dim(0)


@dataclass(frozen=True, slots=True)
class Cost:
    """Formulas over the module's symbols and CONTEXT. Bytes of activations `read` and `written`, of `weights` read, of
    the KV cache; `flops` are operations; `comm` bytes that one rank sends, in `hops` messages one after the other.
    `free`: nothing runs at all."""

    read: Dim = _ZERO
    written: Dim = _ZERO
    weights: Dim = _ZERO
    kv_read: Dim = _ZERO
    kv_written: Dim = _ZERO
    flops: Dim = _ZERO
    comm: Dim = _ZERO
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
class Estimate:
    """Seconds of one op. `limit` is what they are spent on: "compute", "memory", "link", "launch", or "" for nothing.
    `of_compute` and `of_memory`: shares of the machine's peaks that the op reaches."""

    seconds: float
    limit: str
    of_compute: float
    of_memory: float


def estimate(amounts: Amounts, machine: Machine) -> Estimate:
    """The roofline's seconds for `amounts`."""
    if amounts.free:
        return Estimate(0.0, "", 0.0, 0.0)
    compute, memory = amounts.flops / machine.flops, amounts.bytes / machine.bandwidth
    link = amounts.comm / machine.link + amounts.hops * machine.hop
    longest, limit = max((compute, "compute"), (memory, "memory"), (link, "link"), key=lambda pair: pair[0])
    seconds = longest + machine.launch
    if machine.launch > longest:
        limit = "launch"
    if not seconds:
        return Estimate(0.0, "", 0.0, 0.0)
    return Estimate(seconds, limit, compute / seconds, memory / seconds)


class Costs:
    """The costs of one function's ops; changing the function makes it stale."""

    def __init__(self, func: Func) -> None:
        self.func = func
        self.weights = weight_exprs(func)
        self.of: dict[Op, Cost] = {op: self._cost(op) for op in func.ops}

    def total(self, dims: Mapping[str, int]) -> Amounts:
        """The sum over all ops, in numbers."""
        total = Amounts()
        for cost in self.of.values():
            total = total + cost.at(dims)
        return total

    def seconds(self, dims: Mapping[str, int], machine: Machine) -> float:
        """The ops' estimates, one after the other."""
        return sum(estimate(cost.at(dims), machine).seconds for cost in self.of.values())

    def _cost(self, op: Op) -> Cost:
        if not op.operands and not op.results:
            return Cost(free=True)
        if op.SPEC.view or op.name in FREE or (op.results and all(r in self.weights for r in op.results)):
            return Cost(free=True)
        read = weights = _ZERO
        for value in dict.fromkeys(op.operands):  # x * x reads x once
            if isinstance(value.type, Tensor):
                if value in self.weights:
                    weights = weights + value.type.nbytes
                else:
                    read = read + value.type.nbytes
        results = [r.type for r in op.results if isinstance(r.type, Tensor)]
        cost = Cost(read, _sum(t.nbytes for t in results), weights, flops=_sum(t.elements for t in results))
        rule = RULES.get(type(op))
        return cost if rule is None else rule(self, op, cost)

    # Gathers and copies

    def rows(self, op: Op, table: Value, index: Value, cost: Cost) -> Cost:
        """`cost` with the rows that are taken from `table` in place of all of it; a copy has no operations."""
        taken = op.results[0].tensor.nbytes
        if table in self.weights:
            return replace(cost, weights=taken, read=_bytes(index, self.weights), flops=_ZERO)
        return replace(cost, read=taken + _bytes(index, self.weights), flops=_ZERO)


def _sum(dims: Iterable[Dim]) -> Dim:
    total = _ZERO
    for d in dims:
        total = total + d
    return total


def _bytes(value: Value, weights: Mapping[Value, None]) -> Dim:
    return _ZERO if value in weights else value.tensor.nbytes


def _copy(costs: Costs, op: Op, cost: Cost) -> Cost:
    return replace(cost, flops=_ZERO)


def _slice(costs: Costs, op: Op, cost: Cost) -> Cost:
    part = op.results[0].tensor.nbytes
    known = op.operands[0] in costs.weights
    return replace(cost, read=_ZERO if known else part, weights=part if known else _ZERO, flops=_ZERO)


def _embedding(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, Embedding)
    w = op.w.op
    if isinstance(w, Dequantize) and op.w in costs.weights:
        rows, table = op.ids.tensor.elements, (w.scales, *([w.zeros] if w.zeros else []))
        heads = sum(w.scales.shape[1].value * DTYPE_BYTES[v.dtype] for v in table)
        stored = rows * (_row_bytes(op.w.shape[1], w.bits, w.grid) + heads)
        return replace(cost, weights=stored, read=_bytes(op.ids, costs.weights), flops=2 * op.result.tensor.elements)
    return costs.rows(op, op.w, op.ids, cost)


def _take(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, Take)
    return costs.rows(op, op.x, op.idx, cost)


def _widened_weight(costs: Costs, w: Value, cost: Cost) -> Cost:
    """`cost` where a quantized weight is read as it is stored, and widened in registers."""
    made = w.op
    if not isinstance(made, Dequantize) or w not in costs.weights:
        return cost
    table = made.scales.tensor.nbytes + (made.zeros.tensor.nbytes if made.zeros else _ZERO)
    stored = _quant_weight_bytes(made.values, made.bits, made.grid) + table
    return replace(cost, weights=cost.weights - w.tensor.nbytes + stored)


def _linear(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, Linear)
    out = op.result.tensor.elements
    extras = sum((op.bias is not None, op.residual is not None, op.act != "none"))
    return replace(_widened_weight(costs, op.w, cost), flops=2 * out * op.w.shape[1] + extras * out)


def _linear_glu(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, LinearGlu)
    out = op.result.tensor.elements
    extras = 2 + 2 * (op.bias is not None)  # activation and product, biases of both halves
    return replace(_widened_weight(costs, op.w, cost), flops=4 * out * op.w.shape[1] + extras * out)


def _quant_rows(costs: Costs, op: Op, cost: Cost) -> Cost:
    """The largest value, a product and a rounding for each, and their sum; of a rotation its halvings and a product."""
    assert isinstance(op, QuantRows)
    return replace(cost, flops=(4 + op.rotate.bit_length()) * op.x.tensor.elements)


def _quant_norm_rows(costs: Costs, op: Op, cost: Cost) -> Cost:
    """Those of the norm and of quant.rows."""
    assert isinstance(op, QuantNormRows)
    return replace(cost, flops=(8 if op.kind == "rms" else 11) * op.x.tensor.elements)


def _quant_weight_bytes(values: Value, bits: int, grid: int) -> Dim:
    """What kernels read of stored values: two to a byte at 4 bits, whatever the IR's type says, and on grids."""
    out, in_ = values.shape
    return out * _row_bytes(in_, bits, grid) if grid else out * in_ * bits // 8


def _row_bytes(in_: Dim, bits: int, grid: int) -> Dim:
    """The same of one row; on grids there is a byte for each run."""
    return ceildiv(in_, 2) + ceildiv(in_, grid) if grid else in_ * bits // 8


def _quant_linear(costs: Costs, op: Op, cost: Cost) -> Cost:
    """Integer products and sums by group count like others; each group's sum is scaled, by the row's scale too where
    that is the group's, and added once."""
    assert isinstance(op, (QuantLinear, QuantLinearGlu))
    out, in_ = op.values.shape
    rows = op.sums.tensor.elements // op.scales.shape[1]
    by_group = quant.rows_by_group(op.bits, op.group)
    spare = op.values.tensor.nbytes - _quant_weight_bytes(op.values, op.bits, op.grid)
    known = op.values in costs.weights
    result = op.result.tensor.elements
    extras = rows * out if op.bias is not None else _ZERO
    if isinstance(op, QuantLinearGlu):
        extras = extras + 2 * result
    else:
        extras = extras + result * ((op.residual is not None) + (op.act != "none"))
    return replace(
        cost,
        weights=cost.weights - spare if known else cost.weights,
        read=cost.read if known else cost.read - spare,
        flops=rows * out * (2 * in_ + (3 if by_group else 2) * op.scales.shape[1]) + extras,
    )


def _matmul(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, MatMul)
    return replace(cost, flops=2 * op.result.tensor.elements * op.a.shape[-1])


def _per_element(count: int) -> Rule:
    """`count` operations for every element of the first operand."""

    def rule(costs: Costs, op: Op, cost: Cost) -> Cost:
        return replace(cost, flops=count * op.operands[0].tensor.elements)

    return rule


def _rope(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, Rope)
    tokens, heads, _ = op.x.shape
    return replace(cost, flops=_rotations(tokens * heads, op.cos))


def _rotations(vectors: Dim, cos: Value | None) -> Dim:
    """Two products and a sum for each rotated element of `vectors` heads."""
    return _ZERO if cos is None else 6 * vectors * cos.shape[1]


def _kv_write(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, KvWrite)
    return replace(
        cost,
        read=cost.read - _unread_pages(op.table, op.k.shape[0]),
        kv_written=op.k.shape[0] * _token_bytes(op.kv.kv),
        flops=_ZERO,
    )


def _kv_append(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, KvAppend)
    kv = op.kv.kv
    tokens = op.qkv.shape[0]
    vectors = tokens * (op.q_heads * (op.qw is not None) + kv.heads * (op.kw is not None))
    flops = 4 * vectors * kv.k_dim + _rotations(tokens * (op.q_heads + kv.heads), op.cos)
    read = cost.read - _unread_pages(op.table, tokens)
    return replace(cost, read=read, kv_written=tokens * _token_bytes(kv), flops=flops)


def _unread_pages(table: Value, entries: Dim) -> Dim:
    """Bytes of the block table but for `entries` page indices."""
    return table.tensor.nbytes - entries * DTYPE_BYTES[table.dtype]


def _token_bytes(kv: Kv) -> int:
    return kv.token_bytes


def _kv_attend(costs: Costs, op: Op, cost: Cost) -> Cost:
    """Every request's rows are read once. A score costs its dot product, its share of the weighted sum of values, and
    five for scaling and softmax."""
    assert isinstance(op, KvAttend)
    kv = op.kv.kv
    tokens, heads, _ = op.q.shape
    requests = op.table.shape[0]
    each = ceildiv(tokens, requests)
    length = CONTEXT + each
    pairs = tokens * CONTEXT + tokens * (each + 1) // 2
    if op.window:
        length = dmin(length, op.window - 1 + each)
        pairs = dmin(pairs, tokens * op.window)
    flops = heads * pairs * (2 * kv.k_dim + 2 * kv.v_dim + 5)
    read = cost.read - _unread_pages(op.table, requests * ceildiv(length, kv.page))
    written = op.results[0].tensor.nbytes  # scratch is for few rows, and for them it is small
    return replace(cost, read=read, written=written, kv_read=requests * length * _token_bytes(kv), flops=flops)


def _all_reduce(costs: Costs, op: Op, cost: Cost) -> Cost:
    assert isinstance(op, AllReduceStart)
    x = op.x.tensor
    ranks = op.func.module.groups[op.group]
    sent = 2 * (ranks - 1) * x.nbytes // ranks
    return replace(cost, written=x.nbytes, flops=x.elements * (ranks - 1), comm=sent, hops=2 * (ranks - 1))


Rule = Callable[[Costs, Op, Cost], Cost]

FREE: Final = frozenset({"param", "t.const", "comm.wait", "sched.record", "sched.wait"})

RULES: Final[Mapping[type[Op], Rule]] = {
    Concat: _copy,
    Expand: _copy,
    Transpose: _copy,
    Pad: _copy,
    Slice: _slice,
    Embedding: _embedding,
    Take: _take,
    Linear: _linear,
    LinearGlu: _linear_glu,
    QuantRows: _quant_rows,
    QuantNormRows: _quant_norm_rows,
    QuantLinear: _quant_linear,
    QuantLinearGlu: _quant_linear,
    MatMul: _matmul,
    Reduce: _per_element(1),
    BlockMax: _per_element(1),
    Softmax: _per_element(5),
    RmsNorm: _per_element(4),
    AddRmsNorm: _per_element(5),
    LayerNorm: _per_element(7),
    Rope: _rope,
    KvWrite: _kv_write,
    KvAppend: _kv_append,
    KvAttend: _kv_attend,
    AllReduceStart: _all_reduce,
}
