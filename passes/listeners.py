"""What limits and watches single rewrites: fuel for bisecting, explanations of rules."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, TextIO

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Op
from xllm_compiler.ir.printer import func_names

_SHOWN = 60  # characters of a local variable


class Fuel:
    """At most `limit` rewrites in a whole run; every later one is refused. `spent` counts those that were made."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise XllmError("option", f"fuel is {limit}", help="give 0 or more rewrites")
        self.limit = limit
        self.spent = 0

    def allows(self, rule: str, op: Op) -> bool:
        return self.spent < self.limit

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op]) -> None:
        self.spent += fired


class Explain:
    """Writes to `stream` why a rule fired or did not at one op: the lines of the rule that ran, and its variables.

    `pattern` is RULE@VALUE: RULE is "pass/rule", "pass", "rule" or empty for any, VALUE a result of the op without %.
    `tried_rules`: all rules that were tried. `count`: how often the pattern was found; 0 at the end means that no rule
    was tried.
    """

    def __init__(self, pattern: str, stream: TextIO) -> None:
        self.rule, at, self.value = pattern.partition("@")
        self.value = self.value.removeprefix("%")
        if not at or not self.value:
            raise XllmError("option", f"{pattern!r} explains nothing", help="write PASS/RULE@VALUE, such as fuse-glu@y")
        self.stream = stream
        self.count = 0
        self.tried_rules: dict[str, None] = {}
        self._lines: list[tuple[str, int]] = []
        self._locals: dict[str, str] = {}
        self._code_name = self._file = ""
        self._outer: Any = None  # the debugger's or the coverage tool's own trace function
        self._name = ""

    def allows(self, rule: str, op: Op) -> bool:
        self.tried_rules[rule] = None
        if self._is_asked(rule) and self._is_at(op):
            self._lines, self._locals, self._name = [], {}, f"%{self.value} = {op.name}"
            self._code_name, self._file = rule.partition("/")[2].replace("-", "_"), ""
            self._outer = sys.gettrace()
            sys.settrace(self._enter)
        return True

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op]) -> None:
        if not self._name:
            return
        sys.settrace(self._outer)
        self.count += 1
        self.stream.write(f"{rule} at {self._name}: {'fired' if fired else 'did not fire'}\n")
        width = max((len(_source(*line)) for line in self._lines), default=0)
        for file, line in self._lines:
            self.stream.write(f"    {_source(file, line):<{width}}  {file.rpartition('/')[2]}:{line}\n")
        for name, text in self._locals.items():
            self.stream.write(f"    {name} = {text}\n")
        self._name = ""

    def _is_asked(self, rule: str) -> bool:
        return self.rule in ("", rule, *rule.split("/"))

    def _is_at(self, op: Op) -> bool:
        near = [r for r in op.results if r.name and self.value.startswith(r.name.partition("_")[0])]
        if not near:
            return False  # printed names are made from hints; most ops are told without naming a whole function
        names = func_names(op.func)
        return any(names.of(r) == f"%{self.value}" for r in op.results)

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        """The rule itself, and the functions of its file that it calls: guards often stand there."""
        code = frame.f_code
        if code.co_name.strip("_") == self._code_name:
            self._file = code.co_filename
            return self._step
        return self._step_inside if code.co_filename == self._file else None

    def _step_inside(self, frame: FrameType, event: str, arg: object) -> Any:
        here = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and here not in self._lines[-1:]:
            self._lines.append(here)
        return self._step_inside

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        self._step_inside(frame, event, arg)
        for name, value in frame.f_locals.items():
            if name not in self._locals and name != "rw":
                self._locals[name] = _short(value)  # at once: what a rule replaces is empty afterwards
        return self._step


def _source(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
