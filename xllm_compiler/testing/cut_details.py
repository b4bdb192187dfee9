"""Making details simpler: attributes, numbers, arenas, symbols, groups. Owns what counts as simpler; the order is
cuts.py's. Functions come in pairs as in cut_ops.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from xllm_compiler.dims import DimScope
from xllm_compiler.ir.core import Func, Module, Op
from xllm_compiler.ir.ops import Const
from xllm_compiler.ir.spec import Attr
from xllm_compiler.ir.types import Future, State, Tensor, Type
from xllm_compiler.testing.edits import Edit

# ------------------------------------------------------------------------------------------------ attributes, numbers


def attributes(module: Module) -> list[tuple[Op, str, Attr]]:
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


def set_attributes(module: Module, atoms: Sequence[tuple[Op, str, Attr]]) -> Iterator[Edit]:
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
            case State():
                found.update(ty.numbers)
            case Future():
                look(ty.of)
            case _:
                pass

    for f in module.funcs.values():
        for v in (*f.args, *(r for op in f.ops for r in op.results)):
            look(v.type)
    return sorted((n for n in found if n > 1), reverse=True)


def shrunk_numbers(module: Module) -> list[tuple[str, int, int]]:
    """(what to shrink, from, to): everything by a factor, one number with its multiples, one number alone."""
    have = numbers(module)
    out = [("all", f, 1) for f in (64, 32, 16, 8, 4, 2) if any(n > f and n % f == 0 for n in have)]
    for n in have:
        for less in (1, 2, 3, 4, 8, 16):
            if less < n:
                out += [("multiples", n, less), ("only", n, less)]
    return out


def shrink_number(module: Module, atoms: Sequence[tuple[str, int, int]]) -> Iterator[Edit]:
    [(what, old, new)] = atoms

    def number(n: int) -> int:
        if what == "only":
            return new if n == old else n
        return n // old * new if n >= old and n % old == 0 else n

    yield Edit(number=number)


# ---------------------------------------------------------------------------------------- arenas, symbols and groups


def unused_arenas(module: Module) -> list[Func]:
    return [f for f in module.funcs.values() if f.arena is not None and not any("at" in op.attrs for op in f.ops)]


def without_arenas(module: Module, funcs: Sequence[Func]) -> Iterator[Edit]:
    yield Edit(arenas=dict.fromkeys(funcs))


def facts(module: Module) -> list[tuple[str, str, int | None]]:
    """(kind, name, value) of what the head of a module may do without or have simpler."""
    scope = module.scope
    out: list[tuple[str, str, int | None]] = [("assume", str(a.expr), None) for a in scope.assumptions]
    for s in scope.symbols.values():
        out.append(("dim", s.name, None))
        if s.multiple > 1:
            out.append(("multiple", s.name, None))
        out += [("hi", s.name, hi) for hi in (2, 4, 8, 64) if (s.hi is None or hi < s.hi) and hi >= (s.lo or 0)]
    for name, group in module.groups.items():
        out.append(("group", name, None))
        out += [("ranks", name, 1)] if group.size > 1 else []
        out += [("stride", name, 1)] if group.stride > 1 else []
        out += [("place", name, None)] if group.rank else []
    return out


def change_fact(module: Module, atoms: Sequence[tuple[str, str, int | None]]) -> Iterator[Edit]:
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
        groups[name] = replace(groups[name], size=value)
    elif kind == "stride" and value is not None:
        groups[name] = replace(groups[name], stride=value)
    elif kind == "place":
        groups[name] = replace(groups[name], rank="")
    yield Edit(scope=scope, groups=groups)
