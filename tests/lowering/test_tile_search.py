"""Register tiles chosen by measurement: the candidates, the choice, the file of choices; and no bit depends on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from levels import tiered

from xllm_compiler.artifact.cpu_isa import machine_isas, machine_name
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.linear.linear import Linear, LinearGlu, tile_height
from xllm_compiler.kernels.tir.linear.vocab import LinearBlockMax
from xllm_compiler.kernels.tir.native.objects import KernelObjects
from xllm_compiler.kernels.tir.native.standalone import Standalone
from xllm_compiler.kernels.tir.rows.norms import RmsNorm
from xllm_compiler.lowering.cpu import tile_search
from xllm_compiler.lowering.cpu.tile_search import TileChoices, candidates, quickest
from xllm_compiler.weight_formats import parse_format

WIDE = ISAS["avx512_bf16"]
HERE = ISAS[[isa for isa in machine_isas() if not ISAS[isa].has_amx][-1]]
LAYER = Linear(96, 80, "bf16", "bf16", weights="q4g32")


def test_candidates_differ_and_begin_with_the_rule() -> None:
    found = candidates(LAYER, WIDE)
    heights = [tile_height(one, WIDE) for one in found.values()]
    assert next(iter(found)) is None and found[None] == LAYER
    assert len(heights) == len(set(heights)) > 2
    assert (
        candidates(LinearBlockMax(96, 80, "bf16"), WIDE).keys()
        == candidates(Linear(96, 80, "bf16", "f32"), WIDE).keys()
    )


def test_another_tile_must_be_clearly_quicker() -> None:
    assert quickest({None: [1.0, 2.0], 4: [0.9, 1.9], 12: [0.8, 1.9]}) == 12
    assert quickest({None: [1.0, 2.0], 4: [0.98, 1.99]}) is None  # noise
    assert quickest({None: [1.0, 2.0], 4: [0.7, 3.0]}) is None  # quick at few rows, slow at many


def _is_its_own(form: str, isa: str) -> bool:
    """Whether the level does not share another level's code."""
    return Linear(96, 80, "bf16", "bf16", weights=form).level(ISAS[isa]) == ISAS[isa]


@pytest.mark.parametrize(
    "form, isa",
    [
        case
        for form in ("", "q8", "q4g32", "q4grid32", "wq8", "wq4g32")
        for case in tiered([(form, isa) for isa in machine_isas() if _is_its_own(form, isa)])
    ],
)
def test_no_bit_depends_on_the_tile(form: str, isa: str) -> None:
    k, n, rows = 96, 80, 19
    rng = np.random.default_rng(0)
    layer = Linear(k, n, "bf16", "bf16", weights=form)
    x: list[Any] = [rng.standard_normal((rows, k)).astype(ml_dtypes.bfloat16)]
    if form:
        q = parse_format(form.removeprefix("w"))
        weight = np.full(q.shape(n, k), 0x3C, np.uint8)
        values = rng.integers(0, 256, weight.shape, np.uint8)
        body = np.arange(weight.shape[1]) % q.group_bytes(k) >= q.header_bytes
        weight[:, body] = values[:, body]
        if not form.startswith("w"):
            whole = rng.integers(-127, 128, (rows, q.padded(k)), np.int8)
            sums = whole.reshape(rows, q.groups(k), -1).sum(-1, dtype=np.int32)
            x = [whole, rng.uniform(0.01, 0.02, rows).astype(np.float32), sums]
    else:
        weight = rng.standard_normal((2, k // 2, 64, 2)).astype(ml_dtypes.bfloat16)
    results = set()
    for one in candidates(layer, ISAS[isa]).values():
        y = np.zeros((rows, n), ml_dtypes.bfloat16)
        Standalone(one, ISAS[isa])(*x, weight, y, rows, team=2)
        assert np.isfinite(y.astype(np.float32)).all() and y.any()
        results.add(y.tobytes())
    assert len(results) == 1


def test_what_was_chosen_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real search, on a layer of each kind; afterwards nothing is tried again, by us or by another process."""
    monkeypatch.setattr(tile_search, "CANDIDATES", (4, 12))
    layers = [LAYER, LinearGlu(64, 32, "bf16"), LinearBlockMax(64, 70, "bf16", weights="wq8")]
    kernels = [*layers, RmsNorm(64, "bf16", 1e-6), LAYER]
    path = tmp_path / "deep" / "tiles.json"
    first = TileChoices(path, "this machine").apply(kernels, HERE, KernelObjects(), lambda what, done: None)
    assert list(first) == layers
    for layer, chosen in first.items():
        assert chosen == dataclasses.replace(layer, most_rows=chosen.most_rows)
        assert chosen in candidates(layer, HERE).values()

    def never(*args: Any) -> Any:
        raise AssertionError("searched again")

    monkeypatch.setattr(tile_search, "search", never)
    assert TileChoices(path, "this machine").apply(kernels, HERE, KernelObjects(), lambda what, done: None) == first
    with pytest.raises(AssertionError, match="searched again"):
        TileChoices(path, "another machine").apply(kernels, HERE, KernelObjects(), lambda what, done: None)


def test_whoever_chose_first_is_right(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    choices = TileChoices(path, "m")
    assert choices.add(WIDE, {"a": 4, "b": None}) == {"a": 4, "b": None}
    assert choices.add(WIDE, {"a": 8, "c": 12}) == {"a": 4, "b": None, "c": 12}
    assert TileChoices(path, "other").add(WIDE, {"a": 16}) == {"a": 16}
    assert choices.known(WIDE) == {"a": 4, "b": None, "c": 12}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"m": []}', '{"m": {"avx512_bf16": {"a": "x"}}}'])
def test_a_damaged_file_knows_nothing_and_is_replaced(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(damage)
    choices = TileChoices(path, "m")
    assert choices.known(WIDE) == {}
    assert choices.add(WIDE, {"a": 4}) == {"a": 4}
    assert json.loads(path.read_text())["m"]["avx512_bf16"] == {"a": 4}


def test_matrix_tiles_have_one_size(tmp_path: Path) -> None:
    choices = TileChoices(tmp_path / "tiles.json", "m")
    assert choices.apply([LAYER], ISAS["amx"], KernelObjects(), lambda what, done: None) == {}


def test_machine_name() -> None:
    text = "processor\t: 0\nmodel name\t: Chip X\nmodel\t\t: 17\n\nprocessor\t: 1\nmodel name\t: Chip Y\n"
    assert machine_name(text) == "model name Chip X, model 17"
    assert machine_name("") and machine_name()
