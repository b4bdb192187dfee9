"""Checkpoints that were quantized elsewhere. The packings are written here once more, from the formats' own
descriptions and value by value, and what is loaded is compared with transformers on the weights that they stand for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.frontend.conftest import Make
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.quantized_config import QuantizedConfig, Scheme
from xllm_compiler.frontend.reference import load_reference, reference_logits, stepped_logits
from xllm_compiler.frontend.trace import Traced, trace_checkpoint
from xllm_compiler.interp import run_value
from xllm_compiler.ir.ops import Dequantize, Linear
from xllm_compiler.options import CompileOptions, resolve
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, torch.Tensor]
# One module: weight [out, in] -> what is stored for it, and the weight that this stands for.
Round = Callable[[str, Array, np.random.Generator], tuple[Tensors, Array]]

FUSIONS = "import-clean,fix(fold,cse,dce,canonicalise),fuse-glu,fuse-qkv,fuse-epilogue,fix(fold,cse,dce)"
PROMPTS = [[5, 17, 99, 200, 3], [11, 12, 13, 14, 15, 16, 17, 18, 19], [301]]


def pack(values: Array, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Values [rows, n] to i32 [rows, ceil(n * bits / 32)]; the i-th lowest lane of a word is value order[i] of its."""
    per = 32 // bits
    lanes = order or tuple(range(per))
    rows, n = values.shape
    words = np.zeros((rows, -(-n // per)), np.int64)
    for word in range(words.shape[1]):
        for lane in range(per):
            column = word * per + lanes[lane]
            if column < n:
                words[:, word] |= values[:, column].astype(np.int64) << (bits * lane)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def t(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def integers(w: Array, bits: int, group: int, zeros: bool, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Any integers u8 [out, in], f16 scales and zero points [out, groups] near w."""
    out, in_ = w.shape
    count = in_ // group
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    scales = (np.abs(w).reshape(out, count, group).max(axis=2) / (middle - 1)).astype(np.float16)
    points = rng.integers(middle - 3, middle + 3, (out, count)) if zeros else np.full((out, count), middle)
    wide = np.repeat(scales.astype(np.float64), group, 1)
    values = np.clip(np.rint(w / wide) + np.repeat(points, group, 1), 0, top)
    return values.astype(np.uint8), scales, points.astype(np.uint8)


def meant(values: Array, scales: Array, points: Array, group_of: Array) -> Array:
    return (values.astype(np.float64) - points[:, group_of]) * scales.astype(np.float64)[:, group_of]


def awq(group: int) -> Round:
    def store(module: str, w: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        q, s, z = integers(w, 4, group, True, rng)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        stored = {
            f"{module}.qweight": pack(q.T, 4, order),
            f"{module}.qzeros": pack(z.T, 4, order),
            f"{module}.scales": t(s.T),
        }
        return stored, meant(q, s, z, np.arange(w.shape[1]) // group)

    return store


def gptq(bits: int, group: int, *, v1: bool = True, zeros: bool = False, act_order: bool = False) -> Round:
    def store(module: str, w: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        q, s, z = integers(w, bits, group, zeros, rng)
        group_of = np.arange(w.shape[1]) // group
        if act_order:
            group_of = rng.permutation(group_of)
        stored = {
            f"{module}.qweight": t(pack(q, bits).numpy().T),
            f"{module}.qzeros": pack((z.T.astype(np.int64) - v1) & ((1 << bits) - 1), bits),
            f"{module}.scales": t(s.T),
            f"{module}.g_idx": t(group_of.astype(np.int32)),
        }
        return stored, meant(q, s, z, group_of)

    return store


def compressed_int8(module: str, w: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
    scale = torch.from_numpy(np.abs(w).max(axis=1, keepdims=True) / 127).to(torch.bfloat16)
    q = np.clip(np.rint(w / scale.double().numpy()), -128, 127).astype(np.int8)
    return {f"{module}.weight": t(q), f"{module}.weight_scale": scale}, q * scale.double().numpy()


def compressed_int4(group: int, *, zeros: bool = False, narrow: bool = True) -> Round:
    def store(module: str, w: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        q, s, z = integers(w, 4, group, zeros, rng)
        scales = torch.from_numpy(s).to(torch.bfloat16) if narrow else torch.from_numpy(s.astype(np.float32) * 1.0001)
        stored = {
            f"{module}.weight_packed": pack(q, 4),
            f"{module}.weight_scale": scales,
            f"{module}.weight_shape": torch.tensor(w.shape),
        }
        if zeros:  # packed along out
            stored[f"{module}.weight_zero_point"] = t(pack(z.T, 4).numpy().T)
        return stored, meant(q, scales.double().numpy(), z, np.arange(w.shape[1]) // group)

    return store


def fp8(block: tuple[int, int] | None, scale_name: str = "weight_scale_inv") -> Round:
    def store(module: str, w: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        high, wide = block or w.shape
        rows, columns = -(-w.shape[0] // high), -(-w.shape[1] // wide)
        scales = rng.uniform(0.5, 2, (rows, columns)).astype(np.float32) * np.float32(np.abs(w).max() / 448)
        each = np.repeat(np.repeat(scales, high, 0), wide, 1)[: w.shape[0], : w.shape[1]]
        q = np.clip(w / each, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        stored = torch.from_numpy(q.view(np.uint8).copy()).view(torch.float8_e4m3fn)
        found = t(scales) if block else t(scales.reshape(()))
        return {f"{module}.weight": stored, f"{module}.{scale_name}": found}, q.astype(np.float64) * each

    return store


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def int4(group: int, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}


# name -> the stored modules, quantization_config, whether the layers keep their integers
CASES: dict[str, tuple[Round, dict[str, Any], bool]] = {
    "awq": (awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, True),
    "gptq4": (gptq(4, 32), {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, True),
    "gptq4-asym": (
        gptq(4, 32, zeros=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq"},
        True,
    ),
    "gptq8-v2": (
        gptq(8, 16, v1=False, zeros=True),
        {"quant_method": "gptq", "bits": 8, "group_size": 16, "sym": False, "checkpoint_format": "gptq_v2"},
        True,
    ),
    "gptq4-desc_act": (
        gptq(4, 32, act_order=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        False,
    ),
    "w8a8": (compressed_int8, compressed("int-quantized", INT8, TOKEN), True),
    "w8a16": (compressed_int8, compressed("naive-quantized", INT8), True),
    "w4a16": (compressed_int4(32), compressed("pack-quantized", int4(32)), True),
    "w4a16-asym": (compressed_int4(32, zeros=True), compressed("pack-quantized", int4(32, False)), True),
    "w4a16-wide-scales": (compressed_int4(32, narrow=False), compressed("pack-quantized", int4(32)), False),
    "w4a16-odd-groups": (compressed_int4(8), compressed("pack-quantized", int4(8)), False),
    "fp8-block": (fp8((32, 48)), {"quant_method": "fp8", "weight_block_size": [32, 48]}, False),
    "fp8-tensor": (fp8(None), {"quant_method": "fp8", "activation_scheme": "static"}, False),
    "fp8-compressed": (
        fp8(None, "weight_scale"),
        compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        False,
    ),
}


def quantize(path: Path, store: Round, config: dict[str, Any], seed: int = 0) -> dict[str, Array]:
    """Rounds the layers of the checkpoint in `path`, and puts the one that it stands for beside it, into `plain`."""
    rng = np.random.default_rng(seed)
    tensors, plain, weights = {}, {}, {}
    for name, tensor in sorted(load_file(path / "model.safetensors").items()):
        plain[name] = tensors[name] = tensor
        if name.endswith("_proj.weight"):
            del tensors[name]
            stored, value = store(name.removesuffix(".weight"), tensor.double().numpy(), rng)
            tensors.update(stored)
            weights[name] = value
            plain[name] = t(value.astype(np.float32))
    settings = json.loads((path / "config.json").read_text())
    (path / "plain").mkdir()
    save_file(plain, path / "plain" / "model.safetensors", {"format": "pt"})
    (path / "plain" / "config.json").write_text(json.dumps(settings))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return weights


def layers(traced: Traced) -> list[Linear]:
    return [op for op in traced.module.func("step").ops if isinstance(op, Linear) and op.w.shape[0] != 384]


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_the_model_that_it_stands_for(case: str, make: Make, limits: dict[str, Any]) -> None:
    store, config, kept = CASES[case]
    path = make("llama")
    weights = quantize(path, store, config)
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    found = layers(traced)
    assert len(found) == 14 and all(isinstance(op.w.op, Dequantize) == kept for op in found)
    assert any("dequantized" in note for note in traced.notes) != kept
    by_value = {run_value(op.w, traced.weights).astype(np.float64).tobytes(): op for op in found}
    wanted = {w.astype(np.float32).astype(np.float64).tobytes(): name for name, w in weights.items()}
    assert set(by_value) == set(wanted), "every weight is that of the checkpoint, exactly"
    model = load_reference(path / "plain")
    for name, weight in load_reference(path).named_parameters():
        assert torch.equal(weight, model.get_parameter(name))
    for got, prompt in zip(stepped_logits(traced.module, traced.weights, PROMPTS), PROMPTS, strict=True):
        np.testing.assert_allclose(got, reference_logits(model, prompt), atol=1e-4)


@pytest.mark.parametrize("case", ["awq", "w4a16", "w8a8"])
def test_fusions_stack_integers(case: str, make: Make, limits: dict[str, Any]) -> None:
    path = make("llama")
    quantize(path, *CASES[case][:2])
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    run_pipeline(FUSIONS, traced.module, PassContext())
    step = traced.module.func("step")
    kinds = [op.name for op in step.ops if op.name in ("nn.linear", "nn.linear_glu")]
    assert kinds == ["nn.linear", "nn.linear", "nn.linear_glu", "nn.linear"] * 2 + ["nn.linear"]
    assert sum(isinstance(op, Dequantize) for op in step.ops) == 8
    model = load_reference(path / "plain")
    for got, prompt in zip(stepped_logits(traced.module, traced.weights, PROMPTS), PROMPTS, strict=True):
        np.testing.assert_allclose(got, reference_logits(model, prompt), atol=1e-4)


def test_different_forms_stay_apart(make: Make, limits: dict[str, Any]) -> None:
    path = make("llama")

    def mixed(module: str, w: Array, rng: np.random.Generator) -> tuple[Tensors, Array]:
        four = module.endswith(("q_proj", "gate_proj"))
        return gptq(4 if four else 8, 32)(module, w, rng)

    dynamic = {r".*\.(q|gate)_proj": {"bits": 4}}
    quantize(path, mixed, {"quant_method": "gptq", "bits": 8, "group_size": 32, "dynamic": dynamic})
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    context = PassContext()
    run_pipeline(FUSIONS, traced.module, context)
    assert len([r for r in context.remarks if "in different forms" in str(r)]) == 4
    model = load_reference(path / "plain")
    for got, prompt in zip(stepped_logits(traced.module, traced.weights, PROMPTS), PROMPTS, strict=True):
        np.testing.assert_allclose(got, reference_logits(model, prompt), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"bits": 4}, "does not name"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        (compressed("nvfp4-pack-quantized", int4(16)), "'nvfp4-pack-quantized'"),
        (compressed("pack-quantized", {**int4(32), "num_bits": 2}), "2 bits"),
    ],
)
def test_what_cannot_be_read_is_named(config: dict[str, Any], words: str, make: Make, limits: dict[str, Any]) -> None:
    path = make("llama")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    with pytest.raises(XllmError) as e:
        trace_checkpoint(Checkpoint.open(path), **limits)
    assert e.value.kind == "unsupported" and words in e.value.message and "config.json" in e.value.where


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("case", "part", "value", "words"),
    [
        ("awq", "scales", None, "is missing"),
        ("awq", "qweight", None, "no quantized weight"),
        ("awq", "qzeros", torch.zeros(3, 5, dtype=torch.int32), "[3, 5]"),
        ("gptq4", "qweight", torch.zeros(4, 160, dtype=torch.int32), "[160, 64]"),
        ("gptq4", "qweight", torch.zeros(8, 160), "F32"),
        ("gptq4", "g_idx", torch.full((64,), 7, dtype=torch.int32), "outside 0 .. 1"),
        ("w8a8", "weight_scale", None, "is missing"),
        ("w8a8", "weight", torch.zeros(7, 64, dtype=torch.int8), "[160, 64]"),
        ("w4a16", "weight_shape", None, "is missing"),
        ("w4a16", "weight_shape", torch.tensor([160, 80]), "[160, 64]"),
        ("w4a16", "weight_packed", torch.zeros(160, 7, dtype=torch.int32), "[160, 7]"),
        ("fp8-block", "weight_scale_inv", torch.ones(2, 2), "[5, 2]"),
        ("fp8-block", "weight", torch.zeros(160, 64, dtype=torch.int8), "8-bit floats"),
    ],
)
def test_damage_is_named(
    case: str, part: str, value: torch.Tensor | None, words: str, make: Make, limits: dict[str, Any]
) -> None:
    path = make("llama")
    quantize(path, *CASES[case][:2])
    tensors = load_file(path / "model.safetensors")
    tensors.pop(f"{NAME}.{part}")
    if value is not None:
        tensors[f"{NAME}.{part}"] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(XllmError) as e:
        trace_checkpoint(Checkpoint.open(path), **limits)
    assert e.value.kind == "checkpoint" and NAME in e.value.message and words in e.value.message, e.value


def test_groups_divide_rows(make: Make, limits: dict[str, Any]) -> None:
    path = make("llama")
    quantize(path, awq(32), {**CASES["awq"][1], "group_size": 48})
    with pytest.raises(XllmError, match="groups of 48 do not divide its 160 columns") as e:
        trace_checkpoint(Checkpoint.open(path), **limits)
    assert e.value.kind == "checkpoint" and "proj.weight" in e.value.message


def test_layers_that_are_not_linear(make: Make, limits: dict[str, Any]) -> None:
    path = make("gpt2", n_embd=64, n_layer=2, n_head=4, n_inner=64)
    tensors = load_file(path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("h.0.mlp.c_fc.weight"))
    stored, _ = compressed_int8(
        name.removesuffix(".weight"), tensors.pop(name).double().numpy(), np.random.default_rng()
    )
    save_file({**tensors, **stored}, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    config = compressed("int-quantized", {**INT8}, TOKEN)
    (path / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    with pytest.raises(XllmError, match="Conv1D") as e:
        trace_checkpoint(Checkpoint.open(path), **limits)
    assert e.value.kind == "unsupported" and "c_fc" in e.value.message


def test_the_checkpoint_says_what_becomes_of_inputs(make: Make) -> None:
    path = make("llama")
    settings = json.loads((path / "config.json").read_text())
    wanted = {
        "@cpu-rows": [CASES["w8a8"][1], compressed("pack-quantized", int4(32), TOKEN)],
        "@cpu": [
            CASES["w8a16"][1],
            CASES["awq"][1],
            CASES["fp8-block"][1],
            compressed("int-quantized", INT8, {**TOKEN, "dynamic": False, "strategy": "tensor"}),
            compressed("int-quantized", INT8, {**TOKEN, "symmetric": False}),
        ],
    }
    for pipeline, configs in wanted.items():
        for config in configs:
            (path / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
            assert resolve(CompileOptions(), Checkpoint.open(path)).pipeline == pipeline, config


def test_a_damaged_pattern(make: Make, limits: dict[str, Any]) -> None:
    path = make("llama")
    config = compressed("pack-quantized", int4(32))
    config["config_groups"]["group_0"]["targets"] = ["re:("]
    quantize(path, compressed_int4(32), config)
    with pytest.raises(XllmError, match=r"pattern '\(' is damaged") as e:
        trace_checkpoint(Checkpoint.open(path), **limits)
    assert e.value.kind == "checkpoint"


@pytest.mark.parametrize("pattern", [r"(a|aa)+\b!!$", "(.*?a){20}P", r"(aa|a)+\b!!$"])
def test_a_pattern_that_would_take_years(pattern: str) -> None:
    scheme = Scheme(4, 32)
    config = QuantizedConfig("gptq", "config.json", scheme, overrides=((pattern, scheme),))
    started = time.perf_counter()
    with pytest.raises(XllmError, match="takes more than") as caught:
        config.of("a" * 60)
    assert caught.value.kind == "checkpoint" and time.perf_counter() - started < 9  # processor seconds are what counts
