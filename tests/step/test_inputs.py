"""The writer of a step's arrays against a naive one, and which inputs it can give at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.errors import XllmError
from xllm_compiler.step.abi import ArgumentBlock, symbol_of
from xllm_compiler.step.inputs import StepBatch, StepWriter, check_written, step_inputs
from xllm_compiler.step.interface import Function, Program, TensorSpec, ValueRange

LENGTH, PAGE = 50, 8
WIDTH = 7
INPUTS = step_inputs(LENGTH, PAGE)
STEP = Function(INPUTS, (TensorSpec("logits", "f32", ("S", "9")),), ("kv0", "kv1"), (Program("xllm_fn_step", (), "0"),))
CAPACITY = {"N": 400, "B": 9, "S": 400}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10), st.integers(0, 10)), min_size=1, max_size=9))
def test_arrays_are_those_of_a_naive_writer(requests: list[tuple[int, int, int]]) -> None:
    """(position, tokens, first wanted row) each; the batch has held another step before."""
    batch = StepBatch("step", STEP, CAPACITY)
    writer = StepWriter(batch)
    writer.begin()
    for i in range(9):
        writer.add(list(range(40)), 3, np.full(WIDTH, 90 + i, np.int32), range(40))
    writer.end()
    writer.begin()
    want: dict[str, list[object]] = {name: [] for name in ("ids", "pos", "seq", "start", "table", "sel")}
    for b, (position, count, first) in enumerate(requests):
        tokens = [100 * b + p for p in range(position, position + count)]
        pages = np.arange(WIDTH, dtype=np.int32) + 10 * b
        writer.add(tokens if b % 2 else np.array(tokens, np.int32), position, pages, range(first, count))
        n = len(want["ids"])
        want["start"].append(n)
        want["table"].append(pages.tolist())
        for i, token in enumerate(tokens):
            want["ids"].append(token)
            want["pos"].append(position + i)
            want["seq"].append(b)
            if i >= first:
                want["sel"].append(n + i)
    want["start"].append(len(want["ids"]))
    got = writer.end().inputs()
    assert {name: array.tolist() for name, array in got.items()} == want
    assert batch.sizes == {"N": len(want["ids"]), "B": len(requests), "S": len(want["sel"])}
    assert all(array.base is not None and array.dtype == np.int32 for array in got.values())


def test_inputs_that_a_function_does_not_take_are_left_out() -> None:
    few = replace(STEP, inputs=tuple(spec for spec in INPUTS if spec.name in ("ids", "start")))
    writer = StepWriter(StepBatch("few", few, CAPACITY))
    writer.begin()
    writer.add([5, 6], 0, np.zeros(WIDTH, np.int32), [1])
    got = writer.end().inputs()
    assert {name: array.tolist() for name, array in got.items()} == {"ids": [5, 6], "start": [0, 2]}


def test_an_unmapped_table_and_a_batch_filled_from_another() -> None:
    batch, other = StepBatch("step", STEP, CAPACITY), StepBatch("step", STEP, CAPACITY)
    assert (batch["table"] == -1).all() and batch["table"].shape == (9, WIDTH)
    assert batch.nbytes == sum(4 * n for n in (400, 400, 400, 10, 9 * WIDTH, 400))
    writer = StepWriter(other)
    writer.begin()
    writer.add([1, 2, 3], 4, np.arange(WIDTH, dtype=np.int32), [2])
    writer.end()
    batch.fill(other.inputs(), other.sizes)
    for name, array in batch.inputs().items():
        np.testing.assert_array_equal(array, other.inputs()[name])


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("pixels", "bf16", ("N",)),
        TensorSpec("ids", "i64", ("N",)),
        TensorSpec("ids", "i32", ("S",)),
        TensorSpec("table", "i32", ("B", "N")),
        TensorSpec("table", "i32", ("B",)),
    ],
)
def test_inputs_that_nobody_gives_are_refused(spec: TensorSpec) -> None:
    check_written("step", STEP)
    with pytest.raises(XllmError, match=spec.name) as caught:
        check_written("step", replace(STEP, inputs=(spec,)))
    assert caught.value.kind == "artifact" and "$.functions.step.inputs" in caught.value.where


def test_only_a_first_axis_may_change() -> None:
    wide = replace(STEP, inputs=(TensorSpec("rope", "i32", ("3", "N")),))
    with pytest.raises(XllmError, match="first axis"):
        StepBatch("step", wide, CAPACITY)


def test_the_order_of_the_words_is_that_of_the_interface() -> None:
    block = ArgumentBlock.of(STEP, {"S": 0, "N": 0, "B": 0, "P": 0})
    names = [name or space for space, name in block.words]
    assert names == [
        "arena",
        "weights",
        "kv0",
        "kv1",
        *(s.name for s in INPUTS),
        "logits",
        *"BNPS",
        "barrier",
        "profile",
    ]
    assert block.place("input", "pos") == 5 and block.dims() == {"B": 11, "N": 12, "P": 13, "S": 14}
    assert len(block) == 17 and symbol_of("step", 1) == "xllm_fn_step_1"


def test_specs_read_as_the_module_prints_them() -> None:
    pos = next(spec for spec in INPUTS if spec.name == "pos")
    assert pos.range == ValueRange(0, LENGTH - 1) and str(pos) == "i32[N] in [0, 49]"
    assert TensorSpec("x", "bf16", ("N", "2*B", "3")).nbytes().evaluate({"N": 5, "B": 2}) == 120
