"""The calibration of whole modules: what is replaced, what each layer saw, what it costs and loses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xllm_compiler.analysis.weights import param_names
from xllm_compiler.calibration import calibrate as calibration
from xllm_compiler.calibration.calibrate import Calibrated, calibrate
from xllm_compiler.calibration.rounding import DAMP
from xllm_compiler.calibration.text import FOLDER, calibration_ids, pieces
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.trace import Traced, trace_checkpoint
from xllm_compiler.interp import run_value
from xllm_compiler.interp.run import run_ranks
from xllm_compiler.ir import quant
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module, Value
from xllm_compiler.ir.ops import Dequantize, Embedding, Linear, Param, QuantLinear, QuantWeight
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.semantics import Array
from xllm_compiler.ir.verify import verify
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.passes.quantize.forms import parse_form
from xllm_compiler.quant_eval.replay import step_inputs
from xllm_compiler.quant_eval.text import WINDOW
from xllm_compiler.quant_eval.text import pieces as held_out
from xllm_compiler.targets import target_class
from xllm_compiler.weight_formats import parse_format

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"


def traced(folder: Path, functions: tuple[str, ...] = ("step",), **settings: object) -> Traced:
    return trace_checkpoint(
        Checkpoint.open(write_random_checkpoint("llama", folder / "m", settings={**TINY, **settings}, seed=1)),
        dtype="f32",
        max_model_len=64,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        max_num_logits=1024,
        functions=functions,
    )


def quantized(model: Traced, form: str) -> Module:
    module, target = clone_module(model.module), target_class("cpu")()
    run_pipeline(",".join(target.quantized(parse_form(form))), module, PassContext(target.capabilities))
    return module


def calibrated(model: Traced, module: Module, folder: Path) -> Calibrated:
    return calibrate(module, model.weights, None, model.info.vocab_size, 64, folder)


def weights_of(module: Module) -> list[QuantWeight]:
    return [op for func in module.funcs.values() for op in func.ops if isinstance(op, QuantWeight)]


def layers_weights(module: Module) -> list[QuantWeight]:
    """All but those that are only looked up in."""
    looked_up = {op.w.op for func in module.funcs.values() for op in func.ops if isinstance(op, Embedding)}
    return [
        op
        for op in weights_of(module)
        if not all(user in looked_up and len(user.result.users) == 1 for user in op.results[0].users)
    ]


@pytest.mark.parametrize("form", ["int8", "int4", "w8a8-g32", "w4a8-g32-asym", "w4a16", "w8a16"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_becomes_params(tmp_path: Path, form: str, tied: bool) -> None:
    model = traced(tmp_path, tie_word_embeddings=tied)
    module = quantized(model, form)
    wanted = [tuple(param_names(op.w)) for op in layers_weights(module)]
    types = {str(r.type) for op in layers_weights(module) for r in op.results}
    made = calibrated(model, module, tmp_path)
    verify(module)
    assert not layers_weights(module) and made.kept == ()
    assert len(weights_of(module)) == (
        tied and "a16" not in form
    )  # a table that was tied and is rotated: looked up in only
    assert sorted(layer.names for layer in made.layers) == sorted(wanted)
    assert all(0 < layer.error <= layer.plain < 0.1 for layer in made.layers)
    assert sum(layer.error for layer in made.layers) < 0.95 * sum(layer.plain for layer in made.layers)
    new = [name for name in made.params if name not in model.weights]
    assert {name.rpartition(":")[2] for name in new} <= {"values", "scales", "zeros"}
    text = print_module(module)
    assert types <= {line.rpartition(" : ")[2] for line in text.splitlines() if "param(" in line}
    assert print_module(parse_module(text, "m")) == text
    assert all(isinstance(made.params[name].base, np.memmap) for name in new)


@pytest.mark.parametrize("form", ["int4", "w8a8-g32", "w4a16"])
def test_a_layer_is_rounded_for_what_it_sees(tmp_path: Path, form: str) -> None:
    """Its inputs are read off a run of the calibrated module by the interpreter: weights before it are rounded ones."""
    model = traced(tmp_path)
    module = quantized(model, form)
    weights = {id(op): quant.rotate(run_value(op.w, model.weights), op.rotate) for op in weights_of(module)}
    layers = [op for op in module.func("step").ops if isinstance(op, (Linear, QuantLinear))]
    layer = layers[2]  # the first down projection: after a nonlinearity tokens differ in size
    stored = layer.values.op if isinstance(layer, QuantLinear) else layer.w.op.values.op  # type: ignore[union-attr]
    assert isinstance(stored, QuantWeight)
    w, names, format = weights[id(stored)].astype(np.float64), tuple(param_names(stored.w)), parse_format(stored.format)
    made = calibrated(model, module, tmp_path)
    seen: dict[Value, Array] = {}

    def watch(value: Value, rank: int, x: Array) -> Array:
        seen[value] = x
        return x

    ids = calibration_ids(None, model.info.vocab_size, 64, 4 * 160)
    sizes, inputs = step_inputs(module, ids)
    named = {arg.name: inputs[arg] for arg in module.func("step").args}
    run_ranks(module, "step", [named], [made.params], sizes, watch=watch)
    x = seen[layer.x].astype(np.float64)
    if isinstance(layer, QuantLinear):
        x *= np.repeat(seen[layer.scale], 32, axis=1) if form == "w8a8-g32" else seen[layer.scale][:, None]
        parts = [run_value(v, made.params) for v in (layer.values, layer.scales)]
    else:
        assert isinstance(layer.w.op, Dequantize)
        parts = [run_value(v, made.params) for v in (layer.w.op.values, layer.w.op.scales)]
    x = x[:, : w.shape[1]]
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True))

    def size(e: Array) -> float:
        return float(np.square(x @ e.T).sum() / len(x) + DAMP * np.square(e).sum())

    plain = quant.quantize_weight(w.astype(np.float32), format)
    errors = [
        w - quant.dequantize_weight(values, scales, None, format, np.float64) for values, scales in (plain, parts)
    ]
    found = next(each for each in made.layers if each.names == names)
    assert [found.plain, found.error] == pytest.approx([size(e) / size(w) for e in errors], rel=1e-2)


def test_both_functions_read_the_same_integers(tmp_path: Path) -> None:
    model = traced(tmp_path, ("step", "embed"))
    module = quantized(model, "int8")
    calibrated(model, module, tmp_path)
    assert not weights_of(module)
    read = [
        {op.name_ for op in func.ops if isinstance(op, Param) and ":" in op.name_} for func in module.funcs.values()
    ]
    assert read[1] < read[0] and len(read[0] - read[1]) == 2  # the head's


def test_what_cannot_be_calibrated_is_rounded_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced(tmp_path)
    module = quantized(model, "int8")
    most = max(w.shape[0].value * w.shape[1].value ** 2 for w in (op.w for op in weights_of(module)))
    monkeypatch.setattr(calibration, "_LARGEST", most - 1)
    made = calibrated(model, module, tmp_path)
    assert len(made.kept) == len(weights_of(module)) > 0 and len(made.layers) > 0
    verify(module)
    monkeypatch.undo()
    broken = {name: model.weights[name] for name in model.weights}
    broken["model.norm.weight"] = np.full_like(broken["model.norm.weight"], np.inf)
    module = quantized(model, "w8a16")
    kept = calibrate(module, broken, None, model.info.vocab_size, 64, tmp_path).kept
    assert kept == ("lm_head.weight",)


def test_the_same_bytes_whatever_is_rounded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced(tmp_path)
    found = []
    for _ in range(2):
        module = quantized(model, "int4")
        made = calibrated(model, module, tmp_path)
        found.append({name: np.array(made.params[name]) for name in made.params if name not in model.weights})
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_nothing_to_round(tmp_path: Path) -> None:
    model = traced(tmp_path)
    module = quantized(model, "kv8")
    before = print_module(module)
    made = calibrated(model, module, tmp_path)
    assert made == Calibrated(model.weights, (), ()) and print_module(module) == before


def test_the_text_has_all_kinds_early_and_none_of_the_measured() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.txt")}
    texts = pieces()
    assert "".join(sorted(texts)) != "" and sum(map(len, texts)) == sum(map(len, files.values()))
    first = texts[: len(files)]
    assert len(files) >= 12 and all(any(piece in text for piece in first) for text in files.values())
    ids = calibration_ids(BUNDLED / "tokenizer.json", 4096, 2048, 1000)
    assert sum(map(len, ids)) == 1000 and max(map(len, ids)) == WINDOW
    assert max(map(len, calibration_ids(BUNDLED / "tokenizer.json", 4096, 40, 1000))) == 40
    for given in (None, BUNDLED / "tokenizer.json"):
        random = calibration_ids(given, 20, 64, 300)
        assert sum(map(len, random)) == 300 and all(each.max() < 20 for each in random)
    lines = {line.strip() for _, text in held_out() for line in text.splitlines() if len(line.strip()) > 60}
    assert lines and not any(line in text for line in lines for text in files.values())
