"""tabulate-positions: what depends on a token's position alone becomes a table, looked up by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.ops import Add, Const, CumSum, Embedding, Iota, Reshape, Softmax, Take
from xllm_compiler.ir.rewrite import erase_dead
from xllm_compiler.ir.spec import Attr
from xllm_compiler.ir.types import Tensor
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("tabulate-positions")
@dataclass(frozen=True)
class TabulatePositions(FuncPass):
    """Computes functions of the position at compile time, for every position that a request can have.

    before:  %f = t.cast(%pos, dtype=f32) : f32[N]                   after:  %i = t.iota(size=512) : i32[512]
             %g = t.mul(%f1, %inv_freq) : f32[N, 32]                         ... the same over %i: weights, not work
             %cos = t.cos(%g) : f32[N, 32]                                   %cos = nn.embedding(%pos, %table)

    The table has a row for each position in the range of %pos; fewer where the expression itself reads a table with
    fewer rows. A %pos without a range is left alone.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        pos = next((a for a in func.args if a.name == "pos" and a in func.ranges), None)
        if pos is None:
            return False
        known = _position_only(func, pos)
        roots = [v for v in known if _is_root(v, known) and _worth_it(v)]
        length = _length(func, known, pos, func.ranges[pos].hi + 1)
        memo: dict[Value, Value] = {}
        for root in roots:
            assert root.op is not None
            _tabulate(root, root.op, pos, length, memo)
            ctx.stat("tables")
        if roots:
            erase_dead(func)
        return bool(roots)


def _position_only(func: Func, pos: Value) -> dict[Value, bool]:
    """Values made from %pos, params and constants only -> whether %pos is among them; in order of definition."""
    known: dict[Value, bool] = {pos: True}
    n = pos.shape[0]
    for op in func.ops:
        if op.SPEC.pure and len(op.results) == 1 and all(v in known for v in op.operands):
            result = op.result
            # A partial sum is no table: it has to be summed over ranks first, which is no weight expression.
            if isinstance(result.type, Tensor) and result.type.partial is None and _rows_only(op, n):
                known[result] = any(known[v] for v in op.operands)
    return known


def _rows_only(op: Op, n: Dim) -> bool:
    """Whether the op treats tokens one by one, and its sizes mention them at most as the leading axis of its result."""
    match op:
        case Iota() if op.size.symbols:  # the index in the step is no function of the position
            return False
        case CumSum() | Softmax() if op.axis == 0 and op.x.shape[0].symbols:
            return False
        case Take() | Embedding():
            looked_into = op.x if isinstance(op, Take) else op.w
            if any(d.symbols for d in looked_into.shape):  # a row of another token
                return False
    shape = op.result.shape
    return all(not d.symbols for d in shape[1:]) and (not shape or shape[0] is n or not shape[0].symbols)


def _is_root(v: Value, known: Mapping[Value, bool]) -> bool:
    """Depends on the position and is read by something that depends on more."""
    if not known[v] or v.op is None:
        return False
    return any(user.results == [] or user.results[0] not in known for user in v.users)


def _worth_it(v: Value) -> bool:
    """Leaves alone what is a look-up already, and what is not a float per token."""
    op = v.op
    while isinstance(op, Reshape):
        op = op.x.op
    if op is None or not v.tensor.is_float or not v.shape or v.shape[0].is_const:
        return False
    return not (isinstance(op, Embedding) and op.ids.op is None)


def _offset(ids: Value, pos: Value) -> int | None:
    """c where ids is pos + c."""
    while isinstance(ids.op, Reshape):
        ids = ids.op.x
    if ids is pos:
        return 0
    if isinstance(ids.op, Add):
        for a, b in (ids.op.operands, ids.op.operands[::-1]):
            if isinstance(b.op, Const) and isinstance(b.op.value, int):
                inner = _offset(a, pos)
                if inner is not None:
                    return inner + b.op.value
    return None


def _length(func: Func, known: Mapping[Value, bool], pos: Value, length: int) -> int:
    """Rows that every table can have: no more than the tables that the expressions themselves look into."""
    for op in func.ops:
        if isinstance(op, (Embedding, Take)) and op.result in known:
            ids, w = (op.ids, op.w) if isinstance(op, Embedding) else (op.idx, op.x)
            offset = _offset(ids, pos)
            axis = 0 if isinstance(op, Embedding) else op.axis
            if offset is not None and w.shape[axis].is_const:
                length = min(length, w.shape[axis].value - offset)
    return length


def _tabulate(root: Value, op: Op, pos: Value, length: int, memo: dict[Value, Value]) -> None:
    rows = as_dim(length)
    width = as_dim(1)
    for d in root.shape[1:]:
        width = width * d
    n = pos.shape[0]
    table = _over_all(root, pos, n, rows, memo)
    b = Builder.before(op)
    if table.tensor.rank != 2:
        table = b.create(Reshape, table, shape=(rows, width), hint=root.name).result
    looked = b.create(Embedding, pos, table, hint=root.name).result
    if root.tensor.rank != 2:
        looked = b.create(Reshape, looked, shape=root.shape, hint=root.name).result
    root.replace_all_uses_with(looked)


def _over_all(v: Value, pos: Value, n: Dim, rows: Dim, memo: dict[Value, Value]) -> Value:
    """`v` computed for positions 0..rows-1 instead of those of the step."""
    if v in memo:
        return memo[v]
    op = v.op
    if v is pos:
        assert isinstance(pos.owner, Func)
        made = Builder.at_start(pos.owner).create(Iota, size=rows, hint="positions").result
    elif op is None or all(not d.symbols for d in v.shape):
        return v  # a weight as it stands
    else:
        operands = [_over_all(o, pos, n, rows, memo) for o in op.operands]
        attrs = {k: _substitute(a, n, rows) for k, a in op.attrs.items()}
        copy = type(op)(op.func, operands, op.segments, attrs, op.loc.touched_by("tabulate-positions"), [v.name])
        Builder.before(op).insert(copy)
        made = copy.result
    memo[v] = made
    return made


def _substitute(attr: Attr, n: Dim, rows: Dim) -> Attr:
    env = {str(n): rows}
    if isinstance(attr, Dim):
        return attr.substitute(env)
    if isinstance(attr, tuple):
        return tuple(a.substitute(env) if isinstance(a, Dim) else a for a in attr)
    return attr
