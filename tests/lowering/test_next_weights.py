"""Every linear layer is told where the weight of the next one lies, so that it can be asked for before the barrier."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.trace import trace_checkpoint
from xllm_compiler.kernels.tir.linear.linear import LinearGlu
from xllm_compiler.kernels.tir.linear.vocab import LinearBlockMax
from xllm_compiler.lowering.cpu.pack import packed_shape
from xllm_compiler.lowering.cpu.select_kernels import select
from xllm_compiler.lowering.storage import Ref
from xllm_compiler.lowering.weight_requests import WeightTable
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline

FACTS = {"dtype": "bf16", "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.mark.parametrize("pipeline", ["@cpu", "@cpu-int8", "@cpu-int4"])
def test_the_next_layer_is_named(pipeline: str, tmp_path: Path) -> None:
    write_random_checkpoint("qwen3", tmp_path / "m", settings={**TINY, "head_dim": 32}, seed=5)
    module = trace_checkpoint(Checkpoint.open(tmp_path / "m"), max_num_logits=4, **FACTS).module  # type: ignore[arg-type]
    run_pipeline(pipeline, module, PassContext())
    table = WeightTable()
    found = []
    for call in select(module.func("step"), table).calls:
        given = {arg.name: value for arg, value in zip(call.kernel.args[:-2], call.args, strict=True)}
        if "next" in given:
            found.append((call.kernel, given))
    assert sum(isinstance(kernel, LinearGlu) for kernel, _ in found) >= 2
    assert isinstance(found[-1][0], LinearBlockMax)
    for (_, given), (_, after) in zip(found, found[1:] + found[:1], strict=True):
        assert isinstance(after["w"], Ref) and given["next"] == after["w"] != given["w"]
        panels, *rest = packed_shape(table.requests[after["w"].index])
        size = 1
        for n in rest:
            size *= n
        size *= 1 if table.requests[after["w"].index].dtype == "u8" else 2
        assert (given["next_panels"], given["next_bytes"]) == (panels, size)
