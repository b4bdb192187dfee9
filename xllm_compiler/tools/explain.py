"""`xllm-compile explain CHECKPOINT`: which cache entry a compile would use, or what keeps it from using one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from xllm_compiler.driver import read_request
from xllm_compiler.tools.compile import add_compile_arguments, cache_of, options_of


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Flags of `explain`: those of a compile for the target that `argv` names."""
    add_compile_arguments(parser, argv)


def main(args: argparse.Namespace) -> int:
    """Print the answer; 0 when an entry would be used, 1 when the checkpoint would be compiled."""
    request = read_request(args.checkpoint, options_of(args))
    cache = cache_of(args)
    entries = cache.entries(request.factors)
    if not entries:
        print(f"would compile: the cache {cache.root} is empty")
        return 1
    nearest = entries[0]
    if not nearest.differences:
        print(f"would use {nearest.path}")
        return 0
    first, *rest = nearest.differences
    print(f"would compile: the nearest of {len(entries)} entries, {nearest.path}, was made from other input")
    print(f"  {first.factor}: {_show(first.found)} there, {_show(first.wanted)} now")
    if rest:
        print(f"  and {len(rest)} more: {', '.join(difference.factor for difference in rest)}")
    return 1


def _show(value: Any) -> str:
    return "absent" if value is None else str(value)
