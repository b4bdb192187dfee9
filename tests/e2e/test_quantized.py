"""Quantized models: the compiled step computes what the interpreter makes of the same IR, tied or not, 8 bits or 4."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stepper import options

from xllm_compiler.artifact import WEIGHTS, read_manifest
from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.tools import verify
from xllm_compiler.tools.steps import make_trial
from xllm_compiler.tools.verify import references, run_native

ZEROS = ",".join(Cpu.presets["cpu-int4"]).replace("q4grid32", "q4g64z")
FINE = ",".join(Cpu.presets["cpu-int4"]).replace("q4grid32", "q4grid16")
WEIGHTS_ONLY = ",".join(Cpu.presets["cpu-int8"]).replace(",quantize-rows", "").replace(",rotate=true", "")
# A look-up in a rotated table of 4 bits gives rows of few distinct values, and a norm without weight keeps them so.
# Many fall between two integers of 8 bits, and the last bit decides. So tied tables of 4 bits are tried unrotated.
FINE_TIED, ZEROS_TIED = FINE.replace("rotate-stream,", ""), ZEROS.replace("rotate-stream,", "")
CASES = [
    ("qwen3", "@cpu-int8", {"q8", "glu_q8"}),
    ("qwen3", "@cpu-int4", {"q4grid32", "glu_q4grid32"}),
    ("llama", FINE_TIED, {"q4grid16", "glu_q4grid16"}),
    ("llama", FINE.replace(",quantize-rows", ""), {"q4grid16", "glu_q4grid16"}),
    ("qwen3", ZEROS, {"q4g64z", "glu_q4g64z"}),
    ("llama", "@cpu-int8", {"q8", "glu_q8"}),  # tied embeddings, biases
    ("llama", ZEROS_TIED, {"q4g64z", "glu_q4g64z"}),
    ("qwen3", WEIGHTS_ONLY, {"q8", "glu_q8"}),
    ("llama", ZEROS.replace(",quantize-rows", ""), {"q4g64z", "glu_q4g64z"}),
]


@pytest.mark.parametrize(
    "family, pipeline, layouts", CASES, ids=lambda value: value[-24:] if isinstance(value, str) else ""
)
def test_it_computes_what_the_interpreter_does(
    family: str, pipeline: str, layouts: set[str], artifact: Callable[..., Path]
) -> None:
    """In f32 a rounding that falls on the other side, of one 8-bit activation, is the largest difference there is."""
    path = artifact(family, "float32", pipeline)
    manifest = read_manifest(path)
    stored = manifest.weights.tensors
    assert {t.layout for t in stored} - {"row", "panel", "glu"} == layouts
    matrices = [t for t in stored if t.layout in ("panel", "glu")]
    assert not matrices, "a weight is still stored whole"
    embeddings = [t.name for t in stored if "embed_tokens" in t.name]
    rotated = pipeline.startswith("@") or "rotate-stream" in pipeline
    assert len(embeddings) == (2 if family == "llama" and rotated else 1)  # a tied table is rotated in two ways
    trial = make_trial(manifest, 0)
    got = np.concatenate(run_native(path, manifest.target.levels[0], trial, 2)["logits"])
    ((_, wanted),) = references(path, manifest, None, trial)
    want = np.concatenate(wanted["logits"])
    assert want.std() > 0.01
    off = np.abs(got - want) / np.abs(want).max()
    assert np.median(off) < 1e-5 and off.max() < 2e-2, (np.median(off), off.max())


@pytest.mark.parametrize("pipeline", ["@cpu-int8", "@cpu-int4"])
def test_verify_takes_it(pipeline: str, artifact: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = artifact("qwen3", "bfloat16", pipeline)
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser, [])
    assert verify.main(parser.parse_args([str(path)])) == 0
    assert "interpreter on " in capsys.readouterr().out


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_bytes_of_the_weights(family: str, artifact: Callable[..., Path]) -> None:
    """8 bits take half of the bytes of bf16, 4 bits on grids a little over a quarter; scales come on top."""
    full, eight, four = (
        sum(t.bytes for t in read_manifest(artifact(family, "bfloat16", p)).weights.tensors if len(t.shape) > 1)
        for p in (None, "@cpu-int8", "@cpu-int4")
    )
    assert eight < 0.75 * full and four < 0.55 * full, (full, eight, four)


def test_the_same_bytes_twice(
    checkpoint: Callable[[str], Path],
    artifact: Callable[..., Path],
    tmp_path: Path,
    forget_kernels: Callable[[], None],
) -> None:
    first = artifact("qwen3", "bfloat16", "@cpu-int4")
    forget_kernels()
    compile_checkpoint(checkpoint("qwen3"), tmp_path / "again", options("bfloat16", "@cpu-int4"))
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert Path(WEIGHTS) in files
    for name in files:
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
