"""`compile_checkpoint`: the phases of a compile, one after the other. Owns their order and their times.

Every phase lives elsewhere and takes what earlier ones returned. torch and TVM are imported only when a compile really
runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compiler.artifact import Manifest, read_manifest
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.cache import CompileCache
from xllm_compiler.driver import phases
from xllm_compiler.driver.key import Request, read_request
from xllm_compiler.driver.manifest import build_manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.rewrite import RewriteListener
from xllm_compiler.options import CompileOptions
from xllm_compiler.passes.instruments import Instrument
from xllm_compiler.progress import Progress, Silent
from xllm_compiler.workspace import temporary_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xllm_compiler.quant_eval.report import LayerError


@dataclass(frozen=True)
class CompileReport:
    """What a compile did. `phases` are (name, seconds) and cover `seconds`; empty when the cache had the artifact."""

    path: Path
    manifest: Manifest
    cached: bool
    seconds: float
    phases: tuple[tuple[str, float], ...] = ()


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
    """Compile a checkpoint, a Hugging Face directory or a GGUF file, into the artifact directory `out`, or into `cache`
    when that is None.

    `instruments` watch the passes, `listeners` single rewrites; they see nothing where the cache has the artifact.
    `store`: a directory for what the next compile can use again: compiled kernels, and the register tiles that were
    chosen, which option `tune` needs. None: compiled kernels are kept for as long as this process lives.
    Raises XllmError of any kind but "request"."""
    started = time.perf_counter()
    clock = _Clock(progress or Silent())
    with clock.phase("read"):
        request = read_request(checkpoint, options)
    for note in request.options.notes:
        clock.progress.note(note)
    if out is not None:
        manifest = _make(request, out, clock, store, (instruments, listeners), in_cache=False)
        return CompileReport(out, manifest, False, time.perf_counter() - started, tuple(clock.phases))
    if cache is None:
        raise XllmError("option", "neither an output directory nor a cache is given")
    path, made = cache.obtain(
        request.factors,
        lambda p: _make(request, p, clock, store, (instruments, listeners), in_cache=True),
        clock.progress.note,
    )
    taken = tuple(clock.phases) if made else ()
    return CompileReport(path, read_manifest(path), not made, time.perf_counter() - started, taken)


Watchers = tuple[Sequence[Instrument], Sequence[RewriteListener]]


def _make(
    request: Request, path: Path, clock: _Clock, store: Path | None, watchers: Watchers, *, in_cache: bool
) -> Manifest:
    """All phases but the first, and the artifact published at `path`. `in_cache`: others will find it by its key."""
    progress = clock.progress
    with ArtifactWriter(path) as writer, temporary_files(writer.work):
        with clock.phase("import"):
            phases.load_compiler(request)
            if in_cache:
                request.check_sources()
        with clock.phase("tokenizer"):
            tokenizer = phases.write_tokenizer(request.checkpoint, writer, progress)
        with clock.phase("trace"):
            traced = phases.trace(request, progress)
        ends = phases.ends(request.checkpoint, traced.info, tokenizer, progress)
        pipeline, evaluator = request.options.pipeline, None
        if request.options.quantize is not None:
            with clock.phase("choose"):
                evaluator = phases.evaluator(request, traced, writer)
                pipeline = evaluator.choose()
        with clock.phase("passes"):
            module = phases.run_passes(request, traced.module, pipeline, *watchers)
        weights: Mapping[str, NDArray[Any]] = traced.weights
        layers: tuple[LayerError, ...] = ()
        if evaluator is not None:
            with clock.phase("calibrate"):
                rounded = phases.calibrate(module, traced, writer, progress)
                weights, layers = rounded.params, rounded.layers
        with clock.phase("lower"):
            phases.write_module(module, writer)
            lowered = request.options.target.lower(module, weights, writer.path, store=store, progress=progress)
        if evaluator is not None:
            with clock.phase("loss"):
                measured = build_manifest(request, module, traced.info, ends, lowered)
                phases.evaluate(evaluator, writer, measured, layers)
        with clock.phase("write"):
            request.check_unchanged()
            return writer.commit(build_manifest(request, module, traced.info, ends, lowered))
