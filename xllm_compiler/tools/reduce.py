"""`xllm-reduce`: makes a module that shows a failure small. Owns the flags and what is shown; the search is
testing/reducer.py's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from xllm_compiler.errors import XllmError
from xllm_compiler.tools.arguments import Arguments, whole_number
from xllm_compiler.tools.console import run
from xllm_compiler.tools.failing import (
    CHECK_HELP,
    add_failure_arguments,
    check_output,
    command,
    command_check,
    opt_words,
    pipeline_check,
    refuse_stray_flags,
    run_line,
)
from xllm_compiler.tools.loading import load_given

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Module
    from xllm_compiler.testing.reducer import Progress

_EPILOG = f"""\
{CHECK_HELP}
a smaller module counts when it verifies and fails in the same way: the same pass raises the same kind of message, or
breaks the same invariant, or meanings differ at the smallest of the sizes at which they differed.

with --test, CMD is run without a shell, %s is the path of a candidate (at the end if it is not there), and a candidate
counts when the exit code is not 0, or is that of --interesting-exit: a ShrinkRay script wants --interesting-exit 0"""


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the tool and return its exit code: 0 (reduced), 2 (bad input, or nothing fails), 130 (interrupted; what had
    been reached is written)."""
    return run(lambda: _main(list(argv)))


def parser() -> Arguments:
    """All flags of xllm-reduce."""
    p = Arguments(
        "xllm-reduce",
        "Make a module (.xir) on which a pipeline or a command fails as small as it gets.",
        epilog=_EPILOG,
        usage="xllm-reduce FILE.xir|- (-p PIPELINE [--check equiv] | --test CMD) [-o OUT.xir] [flags]",
    )
    p.add_argument("file", metavar="FILE.xir", help="the module, - for standard input")
    p.add_argument("-p", "--pipeline", metavar="PIPELINE", help="passes that do something wrong")
    p.add_argument("-o", "--output", metavar="OUT.xir", help="write the result here; default: standard output")
    p.add_argument("--time-limit", type=whole_number, metavar="S", help="stop after so many seconds with what there is")
    add_failure_arguments(p, "a command that fails on the module, instead of -p")
    return p


def _main(argv: list[str]) -> int:
    args = parser().read(argv)
    if (args.pipeline is None) == (args.test is None):
        raise XllmError("option", "give either -p PIPELINE or --test CMD", help="xllm-reduce --help tells more")
    refuse_stray_flags(args)
    check_output(args.output)
    from xllm_compiler.testing.reducer import Reduction, op_count
    from xllm_compiler.tools.files import display_name, read_module, write_text

    load_given(args)
    module = read_module(args.file)
    failing = _CommandFails(args, module) if args.test is not None else _PipelineFails(args, module)
    show = _Show()
    reduction = Reduction(module, failing.on, time_limit=args.time_limit, progress=show)
    interrupted = False
    try:
        reduction.run()
    except KeyboardInterrupt:
        interrupted = True
    before, after = op_count(module), op_count(reduction.best)
    show.line(f"{before} ops -> {after} ops, {reduction.tried} candidates")
    if interrupted or reduction.timed_out:
        show.line("note: " + ("interrupted" if interrupted else "time is up") + "; it may get smaller still")
    origin = f"// Reduced from {display_name(args.file)}, {before} ops.\n"
    write_text(args.output, failing.head(reduction.best) + origin + _text(reduction.best, failing.on))
    return 130 if interrupted else 0


def _text(module: Module, still_fails: Callable[[Module], bool]) -> str:
    """The module as text: without source lines, unless a pass goes by them."""
    from xllm_compiler.ir.parser import parse_module
    from xllm_compiler.ir.printer import print_module

    plain = print_module(module)
    return plain if still_fails(parse_module(plain)) else print_module(module, loc=True)


class _PipelineFails:
    """-p: the failure that the pipeline shows on the module."""

    def __init__(self, args: Any, module: Module) -> None:
        self.args = args
        self.check = pipeline_check(args, module)
        found = self.check.find(module)
        if found is None:
            raise XllmError(
                "option",
                f"there is nothing to reduce: {args.pipeline} does nothing wrong that --check {args.check} sees",
                help="another --check or other --sizes may see more; --test CMD can look for anything",
            )
        self.failure = found
        print(found.text, file=sys.stderr)

    def on(self, module: Module) -> bool:
        return self.check.shows(module, self.failure)

    def head(self, module: Module) -> str:
        """The comments on top of `module`, which shows the failure."""
        found = self.check.again(module, self.failure) or self.failure
        words = opt_words(self.args.pipeline, self.args, found)
        return f"{run_line(words)}// Fails: {found.text.splitlines()[0]}\n"


class _CommandFails:
    """--test: whatever the command looks for."""

    def __init__(self, args: Any, module: Module) -> None:
        self.args = args
        self.on = command_check(args)
        if not self.on(module):
            code = "0" if args.interesting_exit is None else f"not {args.interesting_exit}"
            raise XllmError(
                "option",
                f"there is nothing to reduce: the command's exit code is {code}, or it takes too long",
                where=args.test,
                help="--interesting-exit says which exit code is a failure, --test-timeout how long a run may take",
            )

    def head(self, module: Module) -> str:
        return f"// RUN: {command(self.on.template)}\n"


class _Show:
    """Progress on standard error: on a terminal one line that is rewritten, elsewhere a line when ops went."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.ops = -1

    def __call__(self, p: Progress) -> None:
        text = f"{p.ops:6} ops left, {p.tried:5} candidates tried, cutting {p.cut}"
        if self.live:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        elif p.shrank and p.ops != self.ops:
            self.ops = p.ops
            print(text, file=sys.stderr)

    def line(self, text: str) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[K")
        print(text, file=sys.stderr)
