"""Lets the tests of this folder import `sample_manifest` from tests/artifact; and what they share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xllm_compiler.passes import registry

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))


@pytest.fixture
def own_registry() -> Iterator[None]:
    """Passes from outside that a test loads are unknown again afterwards: nobody else is to list wrong ones."""
    before = dict(registry._registered)
    yield
    for name, cls in list(registry._registered.items()):
        if name not in before and not cls.__module__.startswith("xllm_compiler."):
            del registry._registered[name]
            sys.modules.pop(cls.__module__, None)


@pytest.fixture
def faulty(own_registry: None) -> str:
    """The file of wrong passes, for --load."""
    return str(Path(__file__).parent / "faulty_passes.py")
