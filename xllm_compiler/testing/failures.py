"""What a pipeline does wrong on a module, in a form that can be recognised again. Owns `Failure` and the checks that
find one, for the reducer and the bisector; must not know how modules are made smaller.

    check = PipelineCheck("fuse-glu", "equiv")
    found = check.find(module)          # None, or what is wrong
    check.shows(other, found)           # does another module show the same failure?
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.base import Pass, PassContext
from xllm_compiler.passes.instruments import Instrument
from xllm_compiler.passes.manager import Pipeline, item_text, parse_pipeline, run_pipeline
from xllm_compiler.testing.equiv import Mismatch, Reference
from xllm_compiler.testing.inputs import Sizes

CheckName = Literal[
    "error",  # a pass raises, or lies about having changed something
    "verify",  # and what it leaves does not verify
    "equiv",  # and what it leaves computes something else
]
CHECKS: Final[tuple[str, ...]] = get_args(CheckName)

_PINNED: Final = ("N", "B")  # the sizes of a mismatch that are kept; the others are completed to fit each module


@dataclass(frozen=True, slots=True)
class Failure:
    """What is wrong. Two failures are the same when their `signature` is: the kind, who, and the message without names
    and numbers, which change while a module shrinks. `text` is the whole report, `sizes` those where meanings differ.
    """

    signature: tuple[str, ...]
    text: str
    run: int = 0  # the pass run that raised or left something broken; 0 where meanings differ
    sizes: dict[str, int] | None = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        """ "raises", "claim", "verify" or "differs"."""
        return self.signature[0]

    def same_as(self, other: Failure | None) -> bool:
        return other is not None and self.signature == other.signature


class PipelineCheck:
    """Runs a pipeline on copies of modules and looks at what comes of it, as strictly as `check` says.

    `sizes`: where meanings are compared; None: where mistakes show (inputs.telling_sizes), the least first.
    """

    def __init__(
        self,
        pipeline: str | Pipeline,
        check: CheckName = "equiv",
        *,
        sizes: Sequence[Sizes] | None = None,
        seed: int = 0,
    ) -> None:
        self.pipeline = parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
        self.check = check
        self.sizes = sizes
        self.seed = seed
        self.ulps = max((p.ulps for p in self.pipeline.passes()), default=0)

    def find(self, module: Module) -> Failure | None:
        """What is wrong with the pipeline on `module`, which stays as it is. XllmError where that cannot be told."""
        return self._find(module, self.sizes, typed=True)

    def again(self, module: Module, failure: Failure) -> Failure | None:
        """What is wrong on another module, if it is that failure, at the sizes at which it showed. A module on which
        that cannot be told does not show it."""
        sizes = [fitting(module, failure.sizes)] if failure.sizes is not None else self.sizes
        try:
            # A candidate for a failure in exact arithmetic need not be run in its dtypes as well.
            found = self._find(module, sizes, typed=failure.signature != DIFFERS_EXACTLY)
        except Exception:  # a candidate may be nonsense, such as an index that is out of range by itself
            return None
        return found if failure.same_as(found) else None

    def shows(self, module: Module, failure: Failure) -> bool:
        """Whether the pipeline fails on `module` in the same way."""
        return self.again(module, failure) is not None

    def _find(self, module: Module, sizes: Sequence[Sizes] | None, typed: bool) -> Failure | None:
        after = clone_module(module)
        found = run_passes(self.pipeline, after, self.check)
        if found is not None or self.check != "equiv":
            return found
        return compare(Reference(module, sizes, typed=typed, seed=self.seed), after, self.ulps)


def fitting(module: Module, sizes: Sizes) -> dict[str, int]:
    """Those sizes for which `module` has a symbol."""
    return {name: n for name, n in sizes.items() if name in module.scope.symbols}


def run_passes(
    pipeline: str | Pipeline,
    module: Module,
    check: CheckName,
    *,
    ctx: PassContext | None = None,
    limit: int | None = None,
    instruments: Sequence[Instrument] = (),
) -> Failure | None:
    """Runs passes on `module` itself. An XllmError that no pass is to blame for (an unknown one, a wrong stage) is
    raised."""
    blame = _Blame()
    watching = [blame, *instruments]
    try:
        run_pipeline(pipeline, module, ctx, instruments=watching, verify_each=check != "error", limit=limit)
    except XllmError as error:
        if blame.culprit is None:
            raise
        return _failure(blame.index, blame.culprit, error)
    return None


class _Blame(Instrument):
    """Remembers which pass failed."""

    def __init__(self) -> None:
        self.index = 0
        self.culprit: Pass | None = None

    def failed(self, index: int, p: Pass, module: Module, error: XllmError) -> None:
        self.index, self.culprit = index, p


def _failure(index: int, p: Pass, error: XllmError) -> Failure:
    cause = error.__cause__
    number = re.search(r"\bV\d+\b", error.message)
    if isinstance(cause, XllmError) and error.message.startswith("after pass") and number is not None:
        return Failure(("verify", p.name, number[0]), str(error), index)
    if isinstance(cause, Exception) and not isinstance(cause, XllmError):
        place = re.sub(r".*/|:\d+", "", error.where)  # the file and the function; lines say no more than the message
        return Failure(("raises", p.name, type(cause).__name__, place, message_class(str(cause))), str(error), index)
    by_itself = any(note.startswith("while running pass") for note in getattr(error, "__notes__", ()))
    kind = "raises" if by_itself else "claim"
    text = error.message.replace(item_text(p), p.name)
    return Failure((kind, p.name, error.kind, message_class(text)), str(error), index)


def message_class(message: str) -> str:
    """A message without what changes while a module shrinks: value names, numbers, types, quoted words."""
    text = re.sub(r"%[\w.'$]+", "%", message)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'", text)
    text = re.sub(r"\b[a-z]+\d*(<[^>]*>)?\[[^\]]*\]", "[]", text)
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", text)


DIFFERS_EXACTLY: Final = ("differs", "exact")


def compare(reference: Reference, after: Module, ulps: int) -> Failure | None:
    """What `after` computes differently."""
    mismatch = reference.compare(after, ulps=ulps)
    return None if mismatch is None else _differs(mismatch, reference.sizes)


def _differs(mismatch: Mismatch, given: Sequence[Sizes] | None) -> Failure:
    if mismatch.index < 0:  # the function is gone, or cannot be run any more
        signature: tuple[str, ...] = ("differs", "broken", message_class(mismatch.message))
    else:
        signature = DIFFERS_EXACTLY if mismatch.precise else ("differs", "typed")
    keep = _PINNED if given is None else tuple(dict.fromkeys(name for sizes in given for name in sizes))
    lines = [
        mismatch.message,
        *(f"  {word} {text}" for word, text in (("at", mismatch.where), ("help:", mismatch.help)) if text),
    ]
    return Failure(signature, "\n".join(lines), 0, {k: n for k, n in mismatch.sizes.items() if k in keep})


# ------------------------------------------------------------------------------------------------------------ commands


class CommandCheck:
    """Asks a command whether a module fails. `%s` in it stands for the path of the module's text; without one the path
    comes last. No shell is involved.

    The module fails when the command's exit code is `interesting`; None: when it is any but 0, death by a signal
    included. A run of more than `timeout` seconds is no failure.
    """

    def __init__(self, command: str, *, interesting: int | None = None, timeout: float = 60.0) -> None:
        try:
            self.template = shlex.split(command)
        except ValueError as error:
            raise XllmError("option", f"the command {command!r} cannot be split into words: {error}") from None
        if not self.template:
            raise XllmError("option", "the command is empty", help="give a program, and %s for the module's file")
        if not any("%s" in word for word in self.template):
            self.template.append("%s")
        self.interesting = interesting
        self.timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="xllm-")

    def __call__(self, module: Module) -> bool:
        path = os.path.join(self._folder.name, "candidate.xir")
        Path(path).write_text(print_module(module, loc=True), encoding="utf-8")
        words = [word.replace("%s", path) for word in self.template]
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=self.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
        except OSError as error:
            raise XllmError(
                "option",
                f"the command cannot be run: {words[0]}: {error.strerror}",
                help="give a program on PATH or the path of an executable file; there is no shell",
            ) from None
        return done.returncode != 0 if self.interesting is None else done.returncode == self.interesting


def sizes_text(sizes: Mapping[str, int]) -> str:
    """`N=1,B=1`, as the tools read it."""
    return ",".join(f"{name}={n}" for name, n in sizes.items())
