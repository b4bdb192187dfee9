"""Quantized checkpoints of other libraries: compressed-tensors rounds and packs, transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

from tests.frontend.conftest import Make
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.reference import reference_logits, stepped_logits
from xllm_compiler.frontend.trace import trace_checkpoint
from xllm_compiler.interp import run_value
from xllm_compiler.ir.ops import Dequantize

PROMPTS = [[5, 17, 99, 200, 3], [11, 12, 13, 14, 15, 16, 17, 18, 19], [301]]
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


def compress(path: Path, form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> None:
    """Rounds the layers of the checkpoint in `path` as the compressed-tensors library does."""
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(**weights),
        input_activations=quantization.QuantizationArgs(**inputs) if inputs else None,
    )
    compressor = base.BaseCompressor.get_value_from_registry(form)
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        tensors[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        del tensors[name]
        rows = tensor.reshape(tensor.shape[0], -1, weights.get("group_size") or tensor.shape[1])
        axes: Any = (0, 1, 2) if weights.get("strategy") == "tensor" else 2
        low, high = rows.amin(axes), rows.amax(axes)
        if weights.get("strategy") == "block":
            (a, b), (out, in_) = weights["block_structure"], tensor.shape
            blocks = tensor.reshape(out // a, a, in_ // b, b)
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        scale, zero = helpers.calculate_qparams(low, high, scheme.weights)
        state = {"weight": tensor, "weight_scale": scale.to(tensor.dtype), "weight_zero_point": zero}
        module = name.removesuffix("weight")
        stored = compressor.compress(state, scheme)
        tensors.update({module + part: v.contiguous() for part, v in stored.items() if v is not None})
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = json.loads(config.model_dump_json())
    (path / "config.json").write_text(json.dumps(settings))


def same(path: Path, limits: dict[str, Any], model: Any, kept: bool) -> None:
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    assert sum(isinstance(op, Dequantize) for op in traced.module.func("step").ops) == (14 if kept else 0)
    for got, prompt in zip(stepped_logits(traced.module, traced.weights, PROMPTS), PROMPTS, strict=True):
        want = reference_logits(model.eval(), prompt)
        np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize(
    ("form", "weights", "inputs", "kept"),
    [
        ("int-quantized", INT8, TOKEN, True),
        ("int-quantized", {**INT8, "strategy": "tensor"}, None, True),
        ("int-quantized", {**INT4, "num_bits": 8, "symmetric": True}, None, False),  # f32 scales of groups
        ("pack-quantized", {**INT8, "symmetric": False}, None, True),
        ("pack-quantized", {**INT4, "symmetric": True}, None, False),
        ("pack-quantized", {**INT4, "symmetric": False}, None, False),
        ("float-quantized", {**FP8, "strategy": "tensor"}, None, False),
        ("float-quantized", {**FP8, "strategy": "channel"}, None, False),
        ("float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 32]}, None, False),
    ],
)
def test_compressed_tensors(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, kept: bool, make: Make, limits: dict[str, Any]
) -> None:
    path = make("llama")
    compress(path, form, weights, inputs)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    same(path, limits, model, kept)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_with_narrow_scales(symmetric: bool, make: Make, limits: dict[str, Any]) -> None:
    """A bf16 checkpoint has bf16 scales, which f16 holds: weights stay in integers, and are those of the library."""
    path = make("llama", dtype="bfloat16")
    compress(path, "pack-quantized", {**INT4, "symmetric": symmetric}, None)
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    assert sum(isinstance(op, Dequantize) for op in traced.module.func("step").ops) == 14
    quantization = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=quantization)
    weights = dict(model.named_parameters())
    checked = 0
    for op in traced.module.func("step").ops:
        if isinstance(op, Dequantize):
            name = op.values.op.attrs["name"].removesuffix(":values")
            ours = run_value(op.result, traced.weights)
            assert torch.equal(torch.from_numpy(ours).to(torch.bfloat16), weights[name])
            checked += 1
    assert checked == 14


@pytest.mark.parametrize("block", [(32, 32), (16, 32)])
def test_fine_grained_fp8(block: tuple[int, int], make: Make, limits: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    path = make("llama")
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w = tensors[name]
        a, b = block
        blocks = w.reshape(w.shape[0] // a, a, w.shape[1] // b, b)
        scale = blocks.abs().amax((1, 3)) / 448
        q = (blocks / scale[:, None, :, None]).reshape(w.shape)
        tensors[name] = q.to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head"],
    }
    (path / "config.json").write_text(json.dumps(settings))
    quantization = FineGrainedFP8Config(dequantize=True, weight_block_size=block, modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", quantization_config=quantization
    )
    same(path, limits, model, kept=False)
