"""Options: defaults that follow the checkpoint, and an error for everything out of range."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from xllm_compiler.artifact.cpu_isa import machine_levels
from xllm_compiler.driver import read_request
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.options import CompileOptions, resolve
from xllm_compiler.targets.cpu import Cpu


def write(root: Path, dtype: Any = np.float32, **config: Any) -> Path:
    """A directory that has the form of a checkpoint; no model."""
    root.mkdir(exist_ok=True)
    weights = {"a": np.ones((4, 4), dtype), "b": np.ones(3, np.float32)}
    safetensors.numpy.save_file(weights, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": 512, **config}))
    (root / "tokenizer.json").write_text("{}")
    return root


def resolved(root: Path, **options: Any) -> Any:
    return resolve(CompileOptions(**options), Checkpoint.open(root))


def test_defaults(tmp_path: Path) -> None:
    got = resolved(write(tmp_path / "model-x"))
    assert (got.target.name, got.dtype, got.max_model_len, got.name) == ("cpu", "f32", 512, "model-x")
    assert (got.max_num_seqs, got.max_num_batched_tokens, got.max_num_logits) == (64, 2048, 128)
    assert got.pipeline == "@cpu" and got.target.isas == machine_levels() and got.notes == ()


@pytest.mark.parametrize(
    ("stored", "want"), [(np.float32, "f32"), (ml_dtypes.bfloat16, "bf16"), (np.float16, "bf16"), (np.float64, "f32")]
)
def test_dtype_follows_the_weights(tmp_path: Path, stored: Any, want: str) -> None:
    root = write(tmp_path / "m", stored)
    assert resolved(root).dtype == want
    assert resolved(root, dtype="float32").dtype == "f32"


def test_length_follows_the_model(tmp_path: Path) -> None:
    assert resolved(write(tmp_path / "m", max_position_embeddings=None, n_positions=77)).max_model_len == 77
    long = resolved(write(tmp_path / "m", max_position_embeddings=1 << 20))
    assert long.max_model_len == 1 << 17 and "1048576" in long.notes[0]
    assert resolved(tmp_path / "m", max_model_len=1 << 20).max_model_len == 1 << 20
    silent = resolved(write(tmp_path / "m", max_position_embeddings=None))
    assert silent.max_model_len == 2048 and silent.notes
    nested = resolved(write(tmp_path / "m", text_config={"max_position_embeddings": 99}))
    assert nested.max_model_len == 99


def test_limits_that_follow_each_other(tmp_path: Path) -> None:
    root = write(tmp_path / "m")
    assert resolved(root, max_num_seqs=3000).max_num_batched_tokens == 3000
    assert resolved(root, max_num_seqs=3000).max_num_logits == 3000
    assert resolved(root, max_num_seqs=2, max_num_batched_tokens=8).max_num_logits == 8
    assert resolved(root, target=Cpu(("avx512", "avx2"))).target.isas == ("avx2", "avx512")
    assert resolved(root, target=Cpu(("neon", "avx2"))).target.isas == ("avx2", "neon")  # also of other machines


@pytest.mark.parametrize(
    "options",
    [
        {"target": "tpu"},
        {"dtype": "int3"},
        {"max_model_len": 0},
        {"max_model_len": 513},
        {"max_model_len": 1 << 30},
        {"max_num_seqs": 0},
        {"max_num_seqs": -1},
        {"max_num_seqs": 1 << 20},
        {"max_num_batched_tokens": 0},
        {"max_num_batched_tokens": 1 << 20},
        {"max_num_batched_tokens": 63},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
        {"target": Cpu(())},
        {"target": Cpu(("sse2",))},
        {"name": ""},
        {"name": "two\nlines"},
        {"name": "half \ud800"},
        {"name": "\x9b2J"},
        {"pipeline": "no-such-pass"},
        {"pipeline": "@nowhere"},
        {"pipeline": "dce,"},
        {"quantize": "int3"},
        {"max_kl": 0.1},
        {"quantize": "int4", "max_kl": 0.0},
        {"quantize": "int4", "max_kl": float("nan")},
        {"quantize": "mixed", "max_kl": float("inf")},
        {"quantize": "int8", "pipeline": "@cpu-int8"},
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(XllmError) as caught:
        read_request(write(tmp_path / "m"), CompileOptions(**options))
    assert caught.value.kind == "option" and caught.value.exit_code == 2
    assert caught.value.help or caught.value.where


CHANGES = [
    {"dtype": "bfloat16"},
    {"max_model_len": 511},
    {"max_num_seqs": 63},
    {"max_num_batched_tokens": 2047},
    {"pipeline": "dce"},
    {"pipeline": None, "quantize": "int8"},
    {"pipeline": None, "quantize": "mixed"},
    {"pipeline": None, "quantize": "int8", "max_kl": float("inf")},
    {"target": Cpu(("avx2",))},
    {"name": "other"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_option_is_a_factor(tmp_path: Path, change: dict[str, Any]) -> None:
    root = write(tmp_path / "m")
    base = CompileOptions(pipeline="cse")
    assert read_request(root, base).factors.hash() != read_request(root, replace(base, **change)).factors.hash()


def test_spelled_out_defaults_are_the_same_request(tmp_path: Path) -> None:
    root = write(tmp_path / "m")
    isas = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2")
    spelled = CompileOptions(Cpu(isas), "float32", 512, 64, 2048, " cse , dce ", "m")
    assert (
        read_request(root, CompileOptions(pipeline="cse,dce")).factors.hash()
        == read_request(root, spelled).factors.hash()
    )


def test_a_form_is_its_pipeline(tmp_path: Path) -> None:
    root = write(tmp_path / "m")
    named = [
        read_request(root, CompileOptions(quantize=form)).factors
        for form in ("int4", "W4A8", "w4a8-grid32", "int4-g64")
    ]
    text = [factors.read("pipeline.text") for factors in named]
    assert text[0] == text[1] == text[2] != text[3]
    assert named[0].hash() == named[1].hash() == named[2].hash() != named[3].hash()
    assert "quantize-weights{format=q4grid32},quantize-rows" in text[0]


def test_files_are_factors_by_content(tmp_path: Path) -> None:
    root = write(tmp_path / "m")
    options = CompileOptions(pipeline="cse")
    first = read_request(root, options).factors.hash()
    write(root)
    (root / "README.md").write_text("not read")
    assert read_request(root, options).factors.hash() == first
    moved = tmp_path / "sub" / "m"
    moved.parent.mkdir()
    root.rename(moved)
    assert read_request(moved, options).factors.hash() == first
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert read_request(moved, options).factors.hash() != first


def test_missing_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(XllmError) as caught:
            read_request(path, CompileOptions())
        assert caught.value.kind == "checkpoint"


@pytest.mark.parametrize(
    ("stored", "said", "noted"),
    [
        (np.float32, "bfloat16", True),
        (ml_dtypes.bfloat16, "float32", True),
        (np.float16, "float32", True),
        (np.float16, "bfloat16", False),
        (np.float32, "float32", False),
        (np.float32, None, False),
    ],
)
def test_a_config_that_says_another_dtype_is_told_of(tmp_path: Path, stored: Any, said: Any, noted: bool) -> None:
    root = write(tmp_path / "m", stored, torch_dtype=said)
    notes = resolved(root).notes
    assert any(str(said) in note and "--dtype" in note for note in notes) == noted
    assert resolved(root, dtype="float32").notes == ()


def test_lengths_of_scaled_ropes(tmp_path: Path) -> None:
    root = write(tmp_path / "m", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})
    default = resolved(root)
    assert default.max_model_len == 512 and "2048 (yarn)" in default.notes[0]
    assert resolved(root, max_model_len=2048).max_model_len == 2048
    with pytest.raises(XllmError, match="2049") as caught:
        resolved(root, max_model_len=2049)
    assert caught.value.kind == "option" and "2048" in caught.value.help


def test_settings_beside_the_config_are_factors(tmp_path: Path) -> None:
    root = write(tmp_path / "m")
    before = read_request(root, CompileOptions(pipeline="cse")).factors.hash()
    (root / "quantize_config.json").write_text('{"bits": 4}')
    after = read_request(root, CompileOptions(pipeline="cse"))
    assert after.factors.hash() != before and "quantize_config.json is not used" in after.options.notes[0]
