"""What decides the result of a compile, and which of it a compile has read: the key of the compile cache.

`read_request` opens the checkpoint, checks the options, and collects the factors; it imports nothing slow, since
`xllm-compile explain` answers from here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, TypeVar

from xllm_compiler.artifact import digest_file
from xllm_compiler.cache import Factors
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import INDEX, SIDE_FILES, Checkpoint
from xllm_compiler.frontend.embedding import embedding_files
from xllm_compiler.frontend.tokenizer import tokenizer_files
from xllm_compiler.options import CompileOptions, Resolved, resolve
from xllm_compiler.passes.manager import parse_pipeline
from xllm_compiler.sources import digest_sources
from xllm_compiler.targets import TARGETS, Target

COPIED: Final = ("config.json", "generation_config.json")
"""Checkpoint files that an artifact carries as they are, where present."""

SOURCES: Final = (
    "errors.py",
    "confined",
    "dims",
    "weight_formats.py",
    "ir",
    "interp",
    "analysis",
    "frontend",
    "passes",
    "kernels",
    "lowering",
    "step",
    "artifact",
    "targets",
    "quant_eval",
    "calibration",
    "options.py",
    "driver",
)
"""The parts of the compiler that may decide a byte of the result."""

_VERSIONS: Final = (
    "numpy",
    "ml_dtypes",
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "protobuf",
    "tiktoken",
    "jinja2",
)

T = TypeVar("T")

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Request:
    """A checked wish: the opened checkpoint, every option's value, and all that may decide the result.

    Reading an option makes it part of the key. `stamps`: size, time and inode of every file that a compile reads, as
    they were when the checkpoint was opened; None for one that was not there."""

    checkpoint: Checkpoint
    options: Resolved
    factors: Factors
    stamps: dict[str, Stamp | None]

    def check_sources(self) -> None:
        """The compiler is in memory now. If its files are not those in the key any more, the entry would be a lie.
        Raises kind "internal"."""
        for name, digest in _source_factors(self.options.target).items():
            if self.factors.read(name) != digest:
                raise XllmError(
                    "internal",
                    f"{name} changed while the compiler was loaded",
                    help="compile again when no one edits it",
                )

    def check_unchanged(self) -> None:
        """The key says what was read; a file that changed meanwhile would make it a lie. Raises kind "checkpoint"."""
        now = _stamps(self.checkpoint)
        for name, stamp in self.stamps.items():
            if now.get(name) != stamp:
                raise XllmError(
                    "checkpoint",
                    f"{name} changed while it was compiled",
                    where=str(_read_files(self.checkpoint).get(name, self.checkpoint.path)),
                    help="compile again when nothing writes to the checkpoint",
                )


def read_request(path: Path, options: CompileOptions) -> Request:
    """Check the checkpoint's form and the options, and collect the factors of the key. Raises kinds "checkpoint",
    "option" and "io"."""
    checkpoint = Checkpoint.open(path)
    stamps = _stamps(checkpoint)
    resolved = resolve(options, checkpoint)
    TARGETS.refuse_rivals(resolved.target.name)
    pipeline = parse_pipeline(resolved.pipeline)
    factors = Factors(
        {
            **_checkpoint_factors(checkpoint),
            **{f"option.{name}": value for name, value in resolved.factors().items()},
            **{f"option.target.{name}": value for name, value in resolved.target.factors().items()},
            "pipeline.text": str(pipeline),
            "pipeline.hash": pipeline.hash(),  # the sources of passes from outside are in no other factor
            **_source_factors(resolved.target),
            **_version_factors(resolved.target),
        }
    )
    target = recorded(resolved.target, lambda name: factors.read(f"option.target.{name}"))
    named = {"pipeline": "pipeline.text", "notes": None}

    def note(field: str) -> None:
        name = named.get(field, f"option.{field}")
        if name is not None:
            factors.read(name)

    watched = recorded(dataclasses.replace(resolved, target=target, pipeline=str(pipeline)), note)
    return Request(checkpoint, watched, factors, stamps)


def recorded(value: T, note: Callable[[str], object]) -> T:
    """The same value of a frozen dataclass, which calls `note` with the name of every field that is read of it."""
    kind: Any = type(value)
    names = [field.name for field in dataclasses.fields(kind)]

    class Recorded(kind):  # type: ignore[misc]
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            if name in names:
                note(name)
            return super().__getattribute__(name)

    copy: T = object.__new__(Recorded)
    for name in names:
        object.__setattr__(copy, name, getattr(value, name))
    return copy


def _read_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """By its name, each file that a compile reads, or would read if it were there."""
    if checkpoint.gguf is not None:
        return {checkpoint.path.name: checkpoint.path}
    root = checkpoint.path
    shards = [INDEX, *(shard.name for shard in checkpoint.shards)]
    names = [*COPIED, *tokenizer_files(root), *SIDE_FILES, *embedding_files(root), *shards]
    return {name: root / name for name in names}


def _checkpoint_factors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Digest of each file that a compile reads; None for one that it would read if it were there."""
    threads = len(os.sched_getaffinity(0))
    # A file that is added later may be read then, and cannot be listed by name now.
    found: dict[str, Any] = {"checkpoint.tokenizer files": " ".join(tokenizer_files(checkpoint.path))}
    for name, path in _read_files(checkpoint).items():
        try:
            found[f"checkpoint.{name}"] = digest_file(path, threads) if path.is_file() else None
        except OSError as error:
            raise XllmError("io", f"cannot read {name}: {error.strerror}", where=str(path)) from None
    return found


def _stamps(checkpoint: Checkpoint) -> dict[str, Stamp | None]:
    """Size, time and inode of every file that a compile reads."""
    found: dict[str, Stamp | None] = {}
    for name, path in _read_files(checkpoint).items():
        try:
            stat = os.stat(path)
            found[name] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        except OSError:
            found[name] = None
    return found


def _source_factors(target: Target) -> dict[str, str]:
    """One digest for each part of the compiler, and one for a target from outside."""
    root = Path(__file__).parents[1]
    found = {f"source.{part.removesuffix('.py')}": digest_sources(root / part) for part in SOURCES}
    outside = target.sources()
    return found if outside is None else {**found, f"source.target {target.name}": digest_sources(outside)}


def _version_factors(target: Target) -> dict[str, str | None]:
    """Versions of what the compiler is built on; None where a package is not installed."""
    found: dict[str, str | None] = {"version.python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in (*_VERSIONS, *target.requires.values()):
        try:
            found[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[f"version.{package}"] = None
    return found
