"""A GGUF file through the whole compiler: verified, quantized anew where it is in no integers, found in the cache."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from tests.frontend.gguf.writing import random_gguf
from xllm_compiler.artifact import read_manifest
from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.cache import CompileCache
from xllm_compiler.driver import compile_checkpoint, read_request
from xllm_compiler.errors import XllmError
from xllm_compiler.options import CompileOptions
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.tools import verify

OPTIONS = CompileOptions(target=Cpu((machine_isas()[0],)))


def layouts(path: Path) -> Counter[str]:
    return Counter(tensor.layout for tensor in read_manifest(path).weights.tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_takes_it(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three types that stay in integers and one that does not, the last matrix of which is the table of embeddings."""
    path = random_gguf("qwen2", tmp_path, [Kind.Q8_0, Kind.Q4_0, Kind.Q5_0, Kind.Q6_K])
    out = tmp_path / "artifact"
    compile_checkpoint(path, out, CompileOptions(target=OPTIONS.target, dtype=dtype))
    found = layouts(out)
    assert found["q8g32"] + found["glu_q8g32"] >= 3 and found["q4g32"] >= 2 and found["panel"] >= 2, found
    manifest = read_manifest(out)
    assert manifest.model.name == "qwen2" and json.loads((out / "config.json").read_text())["model_type"] == "qwen2"
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser, [])
    assert verify.main(parser.parse_args([str(out), "--checkpoint", str(path)])) == 0
    assert "transformers" in capsys.readouterr().out


def test_quantize_rounds_what_is_in_no_integers(tmp_path: Path) -> None:
    path = random_gguf("llama", tmp_path, [Kind.Q4_0, Kind.Q4_K])
    out = tmp_path / "artifact"
    compile_checkpoint(path, out, CompileOptions(target=OPTIONS.target, quantize="w8a16", max_kl=float("inf")))
    found = layouts(out)
    assert found["q4g32"] >= 3 and found["q8"] + found["glu_q8"] >= 3 and not found["panel"], found


def test_the_cache_knows_the_file(tmp_path: Path) -> None:
    """By its bytes, wherever it lies; and a file that changes while it is compiled is told of."""
    path = random_gguf("llama", tmp_path, [Kind.Q4_0])
    cache = CompileCache(tmp_path / "cache")
    first = compile_checkpoint(path, None, OPTIONS, cache=cache)
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / path.name)
    assert compile_checkpoint(moved, None, OPTIONS, cache=cache).cached and not first.cached
    request = read_request(moved, OPTIONS)
    os.utime(moved, (1, 1))
    with pytest.raises(XllmError, match=r"llama\.gguf changed while it was compiled"):
        request.check_unchanged()
