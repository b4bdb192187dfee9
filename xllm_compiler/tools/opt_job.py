"""What `xllm-opt` does to the modules of one file: parse, run, check, print. Owns that order; flags are opt.py's."""

from __future__ import annotations

import json
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes.base import PassContext, Remark
from xllm_compiler.passes.instruments import DumpDir, Instrument, PrintAfter, Repro
from xllm_compiler.passes.listeners import Explain, Fuel
from xllm_compiler.passes.manager import Pipeline, run_pipeline
from xllm_compiler.targets import DEFAULT, Target, target_class
from xllm_compiler.tools.arguments import check_sizes, parse_size_lists, parse_sizes, size_combinations
from xllm_compiler.tools.console import DUMP_DIR, debug_level, error_text
from xllm_compiler.tools.debug import PassTable, debug_instruments
from xllm_compiler.tools.files import display_name, read_text, write_text
from xllm_compiler.tools.loading import load_words

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Op

SEPARATOR = "// -----"
_SEPARATOR_LINE = re.compile(r"// -{5,}[ \t]*")
_COMMENTS_ONLY = re.compile(r"(\s|//[^\n]*(\n|\Z))*")


@dataclass
class Job:
    """One module of a file: its text, standing on the lines that it has in the file; what became of it."""

    text: str
    name: str
    number: int | None = None  # of the module in a file that is split
    result: str | None = None
    error: XllmError | None = None
    remarks: list[Remark] = field(default_factory=list)

    def numbered(self, path: str) -> Path:
        """`path` for this module: `out.html` is `out-2.html` for the second module of a file that is split."""
        plain = Path(path)
        return plain if self.number is None else plain.with_name(f"{plain.stem}-{self.number}{plain.suffix}")


def run_file(args: Any, pipeline: Pipeline) -> int:
    """Runs the pipeline on every module of the file; returns the exit code, raises what ends everything."""
    text, name = read_text(args.file), display_name(args.file)
    read = text
    if args.verify_diagnostics:
        from xllm_compiler.testing.directives import mask

        read = mask(text)  # a comment inside brackets would be a division
    jobs = split(read, name) if args.split_file else [Job(read, name)]
    for job in jobs:
        try:
            job.result = _run(job, args, pipeline)
        except XllmError as error:
            job.error = error
            if not args.split_file and not args.verify_diagnostics:
                raise
            if not args.verify_diagnostics:
                if debug_level():
                    traceback.print_exc()
                print(error_text(error), file=sys.stderr)
    if args.remarks_json is not None:
        write_text(args.remarks_json, "".join(_remark_json(r) for job in jobs for r in job.remarks))
    results = [job.result for job in jobs if job.result is not None]
    write_text(args.output, f"\n{SEPARATOR}\n\n".join(results))
    if args.verify_diagnostics:
        return _verify_diagnostics(text, name, jobs, args)
    return max((job.error.exit_code for job in jobs if job.error is not None), default=0)


def split(text: str, name: str) -> list[Job]:
    """The modules between separator lines. Parts that hold comments only are none."""
    parts: list[tuple[int, list[str]]] = [(0, [])]
    for i, line in enumerate(text.splitlines(keepends=True)):
        if _SEPARATOR_LINE.fullmatch(line.rstrip("\n")):
            parts.append((i + 1, []))
        else:
            parts[-1][1].append(line)
    texts = [(first, "".join(lines)) for first, lines in parts]
    found = [(first, part) for first, part in texts if not _COMMENTS_ONLY.fullmatch(part)]
    return [Job("\n" * first + part, name, i + 1) for i, (first, part) in enumerate(found)]


def _run(job: Job, args: Any, pipeline: Pipeline) -> str:
    module = parse_module(job.text, job.name)
    verify(module)
    sizes = _given_sizes(module, args)
    before = clone_module(module) if args.check_equiv is not None else None
    target = target_class(args.target or DEFAULT)
    ctx = PassContext(target.capabilities)
    explains = [Explain(pattern, sys.stderr) for pattern in args.explain]
    tries = OpsTried()
    fuel = [] if args.fuel is None else [Fuel(args.fuel)]
    ctx.listeners += [*([tries] if explains else []), *fuel, *explains]
    names = _value_names(module) if explains else {}
    tracer = sys.gettrace()
    try:
        run_pipeline(
            pipeline,
            module,
            ctx,
            instruments=_instruments(job, args, pipeline, target, ctx),
            verify_each=not args.no_verify_each,
            limit=args.pass_limit,
        )
    finally:
        if sys.gettrace() is not tracer:  # a rule raised while its lines were followed
            sys.settrace(tracer)
        job.remarks = list(ctx.remarks)
        _print_context(ctx, args)
    if args.no_verify_each:
        verify(module)
    for explain in explains:
        if not explain.count:
            spent = "; --fuel was used up" if any(f.spent == f.limit for f in fuel) else ""
            _explain_nothing(explain, tries, {**names, **_value_names(module)}, spent)
    if before is not None:
        _check_equiv(before, module, sizes.equiv, pipeline, args)
    if args.interp is not None:
        _interpret(module, sizes.interp, args.seed)
    return print_module(module, loc=args.loc)


@dataclass(frozen=True)
class _Sizes:
    interp: dict[str, int]
    equiv: list[dict[str, int]]


def _given_sizes(module: Module, args: Any) -> _Sizes:
    """The sizes on the command line, checked against the module before anything runs."""
    interp: dict[str, int] = {}
    equiv: list[dict[str, int]] = []
    if args.interp is not None:
        interp = parse_sizes([args.interp] if args.interp else [], "--interp")
        check_sizes(module.scope, interp, "--interp")
    if args.check_equiv:
        lists = parse_size_lists(args.check_equiv, "--check-equiv")
        equiv = size_combinations(module.scope, lists, "--check-equiv")
    return _Sizes(interp, equiv)


def _instruments(job: Job, args: Any, pipeline: Pipeline, target: type[Target], ctx: PassContext) -> list[Instrument]:
    err = sys.stderr
    level = debug_level()
    found: list[Instrument] = debug_instruments(level, err, job.numbered(DUMP_DIR))
    if args.print_changed or (args.diff and not args.print_after):
        found.append(PrintAfter(err, "changed", args.diff))
    found += [PrintAfter(err, name, args.diff) for name in args.print_after]
    if args.dump_dir is not None:
        found.append(DumpDir(job.numbered(args.dump_dir)))
    if args.time_passes and level < 2:
        found.append(PassTable(err))
    if not args.no_repro:
        found.append(Repro(job.numbered(args.repro), _repro_flags(args)))
    if args.report is not None:
        from xllm_compiler.report.page import ReportPage

        title = f"{Path(job.name).name} after {pipeline}" if pipeline.items else Path(job.name).name
        page = ReportPage(job.numbered(args.report), title, target.machine)
        ctx.listeners.append(page.tries)
        found.append(page)
    if args.timeline is not None:
        from xllm_compiler.report.timeline import TimelineFile

        found.append(TimelineFile(job.numbered(args.timeline), target.machine))
    return found


def _repro_flags(args: Any) -> tuple[str, ...]:
    target = [] if args.target is None else ["--target", args.target]
    return (*load_words(args), *target, *(["--no-verify-each"] if args.no_verify_each else []))


def _print_context(ctx: PassContext, args: Any) -> None:
    """Stats and remarks as asked for; also those of passes before one that failed."""
    if args.stats:
        lines = [
            f"{name}: {', '.join(f'{key} {n}' for key, n in sorted(counts.items()))}"
            for name, counts in sorted(ctx.stats.items())
            if counts
        ]
        print("\n".join(lines) or "nothing was counted", file=sys.stderr)
    if args.remarks is not None:
        for remark in ctx.remarks:
            if re.search(args.remarks, str(remark)):
                print(f"remark: {remark}", file=sys.stderr)


def _remark_json(remark: Remark) -> str:
    loc = remark.loc
    record = {
        "pass": remark.pass_name,
        "text": remark.text,
        "where": remark.where,
        "file": loc.file,
        "line": loc.line,
        "module_path": loc.module_path,
        "lineage": list(loc.lineage),
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


# ----------------------------------------------------------------------------------------------------------- explaining


class OpsTried:
    """Remembers for which ops each rule was asked for, by op name."""

    def __init__(self) -> None:
        self.ops: dict[str, dict[str, None]] = {}

    def allows(self, rule: str, op: Op) -> bool:
        self.ops.setdefault(rule, {})[op.name] = None
        return True

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op]) -> None:
        """Nothing to remember of that."""


def _value_names(module: Module) -> dict[str, str]:
    """Printed name of every result without its %, and the op that defines it."""
    from xllm_compiler.ir.printer import func_names

    found: dict[str, str] = {}
    for func in module.funcs.values():
        names = func_names(func)
        found.update((names.of(r)[1:], op.name) for op in func.ops for r in op.results)
    return found


def _explain_nothing(explain: Explain, tries: OpsTried, values: dict[str, str], spent: str) -> None:
    """Says why the rule was never tried at that op; XllmError when there is no such rule or no such value."""
    from xllm_compiler.tools.arguments import nearest, suggest

    pattern = f"--explain {explain.rule}@{explain.value}"
    if explain.value not in values:
        near = nearest(explain.value, list(values))
        help = f"did you mean %{near}?" if near else "name a result as the module prints it"
        raise XllmError("option", f"{pattern}: no op defines %{explain.value}", help=help)
    rules = [rule for rule in tries.ops if explain.rule in ("", rule, *rule.split("/"))]
    if not rules:
        known = list(tries.ops) if "/" in explain.rule else [p for r in tries.ops for p in r.split("/")]
        help = suggest(explain.rule, list(dict.fromkeys(known)), "rules that were tried")
        raise XllmError("option", f"{pattern}: no such rule was tried in this run", help=help)
    for rule in rules:
        why = spent or f"; in this run only at {', '.join(tries.ops[rule])}"
        print(f"{rule} was not tried at %{explain.value} = {values[explain.value]}{why}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- checking


def _check_equiv(before: Module, after: Module, sizes: list[dict[str, int]], pipeline: Pipeline, args: Any) -> None:
    from xllm_compiler.testing.equiv import check_equal

    ulps = max((p.ulps for p in pipeline.passes()), default=0)
    mismatch = check_equal(before, after, sizes or None, ulps=ulps, seed=args.seed)
    if mismatch is not None:
        command = shlex.join(["xllm-bisect", display_name(args.file), "-p", str(pipeline), *load_words(args)])
        help = mismatch.help or f"`{command}` finds the pass and the one rewrite that did it"
        raise XllmError("internal", mismatch.message, where=mismatch.where, help=help)


def _interpret(module: Module, sizes: dict[str, int], seed: int) -> None:
    from xllm_compiler.tools.evaluate import evaluate_all

    for text in evaluate_all(module, sizes, seed):
        print(text, file=sys.stderr)


def _verify_diagnostics(text: str, name: str, jobs: Sequence[Job], args: Any) -> int:
    """Compares what was said with the ERROR and REMARK comments of the file; tells every difference."""
    from xllm_compiler.testing.diagnostics import Diagnostic, match_diagnostics

    said = []
    for job in jobs:
        if job.error is not None:
            said.append(Diagnostic.of_error(job.error, name))
        said += [Diagnostic.of_remark(remark, name) for remark in job.remarks]
    differences = match_diagnostics(text, name, said, split=args.split_file)
    for difference in differences:
        print(difference, file=sys.stderr)
    return 1 if differences else 0
