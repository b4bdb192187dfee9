"""Hypothesis strategies for IR. Owns drawing and shrinking; what is drawn is graphs.py's.

@given(xir_modules())
def test_my_pass_keeps_the_meaning(module: Module) -> None: ...
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from xllm_compiler.ir.core import Module
from xllm_compiler.testing.graphs import random_module


@st.composite
def xir_modules(draw: st.DrawFn, size: int = 8, ranks: Sequence[int] = (1, 2, 4)) -> Module:
    """Sound modules of up to `size` idioms of a few ops each, see `random_module`. They shrink to single ops."""
    return random_module(lambda n: draw(st.integers(0, n - 1)), size, ranks)
