"""Local rewriting to a fixed point. Owns rules, the worklist driver and lineage; must not know any single rule.

    @rule(Mul)
    def silu_mul(op: Mul, rw: Rewriter) -> bool:
        ...
        rw.replace(op, rw.create(SomeOp, a, b, hint="y"))
        return True

A rule either changes the IR through `rw` and returns True, or leaves it alone and returns False. Ops that die on the
way are erased by the driver, so a rule only replaces what it has to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.loc import Loc

T = TypeVar("T", bound=Op)

# Rewrites per op beyond which rules are taken to undo each other. Real pipelines need a handful.
_LIMIT_PER_OP: Final = 64


class RewriteContext(Protocol):
    """What the driver and rules may ask of a pass context."""

    def stat(self, name: str, n: int = 1) -> None: ...

    def remark(self, op: Op | None, text: str) -> None: ...

    def allows(self, rule: str, op: Op) -> bool: ...

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op] = ()) -> None: ...


class RewriteListener(Protocol):
    """Whoever limits or watches single rewrites: fuel, explanations. `rule` is "pass/rule"."""

    def allows(self, rule: str, op: Op) -> bool:
        """False: the rule is not tried at `op`. Called right before it would be."""

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op]) -> None:
        """It was tried; `made` are the new ops that are left when it fired (`op` itself may be gone)."""


class Rewriter:
    """What a rule works with. New ops stand before the op being rewritten and inherit where it came from."""

    def __init__(self, func: Func, ctx: RewriteContext | None = None) -> None:
        self.func = func
        self.ctx = ctx
        self._builder = Builder.at_end(func)
        self._touched: dict[Op, None] = {}
        self._unnamed: dict[Op, None] = {}
        self._made: list[Op] = []
        self._changes = 0
        self._entry = ""

    @property
    def made(self) -> list[Op]:
        """The ops that the running rule has created, in order."""
        return list(self._made)

    def create(
        self,
        cls: type[T],
        *operands: Value | None,
        loc: Loc | None = None,
        hint: str | Sequence[str] = "",
        **fields: object,
    ) -> T:
        """A new op before the op being rewritten (see `before`). Unnamed results take the names they replace.

        `loc`: another source than the op being rewritten; the rule is added to its lineage.
        """
        place = None if loc is None else loc.touched_by(self._entry)
        made = self._builder.create(cls, *operands, loc=place, hint=hint, **fields)
        self._changes += 1
        self._touched[made] = None
        self._made.append(made)
        if not hint:
            self._unnamed[made] = None
        return made

    def before(self, op: Op) -> None:
        """From now on this rule's new ops stand before `op`."""
        self._builder = Builder.before(op, self._builder.loc)

    def after(self, op: Op) -> None:
        """From now on this rule's new ops stand after `op`."""
        self._builder = Builder.after(op, self._builder.loc)

    def replace(self, op: Op, new: Op | Value | Sequence[Value]) -> None:
        """Every use of `op`'s results becomes a use of `new`'s (same types, same number), and `op` is erased."""
        values = new.results if isinstance(new, Op) else [new] if isinstance(new, Value) else list(new)
        if len(values) != len(op.results):
            raise XllmError("internal", f"{self._entry}: {op.name} has {len(op.results)} results, got {len(values)}")
        for old, value in zip(op.results, values, strict=True):
            self.replace_value(old, value)
        self.erase(op)

    def replace_value(self, old: Value, new: Value) -> None:
        """Every use of one value becomes a use of another of the same type."""
        if new.op is not None and new.op in self._unnamed:
            new.name = old.name
        for user in old.users:
            self._touched[user] = None
        old.replace_all_uses_with(new)
        self._changes += 1

    def erase(self, op: Op) -> None:
        """Removes an op whose results have no uses."""
        operands = op.operands
        op.erase()
        for v in operands:
            self._touched.update(dict.fromkeys(_affected(v)))
        self._changes += 1

    def modified(self, op: Op) -> None:
        """Says that the rule changed `op` in place (an operand or attribute): it and its users are looked at again."""
        op.loc = op.loc.touched_by(self._entry)
        self._touched[op] = None
        for r in op.results:
            for user in r.users:
                self._touched[user] = None
        self._changes += 1

    def _start(self, op: Op, entry: str) -> None:
        self._entry = entry
        self._builder = Builder.before(op, op.loc.touched_by(entry))
        self._touched.clear()
        self._unnamed.clear()
        self._made.clear()
        self._changes = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """A rewrite on ops of some classes; knows where it is written, for hit counts and lineage."""

    name: str
    on: tuple[type[Op], ...]
    apply: Callable[[Any, Rewriter], bool]  # Any: each rule takes its own op class
    file: str
    line: int


def rule(*on: type[T]) -> Callable[[Callable[[T, Rewriter], bool]], Rule]:
    """Makes a function a Rule on ops of the given classes. Its name in lineage is the function's, with dashes."""

    def declare(fn: Callable[[T, Rewriter], bool]) -> Rule:
        code = fn.__code__
        return Rule(fn.__name__.strip("_").replace("_", "-"), on, fn, code.co_filename, code.co_firstlineno)

    return declare


@dataclass(slots=True)
class RewriteStats:
    """What a run did: applications per rule name, in the order of the rules, and dead ops erased."""

    hits: dict[str, int] = field(default_factory=dict)
    erased: int = 0

    @property
    def changed(self) -> bool:
        return self.erased > 0 or any(self.hits.values())

    def __bool__(self) -> bool:
        return self.changed


def apply_rules(func: Func, rules: Iterable[Rule], pass_name: str, ctx: RewriteContext | None = None) -> RewriteStats:
    """Applies rules until none fires, front to back, and erases pure ops whose results nobody uses.

    At each op rules are tried in the given order; after a hit the op's surroundings are looked at again. Deterministic.
    Raises an "internal" error when rules seem to undo each other, or when one lies about having changed something.
    """
    ordered = list(rules)
    stats = RewriteStats({r.name: 0 for r in ordered})
    by_class: dict[type[Op], list[Rule]] = {}
    rw = Rewriter(func, ctx)
    work: deque[Op] = deque(func.ops)
    queued: set[Op] = set(work)
    budget = _LIMIT_PER_OP * (len(func.ops) + 16)

    def push(op: Op) -> None:
        if op.attached and op not in queued:
            queued.add(op)
            work.append(op)

    def sweep(op: Op) -> bool:
        """Erases `op` if it is dead, and with it whatever dies of that."""
        if not _dead(op):
            return False
        stack = [op]
        while stack:
            top = stack.pop()
            if not top.attached or not _dead(top):
                continue
            operands = top.operands
            top.erase()
            stats.erased += 1
            for v in operands:
                if v.op is not None:
                    stack.append(v.op)
                for near in _affected(v):
                    push(near)
        return True

    while work:
        op = work.popleft()
        queued.discard(op)
        if not op.attached or sweep(op):
            continue
        cls = type(op)
        if cls not in by_class:
            by_class[cls] = [r for r in ordered if issubclass(cls, r.on)]
        for r in by_class[cls]:
            entry = f"{pass_name}/{r.name}"
            if ctx is not None and not ctx.allows(entry, op):
                continue
            rw._start(op, entry)
            fired = r.apply(op, rw)
            if ctx is not None:
                ctx.tried(entry, op, fired is True, rw.made)
            if fired is not bool(rw._changes):
                did = "changed the IR" if rw._changes else "changed nothing"
                help = "return True after changing the IR through rw, and False otherwise, at every end of the rule"
                raise XllmError("internal", f"rule {r.name} {did} and returned {fired!r}", where=_place(r), help=help)
            if not fired:
                continue
            stats.hits[r.name] += 1
            budget -= 1
            if budget < 0:
                counts = ", ".join(f"{name}: {n}" for name, n in stats.hits.items() if n)
                raise XllmError("internal", f"{pass_name}: rules undo each other ({counts})", where=_place(r))
            # Dead neighbours go first: rules that want a single use must not count uses by the dead.
            touched = list(rw._touched)
            for near in touched:
                if near.attached:
                    sweep(near)
            for near in touched:
                push(near)
            push(op)
            break
    if ctx is not None:
        for name, n in stats.hits.items():
            if n:
                ctx.stat(name, n)
        if stats.erased:
            ctx.stat("dead-ops", stats.erased)
    return stats


def _dead(op: Op) -> bool:
    return op.SPEC.pure and not any(r.has_uses for r in op.results)


def _affected(v: Value) -> list[Op]:
    """Ops at which a rule may fire now that `v` has lost a use: its definition, and its user if only one is left."""
    out = [] if v.op is None else [v.op]
    return out + v.users if v.has_one_use else out


def _place(r: Rule) -> str:
    return f"{r.file}:{r.line}"


def erase_dead(func: Func) -> int:
    """Erases every pure op without (transitive) use; how many."""
    return apply_rules(func, (), "dce").erased
