"""Cutting pieces out of a module. Owns `Edit`, a description of cuts, and `rebuild`, which makes the module without
them; must not know why something is cut or whether the result is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xllm_compiler.dims import Dim, DimScope, as_dim, parse_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Func, Module, Op, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.ops import Param
from xllm_compiler.ir.spec import Attr, Scalar
from xllm_compiler.ir.state import first_version
from xllm_compiler.ir.types import Future, State, Tensor, Type, map_sizes
from xllm_compiler.ir.verify import verify
from xllm_compiler.ir.verify_buf import arena_results, weight_values

_INTEGER = re.compile(r"\b\d+\b")
_NOT_SIZES = frozenset({"axis", "value", "stream"})  # integer attributes that count something else than elements


@dataclass(slots=True)
class Edit:
    """What to change; everything refers to one module. Ops that become dead of it go as well, ops that were dead stay.

    fresh     values that are replaced by a new argument ("arg") or a new param op ("param") of their type
    subst     values that are replaced by another one that stands before them and is not itself replaced so
    drop      ops that go although they have effects or were dead before
    omit      flat operand indices that an op loses (optional or variadic ones)
    returns   what a function returns instead
    attrs     attributes that an op gets instead
    unused    arguments that go if nothing uses them any more
    funcs     functions that go
    arenas    functions that lose their arena, of which nothing may be left in use
    number    what becomes of an integer in a Dim, a type or a size-like attribute
    scope     the symbols and assumptions instead of the module's; groups likewise
    """

    fresh: dict[Value, str] = field(default_factory=dict)
    subst: dict[Value, Value] = field(default_factory=dict)
    drop: dict[Op, None] = field(default_factory=dict)
    omit: dict[Op, set[int]] = field(default_factory=dict)
    returns: dict[Func, list[Value]] = field(default_factory=dict)
    attrs: dict[Op, dict[str, Attr]] = field(default_factory=dict)
    unused: dict[Value, None] = field(default_factory=dict)
    funcs: dict[str, None] = field(default_factory=dict)
    arenas: dict[Func, None] = field(default_factory=dict)
    number: Callable[[int], int] | None = None
    scope: DimScope | None = None
    groups: dict[str, RankGroup] | None = None

    def resolve(self, value: Value) -> Value:
        """The old value that stands for `value` now; it may itself be one of `fresh`."""
        return self.subst.get(value, value)


def is_dead(op: Op) -> bool:
    """Whether nothing uses what `op` yields; an op that yields nothing is there for its effect and never dead."""
    return bool(op.results) and not any(r.has_uses for r in op.results)


def rebuild(module: Module, edit: Edit) -> Module:
    """A new module with the edit made and all types inferred anew. IrError where they do not fit; it may break
    invariants, which `verify` tells."""
    copy = Module(module.stage, (edit.scope or module.scope).copy())
    copy.groups = dict(module.groups if edit.groups is None else edit.groups)
    for func in module.funcs.values():
        if func.name not in edit.funcs:
            _Rebuilder(func, edit, copy).run()
    return copy


def with_ranks(module: Module, ranks: int) -> Module:
    """A copy in which every group has so many ranks, all types inferred anew. XllmError where the module is for the
    sizes that it declares: its groups are a mesh or have rank dims, or it does not verify with others."""
    for name, group in module.groups.items():
        if group.stride != 1 or group.rank:
            raise XllmError(
                "unsupported",
                f"the module is for group @{name} as it is: {group}",
                help="only groups without stride and rank dim can be given another size",
            )
    copy = rebuild(module, Edit(groups=dict.fromkeys(module.groups, RankGroup(ranks))))
    verify(copy)
    return copy


class _Rebuilder:
    """Copies one function."""

    def __init__(self, func: Func, edit: Edit, module: Module) -> None:
        self.old = func
        self.edit = edit
        self.new = module.add_func(func.name)
        self.builder = Builder.at_end(self.new)
        self.mapping: dict[Value, Value] = {}
        self.made: dict[Value, Value] = {}  # stands in for those of edit.fresh
        self.names = {a.name for a in func.args}

    def run(self) -> None:
        edit, old = self.edit, self.old
        returns = edit.returns.get(old, list(old.returns))
        kept, used = self.live(returns)
        for arg in old.args:
            if arg in used or (arg not in edit.unused and arg not in edit.fresh and arg not in edit.subst):
                self.mapping[arg] = self.new.add_arg(arg.name, self.type(arg.type), old.ranges.get(arg))
        for op in old.ops:
            if op in kept:
                self.copy(op)
        values = [self.value(v) for v in returns]
        aliases = {i: first_version(v) for i, v in enumerate(values) if isinstance(v.type, State)}
        named = {old.returns[i]: name for i, name in old.outputs.items()}
        self.new.set_returns(values, aliases, {i: named[v] for i, v in enumerate(returns) if v in named})
        self.new.arena = None if old.arena is None or old in edit.arenas else self.dim(old.arena)
        self.place()

    def live(self, returns: Sequence[Value]) -> tuple[set[Op], set[Value]]:
        """Ops to keep, and old values that something kept uses."""
        edit = self.edit
        used = {edit.resolve(v) for v in returns}
        kept: set[Op] = set()
        for op in reversed(self.old.ops):
            rooted = op not in edit.drop and (not op.results or is_dead(op))
            if rooted or any(r in used and r not in edit.fresh for r in op.results):
                kept.add(op)
                gone = edit.omit.get(op, ())
                used.update(edit.resolve(v) for i, v in enumerate(op.operands) if i not in gone)
        return kept, used

    def copy(self, op: Op) -> None:
        gone = self.edit.omit.get(op, ())
        segments, start = [], 0
        for count in op.segments:
            segments.append(sum(i not in gone for i in range(start, start + count)))
            start += count
        operands = [self.value(v) for i, v in enumerate(op.operands) if i not in gone]
        attrs = {**op.attrs, **self.edit.attrs.get(op, {})}
        if self.edit.number is not None:
            attrs = {name: self.attr(op, name, value) for name, value in attrs.items()}
        made = type(op)(self.new, operands, segments, attrs, op.loc, [r.name for r in op.results])
        if len(made.results) != len(op.results):
            raise IrError(f"{op.name} has {len(made.results)} results after the edit, {len(op.results)} before")
        self.builder.insert(made)
        self.mapping.update(zip(op.results, made.results, strict=True))

    def place(self) -> None:
        """Stage buf: every result in the arena keeps its offset; what is returned now needs none any more."""
        known: dict[Value, Dim] = {}
        weights = weight_values(self.old)
        for op in self.old.ops:
            offsets = op.attrs.get("at")
            if isinstance(offsets, tuple):
                for r, at in zip(arena_results(op, weights), offsets, strict=False):
                    if r in self.mapping and isinstance(at, Dim):
                        known[self.mapping[r]] = self.dim(at)
        if not known:
            return
        weights = weight_values(self.new)
        for op in self.new.ops:
            if "at" in op.attrs:
                op.attrs["at"] = tuple(known[r] for r in arena_results(op, weights) if r in known)
                if not op.attrs["at"]:
                    del op.attrs["at"]

    def value(self, old: Value) -> Value:
        """The new value for an old one, made now if it is one of `fresh`."""
        old = self.edit.resolve(old)
        how = self.edit.fresh.get(old)
        if how is None:
            return self.mapping[old]
        # Apart from `mapping`: an op that is kept for another of its results still makes its own value.
        if old not in self.made:
            self.made[old] = self.make(old, how)
        return self.made[old]

    def make(self, old: Value, how: str) -> Value:
        ty = self.type(old.type)
        if how == "param" and isinstance(ty, Tensor):
            return self.builder.create(Param, name=old.name or "w", type=ty, loc=None, hint=old.name).result
        name, count = old.name or "v", 0
        while name in self.names:
            count += 1
            name = f"{old.name or 'v'}_{count}"
        self.names.add(name)
        return self.new.add_arg(name, ty)

    def dim(self, dim: Dim) -> Dim:
        number = self.edit.number
        if number is None:
            return dim
        if dim.is_const:
            return as_dim(number(dim.value))
        return parse_dim(_INTEGER.sub(lambda m: str(number(int(m[0]))), str(dim)))

    def type(self, ty: Type) -> Type:
        number = self.edit.number
        return ty if number is None else map_sizes(ty, number, self.dim)

    def attr(self, op: Op, name: str, value: Attr) -> Attr:
        """Dims and types always; an integer where it is a size: one by itself that does not name an axis."""
        if isinstance(value, tuple):
            return tuple(self.scalar(v) for v in value)
        if isinstance(value, int) and not isinstance(value, bool) and name not in _NOT_SIZES:
            assert self.edit.number is not None
            return self.edit.number(value)
        return self.scalar(value)

    def scalar(self, value: Scalar) -> Scalar:
        if isinstance(value, Dim):
            return self.dim(value)
        return self.type(value) if isinstance(value, (Tensor, State, Future)) else value
