"""Weight formats: names are read back, packing has the shape that layouts promise, and the rest is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.dims import as_dim, ceildiv, sym
from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.quant import dequantize_weight, quantize_weight
from xllm_compiler.kernels.layouts import pack, unpack
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.weight_formats import (
    GROUPS,
    GridFormat,
    IntegerFormat,
    Layout,
    RowFormat,
    WeightFormat,
    parse_format,
)

EVERY: list[WeightFormat] = [
    *(IntegerFormat(bits, group, zeros) for bits in (8, 4) for group in (0, 16, *GROUPS) for zeros in (False, True)),
    *(GridFormat(grid) for grid in (16, 32)),
]


@pytest.mark.parametrize("format", EVERY, ids=str)
def test_a_name_says_everything(format: WeightFormat) -> None:
    assert parse_format(str(format)) == format
    for glu in (False, True):
        layout = Layout(True, glu, format)
        assert Layout.parse(str(layout)) == layout and str(layout) == ("glu_" if glu else "") + str(format)
    assert [str(Layout.parse(name)) for name in ("row", "panel", "glu")] == ["row", "panel", "glu"]


@pytest.mark.parametrize(
    "name",
    [
        *("", "q", "q5", "q8g0", "q8g", "q8g20", "q4g032", "q4zg32", "q4zz", "Q8", "q8 ", " q8", "q8\n", "q-4", "q٨"),
        *("q4grid", "q4grid8", "q4grid64", "q8grid32", "q4grid32z", "q4g32grid32", "glu_q8", "panel"),
    ],
)
def test_what_is_no_format_is_refused(name: str) -> None:
    with pytest.raises(XllmError, match="weight format") as caught:
        parse_format(name, "option")
    assert caught.value.kind == "option" and caught.value.help


def test_formats_that_there_are_not() -> None:
    with pytest.raises(XllmError, match="no weights of 5 bits"):
        IntegerFormat(5)
    with pytest.raises(XllmError, match="groups of 24"):
        IntegerFormat(4, 24)
    with pytest.raises(XllmError, match="grids of 8"):
        GridFormat(8)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(EVERY), st.booleans(), st.integers(1, 70), st.integers(1, 80))
def test_a_rounded_weight_is_packed_as_promised(format: WeightFormat, glu: bool, half: int, in_: int) -> None:
    """Rounding, layout and packer agree about shapes, and nothing is lost on the way to the file and back."""
    w = np.random.default_rng(in_).standard_normal((2 * half, in_)).astype(np.float32)
    parts = quantize_weight(w, format)
    layout = Layout(True, glu, format)
    packed = pack(layout, parts)
    assert packed.shape == layout.shape(w.shape, "u8") and layout.holds(packed.shape, "u8")
    assert parts[1].shape == (2 * half, format.groups(in_)) and len(parts) == 2 + format.zeros
    found = unpack(layout, packed, w.shape)
    assert all(np.array_equal(a, b) for a, b in zip(found, parts, strict=True))
    back = dequantize_weight(*found[:2], found[2] if format.zeros else None, format, np.float64)
    assert np.sqrt(np.square(back - w).mean()) < 2 * format.error * np.sqrt(np.square(w).mean()) + 1e-6


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["row", "panel", "glu"])
def test_plain_layouts_hold_what_they_pack(name: str, dtype: np.dtype[np.generic]) -> None:
    layout, text = Layout.parse(name), "f32" if dtype.itemsize == 4 else "bf16"
    w = np.random.default_rng(0).standard_normal((70, 33)).astype(dtype)
    packed = pack(layout, [w])
    assert packed.shape == layout.shape(w.shape, text) and layout.holds(packed.shape, text)
    assert name == "row" or (not layout.holds(packed.shape[:-1], text) and not layout.holds(packed.shape, "i32"))
    assert unpack(layout, packed, w.shape)[0].tobytes() == w.tobytes()


@pytest.mark.parametrize("form", [RowFormat(), RowFormat(32), RowFormat(48, by_group=True)])
def test_rows_have_sizes_of_numbers_and_of_dims(form: RowFormat) -> None:
    unit = form.group or 16
    for in_ in (1, 16, 40, 96, 97):
        assert form.padded(in_) == -(-in_ // unit) * unit
        assert form.groups(in_) == (-(-in_ // form.group) if form.group else 1)
        assert form.padded(as_dim(in_)) is as_dim(form.padded(in_))
        assert form.groups(as_dim(in_)) is as_dim(form.groups(in_))
    assert form.padded(sym("K")) is unit * ceildiv(sym("K"), unit)


TEXT = """xir 1 stage=graph
dim N in [0, 8]

func @f(%x: f32[N, 32]) -> (f32[N, 16]) {
  %w = param(name="w") : f32[16, 32]
  %y = nn.linear(%x, %w) : f32[N, 16]
  return %y
}
"""


@pytest.mark.parametrize("format", EVERY, ids=str)
def test_every_format_goes_through_the_passes(format: WeightFormat) -> None:
    """Printed and read back in between, since the name is all that ops say of it."""
    w, x = (np.random.default_rng(i).standard_normal((n, 32)).astype(np.float32) for i, n in enumerate((16, 4)))
    module = parse_module(TEXT, "f.xir")
    for pipeline in (f"quantize-weights{{format={format}}}", "quantize-rows"):
        run_pipeline(pipeline, module, PassContext())
        module = parse_module(print_module(module), "f.xir")
        (got,) = run(module, "f", {"x": x}, {"w": w})
        want = x @ w.T
        assert np.sqrt(np.square(got - want).mean()) < (2 * format.error + 0.02) * np.sqrt(np.square(want).mean())
    assert any(op.name == "quant.linear" for op in module.func("f").ops)


def test_a_format_without_rows_keeps_its_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IntegerFormat, "rows", None)
    module = parse_module(TEXT, "f.xir")
    run_pipeline("quantize-weights{format=q4g32},quantize-rows", module, PassContext())
    assert [op.name for op in module.func("f").ops][-1] == "nn.linear"
