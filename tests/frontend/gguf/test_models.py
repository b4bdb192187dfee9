"""Models in GGUF files, as transformers reads the same file, and blocks as llama.cpp's own package unpacks them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from tests.frontend.gguf.writing import FAMILIES, random_gguf
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.gguf.blocks import BLOCKS, TYPES, scales
from xllm_compiler.frontend.quantized import Quantized
from xllm_compiler.frontend.reference import load_reference, reference_logits, stepped_logits
from xllm_compiler.frontend.trace import trace_checkpoint
from xllm_compiler.ir.ops import Dequantize
from xllm_compiler.ir.quant import dequantize_weight

PROMPTS = [[5, 17, 99, 200, 3], [11, 12, 13, 14, 15, 16, 17, 18, 19], [201]]
KINDS = [Kind(number) for number in TYPES]
ROWS: dict[str, Any] = {"dtype": "f32", "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_num_logits": 64}
KEPT = (Kind.Q8_0, Kind.Q4_0, Kind.Q5_0)


@pytest.mark.parametrize("name", BLOCKS)
def test_random_bytes_are_unpacked_bit_by_bit_as_the_package_does(name: str) -> None:
    block = BLOCKS[name]
    raw = np.random.default_rng(0).integers(0, 256, (4096 // block.values, block.nbytes), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # among random numbers are NaNs
        wanted = gguf.dequantize(raw.reshape(4, -1), Kind[name]).reshape(-1)
        got = block.floats(raw).reshape(-1)
    assert got.dtype == np.float32 and np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.name)
def test_kept_integers_stand_for_the_stored_numbers(kind: Kind) -> None:
    """Also the lowest of 8 bits, -128, which llama.cpp never writes."""
    block = BLOCKS[kind.name]
    raw = np.random.default_rng(0).integers(0, 256, (512, block.nbytes), dtype=np.uint8)
    raw[:, 1] &= 0x7B  # finite scales
    raw[0, 2:] = 0x80
    assert block.integers is not None and block.format is not None
    values = dequantize_weight(block.integers(raw), scales(raw)[:, None], None, block.format, np.float32)
    assert np.array_equal(values, gguf.dequantize(raw, kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path, limits: dict[str, Any]) -> None:
    """Every type of tensor in turn: f32, and those that stay integers are counted."""
    order = KINDS[list(FAMILIES).index(family) :] + KINDS[: list(FAMILIES).index(family)]
    path = random_gguf(family, tmp_path, order)
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    infos = gguf.GGUFReader(path).tensors
    kept = [info.name for info in infos if info.tensor_type in KEPT]
    assert sum(isinstance(op, Dequantize) for op in traced.module.func("step").ops) == len(kept) >= 3
    told = " ".join(traced.notes)
    for kind in {info.tensor_type for info in infos}:
        assert (f"{kind.name} " in told) == (kind not in KEPT and BLOCKS[kind.name].values > 1), (kind, told)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    own = load_reference(path)
    for got, prompt in zip(stepped_logits(traced.module, traced.weights, PROMPTS), PROMPTS, strict=True):
        want = reference_logits(model, prompt)
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, atol=2e-4)
        np.testing.assert_allclose(reference_logits(own, prompt), want, atol=1e-5)


def test_weights_are_dequantized_in_f32_and_rounded_once(tmp_path: Path) -> None:
    path = random_gguf("llama", tmp_path, [Kind.Q4_1, Kind.Q6_K, Kind.F16])
    quantized = Quantized.of(Checkpoint.open(path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        weight = quantized.weights.get(name)
        if weight is not None:
            ours = torch.from_numpy(weight.floats("bf16").astype(np.float32))
            assert torch.equal(ours, parameter.to(torch.bfloat16).float()), name
    assert len(quantized.weights) >= 8


def test_a_model_of_16_bits_is_read_as_one(tmp_path: Path) -> None:
    """Rows of q and k in 16 bits are put in order too; the norms stay f32."""
    path = random_gguf("llama", tmp_path, [Kind.F16])
    opened = Checkpoint.open(path)
    assert not Quantized.of(opened).weights
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        read = opened.read(name)
        assert read.dtype == (np.float16 if parameter.dim() == 2 else np.float32)
        assert torch.equal(torch.from_numpy(read.astype(np.float32)), parameter), name


# ---- what transformers does not read of a GGUF file


def config_of(tmp_path: Path, family: str, settings: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return Checkpoint.open(random_gguf(family, tmp_path, [Kind.Q8_0], settings, **keys)).config


def test_a_sliding_window_makes_it_a_mistral(tmp_path: Path) -> None:
    found = config_of(tmp_path, "llama", {}, **{"attention.sliding_window": 48})
    assert (found["model_type"], found["sliding_window"]) == ("mistral", 48)


def test_softcaps_and_windows_of_gemma(tmp_path: Path) -> None:
    keys = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "attention.sliding_window": 64}
    found = config_of(tmp_path, "gemma2", {}, **keys)
    assert [found[k] for k in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")] == [20, 10, 64]


def with_tables(path: Path, **tables: Any) -> None:
    """Adds tables of factors to a file."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, factors in tables.items():
        writer.add_tensor(f"{name}.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").rename(path)


def test_the_rope_of_llama_3_is_found_by_its_table(tmp_path: Path) -> None:
    """The table is what transformers' own rule makes of the setting."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    path = random_gguf("llama", tmp_path, [Kind.Q8_0], {"rope_theta": 500000.0})
    config = LlamaConfig(**{**Checkpoint.open(path).config, "max_position_embeddings": 131072})
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2).float() / 64)
    setting = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.rope_parameters = {**setting, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    with_tables(path, rope_freqs=plain / scaled)
    found = Checkpoint.open(path).config["rope_parameters"]
    assert {**found, "factor": round(found["factor"], 4)} == config.rope_parameters
    other = random_gguf("llama", tmp_path / "other", [Kind.Q8_0])
    with_tables(other, rope_freqs=np.linspace(1, 9, 32))
    with pytest.raises(XllmError, match="rope_freqs") as e:
        Checkpoint.open(other)
    assert e.value.kind == "unsupported"


def test_a_table_of_another_size_is_damage(tmp_path: Path) -> None:
    """A size that nobody means is not allocated before it is compared."""
    size = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), 2**31)
    path = random_gguf("llama", tmp_path, [Kind.Q8_0], **size)
    with_tables(path, rope_freqs=np.linspace(1, 9, 32))
    with pytest.raises(XllmError, match=r"has 32 factors, heads have 2147483648"):
        Checkpoint.open(path)


def test_the_rope_of_phi_is_in_two_tables(tmp_path: Path) -> None:
    keys = {"context_length": 4096, "rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.2}
    path = random_gguf("phi3", tmp_path, [Kind.Q8_0], **keys, **{"rope.dimension_count": 48})
    with_tables(path, rope_factors_long=np.linspace(1, 9, 24), rope_factors_short=np.linspace(1, 2, 24))
    found = Checkpoint.open(path).config["rope_parameters"]
    assert found["rope_type"] == "longrope" and len(found["long_factor"]) == len(found["short_factor"]) == 24
    assert found["original_max_position_embeddings"] == 128 and found["partial_rotary_factor"] == 0.75
    assert found["factor"] == 32 and found["attention_factor"] == pytest.approx(1.2)
    with pytest.raises(XllmError, match="changes its frequencies"):
        trace_checkpoint(Checkpoint.open(path), **ROWS, max_model_len=4096)
    traced = trace_checkpoint(Checkpoint.open(path), **ROWS, max_model_len=64)
    ours = stepped_logits(traced.module, traced.weights, PROMPTS[:1])[0]
    np.testing.assert_allclose(ours, reference_logits(load_reference(path), PROMPTS[0]), atol=2e-4)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_by_a_factor(kind: str, tmp_path: Path) -> None:
    path = random_gguf("llama", tmp_path, [Kind.F32], **{"rope.scaling.type": kind, "rope.scaling.factor": 4.0})
    found = Checkpoint.open(path).config["rope_parameters"]
    assert (found["rope_type"], found["factor"]) == (kind, 4.0)
    assert found.get("original_max_position_embeddings") == (128 if kind == "yarn" else None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, "mixture of experts"),
        ({"logit_scale": 2.0}, "llama.logit_scale is 2.0"),
        ({"rope.dimension_count": 32}, "rope.dimension_count is 32"),
        ({"attention.value_length": 32}, "keys and values"),
        ({"block_count": 1}, "layers beyond"),
        ({"embedding_length": 128}, "has shape"),
    ],
    ids=str,
)
def test_another_model_than_the_class_makes_is_refused(
    keys: dict[str, Any], message: str, tmp_path: Path, limits: dict[str, Any]
) -> None:
    path = random_gguf("llama", tmp_path, [Kind.Q8_0], **keys)
    with pytest.raises(XllmError) as e:
        trace_checkpoint(Checkpoint.open(path), **limits)
    assert e.value.kind in ("unsupported", "checkpoint") and message in e.value.message
