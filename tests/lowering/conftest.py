"""Compiles a small module for the CPU, runs a step through the C interface and through the reference interpreter."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.dims import as_dim, ceildiv
from xllm_compiler.interp import run
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.semantics import NP_DTYPE, state_zeros
from xllm_compiler.ir.types import Kv, Tensor
from xllm_compiler.ir.verify import verify
from xllm_compiler.ir.verify_buf import arena_results, weight_values
from xllm_compiler.kernels.tir.native.team import CTX_BYTES, CTX_TEAM_OFFSET
from xllm_compiler.lowering.cpu.build import CpuLowering, lower_cpu
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.step.abi import ArgumentBlock, symbol_of

Array = npt.NDArray[Any]
HEAD = """xir 1 stage=graph
dim N in [1, 512]  // "tokens"
dim B in [1, 64]  // "requests"
dim S in [0, 64]  // "rows"
dim P in [1, 64]  // "pages"
assume N - B >= 0  // "a token each"
"""


def plan_apart(module: Module) -> None:
    """The simplest memory plan: every value has bytes of its own."""
    for func in module.funcs.values():
        weights = weight_values(func)
        end = as_dim(0)
        for op in func.ops:
            needing = arena_results(op, weights)
            if not needing or (op.SPEC.view and not op.operands[0].has_uses):
                continue
            at = []
            for r in needing:
                at.append(end)
                end = end + 64 * ceildiv(r.tensor.nbytes, 64)
            op.set_attr("at", tuple(at))
        func.arena = end
    module.stage = "buf"


@dataclass
class Compiled:
    """A lowered module on disk."""

    module: Module
    lowering: CpuLowering
    folder: Path
    params: Mapping[str, Array]
    outputs: dict[str, Array] | None = None
    """Everything that the last call returned, by name."""

    def step(
        self,
        inputs: Mapping[str, Array],
        dims: Mapping[str, int],
        isa: str,
        team: int = 1,
        kv: Array | None = None,
        function: str = "step",
    ) -> tuple[Array, Array]:
        """(first output, bytes of all states). The arena and the outputs are full of NaN before the call."""
        library = ctypes.CDLL(str(self.folder / "cpu" / f"{isa}.so"))
        about = self.lowering.functions[function]
        env = {"N": 1, "B": 1, "S": 0, "P": 1, **dims}
        arena_bytes = about.arena_bytes(env)
        arena = aligned(arena_bytes + 64, 0xFF)
        weights = aligned(self.lowering.weight_bytes + 64, 0)
        weights[: self.lowering.weight_bytes] = np.fromfile(self.folder / "weights.bin", np.uint8)
        sizes = {name: state.block_bytes for name, state in self.lowering.states.items()}
        pool = aligned(env["P"] * sum(sizes.values()), 0)  # a block has its tokens of all states
        if kv is not None:
            pool[:] = kv
        ends = np.cumsum([0, *sizes.values()])
        meeting = aligned(64 * (2 + team), 0)  # a barrier, a line for each member, and one that nobody may write
        outputs = {spec.name: aligned(spec.nbytes().evaluate(env) + 64, 0xFF) for spec in about.outputs}
        given = {x.name: np.ascontiguousarray(inputs[x.name], NP_DTYPE[x.dtype]) for x in about.inputs}
        words = {
            ("arena", ""): arena.ctypes.data,
            ("weights", ""): weights.ctypes.data,
            **{("state", name): pool.ctypes.data + int(end) for name, end in zip(sizes, ends, strict=False)},
            **{("input", name): array.ctypes.data for name, array in given.items()},
            **{("output", name): array.ctypes.data for name, array in outputs.items()},
            **{("dim", name): value for name, value in env.items()},
            ("barrier", ""): meeting.ctypes.data,
            ("profile", ""): 0,
        }
        block = ArgumentBlock.of(about, self.module.scope.symbols)
        status = run_team(
            library, symbol_of(function), (ctypes.c_int64 * len(block))(*(words[word] for word in block.words)), team
        )
        assert status == 0
        assert not meeting[64 * (1 + team) :].any(), "wrote past the members' words"
        assert (arena[arena_bytes:] == 0xFF).all(), "wrote past the arena"
        self.outputs = {}
        for spec in about.outputs:
            size = spec.nbytes().evaluate(env)
            array = outputs[spec.name]
            assert (array[size:] == 0xFF).all(), f"wrote past the output {spec.name}"
            shape = [d.evaluate(env) for d in spec.dims()]
            self.outputs[spec.name] = array[:size].view(NP_DTYPE[spec.dtype]).reshape(shape)
        return next(iter(self.outputs.values())), pool

    def reference(self, inputs: Mapping[str, Array], dims: Mapping[str, int], precise: bool = False) -> Array:
        """The logits by the interpreter."""
        func = self.module.func("step")
        given: dict[str, Array] = {}
        for arg in func.args:
            if isinstance(arg.type, Kv):
                given[arg.name] = state_zeros(arg.type, dims, precise)
            else:
                given[arg.name] = np.asarray(inputs[arg.name])
        outs = run(self.module, "step", given, self.params, dims, precise)
        return next(x for x, v in zip(outs, func.returns, strict=True) if isinstance(v.type, Tensor))


def aligned(size: int, fill: int) -> npt.NDArray[np.uint8]:
    """`size` bytes on a 64-byte boundary, all of them `fill`."""
    raw = np.full(size + 64, fill, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def run_team(library: ctypes.CDLL, symbol: str, args: Any, team: int) -> int:
    """One step on a native team of that size."""
    memory = aligned(CTX_BYTES, 0)
    context = ctypes.c_void_p(memory.ctypes.data)
    ctypes.c_int32.from_address(memory.ctypes.data + CTX_TEAM_OFFSET).value = team
    threads = [threading.Thread(target=library.xllm_team_join, args=(context, m), daemon=True) for m in range(1, team)]
    for t in threads:
        t.start()
    step = ctypes.cast(getattr(library, symbol), ctypes.c_void_p)
    status = int(library.xllm_team_run(context, step, args))
    library.xllm_team_stop(context)
    for t in threads:
        t.join()
    return status


def plan_tight(module: Module) -> None:
    """The product's memory plan, which reuses bytes as soon as they are free."""
    run_pipeline("assign-streams,plan-memory", module)


Build = Callable[..., Compiled]
_built: dict[str, Compiled] = {}


@pytest.fixture
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(text of @step, params) -> Compiled for the best instruction set; dims are declared already.

    Equal requests share one compilation, unless `fresh`.
    """

    def make(
        text: str,
        params: Mapping[str, Array] | None = None,
        isas: Sequence[str] | None = None,
        plan: Callable[[Module], None] = plan_tight,
        fresh: bool = False,
    ) -> Compiled:
        given = dict(params or {})
        wanted = tuple(isas or machine_isas()[-1:])
        digest = hashlib.sha256(repr((text, wanted, plan.__name__, sorted(given))).encode())
        for name in sorted(given):
            digest.update(given[name].tobytes())
        key = digest.hexdigest()
        if fresh or key not in _built:
            module = parse_module(text if text.startswith("xir") else HEAD + text)
            verify(module)
            plan(module)
            verify(module)
            folder = tmp_path_factory.mktemp("lowered")
            _built[key] = Compiled(module, lower_cpu(module, given, folder, isas=wanted), folder, given)
        return _built[key]

    return make
