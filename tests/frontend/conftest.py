"""Random checkpoints in temporary folders, and quiet transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint

Make = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make("llama", sliding_window=8) writes a tiny random checkpoint and returns its folder."""

    def write(family: str, dtype: str = "float32", **settings: Any) -> Path:
        sizes = {**TINY, "max_position_embeddings": 128, **settings}
        return write_random_checkpoint(family, tmp_path / family, settings=sizes, dtype=dtype, tokenizer=False)

    return write


@pytest.fixture
def limits() -> dict[str, Any]:
    return {
        "dtype": "f32",
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "max_num_logits": 64,
    }
