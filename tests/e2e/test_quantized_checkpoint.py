"""Checkpoints that came quantized, compiled as they ask for and held to the model that they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.frontend.test_quantized import CASES, quantize
from xllm_compiler.artifact import read_manifest
from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint
from xllm_compiler.options import CompileOptions
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.tools import verify


@pytest.mark.parametrize("case, kept", [("w8a8", "q8"), ("awq", ""), ("fp8-tensor", "")])
def test_verify_takes_it(case: str, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kept`: the form in which the layers' weights are certainly stored."""
    checkpoint = tmp_path / "checkpoint"
    sizes = {**TINY, "max_position_embeddings": 128}
    write_random_checkpoint("llama", checkpoint, settings=sizes, dtype="bfloat16", tokenizer=False)
    quantize(checkpoint, *CASES[case][:2])
    out = tmp_path / "artifact"
    compile_checkpoint(checkpoint, out, CompileOptions(target=Cpu((machine_isas()[0],))))
    layouts = [t.layout for t in read_manifest(out).weights.tensors]
    assert not kept or (layouts.count(kept), layouts.count(f"glu_{kept}")) == (6, 2)
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser, [])
    assert verify.main(parser.parse_args([str(out), "--checkpoint", str(checkpoint)])) == 0
    assert "transformers" in capsys.readouterr().out
