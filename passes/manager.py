"""Parses and runs pipelines, checks the module around every pass, and measures time.

    pipeline := item ("," item)*
    item     := name ["{" option "=" value ("," option "=" value)* "}"] | "fix(" pipeline ")" | "@" preset

`fix(..)` repeats its items until a round changes nothing. The canonical text prints presets expanded and options that
differ from their defaults, in field order; it is part of the compile-cache key together with the passes' sources.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes.base import Pass, PassContext, said
from xllm_compiler.passes.instruments import Instrument
from xllm_compiler.passes.presets import all_presets, preset
from xllm_compiler.passes.registry import did_you_mean, pass_class

MAX_ROUNDS = 8  # of fix(..); honest passes settle in two or three


@dataclass(frozen=True, slots=True)
class Fix:
    """Items to repeat until nothing changes."""

    items: tuple[Item, ...]

    def __str__(self) -> str:
        return f"fix({','.join(map(item_text, self.items))})"


Item = Pass | Fix


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes in order. `str()` is the canonical text and parses back to an equal pipeline."""

    items: tuple[Item, ...]

    def __str__(self) -> str:
        return ",".join(map(item_text, self.items))

    def passes(self) -> Iterator[Pass]:
        """Every pass once per mention, in order."""
        yield from _flatten(self.items)

    def hash(self) -> str:
        """sha256 over the canonical text and the sources of every pass in it."""
        digest = hashlib.sha256(str(self).encode())
        for module in _sources({type(p).__module__ for p in self.passes()}):
            digest.update(module.encode())
            digest.update(Path(str(sys.modules[module].__file__)).read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PassRun:
    """What one run of one pass did. `text` has its options; `seconds` excludes the manager's own checks; `stats` are
    this run's counts; `rewrites` those that it asked leave for."""

    index: int
    name: str
    text: str
    changed: bool
    seconds: float
    ops_before: int
    ops_after: int
    stats: dict[str, int]
    rewrites: int


@dataclass(slots=True)
class PipelineReport:
    """Every run, in order, and the context with its stats and remarks."""

    ctx: PassContext
    runs: list[PassRun] = field(default_factory=list)

    def table(self) -> str:
        """One line per run: number, pass, whether it changed anything, ops before and after, milliseconds, counts."""
        lines = []
        for r in self.runs:
            counts = ", ".join(f"{k} {v}" for k, v in sorted(r.stats.items()))
            mark = "changed" if r.changed else "-"
            lines.append(
                f"{r.index:02} {r.text:<44} {mark:<8} {r.ops_before:>6} -> {r.ops_after:<6} "
                f"{r.seconds * 1e3:8.1f} ms  {counts}".rstrip()
            )
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- running


def run_pipeline(
    pipeline: Pipeline | str,
    module: Module,
    ctx: PassContext | None = None,
    *,
    instruments: Sequence[Instrument] = (),
    verify_each: bool = True,
    limit: int | None = None,
) -> PipelineReport:
    """Runs every pass on `module`, in place; with `limit` only the first so many runs.

    Around each pass: the stage is checked (before anything runs at all), the result is verified (unless `verify_each`
    is off), and the pass's claim to have changed something is compared with the structural hash; a false claim is an
    XllmError of kind "internal", and so is any exception of a pass that is not an XllmError.
    """
    plan = parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    _check_stages(plan, module)
    runner = _Runner(module, ctx or PassContext(), instruments, verify_each, limit)
    runner.run_all(plan)
    return runner.report


class _LimitReached(Exception):
    """The runs that were asked for are done."""


class _Runner:
    def __init__(
        self, module: Module, ctx: PassContext, instruments: Sequence[Instrument], verify_each: bool, limit: int | None
    ) -> None:
        self.module = module
        self.ctx = ctx
        self.instruments = instruments
        self.verify_each = verify_each
        self.limit = limit
        self.report = PipelineReport(ctx)
        self.hash = ""

    def run_all(self, plan: Pipeline) -> None:
        verify(self.module)
        self.hash = structural_hash(self.module)
        for instrument in self.instruments:
            instrument.started(plan, self.module)
        with suppress(_LimitReached):
            self.run(plan.items)
        for instrument in self.instruments:
            instrument.finished(self.report, self.module)

    def run(self, items: Iterable[Item]) -> bool:
        changed = False
        for item in items:
            if isinstance(item, Fix):
                changed |= self.settle(item)
            else:
                changed |= self.run_pass(item)
        return changed

    def settle(self, fix: Fix) -> bool:
        for i in range(MAX_ROUNDS):
            if not self.run(fix.items):
                return i > 0
        raise XllmError(
            "internal",
            f"{fix} still changes the module after {MAX_ROUNDS} rounds",
            help="two of these passes undo each other; dump the IR and compare the last rounds",
        )

    def run_pass(self, p: Pass) -> bool:
        index = len(self.report.runs) + 1
        if self.limit is not None and index > self.limit:
            raise _LimitReached
        for instrument in self.instruments:
            instrument.before(index, p, self.module)
        self.ctx.current = p.name
        before, counted = _count_ops(self.module), dict(self.ctx.stats.get(p.name, {}))
        rewrites = self.ctx.rewrites
        begin = time.perf_counter()
        try:
            claimed = self.call(p)
            seconds = time.perf_counter() - begin
            self.check(p, claimed)
        except XllmError as error:
            for instrument in self.instruments:
                instrument.failed(index, p, self.module, error)
            raise
        stats = {k: n - counted.get(k, 0) for k, n in self.ctx.stats.get(p.name, {}).items() if n != counted.get(k, 0)}
        run = PassRun(
            index,
            p.name,
            item_text(p),
            claimed,
            seconds,
            before,
            _count_ops(self.module),
            stats,
            self.ctx.rewrites - rewrites,
        )
        self.report.runs.append(run)
        for instrument in self.instruments:
            instrument.after(run, self.module)
        return claimed

    def call(self, p: Pass) -> bool:
        try:
            return said(p, "run", p.run(self.module, self.ctx))
        except XllmError as error:
            error.add_note(f"while running pass {item_text(p)}")
            raise
        except Exception as error:
            raise XllmError(
                "internal",
                f"pass {item_text(p)} failed: {type(error).__name__}: {error}",
                where=_raised_at(error),
                help="this is a bug in the pass; XLLM_DEBUG=1 shows the traceback",
            ) from error

    def check(self, p: Pass, claimed: bool) -> None:
        if self.module.stage != p.leaves:
            raise XllmError("internal", f"pass {p.name} promised stage {p.leaves} and left {self.module.stage}")
        now = structural_hash(self.module)
        if claimed != (now != self.hash):
            did = "says it changed the module, which is as it was" if claimed else "changed the module and denies it"
            raise XllmError("internal", f"pass {item_text(p)} {did}", help="return from run() what really happened")
        self.hash = now
        if claimed and self.verify_each:
            try:
                verify(self.module)
            except XllmError as error:
                raise XllmError(
                    "internal", f"after pass {item_text(p)}: {error.message}", where=error.where, help=error.help
                ) from error


def _raised_at(error: Exception) -> str:
    """File and line of the innermost frame, in which the exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def _count_ops(module: Module) -> int:
    return sum(len(f.ops) for f in module.funcs.values())


def _check_stages(pipeline: Pipeline, module: Module) -> None:
    stage = module.stage
    for p in pipeline.passes():
        if p.needs != stage:
            raise XllmError(
                "option",
                f"pass {p.name} needs stage {p.needs}, but would get {stage}",
                where=f"pipeline {pipeline}",
                help="reorder the pipeline",
            )
        stage = p.leaves


def _flatten(items: Iterable[Item]) -> Iterator[Pass]:
    for item in items:
        if isinstance(item, Fix):
            yield from _flatten(item.items)
        else:
            yield item


def _sources(modules: set[str]) -> list[str]:
    """`modules` and every module of passes, ours or of their own packages, that they take something from; sorted."""
    roots = {"xllm_compiler.passes"} | {name.partition(".")[0] for name in modules} - {"xllm_compiler"}
    seen: set[str] = set()
    todo = sorted(modules)
    while todo:
        name = todo.pop()
        if name in seen or name not in sys.modules:
            continue
        seen.add(name)
        for value in vars(sys.modules[name]).values():
            origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(origin, str) and any(origin == r or origin.startswith(f"{r}.") for r in roots):
                todo.append(origin)
    return sorted(seen)


# ---------------------------------------------------------------------------------------------------------------- text


def item_text(item: Item) -> str:
    """The canonical text of a pass or a fix(..)."""
    if isinstance(item, Fix):
        return str(item)
    options = [
        f"{f.name}={_value_text(getattr(item, f.name))}"
        for f in dataclasses.fields(item)
        if getattr(item, f.name) != f.default
    ]
    return f"{item.name}{{{','.join(options)}}}" if options else item.name


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def parse_pipeline(text: str) -> Pipeline:
    """The pipeline that `text` spells; an XllmError of kind "option" names what is wrong and the nearest right word."""
    reader = _Reader(text)
    items = reader.items()
    if reader.rest():
        reader.fail(f"unexpected {reader.rest()[0]!r}")
    return Pipeline(tuple(items))


class _Reader:
    def __init__(self, text: str, presets: tuple[str, ...] = ()) -> None:
        self.text = text
        self.at = 0
        self.presets = presets  # being expanded, so that a preset inside itself is an error and not a hang

    def fail(self, why: str, help: str = "") -> None:
        raise XllmError("option", why, where=f"pipeline {self.text!r}, column {self.at + 1}", help=help)

    def rest(self) -> str:
        return self.text[self.at :].lstrip()

    def take(self, pattern: str) -> str:
        match = re.compile(rf"\s*({pattern})").match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[1]

    def items(self) -> list[Item]:
        out: list[Item] = []
        if not self.rest():
            return out
        while True:
            out.extend(self.item())
            if not self.take(","):
                return out

    def item(self) -> list[Item]:
        if self.take("@"):
            name = self.take(r"[\w-]+")
            found = preset(name)
            if found is None:
                known = [f"@{known}" for known in all_presets()[0]]
                self.fail(f"there is no preset called @{name}", did_you_mean(f"@{name}", known))
                raise AssertionError
            if name in self.presets:
                self.fail(f"preset @{name} contains itself")
            inner = _Reader(",".join(found), (*self.presets, name))
            items = inner.items()
            if inner.rest():
                inner.fail(f"unexpected {inner.rest()[0]!r}")
            return items
        name = self.take(r"[A-Za-z][\w-]*")
        if not name:
            self.fail(f"expected a pass name, found {self.rest()[:1] or 'the end'!r}")
        if name == "fix" and self.take(r"\("):
            items = self.items()
            if not self.take(r"\)"):
                self.fail("fix( is not closed")
            return [Fix(tuple(items))]
        cls = pass_class(name)
        return [self.configured(cls, self.options(cls))]

    def configured(self, cls: type[Pass], given: dict[str, Any]) -> Pass:
        for f in dataclasses.fields(cls):
            if f.name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                self.fail(f"pass {cls.name} needs option {f.name!r}", f"write {cls.name}{{{f.name}=VALUE}}")
        try:
            return cls(**given)
        except XllmError:
            raise
        except Exception as error:  # the pass's own check of its options
            self.fail(f"pass {cls.name} refuses its options: {error}")
            raise

    def options(self, cls: type[Pass]) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if not self.take(r"\{"):
            return given
        hints = get_type_hints(cls)
        fields = [f.name for f in dataclasses.fields(cls)]
        while not self.take(r"\}"):
            name = self.take(r"[\w-]+")
            if name not in fields:
                known = did_you_mean(name, fields) if fields else "it has no options"
                self.fail(f"pass {cls.name} has no option {name!r}", known)
            if name in given:
                self.fail(f"option {name} of pass {cls.name} is given twice")
            if not self.take("="):
                self.fail(f"option {name} of pass {cls.name} has no value", f"write {name}=VALUE")
            given[name] = self.value(cls, name, self.take(r"[^,{}()]*").strip(), hints[name])
            if not self.take(",") and not self.rest().startswith("}"):
                self.fail(f"options of pass {cls.name} are not closed", "close them with }")
        return given

    def value(self, cls: type[Pass], name: str, text: str, kind: object) -> object:
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if kind is int and re.fullmatch(r"-?\d{1,18}", text):
            return int(text)
        if kind is float and re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d+)?", text):
            return float(text)
        if kind is str and text:
            return text
        wanted = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}.get(kind, str(kind))  # type: ignore[call-overload]
        self.fail(f"option {name} of pass {cls.name} is {wanted}, not {text!r}")
        raise AssertionError
