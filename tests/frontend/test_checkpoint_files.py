"""Files of a checkpoint that contradict each other, are of another kind, or are no files at all."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.frontend.conftest import Make
from tests.frontend.test_checkpoint import tensors, write
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import INDEX, SINGLE, Checkpoint
from xllm_compiler.frontend.model import build_model, load_config
from xllm_compiler.frontend.quantized_config import quantized_config, side_notes

SHARDS = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]


def refusal(path: Path, seconds: float = 2.0) -> XllmError:
    started = time.perf_counter()
    with pytest.raises(XllmError) as caught:
        Checkpoint.open(path)
    assert time.perf_counter() - started < seconds
    assert caught.value.kind in ("checkpoint", "unsupported", "io") and caught.value.where
    return caught.value


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ------------------------------------------------------------------------------------------------ which weights


def test_an_old_file_beside_an_index(tmp_path: Path) -> None:
    path = write(tmp_path / "m", 3)
    save_file(tensors(), path / SINGLE)
    error = refusal(path)
    assert SINGLE in error.message and INDEX in error.message


def test_an_index_of_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(), SINGLE)}))
    checkpoint = Checkpoint.open(path)
    assert sorted(checkpoint.tensors) == sorted(tensors()) and checkpoint.notes == ()


NOTED: dict[str, tuple[int, Callable[[Path], object], tuple[str, ...]]] = {
    "shards of an older download": (
        3,
        lambda p: save_file({"x": torch.ones(2)}, p / "model-00001-of-00007.safetensors"),
        ("not read", "model-00001-of-00007.safetensors"),
    ),
    "a second form": (
        1,
        lambda p: save_file(tensors(), p / "consolidated.safetensors"),
        ("not read", "consolidated.safetensors"),
    ),
    "a tensor that the index forgot": (
        3,
        lambda p: edit_json(
            p / INDEX,
            weight_map={k: v for k, v in json.loads((p / INDEX).read_text())["weight_map"].items() if k > "b"},
        ),
        ("not in", "a.weight"),
    ),
    "sizes": (3, lambda p: edit_json(p / INDEX, metadata={"total_size": 12}), ("12 bytes",)),
}


@pytest.mark.parametrize("kind", NOTED)
def test_files_that_do_not_agree_are_named(tmp_path: Path, kind: str) -> None:
    shards, change, says = NOTED[kind]
    path = write(tmp_path / "m", shards)
    change(path)
    checkpoint = Checkpoint.open(path)
    assert sorted(checkpoint.tensors) == sorted(tensors())
    (note,) = checkpoint.notes
    assert all(word in note for word in says), note


OTHER_KINDS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "adapter": (
        lambda p: (p / "adapter_config.json").write_text("{}"),
        ("adapter_config.json", "changes the model"),
    ),
    "adapter's weights": (lambda p: (p / SINGLE).rename(p / "adapter_model.safetensors"), ("adapter",)),
    "only an adapter": (
        lambda p: [(p / f).unlink() for f in ("config.json", SINGLE)] + [(p / "adapter_config.json").write_text("{}")],
        ("adapter",),
    ),
    "Mistral": (
        lambda p: [(p / "config.json").rename(p / "params.json"), (p / SINGLE).rename(p / "consolidated.safetensors")],
        ("Mistral", "params.json"),
    ),
    "Mistral's weights": (lambda p: (p / SINGLE).rename(p / "consolidated.safetensors"), ("consolidated",)),
    "another name": (lambda p: (p / SINGLE).rename(p / "gptq_model-4bit-128g.safetensors"), ("gptq_model-4bit",)),
    "saved by parts": (
        lambda p: (p / "shard-00000-model-00001-of-00002.safetensors").write_bytes(b""),
        ("several processes",),
    ),
    "weights elsewhere": (
        lambda p: edit_json(p / "config.json", transformers_weights="other.safetensors"),
        ("other.safetensors",),
    ),
    "config elsewhere": (
        lambda p: edit_json(p / "config.json", configuration_files=["config.4.0.0.json"]),
        ("configuration_files",),
    ),
    "long name of a shard": (
        lambda p: [
            (p / SINGLE).unlink(),
            (p / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "x" * 300}})),
        ],
        ("cannot be a file",),
    ),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_directories_of_another_kind(tmp_path: Path, kind: str) -> None:
    change, says = OTHER_KINDS[kind]
    path = write(tmp_path / "m")
    change(path)
    error = refusal(path)
    assert all(word in f"{error.message} {error.help}" for word in says), error


# ------------------------------------------------------------------------------------------------- what is no file


def _socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 108 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": lambda p: os.mkfifo(p),
    "socket": _socket,
    "directory": lambda p: p.mkdir(),
    "link to a device": lambda p: p.symlink_to("/dev/zero"),
    "link to a terminal": lambda p: p.symlink_to("/dev/tty"),
    "link to nothing": lambda p: p.symlink_to(p.parent / "gone"),
    "link to itself": lambda p: p.symlink_to(p.name),
    "link to a pipe": lambda p: [os.mkfifo(p.parent / "pipe"), p.symlink_to("pipe")],
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", SINGLE, "quantize_config.json"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, name: str) -> None:
    path = write(tmp_path / "m")
    (path / name).unlink(missing_ok=True)
    NO_FILES[kind](path / name)
    error = refusal(path)
    assert name in f"{error.message} {error.where}"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "link to a device", "link to nothing"])
def test_the_same_of_files_that_are_copied(tmp_path: Path, kind: str, name: str) -> None:
    path = write(tmp_path / "m")
    NO_FILES[kind](path / name)
    assert name in refusal(path).message


def test_links_to_files_are_files(tmp_path: Path) -> None:
    """Download caches are made of them."""
    path = write(tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    for file in list(path.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert sorted(Checkpoint.open(path).tensors) == sorted(tensors())


def test_sizes_are_bounded(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    with (path / "config.json").open("ab") as f:
        f.truncate(1 << 40)
    assert "bytes" in refusal(path).message and (path / "config.json").stat().st_blocks < 100
    path = write(tmp_path / "n")
    with (path / SINGLE).open("ab") as f:
        f.truncate(1 << 42)
    assert "holes" in refusal(path).message


JSON_DAMAGE: dict[str, tuple[bytes, str]] = {
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "surrogate": (b'{"a": "\\ud800"}', "surrogate"),
    "surrogate in a key": (b'{"\\udfff": 1}', "surrogate"),
    "twice": (b'{"a": 1, "a": 1}', "twice"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "deep": (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
    "deep and whole": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
    "list": (b"[]", "not an object"),
    "empty": (b"", "not valid JSON"),
}


@pytest.mark.parametrize("kind", JSON_DAMAGE)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "quant_config.json", INDEX])
def test_damaged_json(tmp_path: Path, kind: str, name: str) -> None:
    text, says = JSON_DAMAGE[kind]
    path = write(tmp_path / "m", 3)
    (path / name).write_bytes(text)
    assert says in refusal(path).message


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("kind", ["digits", "NaN", "surrogate", "byte order mark", "utf-16", "deep", "list", "empty"])
def test_damaged_json_of_tokenizers(tmp_path: Path, kind: str, name: str) -> None:
    text, says = JSON_DAMAGE[kind]
    path = write(tmp_path / "m")
    (path / name).write_bytes(text)
    assert says in refusal(path).message


def test_infinities_stand_in_published_configs(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    assert Checkpoint.open(path).config["time_step_limit"][1] == float("inf")


def test_a_header_of_half_a_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    text = b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "surrogate" in refusal(path).message


# --------------------------------------------------------------------------------------------- numbers nobody means

ABSURD: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 100_000},
    "a thousand million layers": {"num_hidden_layers": 10**9},
    "layers that are a float": {"num_hidden_layers": 1e9},
    "as gpt2 has it": {"n_layer": 10**6},
    "inside": {"text_config": {"num_hidden_layers": 10**7}},
    "labels": {"num_labels": 10**7},
    "experts": {"num_local_experts": 10**7},
    "heads": {"num_attention_heads": 10**8},
    "positions": {"max_position_embeddings": 10**12},
    "positions of gpt2": {"n_positions": 10**9},
    "kinds of layers": {"layer_types": ["full_attention"] * 100_000},
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_counts_are_found_before_a_model_is_built(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "m")
    edit_json(path / "config.json", **ABSURD[kind])
    error = refusal(path)
    key = next(iter(ABSURD[kind])) if kind != "inside" else "num_hidden_layers"
    assert key in error.message and "config.json" in error.where


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 20},
        {"vocab_size": 10**9},
        {"hidden_size": 1 << 20},
        {"intermediate_size": 10**11},
        {"head_dim": 10**10},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 1e9}},
        {"model_type": "gptj", "max_position_embeddings": None, "n_positions": 1 << 24, "rotary_dim": 1 << 13},
        {"model_type": "gpt_bigcode", "max_position_embeddings": None, "n_positions": 1 << 20},
    ],
    ids=lambda s: list(s)[-1],
)
def test_a_model_out_of_proportion_is_not_built(make: Make, settings: dict[str, Any]) -> None:
    """What the counts let through: each layer of this config is small, or there are few of them."""
    path = make("llama")
    edit_json(path / "config.json", **settings)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    checkpoint = Checkpoint.open(path)
    config = load_config(checkpoint)
    started = time.perf_counter()
    with pytest.raises(XllmError) as caught:
        build_model(config, "f32", 64, checkpoint)
    assert time.perf_counter() - started < 2 and caught.value.kind in ("checkpoint", "unsupported")


# -------------------------------------------------------------------------------------------- settings of other files

GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}
AWQ = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}


def quantized(path: Path, beside: dict[str, Any], packed: bool = True, **config: Any) -> Checkpoint:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    part = "qweight" if packed else "weight"
    save_file({f"model.layers.0.mlp.up_proj.{part}": torch.zeros(8, 8, dtype=torch.int32)}, path / SINGLE)
    for name, settings in beside.items():
        (path / name).write_text(json.dumps(settings))
    return Checkpoint.open(path)


@pytest.mark.parametrize(
    ("name", "settings", "method", "group"),
    [
        ("quantize_config.json", GPTQ, "gptq", 32),
        ("quantize_config.json", {**GPTQ, "quant_method": "gptq", "group_size": 128}, "gptq", 128),
        ("quant_config.json", AWQ, "awq", 64),
        ("quantize_config.json", AWQ, "awq", 64),
        ("quant_config.json", {**AWQ, "quant_method": "awq"}, "awq", 64),
    ],
)
def test_settings_in_a_file_of_their_own(tmp_path: Path, name: str, settings: Any, method: str, group: int) -> None:
    checkpoint = quantized(tmp_path / "m", {name: settings})
    found = quantized_config(checkpoint)
    assert found is not None and (found.method, found.scheme.group) == (method, group) and name in found.where
    assert side_notes(checkpoint) == []
    inside = quantized(tmp_path / "n", {}, quantization_config={"quant_method": method, **settings})
    same = quantized_config(inside)
    assert same is not None and (same.scheme, same.v1, same.symmetric) == (found.scheme, found.v1, found.symmetric)


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    inner = {"quant_method": "gptq", **GPTQ}
    agree = quantized(tmp_path / "a", {"quantize_config.json": GPTQ}, quantization_config=inner)
    assert side_notes(agree) == []
    differ = quantized(tmp_path / "b", {"quantize_config.json": {**GPTQ, "bits": 8}}, quantization_config=inner)
    (note,) = side_notes(differ)
    assert "quantize_config.json contradicts config.json" in note and "bits 8 instead of 4" in note
    other = quantized(tmp_path / "c", {"quant_config.json": AWQ}, quantization_config=inner)
    assert "awq instead of gptq" in side_notes(other)[0]
    odd = quantized(tmp_path / "d", {"quantize_config.json": {"bits": 3}}, quantization_config=inner)
    assert "3 bits" in side_notes(odd)[0]


def test_settings_of_weights_that_are_not_there(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path / "m", {"quantize_config.json": GPTQ}, packed=False)
    assert quantized_config(checkpoint) is None and "not used" in side_notes(checkpoint)[0]


@pytest.mark.parametrize(
    ("beside", "config", "says"),
    [
        (
            {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}},
            {},
            "fp8",
        ),
        ({"quantize_config.json": {**GPTQ, "is_marlin_format": True}}, {}, "marlin"),
        ({"quantize_config.json": {**GPTQ, "quant_method": "bitsandbytes"}}, {}, "bitsandbytes"),
        ({}, {"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ],
)
def test_settings_that_cannot_be_read(tmp_path: Path, beside: dict[str, Any], config: Any, says: str) -> None:
    checkpoint = quantized(tmp_path / "m", beside, **config)
    with pytest.raises(XllmError) as caught:
        quantized_config(checkpoint)
    assert caught.value.kind == "unsupported" and says in caught.value.message.lower()


def test_modes_of_the_files_do_not_matter(tmp_path: Path) -> None:
    """A file that may not be read is an error of the file system; root reads everything."""
    path = write(tmp_path / "m")
    (path / "config.json").chmod(0)
    if os.geteuid():
        assert refusal(path).kind == "io"
    else:
        assert stat.S_IMODE((path / "config.json").stat().st_mode) == 0 and Checkpoint.open(path).tensors
    assert load_file(path / SINGLE)
