"""The runtime's half: steps in the interpreter. It imports the compiler, which a server of ours does not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from interp_target.target import MODULE
from xllm_compiler.artifact import Manifest
from xllm_compiler.interp import run
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.semantics import NP_DTYPE, state_zeros
from xllm_compiler.ir.types import Kv
from xllm_compiler.runtime.executor import Outputs
from xllm_compiler.runtime.targets import Files, RuntimeTarget
from xllm_compiler.step.inputs import StepBatch
from xllm_compiler.step.interface import STEP


class InterpExecutor:
    """Runs functions in numpy, one op after the other; the caches are arrays."""

    def __init__(self, manifest: Manifest, module: Module, weights: NDArray[np.uint8], pages: int) -> None:
        self.pages = pages
        self._manifest, self._module = manifest, module
        self._params = {
            w.name: weights[w.offset : w.offset + w.bytes].view(NP_DTYPE[w.dtype]).reshape(w.shape)
            for w in manifest.weights.tensors
        }
        args = [a for func in module.funcs.values() for a in func.args]
        self._caches = {a.name: state_zeros(a.type, {"P": pages}) for a in args if isinstance(a.type, Kv)}

    def new_batch(self, function: str = STEP) -> StepBatch:
        return StepBatch(function, self._manifest.functions[function], self._manifest.limit_values(self.pages))

    def execute(self, batch: StepBatch) -> Outputs:
        about = self._manifest.functions[batch.function]
        caches = {name: self._caches[name] for name in about.states}
        sizes = {**batch.sizes, "P": self.pages}
        results = run(self._module, batch.function, {**batch.inputs(), **caches}, self._params, sizes)
        outputs = dict(zip((spec.name for spec in about.outputs), results, strict=False))
        self._caches.update(zip(about.states, results[len(outputs) :], strict=True))
        return outputs

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
