"""What `xllm-reduce` and `xllm-bisect` share: flags that say what a failure is, and the command that shows it again.
Owns those; what is done about a failure is theirs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compiler.errors import XllmError
from xllm_compiler.tools.arguments import Arguments, parse_size_lists, size_combinations, whole_number
from xllm_compiler.tools.loading import add_load, load_words

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Module
    from xllm_compiler.testing.failures import CheckName, CommandCheck, Failure, PipelineCheck

CHECK_HELP = """\
what is a failure with --check
  error    a pass raises, or lies about having changed something
  verify   that, and what it leaves does not verify
  equiv    that, and what it leaves computes something else (default)"""


def add_failure_arguments(p: Arguments, test_help: str) -> None:
    """The flags that decide what counts as a failure."""
    p.add_argument(
        "--check", choices=("error", "verify", "equiv"), default="equiv", help="how strictly to look; default equiv"
    )
    p.add_argument("--sizes", metavar="SIZES", help="where meanings are compared: N=1,7;B=1,2; default: telling ones")
    p.add_argument("--seed", type=whole_number, default=0, help="of made-up inputs; default 0")
    add_load(p)
    p.add_argument("--test", metavar="CMD", help=test_help)
    p.add_argument(
        "--interesting-exit", type=whole_number, metavar="N", help="the exit code that is a failure; default: any but 0"
    )
    p.add_argument(
        "--test-timeout", type=whole_number, default=60, metavar="S", help="seconds; a longer run is no failure"
    )


def check_output(path: str | None) -> None:
    """Told before a long search and not after it: that there is no place for its result."""
    if path is None or path == "-":
        return
    if Path(path).is_dir():
        raise XllmError("io", f"cannot write {path}: it is a directory")
    if not Path(path).parent.is_dir():
        raise XllmError("io", f"cannot write {path}: there is no directory {Path(path).parent}")


def checked_sizes(args: Any, module: Module) -> list[dict[str, int]] | None:
    """What --sizes asks for, as far as the module has it."""
    if args.sizes is None:
        return None
    return size_combinations(module.scope, parse_size_lists(args.sizes, "--sizes"), "--sizes")


def pipeline_check(args: Any, module: Module) -> PipelineCheck:
    """The check that -p and its flags ask for."""
    from xllm_compiler.testing.failures import PipelineCheck

    check: CheckName = args.check
    return PipelineCheck(args.pipeline, check, sizes=checked_sizes(args, module), seed=args.seed)


def command_check(args: Any) -> CommandCheck:
    """The check that --test and its flags ask for."""
    from xllm_compiler.testing.failures import CommandCheck

    return CommandCheck(args.test, interesting=args.interesting_exit, timeout=args.test_timeout)


def refuse_stray_flags(args: Any) -> None:
    """Flags that only go with another one."""
    if args.test is None and args.interesting_exit is not None:
        raise XllmError("option", "--interesting-exit is the exit code of a --test command", help="give --test CMD")
    if args.test is not None and args.sizes is not None:
        raise XllmError("option", "--sizes and --test exclude each other", help="the command decides what a failure is")


def opt_words(pipeline: str, args: Any, failure: Failure, more: Sequence[str] = ()) -> list[str]:
    """The arguments with which xllm-opt shows a failure again, without the file."""
    from xllm_compiler.testing.failures import sizes_text

    words = ["-p", pipeline, *load_words(args), *more]
    if failure.kind == "differs":
        words.append(f"--check-equiv={sizes_text(failure.sizes)}" if failure.sizes else "--check-equiv")
        words += ["--seed", str(args.seed)] if args.seed else []
    elif args.check == "error":
        words.append("--no-verify-each")
    return words


def command(words: Sequence[str]) -> str:
    """Words as one line for a shell."""
    return shlex.join(words)


def run_line(words: Sequence[str]) -> str:
    """The line that a test runner reads: `words` on the file that the line stands in."""
    return f"// RUN: xllm-opt %s {command(words)}\n"
