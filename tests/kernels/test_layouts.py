"""Packed weights: whatever is packed can be unpacked, and what no form can hold is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.grid_bytes import bytes_on_grids
from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.grids import from_grids, to_grids
from xllm_compiler.kernels.layouts import pack_quantized, unpack_quantized
from xllm_compiler.weight_formats import GridFormat, parse_format

FORMS = ["q8", "q8g32", "q4g32", "q4g64z", "q4", "q4grid16", "q4grid32"]


@given(st.sampled_from(FORMS), st.integers(1, 140), st.integers(1, 150), st.integers(0, 1 << 32))
def test_what_is_packed_can_be_unpacked(form: str, out: int, in_: int, seed: int) -> None:
    rng, q = np.random.default_rng(seed), parse_format(form)
    values = rng.integers(0, 1 << q.bits, (out, in_)).astype(np.uint8)
    if isinstance(q, GridFormat):
        values = bytes_on_grids(rng, out, in_, q.grid)
    scales = rng.uniform(0.01, 0.1, (out, q.groups(in_))).astype(np.float16 if q.group else np.float32)
    zeros = rng.integers(0, 16, scales.shape).astype(np.uint8) if q.zeros else None
    packed = pack_quantized(q, values, scales, zeros)
    assert packed.shape == q.shape(out, in_) and str(q) == form
    found = unpack_quantized(q, packed, out, in_)
    assert (found[0] == values).all() and (found[1] == scales).all()
    assert (found[2] is None) == (zeros is None) and (zeros is None or bool((found[2] == zeros).all()))


@pytest.mark.parametrize(
    "run, head",
    [
        ([], 1),
        ([129, 143], 1),
        ([3, 113], None),  # 125 and 15 below: steps of 5 would need 26 numbers
        ([16, 72, 128 + 8], 16 * 14 + 8),  # and not 4: 16 numbers would not reach
        ([8, 233], 16 * 8 + 15),
        ([0, 8], None),  # 128 and 120 below: steps of 8 would need 17 numbers
        ([127, 144], None),
        ([255], None),  # 127 is a prime
    ],
)
def test_a_run_is_on_a_grid_or_refused(run: list[int], head: int | None) -> None:
    values = np.array([[*run, *[128] * (16 - len(run))]], np.uint8)
    if head is None:
        with pytest.raises(XllmError, match="on no grid"):
            to_grids(values, 16)
        return
    n, heads = to_grids(values, 16)
    assert heads.tolist() == [[head]] and n.max() <= 15
    assert (from_grids(n, heads, 16) == values).all()
