"""How the end-to-end tests compile, and an artifact driven below the engine: the test decides which tokens go where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.options import CompileOptions
from xllm_compiler.runtime.loader import load_artifact
from xllm_compiler.step.inputs import UNMAPPED, StepWriter
from xllm_compiler.step.interface import LOGITS
from xllm_compiler.targets.cpu import Cpu


@dataclass
class Sequence_:
    """One request: its tokens, the pages it owns, and how many tokens are in the cache."""

    ids: list[int]
    pages: list[int]
    done: int = 0
    logits: list[np.ndarray] = field(default_factory=list)


class Stepper:
    """An executor with a page pool that hands out pages in the order asked for."""

    def __init__(self, artifact: Path, *, threads: int = 2, pages: int = 1024, level: str | None = None) -> None:
        loaded = load_artifact(artifact, level)
        loaded.wait_checked()
        self.manifest = loaded.manifest
        self._loaded = loaded
        self.executor = loaded.code.executor(loaded.weights, pages=pages, threads=threads)
        self.writer = StepWriter(self.executor.new_batch())
        self._free = list(range(pages))

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.close()

    def open(self, ids: Sequence[int], *, shuffle: np.random.Generator | None = None) -> Sequence_:
        """Give a request the pages that its tokens need, scattered over the pool when `shuffle` is given."""
        if shuffle is not None:
            shuffle.shuffle(self._free)
        count = -(-len(ids) // self.manifest.page_tokens)
        pages, self._free = self._free[:count], self._free[count:]
        return Sequence_(list(ids), pages)

    def close(self, request: Sequence_) -> None:
        """Return its pages as they are, so that the next owner finds old bytes in them."""
        self._free = request.pages + self._free

    def step(self, work: Sequence[tuple[Sequence_, int]], *, keep: Sequence[Sequence_] = ()) -> None:
        """One step that advances each request by its number of tokens; those in `keep` keep all rows' logits."""
        writer = self.writer
        writer.begin()
        for request, count in work:
            pages = np.full(writer.batch["table"].shape[1], UNMAPPED, np.int32)
            pages[: len(request.pages)] = request.pages
            rows = range(count) if any(request is kept for kept in keep) else ()
            writer.add(request.ids[request.done : request.done + count], request.done, pages, rows)
            request.done += count
        logits = self.executor.execute(writer.end())[LOGITS].copy()
        at = 0
        for request, count in work:
            if any(request is kept for kept in keep):
                request.logits.append(logits[at : at + count])
                at += count

    def all_logits(self, ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """Logits of every row of one request run alone in chunks: [len(ids), vocab]."""
        request = self.open(ids)
        while request.done < len(ids):
            self.step([(request, min(chunk or len(ids), len(ids) - request.done))], keep=[request])
        self.close(request)
        return np.concatenate(request.logits)


def options(dtype: str, pipeline: str | None = None) -> CompileOptions:
    """This machine's best code only: what the other levels compute is tested with the kernels and the lowering."""
    return CompileOptions(
        dtype=dtype,
        max_model_len=512,
        max_num_seqs=48,
        max_num_batched_tokens=512,
        target=Cpu((machine_isas()[-1],)),
        pipeline=pipeline,
    )
