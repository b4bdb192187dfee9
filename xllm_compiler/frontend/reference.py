"""Running a step function in the interpreter the way a server would, and the same tokens in transformers.

Owns the comparison that decides whether a model was translated right: requests of different length side by side, cut
into chunks, over shared pages, against an eager forward pass of the unmodified model. For tests, the coverage table and
`xllm-compile verify`; slow and for small models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM

from xllm_compiler.analysis.interface import interface_of
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Array, Checkpoint
from xllm_compiler.frontend.model import TORCH_DTYPE, load_config
from xllm_compiler.frontend.quantized import Quantized
from xllm_compiler.interp import run
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.semantics import state_zeros
from xllm_compiler.ir.types import Kv
from xllm_compiler.step.inputs import UNMAPPED, StepBatch, StepWriter
from xllm_compiler.step.interface import STEP

Chunk = tuple[int, int]  # request, number of its next tokens


class Stepper:
    """State of a few requests over one page pool. Requests are numbered from 0; pages are handed out scattered."""

    def __init__(self, module: Module, weights: Mapping[str, Array], requests: int, pages: int = 64) -> None:
        self.module = module
        self.weights = weights
        self.done = [0] * requests
        self.func = module.func(STEP)
        self.interface = interface_of(self.func)
        (_, width) = self.func.arg("table").shape
        self.tables = np.full((requests, width.value), UNMAPPED, np.int32)
        self.pages = pages
        # Neither in order nor from 0: a kernel or a meaning that ignores the table would show.
        self.free = [int(p) for p in np.random.default_rng(0).permutation(pages)]
        states = [a for a in self.func.args if isinstance(a.type, Kv)]
        self.page_tokens = states[0].kv.page
        self.caches = {a.name: state_zeros(a.kv, {"P": pages}) for a in states}

    def step(self, prompts: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> dict[tuple[int, int], Array]:
        """Runs one step over the next tokens of some requests; f32 logits [vocab] by (request, position)."""
        for request, count in chunks:
            for page in range(-(-(self.done[request] + count) // self.page_tokens)):
                if self.tables[request, page] < 0:
                    self.tables[request, page] = self.free.pop()
        where = [(request, self.done[request] + i) for request, count in chunks for i in range(count)]
        limit = self.module.scope.symbols["S"].hi or len(where)
        capacity = {"N": len(where), "B": len(chunks), "S": min(limit, len(where))}
        batch = StepBatch(STEP, self.interface, capacity)
        writer = StepWriter(batch)
        logits: dict[tuple[int, int], Array] = {}
        for first in range(0, len(where), limit):
            wanted = range(first, min(len(where), first + limit))
            writer.begin()
            n = 0
            for request, count in chunks:
                at = self.done[request]
                tokens = np.asarray(prompts[request][at : at + count], np.int32)
                rows = [row - n for row in wanted if n <= row < n + count]
                writer.add(tokens, at, self.tables[request], rows)
                n += count
            results = run(self.module, STEP, {**writer.end().inputs(), **self.caches}, self.weights)
            logits.update({where[row]: results[0][i] for i, row in enumerate(wanted)})
        # The caches written by the last run over these tokens; runs over the same tokens write the same rows.
        self.caches = dict(zip(self.caches, results[1:], strict=True))
        for request, count in chunks:
            self.done[request] += count
        return logits


def stepped_logits(module: Module, weights: Mapping[str, Array], prompts: Sequence[Sequence[int]]) -> list[Array]:
    """Logits [len(prompt), vocab] of every prompt, computed in ragged, interleaved chunks."""
    stepper = Stepper(module, weights, len(prompts))
    left = [len(p) for p in prompts]
    sizes = (5, 1, 7, 2, 16, 3)
    turn = 0
    rows: dict[tuple[int, int], Array] = {}
    while any(left):
        chunks: list[Chunk] = []
        for request in range(len(prompts)):
            count = min(left[request], sizes[turn % len(sizes)])
            turn += 1
            if count and (turn % 4 or not chunks):  # now and then a request sits a step out
                chunks.append((request, count))
                left[request] -= count
        if chunks:
            rows.update(stepper.step(prompts, chunks))
    return [np.stack([rows[(i, p)] for p in range(len(prompt))]) for i, prompt in enumerate(prompts)]


def load_reference(
    path: str | os.PathLike[str], dtype: str = "f32", attention: str = "eager", *, head: bool = True
) -> Any:
    """The unmodified transformers model of a checkpoint, in eval mode; without `head` its base model.

    transformers gets the config and the tensors that we read, not the directory: what else lies there
    (code, pickles, adapters) is never opened. Of a quantized checkpoint: the float model with the weights that the
    stored ones stand for, dequantized here, since transformers needs a library of each method's own and for some of
    them a GPU.
    """
    quantized = Quantized.of(Checkpoint.open(path))
    settings: dict[str, Any] = {"dtype": TORCH_DTYPE[dtype], "attn_implementation": attention, "local_files_only": True}
    try:
        config = load_config(quantized.view)
        with torch.device("meta"):  # only to learn the class
            own = {"trust_remote_code": False, "attn_implementation": attention}  # not what config.json names
            kind = type((AutoModelForCausalLM if head else AutoModel).from_config(config, **own))
        tensors = {name: _torch(quantized, name, dtype) for name in quantized.view.tensors}
        model = kind.from_pretrained(None, config=config, state_dict=tensors, **settings)
    except XllmError:
        raise
    except Exception as e:
        raise XllmError("unsupported", f"transformers cannot load the model: {e}", where=str(path)) from e
    return model.eval()


def _torch(quantized: Quantized, name: str, dtype: str) -> torch.Tensor:
    """A tensor of the unquantized view."""
    weight = quantized.weights.get(name)
    array = quantized.view.read(name) if weight is None else weight.floats(dtype)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def reference_logits(model: Any, prompt: Sequence[int]) -> Array:
    """f32 logits [len(prompt), vocab] of one eager forward pass over the whole prompt."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([list(prompt)]), use_cache=False)
    logits: Array = out.logits[0].float().numpy()
    return logits
