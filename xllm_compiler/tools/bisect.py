"""`xllm-bisect`: which pass, and which single rewrite of it, goes wrong. Owns the flags and what is shown; the search
is testing/bisector.py's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xllm_compiler.tools.arguments import Arguments
from xllm_compiler.tools.console import run
from xllm_compiler.tools.failing import (
    CHECK_HELP,
    add_failure_arguments,
    check_output,
    checked_sizes,
    command,
    command_check,
    opt_words,
    refuse_stray_flags,
    run_line,
)
from xllm_compiler.tools.loading import load_given

if TYPE_CHECKING:
    from xllm_compiler.testing.bisector import Finding, Repro

_EPILOG = f"""\
{CHECK_HELP}
with --test, CMD is run without a shell on what the passes leave, %s is the path of its text (at the end if it is not
there), and the module is bad when the exit code is not 0, or is that of --interesting-exit

exit code: 0 nothing is wrong, 1 found, 2 bad input"""


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the tool and return its exit code: 0 (nothing is wrong), 1 (found), 2 (bad input)."""
    return run(lambda: _main(list(argv)))


def parser() -> Arguments:
    """All flags of xllm-bisect."""
    p = Arguments(
        "xllm-bisect",
        "Find the first pass that goes wrong on a module (.xir), and the one rewrite in it.",
        epilog=_EPILOG,
        usage="xllm-bisect FILE.xir|- -p PIPELINE [--check equiv | --test CMD] [-o REPRO.xir] [flags]",
    )
    p.add_argument("file", metavar="FILE.xir", help="the module, - for standard input")
    p.add_argument("-p", "--pipeline", required=True, metavar="PIPELINE", help="passes of which one goes wrong")
    p.add_argument("-o", "--output", metavar="REPRO.xir", help="write the IR right before, with a RUN line on top")
    add_failure_arguments(p, "a command that fails on a bad module, instead of comparing meanings")
    return p


def _main(argv: list[str]) -> int:
    args = parser().read(argv)
    refuse_stray_flags(args)
    check_output(args.output)
    from xllm_compiler.passes.manager import parse_pipeline
    from xllm_compiler.testing.bisector import bisect
    from xllm_compiler.tools.files import read_module, write_text

    load_given(args)
    pipeline = parse_pipeline(args.pipeline)
    module = read_module(args.file)
    is_bad = None if args.test is None else command_check(args)
    finding = bisect(module, pipeline, is_bad, check=args.check, sizes=checked_sizes(args, module), seed=args.seed)
    if finding is None:
        seen = f"--check {args.check}" if args.test is None else f"--test {args.test}"
        print(f"nothing is wrong: {args.pipeline} does nothing that {seen} finds bad")
        return 0
    print(finding)
    print(f"\nreproduce: {_command(finding.whole, args.file, args, finding)}")
    if args.output is not None:
        write_text(args.output, _repro_text(args, finding))
        print(f"           {_command(finding.repro, args.output, args, finding)}")
    return 1


def _command(repro: Repro, file: str, args: Any, finding: Finding) -> str:
    """What a shell has to be told."""
    return f"xllm-opt {command([file, *_words(repro, args, finding)])}"


def _words(repro: Repro, args: Any, finding: Finding) -> list[str]:
    """What xllm-opt has to be told; the whole pipeline is spelled as it was given."""
    pipeline = args.pipeline if repro.limit is not None else repro.pipeline
    return opt_words(pipeline, args, finding.failure, repro.words())


def _repro_text(args: Any, finding: Finding) -> str:
    """The IR with comments on top: how to run it, and what is wrong then."""
    from xllm_compiler.ir.printer import print_module

    words = _words(finding.repro, args, finding)
    head = run_line(words)
    if args.test is not None:
        test = command_check(args).template
        head = run_line([*words, "-o", "%t"]) + f"// RUN: {command(test).replace('%s', '%t')}\n"
    why = f"// Fails: {finding.failure.text.splitlines()[0]}\n"
    return head + why + print_module(finding.repro.module, loc=True)
