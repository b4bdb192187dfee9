"""Measures a quantized model: its compiled programs as they will be served, and choices of forms in the interpreter.

The reference is the same checkpoint's module before the passes of the form. It runs in the interpreter, in the model's
own dtype. That costs one reading of the weights and no second compile. The model's size decides how many positions are
measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import WEIGHTS, Manifest
from xllm_compiler.ir.core import Module, Value
from xllm_compiler.passes.quantize.weights import layer_weights
from xllm_compiler.quant_eval.compare import Loss, TextLoss, compare, compare_on, merge
from xllm_compiler.quant_eval.replay import Variant, replay
from xllm_compiler.quant_eval.text import Window, take, windows
from xllm_compiler.runtime.targets import choose_level, runtime_target
from xllm_compiler.step.inputs import UNMAPPED, StepWriter
from xllm_compiler.step.interface import LOGITS, STEP

_WHOLE: Final = 1 << 38  # multiplications that the reference may cost: seconds on two cores
_ALONE: Final = 1 << 39  # and all layers' turns together
_LEAST: Final = 16

Params = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Reference:
    """A module without quantization and the windows of text for it: `text` says what they are."""

    module: Module
    params: Params
    windows: list[Window]
    text: str

    @classmethod
    def of(cls, module: Module, params: Params, tokenizer: Path | None, vocab: int, longest: int) -> Reference:
        """With as many positions as the model affords. `tokenizer`: a tokenizer.json, None where there is none."""
        found, text = windows(tokenizer, vocab, longest)
        return cls(module, params, take(found, max(128, _WHOLE // _size(module))), text)

    @property
    def ids(self) -> list[NDArray[np.int32]]:
        """The tokens of each window."""
        return [window.ids for window in self.windows]

    @property
    def weights(self) -> list[Value]:
        """The weights that a form is about."""
        return list(layer_weights(self.module.func(STEP)))

    @property
    def few(self) -> list[NDArray[np.int32]]:
        """The text for layers' turns, which are many: a multiple of 16 tokens."""
        positions = _ALONE // (_size(self.module) * max(1, len(self.weights)))
        return [window.ids for window in take(self.windows, min(256, max(_LEAST, positions // 16 * 16)))]

    def reference(self) -> NDArray[np.float32]:
        """Logits [positions, vocab] of the module as it is."""
        return next(replay(self.module, self.params, self.ids, []))

    def losses(self, ids: list[NDArray[np.int32]], variants: Sequence[Variant]) -> list[Loss]:
        """The loss of each variant."""
        found: Iterator[NDArray[np.float32]] = replay(self.module, self.params, ids, variants)
        reference = next(found)
        return [compare(reference, logits) for logits in found]


def whole_loss(bench: Reference, folder: Path, manifest: Manifest) -> tuple[Loss, dict[str, TextLoss], str]:
    """The loss of the programs and weights in `folder`; that on each kind of text; the level that they were run at."""
    level = choose_level(runtime_target(manifest), manifest)
    reference, logits = bench.reference(), served_logits(folder, manifest, level, bench.ids)
    kinds = np.concatenate([[window.kind] * len(window.ids) for window in bench.windows])
    following = np.concatenate([[*ids[1:], -1] for ids in bench.ids])
    losses = {
        kind: compare_on(reference[rows], logits[rows], following[rows])
        for kind in sorted(set(kinds))
        for rows in [np.flatnonzero(kinds == kind)]
    }
    return merge([each.loss for each in losses.values()]), losses, level


def served_logits(
    folder: Path, manifest: Manifest, level: str, ids: Sequence[NDArray[np.int32]]
) -> NDArray[np.float32]:
    """Logits [all tokens, vocab] from an artifact's programs; its manifest need not be written yet.

    Requests run one after the other, prefilled in chunks where the limits ask for it.
    """
    code = runtime_target(manifest).load(folder, manifest, level)
    weights = np.memmap(folder / WEIGHTS, np.uint8, "r")
    pages = max(-(-len(each) // manifest.page_tokens) for each in ids)
    limits = manifest.limits
    chunk = min(limits.max_num_batched_tokens, limits.max_num_logits)
    out = np.empty((sum(map(len, ids)), manifest.model.vocab_size), np.float32)
    executor = code.executor(weights, pages=pages, threads=len(os.sched_getaffinity(0)))
    row = 0
    try:
        writer = StepWriter(executor.new_batch())
        table = np.full(writer.batch["table"].shape[1], UNMAPPED, np.int32)
        table[:pages] = np.arange(pages)
        for each in ids:
            for at in range(0, len(each), chunk):
                tokens = each[at : at + chunk]
                count = len(tokens)
                writer.begin()
                writer.add(tokens, at, table, range(count))
                out[row : row + count] = executor.execute(writer.end())[LOGITS]
                row += count
    finally:
        executor.close()
    return out


def _size(module: Module) -> int:
    """Multiplications for one position."""
    total = sum((w.tensor.shape[0] * w.tensor.shape[1]).value for w in layer_weights(module.func(STEP)))
    return max(1, total)
