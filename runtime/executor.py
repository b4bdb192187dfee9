"""The border between engine and target: who runs functions, and what a sampler reads of their outputs. Owns what this
runtime needs of an artifact's functions; must not know requests, pages or policies."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import Manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.step.inputs import StepBatch, check_written
from xllm_compiler.step.interface import BLOCK, BLOCK_MAX, EMBED, HIDDEN, LOGITS, STEP, Function, ValueRange

F32 = NDArray[np.float32]
Outputs = dict[str, NDArray[Any]]


def block_maxima(outputs: Outputs) -> F32:
    """Of a step's logits [s, vocabulary]: the largest value of each block of BLOCK columns, NaN where one of them is,
    [s, ceil(vocabulary / BLOCK)]. The last block may be short. Found here, once a step, where the step did not return
    them."""
    found = outputs.get(BLOCK_MAX)
    if found is None:
        rows = outputs[LOGITS]
        found = outputs[BLOCK_MAX] = np.maximum.reduceat(rows, range(0, rows.shape[1], BLOCK), axis=1)
    return found


class Executor(Protocol):
    """Runs the functions of an artifact. Not thread-safe: one thread calls it."""

    pages: int

    def new_batch(self, function: str = STEP) -> StepBatch:
        """Input buffers of a function, of the sizes this executor was compiled for."""
        ...

    def execute(self, batch: StepBatch) -> Outputs:
        """Run the batch's function once; its outputs by name, views that the function's next call overwrites. Raises
        XllmError("internal")."""
        ...

    def close(self) -> None:
        """Free threads and memory. Safe to call twice."""
        ...


def served_functions(manifest: Manifest) -> tuple[str, ...]:
    """Those that requests can run."""
    return tuple(name for name in (STEP, EMBED) if name in manifest.functions)


def embedding_size(manifest: Manifest) -> int:
    """Numbers in an embedding; 0 where there are none."""
    embed = manifest.functions.get(EMBED)
    spec = None if embed is None else embed.output(HIDDEN)
    return 0 if spec is None else spec.dims()[1].value


def check_functions(manifest: Manifest) -> None:
    """Raises kind "artifact" where a function needs what this runtime cannot give, or one that requests run lacks what
    it needs."""
    if not served_functions(manifest):
        given = ", ".join(f"@{name}" for name in manifest.functions)
        raise XllmError(
            "artifact",
            f"the artifact has neither @{STEP} nor @{EMBED}, which a server runs; it has {given}",
            help="compile the checkpoint again",
        )
    for name, function in manifest.functions.items():
        check_written(name, function)
    vocab, step = manifest.model.vocab_size, manifest.functions.get(STEP)
    if step is not None:
        _check_output(STEP, step, LOGITS, vocab)
        if step.output(BLOCK_MAX) is not None:
            _check_output(STEP, step, BLOCK_MAX, -(-vocab // BLOCK))
    embed = manifest.functions.get(EMBED)
    if embed is not None:
        _check_output(EMBED, embed, HIDDEN, embedding_size(manifest))
    longest = manifest.model.max_model_len
    width = -(-longest // manifest.page_tokens)
    for name, function in manifest.functions.items():
        pos, table = function.input("pos"), function.input("table")
        if pos is not None and pos.range not in (None, ValueRange(0, longest - 1)):
            raise _wrong(name, "inputs", f"pos is {pos}, and a request has {longest} tokens")
        if table is not None and function.states and table.shape[1] != str(width):
            raise _wrong(name, "inputs", f"table is {table}, and {longest} tokens are {width} pages")


def _check_output(name: str, function: Function, output: str, columns: int) -> None:
    spec = function.output(output)
    if spec is None or (spec.dtype, spec.shape) != ("f32", ("S", str(columns))):
        raise _wrong(name, "outputs", f"{output} is {spec or 'missing'}, and this runtime reads f32[S, {columns}]")


def _wrong(function: str, what: str, message: str) -> XllmError:
    where = f"manifest.json: $.functions.{function}.{what}"
    return XllmError("artifact", message, where=where, help="compile the checkpoint again")
