"""`xllm-compile --quantize`: the report in the artifact, the refusal that leaves nothing, mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stepper import options

from xllm_compiler.artifact import read_manifest
from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.options import CompileOptions
from xllm_compiler.quant_eval.report import FILE
from xllm_compiler.tools.compile import main

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"


def bundled(form: str, max_kl: float | None = None) -> CompileOptions:
    return replace(options("bfloat16"), quantize=form, max_kl=max_kl)


def compiled(out: Path, form: str, max_kl: float | None = None) -> dict[str, object]:
    compile_checkpoint(BUNDLED, out, bundled(form, max_kl))
    found = json.loads((out / FILE).read_text())
    assert isinstance(found, dict)
    return found


def test_the_report_is_the_same_twice_and_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forget_kernels: Callable[[], None]
) -> None:
    found = compiled(tmp_path / "a", "int8")
    assert found["form"] == "w8a8" and found["text"] == "held-out text" and found["max_kl"] == 0.01
    total, layers = found["total"], found["layers"]
    assert 0 < total["kl"] < 0.002 and total["top1"] > 0.95 and total["positions"] == 5248  # type: ignore[index]
    kinds: dict[str, dict[str, float]] = found["kinds"]  # type: ignore[assignment]
    assert len(kinds) == 10 and sum(each["positions"] for each in kinds.values()) == 5248
    assert all(0.98 < each["perplexity"] / each["reference_perplexity"] < 1.02 for each in kinds.values())
    assert kinds["code"]["perplexity"] < 100 < kinds["german"]["perplexity"]  # it was trained on code alone
    assert len(layers) == 25 and all(0 < layer["error"] < layer["plain"] < 0.001 for layer in layers)  # type: ignore[arg-type,attr-defined,union-attr]
    forget_kernels()
    compiled(tmp_path / "b", "int8")
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file
    assert main(["show", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "loss of w8a8 against the unquantized model" in out and "limit 0.01" in out


def test_four_bits_lose_less_than_by_plain_rounding(tmp_path: Path) -> None:
    """Which lost 0.0174 nats here, on the ten kinds of text."""
    found = compiled(tmp_path / "a", "int4")
    assert found["total"]["kl"] < 0.012, found  # type: ignore[index]
    assert all(layer["error"] < 0.5 * layer["plain"] for layer in found["layers"])  # type: ignore[attr-defined]
    assert main(["verify", str(tmp_path / "a")]) == 0


def test_too_much_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(XllmError, match=r"loses 0\.0") as caught:
        compile_checkpoint(BUNDLED, tmp_path / "out", bundled("int4", 1e-4))
    assert caught.value.kind == "option" and "--max-kl" in caught.value.help
    assert list(tmp_path.iterdir()) == []


def test_mixed_keeps_the_limit_with_eight_bits_where_they_pay(tmp_path: Path) -> None:
    found = compiled(tmp_path / "m", "mixed", 0.004)
    forms = {layer["weights"][0]: layer["format"] for layer in found["layers"]}  # type: ignore[attr-defined]
    assert found["total"]["kl"] <= 0.004  # type: ignore[index]
    assert forms["model.embed_tokens.weight"] == "q8" and "q4grid16" in forms.values()
    module = parse_module((tmp_path / "m" / "module.xir").read_text(), "module.xir")
    formats = {op.attrs["format"] for op in module.func("step").ops if op.name.startswith("quant.linear")}
    assert formats == {"q8", "q4grid16"}


def test_random_weights_are_accepted_when_told_so(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    compile_checkpoint(checkpoint("qwen3"), tmp_path / "r", bundled("int4", float("inf")))
    found = json.loads((tmp_path / "r" / FILE).read_text())
    assert found["max_kl"] is None and found["total"]["kl"] >= 0


def test_a_small_cache_alone(tmp_path: Path) -> None:
    found = compiled(tmp_path / "kv", "kv8")
    assert found["form"] == "kv8" and found["layers"] == [] and 0 < found["total"]["kl"] < 0.002  # type: ignore[index]
    assert (
        read_manifest(tmp_path / "kv").page_bytes == 26880
    )  # a byte for each of 24,576 values, 4 for each of 384 scales and 192 sums
