"""state.* against numpy indexing, and which slots are refused."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compiler.interp import run
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.semantics import NP_DTYPE, Array, state_zeros
from xllm_compiler.ir.verify import verify

DTYPES = ("f32", "bf16", "f16", "i32", "i64", "u8", "bool")


def text(dtype: str, shape: list[int]) -> str:
    cell, rows = f"cell<{dtype}, {shape}>[Q]", f"{dtype}[{', '.join(map(str, ['B', *shape]))}]"
    return f"""xir 1 stage=graph
dim B in [0, 64]
dim Q in [0, 64]
assume Q - B >= 0

func @f(%x: {rows}, %slot: i32[B], %at: i32[B], %c0: {cell}) -> ({rows}, {rows}, {cell} alias %c0) {{
  %old = state.read(%c0, %slot) : {rows}
  %c1 = state.write(%c0, %x, %slot) : {cell}
  %now = state.read(%c1, %at) : {rows}
  return %old, %now, %c1
}}
"""


@given(st.data())
def test_reads_and_writes_are_those_of_numpy(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3))
    slots = data.draw(st.integers(0, 9))
    slot = np.array(data.draw(st.permutations(range(slots)))[: data.draw(st.integers(0, slots))], np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    at = rng.integers(0, max(1, slots), len(slot)).astype(np.int32)  # readers may share a slot
    x, cell = (rng.integers(-9, 99, (n, *shape)).astype(NP_DTYPE[dtype]) for n in (len(slot), slots))
    module = parse_module(text(dtype, shape))
    verify(module)
    given_cell = cell.copy()
    old, now, after = run(module, "f", {"x": x, "slot": slot, "at": at, "c0": given_cell})
    np.testing.assert_array_equal(given_cell, cell, "the argument was changed")
    np.testing.assert_array_equal(old, cell[slot])
    cell[slot] = x
    np.testing.assert_array_equal(after, cell)
    np.testing.assert_array_equal(now, cell[at])
    assert after.dtype == NP_DTYPE[dtype]


@pytest.mark.parametrize(
    ("slot", "at", "message"),
    [
        ([0, 3], [0, 0], "row 1 names slot 3 of a cell of 3 slots"),
        ([-1, 0], [0, 0], "row 0 names slot -1 of a cell of 3 slots"),
        ([1, 1], [0, 0], "two rows name one slot"),
        ([0, 1], [0, 9], "row 1 names slot 9"),
    ],
)
def test_slots_that_are_none(slot: list[int], at: list[int], message: str) -> None:
    module = parse_module(text("f32", [2]))
    arrays: dict[str, Array] = {"slot": np.array(slot, np.int32), "at": np.array(at, np.int32)}
    arrays |= {"x": np.ones((2, 2), np.float32), "c0": state_zeros(module.func("f").arg("c0").cell, {"Q": 3})}
    with pytest.raises(IrError, match=message):
        run(module, "f", arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("%x: f32", "%x: bf16"), "the cell holds f32"),
        (("%x: f32[B, 2]", "%x: f32[B, 3]"), "state.write: x"),
        (("%slot: i32", "%slot: i64"), r"state.read needs slots i32\[B\]"),
        (("%c0: cell<f32, [2]>[Q]", "%c0: f32[Q, 2]"), "a cell is needed here"),
    ],
)
def test_operands_that_do_not_fit(change: tuple[str, str], message: str) -> None:
    with pytest.raises(IrError, match=message):
        parse_module(text("f32", [2]).replace(*change))


def test_a_precise_run_rounds_nothing() -> None:
    module = parse_module(text("bf16", [1]))
    x: Any = np.array([[1 / 3]])
    arrays = {"x": x, "slot": np.zeros(1, np.int32), "at": np.zeros(1, np.int32), "c0": np.zeros((2, 1))}
    assert run(module, "f", arrays, precise=True)[1] == x
    arrays |= {"x": x.astype(ml_dtypes.bfloat16), "c0": np.zeros((2, 1), ml_dtypes.bfloat16)}
    assert run(module, "f", arrays)[1] == x.astype(ml_dtypes.bfloat16)
