"""What cannot be translated is refused by name and line, never translated into something else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.frontend.conftest import Make
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend import attention
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.rows import check_rows
from xllm_compiler.frontend.trace import trace_checkpoint
from xllm_compiler.ir.parser import parse_module

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}


def refusal(family: str, limits: dict[str, Any], **settings: Any) -> XllmError:
    with pytest.raises(XllmError) as e:
        trace_checkpoint(AutoConfig.for_model(family, **{**SIZES, **settings}), **limits)
    return e.value


def test_experts_name_the_operation_and_the_line(limits: dict[str, Any]) -> None:
    e = refusal("mixtral", limits, num_local_experts=4)
    assert e.kind == "unsupported" and "aten." in e.message and "modeling_mixtral.py:" in e.where


def test_attention_biases_are_not_ignored(limits: dict[str, Any]) -> None:
    e = refusal("bloom", limits, n_layer=2, n_head=4)
    assert e.kind == "unsupported" and "mask" in e.message and "modeling_bloom.py:" in e.where


def test_state_space_models(limits: dict[str, Any]) -> None:
    e = refusal("mamba", limits, state_size=4, expand=1)
    assert e.kind == "unsupported"


def test_bidirectional_models(limits: dict[str, Any]) -> None:
    e = refusal("bert", limits)
    assert e.kind == "unsupported" and "causal" in e.message


def test_encoder_decoder_models(limits: dict[str, Any]) -> None:
    assert "encoder-decoder" in refusal("blenderbot", limits, d_model=32, decoder_layers=1).message


def test_multimodal_models(limits: dict[str, Any]) -> None:
    with pytest.raises(XllmError, match="multimodal"):
        trace_checkpoint(AutoConfig.for_model("llama4"), **limits)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_length(kind: str, limits: dict[str, Any]) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    settings: dict[str, Any] = {}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
        settings["original_max_position_embeddings"] = 64
    family = "phi3" if kind == "longrope" else "llama"
    config = AutoConfig.for_model(family, **{**SIZES, **settings, "rope_parameters": rope, "pad_token_id": 0})
    trace_checkpoint(config, **{**limits, "max_model_len": 64})  # never long enough to change
    if kind == "longrope":
        with pytest.raises(XllmError) as e:
            trace_checkpoint(config, **{**limits, "max_model_len": 65})
        assert "longrope" in e.value.message and "64" in e.value.help


def test_lengths_and_limits(limits: dict[str, Any]) -> None:
    assert refusal("llama", {**limits, "max_model_len": 129}).kind == "option"
    assert refusal("llama", {**limits, "max_model_len": 0}).kind == "option"
    assert refusal("llama", {**limits, "max_num_seqs": 0}).kind == "option"
    assert refusal("llama", {**limits, "dtype": "int8"}).kind == "option"


def test_configs_that_need_foreign_code_or_are_unknown(make: Make, limits: dict[str, Any]) -> None:
    path = make("llama")
    config = json.loads((path / "config.json").read_text())
    cases = {
        "unsupported": [
            {"model_type": "nope"},
            {"model_type": "nope", "auto_map": {"AutoModelForCausalLM": "modeling_nope.Nope"}},
            {"quantization_config": {"quant_method": "hqq"}},
        ],
        "checkpoint": [
            {"model_type": None},
            {"num_attention_heads": "many"},
            {"quantization_config": {"quant_method": "fp8"}},
        ],
    }
    for kind, changes in cases.items():
        for change in changes:
            (path / "config.json").write_text(json.dumps({**config, **change}))
            with pytest.raises(XllmError) as e:
                trace_checkpoint(Checkpoint.open(path), **limits)
            assert e.value.kind == kind and "config.json" in e.value.where, e.value
            assert ("never run" in e.value.message) == ("auto_map" in change)


def test_weights_and_config_that_disagree(make: Make, limits: dict[str, Any]) -> None:
    path = make("llama")
    weights = load_file(path / "model.safetensors")

    def broken(change: dict[str, torch.Tensor | None]) -> XllmError:
        kept = {k: v for k, v in {**weights, **change}.items() if v is not None}
        save_file(kept, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(XllmError) as e:
            trace_checkpoint(Checkpoint.open(path), **limits)
        assert e.value.kind == "checkpoint"
        return e.value

    name = "model.layers.1.mlp.up_proj.weight"
    missing = broken({name: None})
    assert name in missing.message and "missing" in missing.message
    shaped = broken({name: torch.zeros(3, 5)})
    assert name in shaped.message and "[3, 5]" in shaped.message and "model.safetensors" in shaped.where


# ---------------------------------------------------------------------------------------------------- rows


HEAD = "xir 1 stage=graph\ndim N in [1, 64]\ndim S in [0, 8]\n"


@pytest.mark.parametrize(
    ("body", "returns", "message"),
    [
        ("%y = t.reduce(%x, kind=sum, axes=[1]) : f32[1, 8]", "f32[1, 8]", "combines values of different tokens"),
        ("%y = t.cumsum(%x, axis=1) : f32[1, N, 8]", "f32[1, N, 8]", "along the token axis"),
        ("%y = t.slice(%x, axis=1, start=0, stop=1) : f32[1, 1, 8]", "f32[1, 1, 8]", "along the token axis"),
        ("%y = t.softmax(%x, axis=1) : f32[1, N, 8]", "f32[1, N, 8]", "along the token axis"),
        ("%y = t.concat(%x, %x, axis=1) : f32[1, 2*N, 8]", "f32[1, 2*N, 8]", "joins along"),
        ("%y = t.pad(%x, axis=1, lo=1, hi=0) : f32[1, N + 1, 8]", "f32[1, N + 1, 8]", "along the token axis"),
        ("%y = t.reshape(%x, shape=[1, 8, N]) : f32[1, 8, N]", "f32[1, 8, N]", "folds the token axis"),
        ("%y = t.iota(size=N) : i32[N]", "i32[N]", "index in the step"),
        (
            "%t = t.transpose(%x, perm=[0, 2, 1]) : f32[1, 8, N]\n  %y = t.matmul(%t, %x) : f32[1, 8, 8]",
            "f32[1, 8, 8]",
            "contracts the token axis",
        ),
        (
            "%t = t.transpose(%x, perm=[0, 2, 1]) : f32[1, 8, N]\n  %y = t.matmul(%x, %t) : f32[1, N, N]",
            "f32[1, N, N]",
            "two token axes",
        ),
        (
            "%a = t.reshape(%p, shape=[N, 1]) : i32[N, 1]\n  %y = t.eq(%a, %p) : bool[N, N]",
            "bool[N, N]",
            "two token axes",
        ),
        ("%y = t.take(%x, %p, axis=1) : f32[1, N, 8]", "f32[1, N, 8]", "picks tokens by index"),
        (
            '%t = param(name="t") : f32[64, 8]\n  %y = t.slice(%t, axis=0, start=0, stop=N) : f32[N, 8]',
            "f32[N, 8]",
            "numbers the tokens by their index in the step",
        ),
    ],
)
def test_mixing_tokens_is_found(body: str, returns: str, message: str) -> None:
    module = parse_module(
        f"{HEAD}func @step(%x: f32[1, N, 8], %p: i32[N], %sel: i32[S]) -> ({returns}) {{\n  {body}\n  return %y\n}}\n",
        "t",
    )
    with pytest.raises(XllmError, match=message) as e:
        check_rows(module.func("step"))
    assert e.value.kind == "unsupported"


def test_row_by_row_work_is_accepted() -> None:
    module = parse_module(
        HEAD
        + """func @step(%x: f32[1, N, 8], %p: i32[N], %sel: i32[S]) -> (f32[S, 4]) {
  %h = t.reshape(%x, shape=[1, N, 2, 4]) : f32[1, N, 2, 4]
  %t = t.transpose(%h, perm=[0, 2, 1, 3]) : f32[1, 2, N, 4]
  %s = t.softmax(%t, axis=3) : f32[1, 2, N, 4]
  %m = t.reduce(%s, kind=max, axes=[1]) : f32[1, N, 4]
  %f = t.cast(%p, dtype=f32) : f32[N]
  %g = t.reshape(%f, shape=[1, N, 1]) : f32[1, N, 1]
  %a = t.add(%m, %g) : f32[1, N, 4]
  %r = t.reshape(%a, shape=[N, 4]) : f32[N, 4]
  %y = t.take(%r, %sel) : f32[S, 4]
  return %y
}
""",
        "t",
    )
    check_rows(module.func("step"))


# ----------------------------------------------------------------------------------------------- attention


def call(function: Any, **fields: Any) -> attention.AttendCall:
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    defaults: dict[str, Any] = {
        "scale": 0.5,
        "softcap": 0.0,
        "sliding_window": None,
        "sinks_shape": None,
        "sinks_names": (),
        "heads": (4, 2),
        "dims": (8, 8),
    }
    return attention.AttendCall(module=module, mask=attention.Mask(function, None), **{**defaults, **fields})


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv <= q


@pytest.mark.parametrize("window", [1, 2, 8, 1000, 4096, 131072])
def test_windows_are_read_off_the_mask(window: int) -> None:
    assert attention._window(call(causal)) == 0
    assert attention._window(call(lambda b, h, q, kv: (kv <= q) & (kv > q - window))) == window


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, kv: kv >= 0,  # sees the future
        lambda b, h, q, kv: kv < q,  # does not see itself
        lambda b, h, q, kv: (kv <= q) & (kv // 64 == q // 64),  # chunks
        lambda b, h, q, kv: (kv <= q) & ((kv > q - 8) | (kv < 4)),  # window and sinks
        lambda b, h, q, kv: (kv <= q) & (kv % 2 == q % 2),  # dilated
        lambda b, h, q, kv: (kv <= q) & (q - kv != 3),
    ],
)
def test_other_masks_are_refused(mask: Any) -> None:
    with pytest.raises(XllmError, match="mask"):
        attention._window(call(mask))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("twist", ["none", "scale", "bias", "sign"])
def test_eager_attention_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, softcap: float, twist: str
) -> None:
    def eager(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, softcap: Any = None, **_: Any) -> Any:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(2, 3) * scaling
        if twist == "scale":
            scores = scores * 1.01
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if twist == "bias":
            scores = scores + 0.01 * torch.arange(scores.shape[-1])
        out = torch.softmax(scores + mask, -1) @ v
        return (out if twist != "sign" else -out).transpose(1, 2), None

    class Attention(torch.nn.Module):
        num_key_value_groups = 2

    import sys

    monkeypatch.setattr(sys.modules[Attention.__module__], "eager_attention_forward", eager, raising=False)
    about = call(causal, softcap=softcap)
    about.module = Attention()
    if twist == "none":
        attention.decide(about)
    else:
        with pytest.raises(XllmError, match="computes something else"):
            attention.decide(about)
