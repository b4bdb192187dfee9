"""One rewrite seen from close by: where its rule is written, the op it fired at, the IR around it before and after.
Owns the listeners that look; must not know why one is looked for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Op
from xllm_compiler.ir.loc import Loc
from xllm_compiler.ir.printer import func_names, print_op
from xllm_compiler.ir.rewrite import Rule
from xllm_compiler.passes.base import Pass

_AROUND: Final = 3


@dataclass(frozen=True, slots=True)
class Application:
    """A rule applied to an op. `before` and `after` are lines with `>` at the op, and at what it became."""

    rule: str
    place: str
    op: str
    func: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    loc: Loc

    def __str__(self) -> str:
        lines = [f"rule {self.rule}" + (f", {self.place}" if self.place else ""), f"at {self.op} in @{self.func}"]
        traced = self.loc.describe()
        if traced:
            lines.append(f"traced from {traced}")
        if self.loc.lineage:
            lines.append(f"touched before by {', '.join(self.loc.lineage)}")
        lines += ["", "before:", *("    " + line for line in self.before)]
        lines += ["", "after:", *("    " + line for line in self.after)] if self.after else []
        return "\n".join(lines)


class Attempts:
    """A listener that counts how often a rule was tried until the n-th rewrite."""

    def __init__(self) -> None:
        self.count = 0
        self.fired: list[int] = []

    def allows(self, rule: str, op: Op) -> bool:
        self.count += 1
        return True

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op]) -> None:
        if fired:
            self.fired.append(self.count)

    def of_rewrite(self, number: int) -> int:
        """Which attempt became rewrite `number`; the last one of all if it never came to be, because it raised."""
        return self.fired[number - 1] if number <= len(self.fired) else self.count


class Close:
    """A listener that draws the IR right before and right after one attempt."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.rule = ""
        self._count = 0
        self._op = self._func = ""
        self._loc = Loc()
        self._before: tuple[str, ...] = ()
        self._after: tuple[str, ...] = ()
        self._ends: tuple[Op | None, Op | None] = (None, None)

    def allows(self, rule: str, op: Op) -> bool:
        self._count += 1
        if self._count == self.attempt:
            names = func_names(op.func)
            self.rule, self._loc, self._func = rule, op.loc, op.func.name
            self._op = print_op(op, names)
            self._before = tuple(window(op.func, [op]))
            self._ends = (op.prev, op.next)
        return True

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op]) -> None:
        if self._count != self.attempt or not fired or self._after:
            return
        left = [o for o in (*made, op) if o.attached]
        # A rule that only erases or takes another value leaves nothing: then the neighbours show what is there now.
        self._after = tuple(window(op.func, left) if left else window(op.func, [], self._ends))

    def application(self, place: str) -> Application:
        """What was seen. An "internal" XllmError when the attempt never came: the pass does something else now."""
        if not self.rule:
            raise XllmError(
                "internal",
                f"the pass tried {self._count} rewrites this time, and more the time before",
                help="a pass must do the same whenever it runs on the same module",
            )
        return Application(self.rule, place, self._op, self._func, self._before, self._after, self._loc)


def window(func: Func, marked: Sequence[Op], ends: tuple[Op | None, Op | None] = (None, None)) -> list[str]:
    """The lines of a function from some ops before the first of `marked` to some after the last, those marked with `>`.

    Without any, those around `ends`: what stood before and after the place.
    """
    ops = list(func.ops)
    position = {op: i for i, op in enumerate(ops)}
    at = [position[op] for op in marked if op in position]
    if not at:
        before, after = ends
        at = [position[op] for op in (before, after) if op is not None and op in position] or [0]
    names = func_names(func)
    chosen = range(max(0, min(at) - _AROUND), min(len(ops), max(at) + _AROUND + 1))
    return [("> " if ops[i] in marked else "  ") + print_op(ops[i], names) for i in chosen]


def place_of(cls: type[Pass], rule: str) -> str:
    """`file:line` of the rule "pass/rule" of a pass; of the pass where it has no such rule but asks by itself."""
    name = rule.partition("/")[2]
    for r in _rules(cls):
        if r.name == name:
            return f"{r.file}:{r.line}"
    method = getattr(cls, "run_on", cls.run)
    try:
        lines, first = inspect.getsourcelines(method)
        file = inspect.getsourcefile(method) or ""
    except (OSError, TypeError):
        return ""
    asking = next((i for i, line in enumerate(lines) if f"/{name}" in line or "allows" in line), 0)
    return f"{file}:{first + asking}"


def _rules(cls: type[Pass]) -> Iterator[Rule]:
    """Rules within reach of a pass: of its own module first, then of the modules that it takes something from."""
    todo = [base.__module__ for base in cls.__mro__ if issubclass(base, Pass)]
    seen: set[str] = set()
    while todo:
        name = todo.pop(0)
        if name in seen or name not in sys.modules:
            continue
        seen.add(name)
        for value in list(vars(sys.modules[name]).values()):
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, Rule):
                    yield item
                    todo.append(item.apply.__module__)
            origin = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            if isinstance(origin, str) and not _known(origin):
                todo.append(origin)


def _known(module: str) -> bool:
    """Modules that hold no rules and lead everywhere."""
    return module.split(".")[0] in sys.stdlib_module_names or module.startswith(("xllm_compiler.ir", "numpy"))
