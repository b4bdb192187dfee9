"""The ways in which a module can be made smaller. Owns what is proposed and in which order; must not try anything.

A `Cut` splits a module into atoms (functions, returns, ops, arguments, attributes, ..) and says how to do without some
of them, as edits, the most promising first. Coarse cuts stand before fine ones in `CUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.dims import DimScope
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.ops import Const
from xllm_compiler.ir.spec import Attr
from xllm_compiler.ir.types import Event, Future, Kv, Tensor, Type
from xllm_compiler.testing.edits import Edit, first_version, is_dead

A = TypeVar("A")


@dataclass(frozen=True)
class Cut(Generic[A]):
    """`atoms` in the order in which neighbours are likely to go together; `edits` to do without a run of them."""

    name: str
    atoms: Callable[[Module], list[A]]
    edits: Callable[[Module, Sequence[A]], Iterator[Edit]]
    together: bool = True  # False: atoms are alternatives, tried one by one


# ------------------------------------------------------------------------------------------------- functions, returns


def _funcs(module: Module) -> list[Func]:
    return list(module.funcs.values()) if len(module.funcs) > 1 else []


def _without_funcs(module: Module, funcs: Sequence[Func]) -> Iterator[Edit]:
    if len(funcs) < len(module.funcs):
        yield Edit(funcs=dict.fromkeys(f.name for f in funcs))


def _returns(module: Module) -> list[tuple[Func, int]]:
    return [(f, i) for f in module.funcs.values() for i in range(len(f.returns))]


def _without_returns(module: Module, returns: Sequence[tuple[Func, int]]) -> Iterator[Edit]:
    gone = set(returns)
    edit = Edit()
    for f in dict.fromkeys(f for f, _ in returns):
        edit.returns[f] = [v for i, v in enumerate(f.returns) if (f, i) not in gone]
    yield edit


# ---------------------------------------------------------------------------------------------------------------- ops


def _step_ops(module: Module) -> list[Op]:
    """All ops but weight expressions: those come along with what needs them, and would only blur where a layer ends."""
    out: list[Op] = []
    for f in module.funcs.values():
        weights = weight_exprs(f)
        out += [op for op in f.ops if not op.results or op.results[0] not in weights]
    return out


def _weight_ops(module: Module) -> list[Op]:
    step = set(_step_ops(module))
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


def _without_ops(module: Module, ops: Sequence[Op]) -> Iterator[Edit]:
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
        case Kv():  # a version that is still written to is used up
            return all(u in region.ops for u, i in v.uses if u.SPEC.consumes and i == u.field_index(u.SPEC.consumes))
        case _:
            return False


def _bypassed(region: _Region) -> Edit | None:
    """What the region made is replaced by what it read, where types allow (a residual stream), else by arguments."""
    edit = region.edit()
    for r in region.out:
        same = [v for v in region.into if v.type == r.type and v.owner is not r.owner]
        if isinstance(r.type, Kv):
            chain = r
            while chain.op is not None and chain.op in region.ops and chain.op.SPEC.consumes:
                chain = chain.op.field(chain.op.SPEC.consumes)[0]
            same = [chain] if chain.op not in region.ops else []
        if same:
            edit.subst[r] = max(same, key=_position)
        else:
            edit.fresh[r] = "arg"
    return edit if edit.subst else None


def _position(v: Value) -> int:
    return -1 if v.op is None else v.op.func.ops.order(v.op)


def _without_weights(module: Module, ops: Sequence[Op]) -> Iterator[Edit]:
    region = _Region(ops)
    for how in ("param", "arg"):
        edit = region.edit()
        edit.fresh = dict.fromkeys(region.out, how)
        yield edit
    if len(ops) == 1:
        yield _outlined(region, weights=True)


# ------------------------------------------------------------------------------------------------------ single values


def _shortcuts(module: Module) -> list[tuple[Value, Value]]:
    """(result, operand of the same type) of every op, from the last op to the first."""
    out: list[tuple[Value, Value]] = []
    for f in module.funcs.values():
        for op in reversed(f.ops):
            for r in op.results:
                out += [(r, v) for v in dict.fromkeys(op.operands) if v.type == r.type]
    return out


def _take_shortcut(module: Module, pairs: Sequence[tuple[Value, Value]]) -> Iterator[Edit]:
    yield Edit(subst=dict(pairs))


def _spare_operands(module: Module) -> list[tuple[Op, int]]:
    """Operands that an op may do without: optional ones, and those of a variadic field."""
    out: list[tuple[Op, int]] = []
    for op in (op for f in module.funcs.values() for op in f.ops):
        start = 0
        for spec, count in zip(op.SPEC.operands, op.segments, strict=True):
            if spec.arity == "opt" or (spec.arity == "many" and count > 1):
                out += [(op, start + i) for i in range(count)]
            start += count
    return out


def _omit(module: Module, spare: Sequence[tuple[Op, int]]) -> Iterator[Edit]:
    edit = Edit()
    for op, i in spare:
        edit.omit.setdefault(op, set()).add(i)
    yield edit


def _twin_args(module: Module) -> list[tuple[Value, Value]]:
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


def _unused_args(module: Module) -> list[Value]:
    return [a for f in module.funcs.values() for a in f.args if not a.has_uses]


def _without_args(module: Module, args: Sequence[Value]) -> Iterator[Edit]:
    yield Edit(unused=dict.fromkeys(args))


# ------------------------------------------------------------------------------------------------ attributes, numbers


def _attributes(module: Module) -> list[tuple[Op, str, Attr]]:
    """(op, attribute, simpler value)."""
    out: list[tuple[Op, str, Attr]] = []
    for op in (op for f in module.funcs.values() for op in f.ops):
        for spec in op.SPEC.attrs:
            value = op.attrs[spec.name]
            if not spec.required and not spec.is_default(value):
                out.append((op, spec.name, spec.coerce(spec.default)))
            elif isinstance(op, Const) or (spec.required and isinstance(value, float)):
                out += [(op, spec.name, simple) for simple in _simpler_numbers(value)]
    return out


def _simpler_numbers(value: Attr) -> list[Attr]:
    """Numbers of the same kind that are easier on the eye, the likeliest to do first."""
    if isinstance(value, float):
        near = [float(round(value))] if abs(value) < 1e6 else []
        tries: list[Attr] = list(dict.fromkeys([*near, 2.0, 1.0, 0.0]))
    elif isinstance(value, int) and not isinstance(value, bool):
        tries = [2, 1, 0]
    else:
        return []
    return [t for t in tries if number_cost(t) < number_cost(value)]


def number_cost(value: object) -> int:
    """How hard a number is to take in: 0, 1 and 2 are easy, others cost their digits; NaN and inf mean something."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0
    return int(value) if value in (0, 1, 2) else 2 + len(repr(value))


def _set_attributes(module: Module, atoms: Sequence[tuple[Op, str, Attr]]) -> Iterator[Edit]:
    edit = Edit()
    for op, name, value in atoms:
        edit.attrs.setdefault(op, {}).setdefault(name, value)
    yield edit


def numbers(module: Module) -> list[int]:
    """The integers above 1 that sizes consist of, the largest first."""
    found: set[int] = set()

    def look(ty: Type) -> None:
        match ty:
            case Tensor():
                for d in ty.shape:
                    found.update(abs(k) for _, k in d.terms)
            case Kv():
                found.update((ty.heads, ty.k_dim, ty.v_dim))
            case Future():
                look(ty.of)
            case _:
                pass

    for f in module.funcs.values():
        for v in (*f.args, *(r for op in f.ops for r in op.results)):
            look(v.type)
    return sorted((n for n in found if n > 1), reverse=True)


def _shrunk_numbers(module: Module) -> list[tuple[str, int, int]]:
    """(what to shrink, from, to): everything by a factor, one number with its multiples, one number alone."""
    have = numbers(module)
    out = [("all", f, 1) for f in (64, 32, 16, 8, 4, 2) if any(n > f and n % f == 0 for n in have)]
    for n in have:
        for less in (1, 2, 3, 4, 8, 16):
            if less < n:
                out += [("multiples", n, less), ("only", n, less)]
    return out


def _shrink_number(module: Module, atoms: Sequence[tuple[str, int, int]]) -> Iterator[Edit]:
    [(what, old, new)] = atoms

    def number(n: int) -> int:
        if what == "only":
            return new if n == old else n
        return n // old * new if n >= old and n % old == 0 else n

    yield Edit(number=number)


# ---------------------------------------------------------------------------------------- arenas, symbols and groups


def _unused_arenas(module: Module) -> list[Func]:
    return [f for f in module.funcs.values() if f.arena is not None and not any("at" in op.attrs for op in f.ops)]


def _without_arenas(module: Module, funcs: Sequence[Func]) -> Iterator[Edit]:
    yield Edit(arenas=dict.fromkeys(funcs))


def _facts(module: Module) -> list[tuple[str, str, int | None]]:
    """(kind, name, value) of what the head of a module may do without or have simpler."""
    scope = module.scope
    out: list[tuple[str, str, int | None]] = [("assume", str(a.expr), None) for a in scope.assumptions]
    for s in scope.symbols.values():
        out.append(("dim", s.name, None))
        if s.multiple > 1:
            out.append(("multiple", s.name, None))
        out += [("hi", s.name, hi) for hi in (2, 4, 8, 64) if (s.hi is None or hi < s.hi) and hi >= (s.lo or 0)]
    for name, size in module.groups.items():
        out.append(("group", name, None))
        out += [("ranks", name, 1)] if size > 1 else []
    return out


def _change_fact(module: Module, atoms: Sequence[tuple[str, str, int | None]]) -> Iterator[Edit]:
    [(kind, name, value)] = atoms
    scope, groups = DimScope(), dict(module.groups)
    for s in module.scope.symbols.values():
        lo, hi, multiple = s.lo, s.hi, s.multiple
        if s.name == name:
            if kind == "dim":
                continue
            hi = value if kind == "hi" else hi
            multiple = 1 if kind == "multiple" else multiple
        scope.declare(s.name, lo, hi, multiple, s.why)
    for a in module.scope.assumptions:
        if (kind, str(a.expr)) != ("assume", name):
            scope.assume(a.expr, a.why)
    if kind == "group":
        del groups[name]
    elif kind == "ranks" and value is not None:
        groups[name] = value
    yield Edit(scope=scope, groups=groups)


CUTS: Final[tuple[Cut[object], ...]] = tuple(
    cut  # type: ignore[misc]  # each cut has atoms of its own, which only its own `edits` ever sees
    for cut in (
        Cut("functions", _funcs, _without_funcs),
        Cut("returns", _returns, _without_returns),
        Cut("ops", _step_ops, _without_ops),
        Cut("returns", _returns, _without_returns),
        Cut("weights", _weight_ops, _without_weights),
        Cut("shortcuts", _shortcuts, _take_shortcut, together=False),
        Cut("operands", _spare_operands, _omit),
        Cut("arguments", _unused_args, _without_args),
        Cut("twins", _twin_args, _take_shortcut),
        Cut("attributes", _attributes, _set_attributes),
        Cut("numbers", _shrunk_numbers, _shrink_number, together=False),
        Cut("arenas", _unused_arenas, _without_arenas),
        Cut("facts", _facts, _change_fact, together=False),
    )
)


def measure(module: Module) -> Iterator[int]:
    """How large a module is: numbers to be compared in this order, each computed when the ones before are equal."""
    funcs = module.funcs.values()
    yield len(funcs)
    yield sum(len(f.ops) for f in funcs)
    yield sum(len(f.returns) for f in funcs)
    yield sum(len(f.args) for f in funcs)
    ops = [op for f in funcs for op in f.ops]
    yield sum(len(op.operands) for op in ops)
    yield sum(not a.required and not a.is_default(op.attrs[a.name]) for op in ops for a in op.SPEC.attrs)
    yield sum(number_cost(v) for op in ops for v in op.attrs.values())
    yield sum(numbers(module))
    symbols = module.scope.symbols.values()
    yield sum(f.arena is not None for f in funcs)
    yield len(symbols) + len(module.scope.assumptions) + len(module.groups) + sum(module.groups.values())
    yield sum(s.multiple for s in symbols)
    yield sum(64 if s.hi is None else s.hi.bit_length() for s in symbols)


def simpler(a: Module, b: Module) -> bool:
    """Whether `a` is smaller than `b` in the sense of `measure`."""
    return next((x < y for x, y in zip(measure(a), measure(b), strict=True) if x != y), False)


__all__ = ["CUTS", "Cut", "first_version", "measure", "simpler"]
