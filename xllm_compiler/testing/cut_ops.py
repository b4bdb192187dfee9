"""Cutting functions, returns, ops and operands. Owns how a module does without some of them; the order is cuts.py's.

For each kind there is a function that lists the atoms, neighbours next to each other, and one that yields the edits to
do without a run of them, the most promising first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.state import previous_version, writers
from xllm_compiler.ir.types import Event, Future, State, Tensor, Type
from xllm_compiler.testing.edits import Edit, is_dead

# ------------------------------------------------------------------------------------------------- functions, returns


def functions(module: Module) -> list[Func]:
    return list(module.funcs.values()) if len(module.funcs) > 1 else []


def without_funcs(module: Module, funcs: Sequence[Func]) -> Iterator[Edit]:
    if len(funcs) < len(module.funcs):
        yield Edit(funcs=dict.fromkeys(f.name for f in funcs))


def returns(module: Module) -> list[tuple[Func, int]]:
    return [(f, i) for f in module.funcs.values() for i in range(len(f.returns))]


def without_returns(module: Module, returns: Sequence[tuple[Func, int]]) -> Iterator[Edit]:
    gone = set(returns)
    edit = Edit()
    for f in dict.fromkeys(f for f, _ in returns):
        edit.returns[f] = [v for i, v in enumerate(f.returns) if (f, i) not in gone]
    yield edit


# ---------------------------------------------------------------------------------------------------------------- ops


def step_ops(module: Module) -> list[Op]:
    """All ops but weight expressions: those come along with what needs them, and would only blur where a layer ends."""
    out: list[Op] = []
    for f in module.funcs.values():
        weights = weight_exprs(f)
        out += [op for op in f.ops if not op.results or op.results[0] not in weights]
    return out


def weight_ops(module: Module) -> list[Op]:
    step = set(step_ops(module))
    return [op for f in module.funcs.values() for op in f.ops if op not in step]


class _Region:
    """A run of ops, with those that promises and events tie them to, and what crosses its border."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = dict.fromkeys(ops)
        stack = list(ops)
        while stack:
            op = stack.pop()
            tied = [v.op for v in op.operands if _ties(v) and v.op is not None]
            tied += [user for r in op.results if _ties(r) for user in r.users]
            stack += [o for o in tied if o not in self.ops]
            self.ops.update(dict.fromkeys(tied))
        self.funcs = dict.fromkeys(op.func for op in self.ops)
        results = [r for op in self.ops for r in op.results]
        self.out = [r for r in results if any(user not in self.ops for user in r.users)]
        inside = [v for op in self.ops for v in op.operands if v.op not in self.ops]
        self.into = list(dict.fromkeys(inside))

    def edit(self) -> Edit:
        """An edit under which the region's ops go once nothing uses them."""
        return Edit(drop=dict.fromkeys(op for op in self.ops if not op.results or is_dead(op)))


def _ties(v: Value) -> bool:
    """Neither an argument nor a return: the op that makes it and those that use it go together."""
    return isinstance(v.type, (Future, Event))


def without_ops(module: Module, ops: Sequence[Op]) -> Iterator[Edit]:
    region = _Region(ops)
    yield _outlined(region)
    bypass = _bypassed(region)
    if bypass is not None:
        yield bypass
    edit = region.edit()
    edit.fresh = dict.fromkeys(region.out, "arg")
    yield edit
    if len(ops) == 1:  # the failure may be about a weight of which this is the only user
        yield _outlined(region, weights=True)


def _outlined(region: _Region, weights: bool = False) -> Edit:
    """As if another function had computed the region: what it read is returned, what it made comes as arguments.

    Everything else is fed and observed as before. For the first or the last ops this cuts a window out of a function.
    `weights`: also weight expressions are returned.
    """
    edit = region.edit()
    edit.fresh = {v: "arg" for v in region.out if any(u not in region.ops and u is not u.func.ret for u in v.users)}
    for f in region.funcs:
        left = dict.fromkeys(v for v in f.returns if v.op not in region.ops)
        known = {} if weights else weight_exprs(f)
        for v in region.into:
            if v.op is not None and v.op.func is f and v not in known and _returnable(v, region):
                left[v] = None
        edit.returns[f] = list(left)
    return edit


def _returnable(v: Value, region: _Region) -> bool:
    match v.type:
        case Tensor():
            return v.type.partial is None
        case State():  # a version that is still written to is used up
            return all(op in region.ops for op in writers(v))
        case _:
            return False


def _bypassed(region: _Region) -> Edit | None:
    """What the region made is replaced by what it read, where types allow (a residual stream), else by arguments."""
    edit = region.edit()
    for r in region.out:
        same = [v for v in region.into if v.type == r.type and v.owner is not r.owner]
        if isinstance(r.type, State):
            chain = r
            while chain.op in region.ops and (before := previous_version(chain)) is not None:
                chain = before
            same = [chain] if chain.op not in region.ops else []
        if same:
            edit.subst[r] = max(same, key=_position)
        else:
            edit.fresh[r] = "arg"
    return edit if edit.subst else None


def _position(v: Value) -> int:
    return -1 if v.op is None else v.op.func.ops.order(v.op)


def without_weights(module: Module, ops: Sequence[Op]) -> Iterator[Edit]:
    region = _Region(ops)
    for how in ("param", "arg"):
        edit = region.edit()
        edit.fresh = dict.fromkeys(region.out, how)
        yield edit
    if len(ops) == 1:
        yield _outlined(region, weights=True)


# ------------------------------------------------------------------------------------------------------ single values


def shortcuts(module: Module) -> list[tuple[Value, Value]]:
    """(result, operand of the same type) of every op, from the last op to the first."""
    out: list[tuple[Value, Value]] = []
    for f in module.funcs.values():
        for op in reversed(f.ops):
            for r in op.results:
                out += [(r, v) for v in dict.fromkeys(op.operands) if v.type == r.type]
    return out


def take_shortcut(module: Module, pairs: Sequence[tuple[Value, Value]]) -> Iterator[Edit]:
    yield Edit(subst=dict(pairs))


def spare_operands(module: Module) -> list[tuple[Op, int]]:
    """Operands that an op may do without: optional ones, and those of a variadic field."""
    out: list[tuple[Op, int]] = []
    for op in (op for f in module.funcs.values() for op in f.ops):
        start = 0
        for spec, count in zip(op.SPEC.operands, op.segments, strict=True):
            if spec.arity == "opt" or (spec.arity == "many" and count > 1):
                out += [(op, start + i) for i in range(count)]
            start += count
    return out


def omit(module: Module, spare: Sequence[tuple[Op, int]]) -> Iterator[Edit]:
    edit = Edit()
    for op, i in spare:
        edit.omit.setdefault(op, set()).add(i)
    yield edit


def twin_args(module: Module) -> list[tuple[Value, Value]]:
    """(argument, earlier argument of the same type). Floats only: what integers are for is told by their names."""
    out: list[tuple[Value, Value]] = []
    for f in module.funcs.values():
        first: dict[Type, Value] = {}
        for a in f.args:
            if not isinstance(a.type, Tensor) or not a.type.is_float:
                continue
            if a.type in first:
                out.append((a, first[a.type]))
            else:
                first[a.type] = a
    return out


def unused_args(module: Module) -> list[Value]:
    return [a for f in module.funcs.values() for a in f.args if not a.has_uses]


def without_args(module: Module, args: Sequence[Value]) -> Iterator[Edit]:
    yield Edit(unused=dict.fromkeys(args))
