"""One module for all ranks: the same calls and the same plan of the weight file; only packing knows the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.lowering.cpu.pack import PackedTensor, plan_file, write_weights
from xllm_compiler.lowering.cpu.select_kernels import select
from xllm_compiler.lowering.kernel_registry import Call
from xllm_compiler.lowering.weight_requests import WeightTable
from xllm_compiler.passes.manager import run_pipeline

# Columns of one projection and rows of the next, gate and up of both halves, and a weight that all ranks share.
TEXT = """xir 1 stage=graph
dim N in [1, 512]
dim R in [0, 1]
group @tp size=2 rank=R
func @step(%ids: i32[N]) -> (f32[N, 64]) {
  %emb = param(name="emb") : f32[70, 64]
  %x = nn.embedding(%ids, %emb) : f32[N, 64]
  %up.all = param(name="up") : f32[128, 64]
  %up = t.slice(%up.all, axis=0, start=64*R, stop=64*R + 64) : f32[64, 64]
  %h = nn.linear(%x, %up) : f32[N, 64]
  %gate.all = param(name="gate") : f32[64, 128]
  %gate = t.slice(%gate.all, axis=1, start=64*R, stop=64*R + 64) : f32[64, 64]
  %both = t.concat(%gate, %up, axis=0) : f32[128, 64]
  %g = nn.linear_glu(%h, %both) : f32[N, 64]
  %scale.all = param(name="scale") : f32[2, 64]
  %scale.one = t.slice(%scale.all, axis=0, start=R, stop=R + 1) : f32[1, 64]
  %scale = t.reshape(%scale.one, shape=[64]) : f32[64]
  %y = nn.rms_norm(%g, w=%scale, eps=1e-05) : f32[N, 64]
  return %y
}
"""
PIPELINES = ("assign-streams,plan-memory", "quantize-weights,assign-streams,plan-memory")


def _params() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes = {"emb": (70, 64), "up": (128, 64), "gate": (64, 128), "scale": (2, 64)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def _lowered(text: str, pipeline: str) -> tuple[list[Call], WeightTable, list[PackedTensor], int]:
    module = parse_module(text)
    run_pipeline(pipeline, module)
    table = WeightTable()
    calls = list(select(module.func("step"), table).calls)
    return calls, table, *plan_file(table)


def _packed(table: WeightTable, plan: list[PackedTensor], size: int, path: Path, ranks: dict[str, int]) -> bytes:
    write_weights(table, plan, size, _params(), path, lambda name, share: None, ranks)
    return path.read_bytes()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_each_rank_gets_its_own_weights(pipeline: str, tmp_path: Path) -> None:
    calls, table, plan, size = _lowered(TEXT, pipeline)
    files = [_packed(table, plan, size, tmp_path / f"rank{r}.bin", {"tp": r}) for r in (0, 1)]
    own = {t.name for t in plan if any(f[t.offset :][: t.bytes] != files[0][t.offset :][: t.bytes] for f in files)}
    assert own == {t.name for t in plan if t.name != "emb"}, "all but the shared weight differ"
    for rank, got in enumerate(files):
        # The same module written for this rank alone, with numbers for R.
        alone = TEXT.replace("64*R + 64", str(64 * rank + 64)).replace("64*R", str(64 * rank))
        alone = alone.replace("start=R, stop=R + 1", f"start={rank}, stop={rank + 1}")
        assert "R," not in alone.partition("func")[2]
        calls_alone, table_alone, plan_alone, size_alone = _lowered(alone, pipeline)
        assert [(c.kernel, c.args) for c in calls] == [(c.kernel, c.args) for c in calls_alone]
        places = [(t.layout, t.dtype, t.shape, t.offset, t.bytes) for t in plan]
        assert places == [(t.layout, t.dtype, t.shape, t.offset, t.bytes) for t in plan_alone] and size == size_alone
        assert got == _packed(table_alone, plan_alone, size, tmp_path / "alone.bin", {})


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, "a weight depends on the rank in @tp, which is not given"),
        ({"tp": 2}, "place 2 in group @tp, which has 2 ranks"),
        ({"tp": 0, "dp": 0}, "no group @dp to pack weights for"),
    ],
)
def test_ranks_that_do_not_fit(ranks: dict[str, int], message: str, tmp_path: Path) -> None:
    _, table, plan, size = _lowered(TEXT, PIPELINES[0])
    with pytest.raises(XllmError, match=message) as e:
        _packed(table, plan, size, tmp_path / "w.bin", ranks)
    assert e.value.kind == "option" and not (tmp_path / "w.bin").exists()


def test_a_step_does_not_know_its_rank() -> None:
    text = TEXT.replace("return %y", "%z = t.slice(%y, axis=1, start=2*R, stop=2*R + 62) : f32[N, 62]\n  return %z")
    with pytest.raises(XllmError, match=r"t\.slice depends on R, the rank of @tp, and is no weight") as e:
        _lowered(text.replace("-> (f32[N, 64])", "-> (f32[N, 62])"), PIPELINES[0])
    assert e.value.kind == "unsupported" and e.value.where
