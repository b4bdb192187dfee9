"""Checkpoints and artifacts that the end-to-end tests share: compiled once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
from stepper import options

from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"

SETTINGS = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 24},
}
"""What makes each tiny family a test of its own, on top of TINY."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family, or the bundled model."""
    made: dict[str, Path] = {"bundled": BUNDLED}

    def get(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("checkpoint") / family
            made[family] = write_random_checkpoint(family, path, settings={**TINY, **SETTINGS[family]}, seed=3)
        return made[family]

    return get


class Artifacts(Protocol):
    """Makes an artifact when it is first asked for."""

    def __call__(self, family: str, dtype: str, pipeline: str | None = None) -> Path: ...


@pytest.fixture(scope="session")
def artifact(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The artifact of a family at a dtype, by the default pipeline or another."""
    made: dict[tuple[str, str, str | None], Path] = {}

    def get(family: str, dtype: str, pipeline: str | None = None) -> Path:
        if (family, dtype, pipeline) not in made:
            out = tmp_path_factory.mktemp("artifact") / f"{family}-{dtype}"
            compile_checkpoint(checkpoint(family), out, options(dtype, pipeline))
            made[family, dtype, pipeline] = out
        return made[family, dtype, pipeline]

    return get
