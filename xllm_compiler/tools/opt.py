"""`xllm-opt`: runs passes on IR text. Owns the flags and their checks; what happens to one module is opt_job.py's.

The result goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compiler.errors import XllmError
from xllm_compiler.tools.arguments import Arguments, parse_size_lists, parse_sizes, suggest, whole_number
from xllm_compiler.tools.console import run
from xllm_compiler.tools.loading import add_load, load_given

if TYPE_CHECKING:
    from xllm_compiler.passes.manager import Pipeline

REPRO = "xllm-repro.xir"

_EPILOG = """\
a pipeline is passes with commas between: a{option=value},fix(b,c),@preset
see also: xllm-run, xllm-trace, xllm-reduce, xllm-bisect, xllm-new-pass; XLLM_DEBUG=1..4 shows more of what happens"""


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the tool and return its exit code: 0, 1 (a pass is wrong, or not what was expected), 2 (bad input)."""
    return run(lambda: _main(list(argv)))


def parser() -> Arguments:
    """All flags of xllm-opt."""
    p = Arguments(
        "xllm-opt",
        "Run compiler passes on IR text (.xir). Without -p: parse, verify, print.",
        epilog=_EPILOG,
        usage="xllm-opt FILE.xir|- [-p PIPELINE] [flags]",
    )
    p.add_argument("file", nargs="?", metavar="FILE.xir", help="the module, - for standard input")
    p.add_argument("-p", "--pipeline", metavar="PIPELINE", help="passes to run, such as fuse-glu,fix(fold,dce) or @cpu")
    p.add_argument("--target", metavar="NAME", help="what passes and reports assume; default xllm-compile's")
    p.add_argument("-o", "--output", metavar="FILE", help="write the result here")
    add_load(p)
    p.add_argument("--split-file", action="store_true", help="modules stand between lines `// -----`; each by itself")

    g = p.add_argument_group("what there is")
    g.add_argument("--list-passes", action="store_true", help="every pass with stages, options and defaults; presets")
    g.add_argument("--help-pass", metavar="NAME", help="a pass's whole description")

    g = p.add_argument_group("what is shown")
    g.add_argument("--loc", action="store_true", help="print source lines and the rules that touched each op")
    g.add_argument("--print-after", action="append", default=[], metavar="PASS|all", help="the module after a pass")
    g.add_argument("--print-changed", action="store_true", help="the module after every pass that changed it")
    g.add_argument("--diff", action="store_true", help="for those two: only what changed; alone: of all changes")
    g.add_argument("--dump-dir", metavar="DIR", help="the module after every pass, numbered")
    g.add_argument("--time-passes", action="store_true", help="what each pass did, and how long it took")
    g.add_argument("--stats", action="store_true", help="what passes counted")
    g.add_argument(
        "--remarks", nargs="?", const="", metavar="REGEX", help="what passes remarked (=REGEX: matching ones)"
    )
    g.add_argument("--remarks-json", metavar="FILE", help="the same, all, a JSON object a line")
    g.add_argument(
        "--explain", action="append", default=[], metavar="PASS/RULE@VALUE", help="why a rule did or did not"
    )
    g.add_argument("--report", metavar="OUT.html", help="everything as one HTML page")
    g.add_argument("--timeline", metavar="OUT.json", help="the schedule as a Chrome trace")

    g = p.add_argument_group("what is checked")
    g.add_argument("--no-verify-each", action="store_true", help="verify only what comes in and what comes out")
    g.add_argument(
        "--check-equiv", nargs="?", const="", metavar="SIZES", help="same meaning before and after: N=1,7;B=1,2"
    )
    g.add_argument("--interp", metavar="SIZES", help="interpret the result with made-up inputs: N=3,B=2")
    g.add_argument("--seed", type=whole_number, default=0, help="of made-up inputs; default 0")
    g.add_argument("--verify-diagnostics", action="store_true", help="ERROR and REMARK comments are what must be said")

    g = p.add_argument_group("narrowing down")
    g.add_argument("--pass-limit", type=whole_number, metavar="N", help="only the first N pass runs")
    g.add_argument("--fuel", type=whole_number, metavar="N", help="only the first N rewrites")
    g.add_argument("--repro", metavar="FILE", default=REPRO, help=f"for a pass that fails its input; default {REPRO}")
    g.add_argument("--no-repro", action="store_true", help="write no such file")
    return p


def _main(argv: list[str]) -> int:
    args = parser().read(argv)
    load_given(args)
    if args.list_passes or args.help_pass is not None:
        from xllm_compiler.tools.pass_help import help_pass, list_passes

        print(list_passes() if args.list_passes else help_pass(args.help_pass))
        return 0
    if args.file is None:
        raise XllmError("option", "no file is given", help="xllm-opt FILE.xir, or - for standard input")
    from xllm_compiler.tools.opt_job import run_file

    return run_file(args, checked_pipeline(args))


def checked_pipeline(args: Any) -> Pipeline:
    """The pipeline, once every flag that can be checked before a file is read has been."""
    from xllm_compiler.passes.listeners import Explain
    from xllm_compiler.passes.manager import parse_pipeline

    pipeline = parse_pipeline(args.pipeline or "")
    names = list(dict.fromkeys(p.name for p in pipeline.passes()))
    for name in args.print_after:
        if name not in (*names, "all"):
            help = suggest(name, [*names, "all"], "passes of this pipeline")
            raise XllmError("option", f"--print-after: the pipeline has no pass {name!r}", help=help)
    for pattern in args.explain:
        rule = Explain(pattern, sys.stderr).rule
        if "/" in rule and rule.partition("/")[0] not in names:
            help = suggest(rule.partition("/")[0], names, "passes of this pipeline")
            raise XllmError("option", f"--explain: the pipeline has no pass {rule.partition('/')[0]!r}", help=help)
    if args.explain and args.report is not None:
        raise XllmError(
            "option",
            "--explain and --report exclude each other",
            help="each follows the lines that rules run; use two runs",
        )
    for flag in ("report", "timeline", "remarks_json"):  # told before the work, not after it
        path = getattr(args, flag)
        if path is not None and not Path(path).parent.is_dir():
            text = f"--{flag.replace('_', '-')}: there is no directory for {path}"
            raise XllmError("option", text, where=str(Path(path).parent))
    if args.remarks:
        try:
            re.compile(args.remarks)
        except re.error as error:
            raise XllmError("option", f"--remarks: {args.remarks!r} is not a regular expression: {error}") from None
    if args.interp is not None:
        parse_sizes([args.interp], "--interp")
    if args.check_equiv:
        parse_size_lists(args.check_equiv, "--check-equiv")
    return pipeline
