"""The runtime's half: steps in the interpreter. It imports the compiler, which a server of ours does not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from interp_target.target import MODULE
from xllm_compiler.artifact import Manifest
from xllm_compiler.interp import run
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.semantics import NP_DTYPE, kv_zeros
from xllm_compiler.ir.types import Kv
from xllm_compiler.runtime.executor import Logits, StepBatch
from xllm_compiler.runtime.targets import Files, RuntimeTarget


class InterpExecutor:
    """Runs @step in numpy, one op after the other; the caches are arrays."""

    def __init__(self, manifest: Manifest, module: Module, weights: NDArray[np.uint8], pages: int) -> None:
        self.pages = pages
        self._manifest, self._module = manifest, module
        self._params = {
            w.name: weights[w.offset : w.offset + w.bytes].view(NP_DTYPE[w.dtype]).reshape(w.shape)
            for w in manifest.weights.tensors
        }
        args = module.func("step").args
        self._caches = {a.name: kv_zeros(a.type, {"P": pages}) for a in args if isinstance(a.type, Kv)}

    def new_batch(self) -> StepBatch:
        limits, target = self._manifest.limits, self._manifest.target
        width = -(-self._manifest.model.max_model_len // target.page)
        return StepBatch(limits.max_num_batched_tokens, limits.max_num_seqs, limits.max_num_logits, width)

    def execute(self, batch: StepBatch) -> Logits:
        n, b, s = batch.n, batch.b, batch.s
        lengths = {"ids": n, "pos": n, "seq": n, "start": b + 1, "table": b, "sel": s}
        inputs = {spec.name: getattr(batch, spec.name)[: lengths[spec.name]] for spec in self._manifest.inputs}
        sizes = {"N": n, "B": b, "S": s, "P": self.pages}
        logits, *caches = run(self._module, "step", {**inputs, **self._caches}, self._params, sizes)
        self._caches = dict(zip(self._caches, caches, strict=True))
        return Logits.of(logits)

    def close(self) -> None:
        self._caches = {}


class InterpCode:
    """The parsed module."""

    def __init__(self, manifest: Manifest, module: Module) -> None:
        self._manifest, self._module = manifest, module

    def executor(self, weights: NDArray[np.uint8], *, pages: int, threads: int) -> InterpExecutor:
        return InterpExecutor(self._manifest, self._module, weights, pages)


class InterpRuntime(RuntimeTarget):
    """Any machine will do."""

    def levels(self, manifest: Manifest) -> tuple[str, ...]:
        return manifest.target.levels

    def reads(self, level: str) -> tuple[str, ...]:
        return (MODULE,)

    def load(self, files: Files, manifest: Manifest, level: str) -> InterpCode:
        return InterpCode(manifest, parse_module((files / MODULE).read_bytes().decode(), MODULE))
