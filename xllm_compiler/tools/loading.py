"""Passes from outside, on every command line that runs passes. Owns the flag --load."""

from __future__ import annotations

import argparse
from typing import Any


def add_load(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Declares the flag."""
    parser.add_argument(
        "--load", action="append", default=[], metavar="MODULE|FILE.py", help="passes from outside; repeatable"
    )


def load_given(args: Any) -> None:
    """Registers the passes that the flags name. Raises kind "option"."""
    from xllm_compiler.passes.registry import load_passes

    for spec in args.load:
        load_passes(spec)


def load_words(args: Any) -> list[str]:
    """The flags again, for a command line that shows something once more."""
    return [word for spec in args.load for word in ("--load", spec)]
