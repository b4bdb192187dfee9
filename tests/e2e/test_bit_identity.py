"""A request's logits have the same bits alone or in a crowd, in any chunks, on one thread or two, on used pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stepper import Stepper

from xllm_compiler.targets.cpu import Cpu

EIGHT_BIT_KV = ",".join(Cpu.presets["cpu"]).replace("split-attention", "quantize-kv,split-attention")
CASES = [
    *(("bundled", "bfloat16"), ("bundled", "float32"), ("mistral", "bfloat16"), ("qwen2", "float32")),
    *(("bundled", "bfloat16", "@cpu-int8"), ("qwen3", "float32", "@cpu-int4"), ("llama", "bfloat16", "@cpu-int4")),
    *(("bundled", "bfloat16", EIGHT_BIT_KV), ("mistral", "float32", EIGHT_BIT_KV)),
]
LENGTH = 120


def prompt(vocab: int, length: int = LENGTH, seed: int = 11) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, vocab, length)]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case)[-40:])
def path(request: pytest.FixtureRequest, artifact: Callable[..., Path]) -> Path:
    return artifact(*request.param)


@pytest.fixture
def alone(path: Path) -> np.ndarray:
    """The reference: whole prompt in one step, one thread, fresh pages."""
    with Stepper(path, threads=1) as stepper:
        logits = stepper.all_logits(prompt(stepper.manifest.model.vocab_size))
    assert np.isfinite(logits).all() and logits.std() > 0
    return logits


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 64, LENGTH])
def test_chunks_and_threads(path: Path, alone: np.ndarray, chunk: int, threads: int) -> None:
    with Stepper(path, threads=threads) as stepper:
        ids = prompt(stepper.manifest.model.vocab_size)
        assert same_bits(stepper.all_logits(ids, chunk), alone)


@pytest.mark.parametrize("threads", [1, 2])
def test_in_a_batch_of_random_others(path: Path, alone: np.ndarray, threads: int) -> None:
    """32 others of ragged lengths, each at its own pace, on scattered pages: prefill and decode in the same steps."""
    rng = np.random.default_rng(5)
    with Stepper(path, threads=threads) as stepper:
        vocab = stepper.manifest.model.vocab_size
        others = [stepper.open(prompt(vocab, int(rng.integers(1, 150)), seed), shuffle=rng) for seed in range(100, 132)]
        ours = stepper.open(prompt(vocab), shuffle=rng)
        while ours.done < LENGTH:
            work = [(r, min(int(rng.integers(1, 9)), len(r.ids) - r.done)) for r in others if r.done < len(r.ids)]
            chunk = min(int(rng.integers(1, 30)), LENGTH - ours.done)
            work.insert(int(rng.integers(0, len(work) + 1)), (ours, chunk))
            stepper.step(work, keep=[ours])
        assert same_bits(np.concatenate(ours.logits), alone)


def test_on_pages_of_an_aborted_request(path: Path, alone: np.ndarray) -> None:
    """Another request stops half way; its pages, full of its keys and values, come to us next."""
    with Stepper(path, pages=10) as stepper:
        vocab = stepper.manifest.model.vocab_size
        aborted = stepper.open(prompt(vocab, 140, seed=99))
        stepper.step([(aborted, 77)])
        stepper.close(aborted)
        assert same_bits(stepper.all_logits(prompt(vocab), 50), alone)
