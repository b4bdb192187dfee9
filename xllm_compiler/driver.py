"""From a checkpoint to an artifact. Owns the order of the compiler's phases, the key of what they read, and the
manifest; every phase itself lives elsewhere. torch and TVM are imported only when a compile really runs."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xllm_compiler.artifact import (
    CALLS,
    FORMAT,
    MODULE,
    DimRange,
    Limits,
    Manifest,
    Model,
    Target,
    Weight,
    Weights,
    digest_file,
    read_manifest,
)
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.cache import CompileCache, Factors
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import INDEX, SIDE_FILES, Checkpoint
from xllm_compiler.frontend.ends import ends_of_text
from xllm_compiler.frontend.tokenizer import tokenizer_files
from xllm_compiler.ir.rewrite import RewriteListener
from xllm_compiler.options import CompileOptions, Resolved, resolve
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.base import Target as PassTarget
from xllm_compiler.passes.instruments import Instrument
from xllm_compiler.passes.manager import parse_pipeline, run_pipeline
from xllm_compiler.quant_eval.report import FILE as LOSS
from xllm_compiler.workspace import temporary_files

if TYPE_CHECKING:
    from xllm_compiler.frontend.model import CheckpointInfo
    from xllm_compiler.frontend.tokenizer import ResolvedTokenizer
    from xllm_compiler.ir.core import Module
    from xllm_compiler.lowering.cpu.build import CpuLowering
    from xllm_compiler.lowering.cpu.tiles import TileChoices

COPIED = ("config.json", "generation_config.json")
"""Checkpoint files that an artifact carries as they are, where present."""

_SOURCES = (
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
    "loss",
    "options.py",
    "driver.py",
)
_VERSIONS = (
    "numpy",
    "ml_dtypes",
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "protobuf",
    "tiktoken",
    "jinja2",
    "apache-tvm",
)


class Progress(Protocol):
    """Whoever watches a compile."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Entered around each phase."""

    def advance(self, what: str, done: float) -> None:
        """The running phase now does `what`; `done`, 0 to 1, of it is behind us."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


@dataclass
class Silent:
    """A Progress that shows nothing."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows nothing."""
        yield

    def advance(self, what: str, done: float) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""


@dataclass(frozen=True)
class CompileReport:
    """What a compile did. `phases` are (name, seconds) and cover `seconds`; empty when the cache had the artifact."""

    path: Path
    manifest: Manifest
    cached: bool
    seconds: float
    phases: tuple[tuple[str, float], ...] = ()


@dataclass
class Request:
    """A checked wish: the checkpoint, every option's value, and all that may decide the result."""

    checkpoint: Checkpoint
    options: Resolved
    factors: Factors
    stamps: dict[str, tuple[int, int, int] | None]


@dataclass
class _Clock:
    """Passes phases on to the user's progress and keeps their times."""

    progress: Progress
    phases: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.progress.phase(name):
            yield
        self.phases.append((name, time.perf_counter() - started))


def prepare(path: Path, options: CompileOptions) -> Request:
    """Check the checkpoint's form and the options, and collect the factors of the key; imports nothing slow.
    Raises kinds "checkpoint", "option" and "io"."""
    checkpoint = Checkpoint.open(path)
    resolved = resolve(options, checkpoint)
    stamps = _stamps(checkpoint)
    pipeline = parse_pipeline(resolved.pipeline)
    factors = Factors(
        {
            **_checkpoint_factors(checkpoint),
            **resolved.factors(),
            "pipeline.text": str(pipeline),
            "pipeline.hash": pipeline.hash(),  # the sources of passes from outside are in no other factor
            **_source_factors(),
            **_version_factors(),
        }
    )
    return Request(checkpoint, resolved, factors, stamps)


def compile_checkpoint(
    checkpoint: Path,
    out: Path | None,
    options: CompileOptions,
    progress: Progress | None = None,
    *,
    cache: CompileCache | None = None,
    store: Path | None = None,
    instruments: Sequence[Instrument] = (),
    listeners: Sequence[RewriteListener] = (),
) -> CompileReport:
    """Compile a Hugging Face checkpoint directory into the artifact directory `out`, or into `cache` when that is None.

    `instruments` watch the passes, `listeners` single rewrites; they see nothing where the cache has the artifact.
    `store`: a directory for what the next compile can use again: compiled kernels, and the register tiles that were
    chosen, which option `tune` needs. None: compiled kernels are kept for as long as this process lives.
    Raises XllmError of any kind but "request"."""
    started = time.perf_counter()
    progress = progress or Silent()
    clock = _Clock(progress)
    with clock.phase("read"):
        request = prepare(checkpoint, options)
    for note in request.options.notes:
        progress.note(note)
    cached, watchers = False, (instruments, listeners)
    if out is not None:
        path = out
        manifest = _build(request, path, clock, watchers, store, in_cache=False)
    elif cache is not None:
        path, made = cache.obtain(
            request.factors, lambda p: _build(request, p, clock, watchers, store, in_cache=True), progress.note
        )
        cached = not made
        manifest = read_manifest(path)
    else:
        raise XllmError("option", "neither an output directory nor a cache is given")
    phases = () if cached else tuple(clock.phases)
    return CompileReport(path, manifest, cached, time.perf_counter() - started, phases)


Watchers = tuple[Sequence[Instrument], Sequence[RewriteListener]]


def _build(
    request: Request, path: Path, clock: _Clock, watchers: Watchers, store: Path | None, in_cache: bool
) -> Manifest:
    """Trace, transform, lower, and publish at `path`."""
    instruments, listeners = watchers
    read = request.factors.read
    with ArtifactWriter(path) as writer, temporary_files(writer.work):
        with clock.phase("import"):
            _require_compiler()
            from xllm_compiler.frontend.trace import trace_checkpoint
            from xllm_compiler.ir.printer import print_module
            from xllm_compiler.kernels.tir.native.objects import OBJECTS, KernelObjects
            from xllm_compiler.kernels.tir.native.store import ObjectStore
            from xllm_compiler.lowering.cpu.build import lower_cpu

            if in_cache:
                _check_sources(request)
        for group in ("checkpoint", "pipeline", "source", "version"):
            request.factors.read_group(group)
        with clock.phase("tokenizer"):
            tokenizer = _write_tokenizer(request, writer, clock.progress)
        with clock.phase("trace"):
            traced = trace_checkpoint(
                request.checkpoint.path,
                dtype=read("option.dtype"),
                max_model_len=read("option.max_model_len"),
                max_num_seqs=read("option.max_num_seqs"),
                max_num_batched_tokens=read("option.max_num_batched_tokens"),
                max_num_logits=read("option.max_num_logits"),
            )
        ends, remarks = _ends(request, traced.info, tokenizer)
        for note in (*traced.notes, *remarks):
            clock.progress.note(note)
        module = traced.module
        pipeline = read("pipeline.text")
        form = read("option.quantize")
        if form is not None:
            from xllm_compiler.quant_eval.evaluator import QuantizationEvaluator

            judge = QuantizationEvaluator(form, read("option.max_kl"), pipeline, traced, writer.path / "tokenizer.json")
            with clock.phase("choose"):
                pipeline = judge.choose()
        with clock.phase("passes"):
            context = PassContext(PassTarget(read("option.target")), listeners=list(listeners))
            run_pipeline(pipeline, module, context, instruments=instruments)
            writer.write_text(MODULE, print_module(module))
        objects = OBJECTS if store is None else KernelObjects(ObjectStore(store / "kernels"))
        with clock.phase("lower"):
            lowered = lower_cpu(
                module,
                traced.weights,
                writer.path,
                isas=tuple(read("option.isas")),
                tiles=_tiles(request, store),
                objects=objects,
                progress=clock.progress.advance,
            )
        if objects.store is not None and objects.store.failures:
            clock.progress.note(f"some compiled kernels could not be kept or found: {objects.store.last_failure}")
        if form is not None:
            with clock.phase("loss"):
                manifest = _manifest(request, module, traced.info, ends, lowered)
                writer.write_text(LOSS, judge.report(writer.path, manifest).to_json())
        with clock.phase("write"):
            _check_unchanged(request)
            writer.write_text(CALLS, lowered.calls.to_json())
            return writer.commit(_manifest(request, module, traced.info, ends, lowered))


def _tiles(request: Request, store: Path | None) -> TileChoices | None:
    """The choices of register tiles, if any are asked for: of one processor, and of kernels as they are now."""
    machine = request.factors.read("option.tune")
    if machine is None:
        return None
    from xllm_compiler.lowering.cpu.tiles import TileChoices

    if store is None:
        raise XllmError("option", "tuning without a place to remember what was chosen")
    sources = [request.factors.read(f"source.{part}") for part in ("kernels", "weight_formats")]
    return TileChoices(store / "tiles.json", f"{machine}; kernels {' '.join(sources)}")


def _require_compiler() -> None:
    """A serving-only installation is told so before anything else is tried."""
    missing = [module for module in ("torch", "transformers", "tvm") if importlib.util.find_spec(module) is None]
    if missing:
        raise XllmError(
            "option",
            f"compiling needs {', '.join(missing)}, which this installation lacks",
            help="pip install 'xllm-compiler[compile]'",
        )


def _write_tokenizer(request: Request, writer: ArtifactWriter, progress: Progress) -> ResolvedTokenizer | None:
    """The tokenizer and other files that servers want. A bad tokenizer is found here, before the long phases."""
    from xllm_compiler.frontend.tokenizer import resolve_tokenizer

    root = request.checkpoint.path
    for name in COPIED:
        if (root / name).is_file():
            writer.copy(name, root / name)
    tokenizer = resolve_tokenizer(root)
    if tokenizer is None:
        progress.note("the checkpoint has no tokenizer; the artifact will take and give token ids only")
        return None
    writer.write_text("tokenizer.json", tokenizer.tokenizer)
    writer.write_text("tokenizer_config.json", tokenizer.config)
    for note in tokenizer.notes:
        progress.note(note)
    return tokenizer


def _ends(
    request: Request, info: CheckpointInfo, tokenizer: ResolvedTokenizer | None
) -> tuple[tuple[int, ...], list[str]]:
    """The tokens that end a text, and what is odd about the checkpoint's tokens."""
    checkpoint, vocab = request.checkpoint, info.vocab_size
    eos = None if tokenizer is None else tokenizer.eos
    ends, notes = ends_of_text(checkpoint.generation, checkpoint.config, eos, vocab=vocab, default=info.eos_token_ids)
    if tokenizer is not None and tokenizer.size > vocab:
        notes.append(
            f"the tokenizer has {tokenizer.size} tokens, the model {vocab}: a request with one of the others is refused"
        )
    return ends, notes


def _read_names(checkpoint: Checkpoint) -> list[str]:
    shards = [INDEX, *(shard.name for shard in checkpoint.shards)]
    return list(dict.fromkeys([*COPIED, *tokenizer_files(checkpoint.path), *SIDE_FILES, *shards]))


def _checkpoint_factors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Digest of each file that a compile reads; None for one that it would read if it were there."""
    threads = len(os.sched_getaffinity(0))
    # A file that is added later may be read then, and cannot be listed by name now.
    found: dict[str, Any] = {"checkpoint.tokenizer files": " ".join(tokenizer_files(checkpoint.path))}
    for name in _read_names(checkpoint):
        path = checkpoint.path / name
        try:
            found[f"checkpoint.{name}"] = digest_file(path, threads) if path.is_file() else None
        except OSError as error:
            raise XllmError("io", f"cannot read {name}: {error.strerror}", where=str(path)) from None
    return found


def _stamps(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int] | None]:
    """Size, time and inode of every file that a compile reads."""
    found: dict[str, tuple[int, int, int] | None] = {}
    for name in _read_names(checkpoint):
        try:
            stat = os.stat(checkpoint.path / name)
            found[name] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        except OSError:
            found[name] = None
    return found


def _check_unchanged(request: Request) -> None:
    """The key says what was read; a file that changed meanwhile would make it a lie."""
    now = _stamps(request.checkpoint)
    for name, stamp in request.stamps.items():
        if now.get(name) != stamp:
            raise XllmError(
                "checkpoint",
                f"{name} changed while it was compiled",
                where=str(request.checkpoint.path / name),
                help="compile again when nothing writes to the checkpoint",
            )


def _manifest(
    request: Request, module: Module, info: CheckpointInfo, ends: tuple[int, ...], lowered: CpuLowering
) -> Manifest:
    """The manifest, but for files and id, which the writer knows."""
    read = request.factors.read
    dims = {}
    for symbol in module.scope.symbols.values():
        if symbol.lo is None or symbol.hi is None:
            raise XllmError("internal", f"dim {symbol.name} has no range")
        dims[symbol.name] = DimRange(symbol.lo, symbol.hi, symbol.why)
    return Manifest(
        format=FORMAT,
        id="",
        model=Model(
            architecture=info.architecture,
            name=read("option.name"),
            vocab_size=info.vocab_size,
            hidden_size=info.hidden_size,
            layers=info.layers,
            dtype=read("option.dtype"),
            max_model_len=read("option.max_model_len"),
            eos_token_ids=ends,
            bos_token_id=info.bos_token_id,
        ),
        target=Target(read("option.target"), lowered.isas),
        limits=Limits(
            max_num_seqs=read("option.max_num_seqs"),
            max_num_batched_tokens=read("option.max_num_batched_tokens"),
            max_num_logits=read("option.max_num_logits"),
        ),
        dims=dims,
        states=lowered.states,
        functions=lowered.functions,
        weights=Weights(
            lowered.weight_bytes,
            tuple(Weight(t.name, t.layout, t.dtype, t.shape, t.offset, t.bytes) for t in lowered.weights),
        ),
        files={},
        key=request.factors.key(),
    )


def _source_factors() -> dict[str, str]:
    """One digest for each part of the compiler, over the names and contents of its files."""
    root = Path(__file__).parent
    found = {}
    for part in _SOURCES:
        digest = hashlib.sha256()
        path = root / part
        inside = sorted(file for kind in ("*.py", "*.txt") for file in path.resolve().rglob(kind))
        for file in [path] if path.is_file() else inside:
            data = file.read_bytes()
            digest.update(f"{file.relative_to(path.resolve()).as_posix()} {len(data)}\n".encode())
            digest.update(data)
        found[f"source.{part.removesuffix('.py')}"] = digest.hexdigest()[:32]
    return found


def _check_sources(request: Request) -> None:
    """The compiler is in memory now. If its files are not those in the key any more, the entry would be a lie."""
    for name, digest in _source_factors().items():
        if request.factors.read(name) != digest:
            raise XllmError(
                "internal", f"{name} changed while the compiler was loaded", help="compile again when no one edits it"
            )


def _version_factors() -> dict[str, str | None]:
    """Versions of what the compiler is built on; None where a package is not installed."""
    found: dict[str, str | None] = {"version.python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in _VERSIONS:
        try:
            found[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[f"version.{package}"] = None
    return found
