"""Reading checkpoint directories: sound ones as the safetensors library does, damaged ones with typed errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import INDEX, SINGLE, Checkpoint
from xllm_compiler.frontend.weights import Slot, WeightSource, first_not_finite, match


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4, generator=g),
        "b.half": torch.randn(3, generator=g).half(),
        "c.bf16": torch.randn(5, 2, generator=g).bfloat16(),
        "d.ids": torch.arange(7),
        "e.empty": torch.zeros(0, 4),
    }


def write(path: Path, shards: int = 1) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    items = list(tensors().items())
    if shards == 1:
        save_file(dict(items), path / SINGLE)
        return path
    weight_map = {}
    for i in range(shards):
        part = dict(items[i::shards])
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, path / name)
        weight_map.update(dict.fromkeys(part, name))
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def rewrite_header(file: Path, change: Any) -> None:
    """Applies `change` to a safetensors file's header dict and writes it back, data untouched."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_the_library_wrote(tmp_path: Path, shards: int) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, shards))
    assert sorted(checkpoint.tensors) == sorted(tensors())
    assert len(checkpoint.shards) == shards
    for name, tensor in tensors().items():
        got = checkpoint.read(name)
        assert got.shape == tuple(tensor.shape)
        if tensor.dtype == torch.bfloat16:
            assert got.dtype == ml_dtypes.bfloat16
            got, tensor = got.astype(np.float32), tensor.float()
        np.testing.assert_array_equal(got, tensor.numpy())


def test_casts_as_torch_does(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path))
    for name in ("a.weight", "b.half", "c.bf16"):
        for ours, theirs in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            shape = checkpoint.tensors[name].shape
            got = WeightSource({name: Slot(name, ours, shape, key=name)}, checkpoint)[name]
            want = tensors()[name].to(theirs)
            np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())


DAMAGE: dict[str, tuple[Any, str]] = {
    "config gone": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "config cut": (lambda p: (p / "config.json").write_text('{"model_type": "lla'), "not valid JSON"),
    "config list": (lambda p: (p / "config.json").write_text("[1]"), "not an object"),
    "config twice": (lambda p: (p / "config.json").write_text('{"a": 1, "a": 2}'), "stands there twice"),
    "config latin": (lambda p: (p / "config.json").write_bytes(b'{"a": "\xff"}'), "not UTF-8"),
    "weights gone": (lambda p: (p / SINGLE).unlink(), "there are no weights"),
    "weights pickled": (
        lambda p: (p / SINGLE).rename(p / "pytorch_model.bin"),
        "not safetensors but pytorch_model.bin",
    ),
    "cut in data": (lambda p: (p / SINGLE).write_bytes((p / SINGLE).read_bytes()[:-9]), "truncated"),
    "cut in header": (lambda p: (p / SINGLE).write_bytes((p / SINGLE).read_bytes()[:40]), "truncated"),
    "almost empty": (lambda p: (p / SINGLE).write_bytes(b"abc"), "truncated"),
    "longer": (lambda p: (p / SINGLE).write_bytes((p / SINGLE).read_bytes() + b"x"), "1 bytes after its last tensor"),
    "header no JSON": (lambda p: (p / SINGLE).write_bytes((5).to_bytes(8, "little") + b"{nope"), "header"),
    "no dtype": (lambda p: rewrite_header(p / SINGLE, lambda h: h["a.weight"].pop("dtype")), "unknown dtype"),
    "shape lies": (
        lambda p: rewrite_header(p / SINGLE, lambda h: h["a.weight"].update(shape=[6, 5])),
        "tensor 'a.weight': 96 bytes do not hold F32",
    ),
    "negative shape": (
        lambda p: rewrite_header(p / SINGLE, lambda h: h["a.weight"].update(shape=[-6, 4])),
        "malformed shape",
    ),
    "overlap": (
        lambda p: rewrite_header(p / SINGLE, lambda h: h["a.weight"].update(data_offsets=h["d.ids"]["data_offsets"])),
        "a.weight",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_directories(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "model")
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(XllmError) as e:
        Checkpoint.open(path)
    assert e.value.kind == "checkpoint" and message in e.value.message and str(path) in e.value.where


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    def broken(name: str, change: Any) -> XllmError:
        path = write(tmp_path / name, 3)
        change(path)
        with pytest.raises(XllmError) as e:
            Checkpoint.open(path)
        assert e.value.kind == "checkpoint"
        return e.value

    def edit(path: Path, **entries: str) -> None:
        index = json.loads((path / INDEX).read_text())
        index["weight_map"].update(entries)
        (path / INDEX).write_text(json.dumps(index))

    second = "model-00002-of-00003.safetensors"
    gone = broken("gone", lambda p: (p / second).unlink())
    assert second in gone.message and "b.half" in gone.message
    assert "'x.y' is not in" in broken("absent", lambda p: edit(p, **{"x.y": second})).message
    assert "not a file name" in broken("escape", lambda p: edit(p, **{"x.y": "../other.safetensors"})).message
    twice = broken("twice", lambda p: save_file({"b.half": torch.ones(3)}, p / "model-00001-of-00003.safetensors"))
    assert "both in" in twice.message
    assert "no weight_map" in broken("map", lambda p: (p / INDEX).write_text("{}")).message


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(XllmError) as e:
        Checkpoint.open(tmp_path / "nowhere")
    assert e.value.kind == "checkpoint"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    path = write(tmp_path)
    weights = tensors()
    weights["c.bf16"][3, 1] = bad
    save_file(weights, path / SINGLE)
    checkpoint = Checkpoint.open(path)
    slots = {"c.bf16": Slot("c.bf16", "f32", (5, 2), key="c.bf16")}
    with pytest.raises(XllmError) as e:
        WeightSource(slots, checkpoint)["c.bf16"]
    assert e.value.kind == "checkpoint" and "[3, 1]" in e.value.message and SINGLE in e.value.where
    assert not np.isfinite(WeightSource(slots, checkpoint, check_finite=False)["c.bf16"][3, 1])


def test_values_too_large_for_the_compiled_dtype(tmp_path: Path) -> None:
    path = write(tmp_path)
    save_file({"big": torch.full((2,), 3.4e38)}, path / SINGLE)
    with pytest.raises(XllmError, match="too large for bf16"):
        WeightSource({"big": Slot("big", "bf16", (2,), key="big")}, Checkpoint.open(path))["big"]


def test_first_not_finite_looks_at_every_chunk() -> None:
    x = np.zeros(1000, np.float32)
    assert first_not_finite(x, chunk=64) is None
    x[777] = np.nan
    assert first_not_finite(x, chunk=64) == 777


def test_shape_of_the_model_and_of_the_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path))
    with pytest.raises(XllmError, match=r"shape \[6, 4\], the model wants \[4, 6\]"):
        match(Slot("a.weight", "f32", (4, 6), key="a.weight"), checkpoint)
    with pytest.raises(XllmError, match="stored as I64"):
        match(Slot("d.ids", "f32", (7,), key="d.ids"), checkpoint)


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path))
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(XllmError) as e:
        for name in checkpoint.tensors:
            checkpoint.read(name)
    assert e.value.kind == "checkpoint" and "cut off" in e.value.message
