"""What `verify` is made of: its schedule of steps, its comparison, and the way back from packed weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_manifest import sample

from xllm_compiler.artifact import Limits, Manifest, Weight
from xllm_compiler.kernels.layouts import pack
from xllm_compiler.step.inputs import step_inputs
from xllm_compiler.tools.steps import make_trial
from xllm_compiler.tools.unpack import unpack
from xllm_compiler.tools.verify import compare
from xllm_compiler.weight_formats import Layout


def manifest(seqs: int, tokens: int, rows: int, longest: int) -> Manifest:
    small = sample()
    step = replace(small.functions["step"], inputs=step_inputs(longest, 16))
    return replace(
        small,
        limits=Limits(seqs, max(seqs, tokens), rows),
        model=replace(small.model, max_model_len=longest),
        functions={"step": step},
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 20), st.integers(1, 200), st.integers(0, 3))
def test_steps_compute_every_token_once_in_order(seqs: int, tokens: int, rows: int, longest: int, seed: int) -> None:
    about = manifest(seqs, tokens, rows, longest)
    trial = make_trial(about, seed)
    seen: dict[int, int] = {}
    owner: dict[int, int] = {}
    for step in trial.steps:
        ids, pos, seq, start, table, sel = (step.inputs[k] for k in ("ids", "pos", "seq", "start", "table", "sel"))
        n, b = len(ids), len(start) - 1
        assert step.sizes == {"N": n, "B": b, "S": len(sel)}
        assert 1 <= b <= seqs and b <= n <= about.limits.max_num_batched_tokens and 1 <= len(sel) <= rows
        assert start[0] == 0 and start[-1] == n and (np.diff(start) >= 1).all()
        assert table.shape == (b, -(-longest // 16))
        requests = {int(seq[row]): request for row, (request, _) in zip(sel, step.rows, strict=True)}
        for row, (request, position) in zip(sel, step.rows, strict=True):
            assert pos[row] == position and ids[row] == trial.tokens[request][position]
        for index in range(b):
            part = slice(start[index], start[index + 1])
            assert (seq[part] == index).all()
            positions = pos[part]
            assert (positions == np.arange(positions[0], positions[0] + len(positions))).all()
            if index not in requests:
                continue
            request = requests[index]
            if rows >= 12:  # then every request has a row in each of its steps
                assert positions[0] == seen.get(request, 0)
                seen[request] = int(positions[-1]) + 1
            for page in table[index][: positions[-1] // 16 + 1]:
                assert 0 <= page < trial.pages and owner.setdefault(int(page), request) == request
    if rows >= 12:
        assert seen == {request: len(tokens) for request, tokens in enumerate(trial.tokens)}


def test_trials_mix_chunks_and_decodes() -> None:
    trial = make_trial(manifest(8, 64, 16, 128), 0)
    sizes = [(step.sizes["N"], step.sizes["B"]) for step in trial.steps]
    assert any(n == b for n, b in sizes), "a step of decodes alone"
    assert any(
        n > b and (np.diff(s.inputs["start"]) == 1).any() for (n, b), s in zip(sizes[1:], trial.steps[1:], strict=True)
    )


def test_comparison() -> None:
    one = [np.array([[1.0, -20.0]], np.float32)]
    assert compare("", "f32", one, one).good
    near = [one[0] + np.float32(1e-3)]
    assert compare("", "f32", near, one).good and compare("", "f32", near, one).difference == pytest.approx(
        1e-3, rel=1e-2
    )
    assert not compare("", "f32", [one[0] + np.float32(3e-3)], one).good
    for bad in (np.nan, np.inf):
        assert not compare("", "bf16", [np.full_like(one[0], bad)], one).good
    assert compare("", "f32", [np.zeros((0, 5), np.float32)], [np.zeros((0, 5), np.float32)]).good


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("out", "in_"), [(64, 8), (70, 5), (2, 1), (200, 33)])
def test_unpacking_is_the_inverse(dtype: str, out: int, in_: int) -> None:
    bits = np.random.default_rng(0).standard_normal((out, in_)).astype(np.float32)
    value = bits if dtype == "f32" else bits.view(np.uint16)[:, ::2].copy()
    for layout in ("row", "panel", "glu"):
        packed = pack(Layout.parse(layout), [value])
        weight = Weight("w", layout, dtype, packed.shape, 0, packed.nbytes)
        got = unpack(weight, packed.reshape(-1).view(np.uint8), value.shape)
        assert np.array_equal(got.view(value.dtype), value)
