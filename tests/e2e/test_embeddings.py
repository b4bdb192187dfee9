"""Embeddings of compiled models: equal to transformers', the same bits however they are computed, beside chats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from xllm_compiler import LLM, PoolingParams, SamplingParams
from xllm_compiler.artifact import read_manifest
from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.errors import XllmError
from xllm_compiler.models.embedding_checkpoint import write_embedding_checkpoint
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint
from xllm_compiler.options import CompileOptions
from xllm_compiler.step.interface import Pooling

KV = 1 << 22
PROMPTS = [np.random.default_rng(n).integers(3, 380, n).tolist() for n in (1, 5, 40, 17, 100)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

Made = Callable[[str], tuple[Path, Path]]


def _checkpoint(name: str, path: Path) -> Path:
    if name == "chat and last":  # nothing is said of pooling
        return write_random_checkpoint("qwen3", path, settings={**TINY, "head_dim": 32}, seed=3)
    if name == "mean":
        return write_embedding_checkpoint("llama", path, "mean_tokens", normalize=False, settings=TINY, seed=4)
    settings = {**TINY, "head_dim": 32}
    if name == "bf16 cls":
        settings["matryoshka_dimensions"] = [16, 32]
        return write_embedding_checkpoint("qwen3", path, "cls_token", settings=settings, dtype="bfloat16", seed=5)
    assert name == "bf16 last, with a head"
    return write_embedding_checkpoint("llama", path, "lasttoken", head=True, settings=TINY, dtype="bfloat16", seed=6)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Checkpoint and artifact by name."""
    kept: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in kept:
            folder = tmp_path_factory.mktemp("embed")
            checkpoint = _checkpoint(name, folder / "checkpoint")
            functions = ("step", "embed") if name == "chat and last" else None
            options = CompileOptions(functions=functions, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)
            compile_checkpoint(checkpoint, folder / "artifact", options)
            kept[name] = checkpoint, folder / "artifact"
        return kept[name]

    return get


def _reference(checkpoint: Path, dtype: torch.dtype, pooling: Pooling, prompt: list[int]) -> np.ndarray:
    model = AutoModel.from_pretrained(checkpoint, dtype=dtype).eval()
    with torch.no_grad():
        rows = model(torch.tensor([prompt])).last_hidden_state[0].double().numpy()
    vector = {"last": rows[-1], "mean": rows.mean(0), "cls": rows[0]}[pooling.kind]
    return vector / np.linalg.norm(vector) if pooling.normalize else vector


@pytest.mark.parametrize(
    ("name", "pooling", "functions"),
    [
        ("chat and last", Pooling("last", True, None), ["step", "embed"]),
        ("mean", Pooling("mean", False, None), ["embed"]),
        ("bf16 cls", Pooling("cls", True, (16, 32)), ["embed"]),
        ("bf16 last, with a head", Pooling("last", True, None), ["step", "embed"]),
    ],
)
def test_embeddings_are_those_of_transformers(made: Made, name: str, pooling: Pooling, functions: list[str]) -> None:
    checkpoint, artifact = made(name)
    manifest = read_manifest(artifact)
    assert manifest.model.pooling == pooling and sorted(manifest.functions) == sorted(functions)
    narrow = manifest.model.dtype == "bf16"
    with LLM(artifact, threads=1, kv_cache_memory_bytes=KV) as llm:
        for prompt, result in zip(PROMPTS, llm.embed(PROMPTS), strict=True):
            got = np.array(result.outputs.embedding)
            assert result.prompt_token_ids == prompt and len(got) == 64
            want = _reference(checkpoint, torch.float32, pooling, prompt)
            cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
            assert cosine > (0.9995 if narrow else 1 - 1e-9)
            if narrow:  # both sides round after each op; neither is nearer to the truth than the other by much
                theirs = _reference(checkpoint, torch.bfloat16, pooling, prompt)
                assert np.abs(got - want).max() < 2 * np.abs(theirs - want).max() + 1e-3
            else:
                np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1.0, np.abs(want).max()))


def _embed(llm: LLM, prompts: list[list[int]]) -> list[list[float]]:
    return [result.outputs.embedding for result in llm.embed(prompts)]


@pytest.mark.parametrize("name", ["chat and last", "mean", "bf16 cls", "bf16 last, with a head"])
def test_bits_do_not_depend_on_batch_chunks_or_threads(made: Made, name: str) -> None:
    _, artifact = made(name)
    with LLM(artifact, threads=1, kv_cache_memory_bytes=KV) as llm:
        alone = [_embed(llm, [prompt])[0] for prompt in PROMPTS]
        assert _embed(llm, PROMPTS[::-1]) == alone[::-1]
    with LLM(artifact, threads=2, max_num_batched_tokens=9, kv_cache_memory_bytes=KV) as llm:
        assert _embed(llm, PROMPTS) == alone
    bytes_of_page = read_manifest(artifact).page_bytes
    with LLM(artifact, threads=1, kv_cache_memory_bytes=9 * bytes_of_page, max_num_batched_tokens=24) as llm:
        assert _embed(llm, PROMPTS * 3) == alone * 3  # more prompts than there are pages for


@pytest.mark.parametrize("name", ["chat and last", "bf16 last, with a head"])
def test_chats_and_embeddings_share_an_engine(made: Made, name: str) -> None:
    """At once, in few pages: each gets the bits that it gets alone."""
    _, artifact = made(name)
    page = read_manifest(artifact).page_bytes
    with LLM(artifact, threads=1, kv_cache_memory_bytes=KV) as llm:
        alone = _embed(llm, PROMPTS)
        texts = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]
    with LLM(artifact, threads=1, kv_cache_memory_bytes=9 * page, max_num_batched_tokens=24) as llm:
        requests = [llm._request(p, params) for p in PROMPTS for params in (GREEDY, PoolingParams())]
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        vectors: dict[str, list[float]] = {}
        for event in llm._events(requests):
            tokens[event.request_id] += event.token_ids
            if event.embedding is not None:
                vectors[event.request_id] = event.embedding.tolist()
        assert [tokens[request.request_id] for request in requests[::2]] == texts
        assert [vectors[request.request_id] for request in requests[1::2]] == alone


def test_weights_are_there_once_and_chats_pay_nothing(made: Made, tmp_path: Path) -> None:
    checkpoint, artifact = made("chat and last")
    options = CompileOptions(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)
    plain = compile_checkpoint(checkpoint, tmp_path / "plain", options).manifest
    both = read_manifest(artifact)
    assert list(plain.functions) == ["step"] and plain.model.pooling is None
    assert both.weights == plain.weights and both.states == plain.states
    assert both.functions["step"] == plain.functions["step"]


def test_cut_embeddings(made: Made) -> None:
    _, artifact = made("bf16 cls")
    with LLM(artifact, threads=1, kv_cache_memory_bytes=KV) as llm:
        whole = np.array(llm.embed(PROMPTS[2])[0].outputs.embedding)
        short = np.array(llm.embed(PROMPTS[2], PoolingParams(dimensions=16))[0].outputs.embedding)
        np.testing.assert_allclose(short, whole[:16] / np.linalg.norm(whole[:16]), rtol=1e-6)
        assert llm.embed(PROMPTS[2], PoolingParams(dimensions=64))[0].outputs.embedding == whole.tolist()
        for size in (0, 17, 65):
            with pytest.raises(XllmError, match=r"dimensions|cut to 16, 32"):
                llm.embed(PROMPTS[2], PoolingParams(dimensions=size))
        with pytest.raises(XllmError, match="no function step; it has embed"):
            llm.generate(PROMPTS[0], GREEDY)
    _, artifact = made("mean")
    with (
        LLM(artifact, threads=1, kv_cache_memory_bytes=KV) as llm,
        pytest.raises(XllmError, match="not trained to have them cut"),
    ):
        llm.embed(PROMPTS[2], PoolingParams(dimensions=16))


def test_a_manifest_keeps_what_the_checkpoint_says(made: Made) -> None:
    _, artifact = made("bf16 cls")
    said = json.loads((artifact / "manifest.json").read_text())["model"]["pooling"]
    assert said == {"kind": "cls", "normalize": True, "dimensions": [16, 32]}
