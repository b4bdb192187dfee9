"""Which rewrite rules were tried, fired, and where they gave up. Owns watching rules; must not change what they do.

A rule gives up at a line of its own: the condition that it ran last before it returned False. That line is the reason,
in the words of whoever wrote the rule, and costs rule authors nothing. It is seen by a trace function that is set while
the rule runs.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from xllm_compiler.ir.core import Op
from xllm_compiler.passes.base import describe

_EXAMPLES = 3  # ops named for each reason


@dataclass(slots=True)
class Reason:
    """A line at which a rule gave up: how often, and the first ops for which it did."""

    line: int
    source: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class RuleTries:
    """One rule's record; `rule` is "pass/rule"."""

    rule: str
    tried: int = 0
    fired: int = 0
    reasons: dict[int, Reason] = field(default_factory=dict)
    file: str = ""


class Tries:
    """A RewriteListener; put it into `PassContext.listeners`."""

    def __init__(self) -> None:
        self.rules: dict[str, RuleTries] = {}
        self._name = ""
        self._frame: FrameType | None = None
        self._lines: list[int] = []
        self._outer: Any = None  # the debugger's or the coverage tool's own trace function

    def allows(self, rule: str, op: Op) -> bool:
        self._name = rule.partition("/")[2].replace("-", "_")
        self._frame, self._lines = None, []
        self._outer = sys.gettrace()
        sys.settrace(self._enter)
        return True

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op]) -> None:
        sys.settrace(self._outer)
        record = self.rules.setdefault(rule, RuleTries(rule))
        record.tried += 1
        record.fired += fired
        if fired or self._frame is None or not self._lines:
            return
        file = self._frame.f_code.co_filename
        line, source = _condition(file, self._lines)
        record.file = Path(file).name
        reason = record.reasons.setdefault(line, Reason(line, source))
        reason.count += 1
        if len(reason.examples) < _EXAMPLES:
            reason.examples.append(describe(op))

    def data(self) -> list[dict[str, Any]]:
        """Everything recorded, as JSON data, in order of first tries."""
        return [
            {
                "rule": r.rule,
                "tried": r.tried,
                "fired": r.fired,
                "file": r.file,
                "reasons": [
                    {"line": x.line, "source": x.source, "count": x.count, "examples": x.examples}
                    for x in sorted(r.reasons.values(), key=lambda x: (-x.count, x.line))
                ],
            }
            for r in self.rules.values()
        ]

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if self._frame is None and frame.f_code.co_name.strip("_") == self._name:
            self._frame = frame
            return self._step
        return None

    def _step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self._lines.append(frame.f_lineno)
        return self._step


def _condition(file: str, lines: list[int]) -> tuple[int, str]:
    """The last line that ran but for bare returns and the heads of loops that came to their end."""
    for line in reversed(lines):
        source = linecache.getline(file, line).strip()
        if source not in ("return False", "continue") and not source.startswith("for "):
            return line, source
    return lines[-1], linecache.getline(file, lines[-1]).strip()
