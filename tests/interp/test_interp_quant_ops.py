"""Quantized ops against numpy written down here, and what rounding must keep: bounds, exactness, zero points, NaN."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.interp import run
from xllm_compiler.ir import quant
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.weight_formats import ROTATIONS, IntegerFormat, RowFormat

BF16 = np.dtype(ml_dtypes.bfloat16)
FORMS = [(8, 0, False), (8, 32, True), (4, 32, False), (4, 16, True), (4, 0, False), (4, 0, True)]


def spread(table: np.ndarray, group: int, length: int) -> np.ndarray:
    """A number per group as a number per weight."""
    return np.stack([table[:, j // (group or length)] for j in range(length)], axis=1).astype(np.float64)


def matrix(seed: int, out: int, in_: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((out, in_)) * rng.uniform(0.001, 3, (out, 1))).astype(np.float32)


@pytest.mark.parametrize("bits, group, zeros", FORMS)
@settings(deadline=None, max_examples=25)
@given(out=st.integers(1, 9), in_=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_weight_is_off_by_half_a_step(bits: int, group: int, zeros: bool, out: int, in_: int, seed: int) -> None:
    """By group, a short last one too. At 4 bits what is clipped may be off by more, but not in the sum of squares."""
    w = matrix(seed, out, in_)
    stored, scales, points = quant.quantize_integers(w, IntegerFormat(bits, group, zeros))
    count = -(-in_ // group) if group else 1
    assert stored.shape == (out, in_) and scales.shape == points.shape == (out, count)
    assert stored.dtype == points.dtype == np.uint8 and scales.dtype == (np.float16 if group else np.float32)
    assert stored.max() < 1 << bits and (zeros or (points == 1 << (bits - 1)).all())
    step = np.abs(spread(scales, group, in_))
    back = (stored.astype(np.float64) - spread(points, group, in_)) * spread(scales, group, in_)
    off = np.abs(back - w)
    if bits == 8:  # f16 scales put the ends of a group off by up to 127 * 2^-11 steps more
        assert (off <= step * (0.502 + (255 * 2.0**-11 + 0.5 * zeros if group else 0))).all()
    for g in range(count):
        part = slice(g * group, (g + 1) * group) if group else slice(None)
        span = np.abs(w[:, part]).max(axis=1)
        worst = span / (7 if bits == 4 else 127) * (2 if zeros else 1)
        assert (np.sqrt(np.square(off[:, part]).mean(axis=1)) <= worst * 0.75 + 1e-7).all()


@settings(deadline=None, max_examples=25)
@given(out=st.integers(1, 9), in_=st.integers(2, 70), seed=st.integers(0, 99))
def test_multiples_of_a_step_are_kept_exactly(out: int, in_: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    integers = rng.integers(-127, 128, (out, in_))
    integers[:, rng.integers(in_)] = rng.choice((-127, 127))
    w = integers.astype(np.float32) * np.float32(2.0**-9)
    stored, scales, _ = quant.quantize_integers(w, IntegerFormat(8))
    assert (stored.astype(int) - 128 == integers).all() and (scales == 2.0**-9).all()
    assert (quant.dequantize_weight(stored, scales, None, IntegerFormat(8), np.float32) == w).all()


def test_zero_points_spend_the_whole_range_on_one_side() -> None:
    w = np.linspace(0, 15, 16, dtype=np.float32)[None] * np.float32(0.25)
    stored, scales, points = quant.quantize_integers(w, IntegerFormat(4, 16, True))
    assert (stored[0] == np.arange(16)).all() and scales[0, 0] == 0.25 and points[0, 0] == 0
    stored, scales, points = quant.quantize_integers(-w, IntegerFormat(4, 16, True))
    assert (stored[0] == 15 - np.arange(16)).all() and points[0, 0] == 15


@pytest.mark.parametrize("bits, group, zeros", FORMS)
def test_zero_stays_zero_and_rows_do_not_see_each_other(bits: int, group: int, zeros: bool) -> None:
    """Blocks of rows are an implementation's matter: 700 rows at once are what each is alone."""
    w = matrix(3, 700, 300)
    w[5] = 0
    w[:, 7] = 0
    whole = quant.quantize_integers(w, IntegerFormat(bits, group, zeros))
    back = quant.dequantize_weight(
        whole[0], whole[1], whole[2] if zeros else None, IntegerFormat(bits, group, zeros), np.float64
    )
    assert (back[5] == 0).all() and (back[:, 7] == 0).all()
    for row in (0, 5, 436, 437, 699):
        for a, b in zip(
            whole, quant.quantize_integers(w[row : row + 1], IntegerFormat(bits, group, zeros)), strict=True
        ):
            assert np.array_equal(a[row : row + 1], b)


@pytest.mark.parametrize("outlier", [1, 4])
def test_no_scale_is_much_better_than_the_one_chosen(outlier: int) -> None:
    """A thousand scales of either sign, tried one by one here on groups of 32, with an outlier or without."""
    w = matrix(1, 60, 32).astype(np.float64)
    w[:, 3] = outlier * np.abs(w).max(axis=1)
    stored, scales, _ = quant.quantize_integers(w.astype(np.float32), IntegerFormat(4, 32))
    scale = scales.astype(np.float64)
    assert (stored.astype(int) - 8 == np.clip(np.rint(w / scale), -8, 7)).all()
    got = np.square((stored.astype(int) - 8) * scale - w).sum(axis=1)
    best = np.full(60, np.inf)
    for step in np.abs(w).max(axis=1, keepdims=True) / 8 * np.linspace(-1.4, 1.4, 1000)[:, None, None]:
        best = np.minimum(best, np.square(np.clip(np.rint(w / step), -8, 7) * step - w).sum(axis=1))
    assert (got < best * 1.15).all() and np.median(got / best) < 1.01


def test_of_eight_bits_in_groups_too() -> None:
    """A fifth less error than with the largest weight as the largest integer; no group is worse but for f16."""
    w = matrix(2, 400, 32)

    def errors(scale: np.ndarray) -> np.ndarray:
        scale = scale.astype(np.float16).astype(np.float64)
        return np.asarray(np.square(np.clip(np.rint(w / scale), -128, 127) * scale - w).sum(axis=1))

    stored, scales, _ = quant.quantize_integers(w, IntegerFormat(8, 32))
    back = quant.dequantize_weight(stored, scales, None, IntegerFormat(8, 32), np.float64)
    got, plain = np.square(back - w).sum(axis=1), errors(np.abs(w).max(axis=1, keepdims=True) / 127)
    np.testing.assert_allclose(got, errors(scales), rtol=1e-9)
    assert got.sum() < 0.85 * plain.sum() and (got < 1.1 * plain).all()


def test_scales_of_tiny_and_huge_weights() -> None:
    """Nothing overflows on the way to a scale, whatever the magnitude; beyond f16 the scale is its largest or 0."""
    shape = matrix(2, 1, 32)
    plain = quant.quantize_integers(shape, IntegerFormat(4))
    for power in (-80, 90):
        stored, scales, _ = quant.quantize_integers(shape * np.float32(2.0**power), IntegerFormat(4))
        assert (stored == plain[0]).all() and (scales == plain[1] * np.float32(2.0**power)).all()
    assert np.abs(quant.quantize_integers(shape * np.float32(1e30), IntegerFormat(4, 32))[1]) == 65504
    assert (quant.quantize_integers(shape * np.float32(1e-41), IntegerFormat(4, 32))[1] == 0).all()


def test_rows_by_group() -> None:
    """Each group as a row of its own would be; a group that is not finite spoils no other."""
    x = np.random.default_rng(5).standard_normal((4, 40)).astype(np.float32)
    x[1, 35], x[2, :32], x[3, 3] = np.inf, 0, 50
    types = "i8[N, 64], f32[N, 2], i32[N, 2]"
    text = f"""xir 1 stage=graph
dim N in [0, 512]

func @f(%x: f32[N, 40], %w: f32[24, 40]) -> ({types}, f32[N, 24]) {{
  %q, %s, %t = quant.rows(%x, group=32, by_group=true) : {types}
  %a, %b = quant.weight(%w, format="q8g32") : u8[24, 40], f16[24, 2]
  %y = quant.linear(%q, %s, %t, %a, %b, format="q8g32", dtype=f32) : f32[N, 24]
  return %q, %s, %t, %y
}}
"""
    w = matrix(6, 24, 40)
    q, s, t, y = run(parse_module(text, "f.xir"), "f", {"x": x, "w": w}, {})
    for group, part in enumerate((x[:, :32], x[:, 32:])):
        alone = quant.quantize_rows(part, RowFormat(32))
        assert (q[:, 32 * group : 32 * group + 32] == alone[0]).all() and (t[:, group] == alone[2][:, 0]).all()
        np.testing.assert_array_equal(s[:, group], alone[1])
    assert np.isnan(y[1]).all()
    none = run(parse_module(text, "f.xir"), "f", {"x": x[:0], "w": w}, {})
    assert [made.shape for made in none] == [(0, 64), (0, 2), (0, 2), (0, 24)]
    back = quant.dequantize_weight(
        *quant.quantize_integers(w, IntegerFormat(8, 32))[:2], None, IntegerFormat(8, 32), np.float64
    )
    wide = np.concatenate([q[:, :32] * s[:, :1].astype(np.float64), q[:, 32:40] * s[:, 1:].astype(np.float64)], axis=1)
    rest = [0, 2, 3]
    np.testing.assert_allclose(y[rest], wide[rest] @ back.T, rtol=1e-5, atol=1e-5)
    assert np.abs(wide[3, 4:] - x[3, 4:]).max() < 0.25 and np.abs(wide[3, 32:] - x[3, 32:]).max() < 0.02
    with pytest.raises(IrError, match="no groups"):
        parse_module(text.replace("quant.rows(%x, group=32, by", "quant.rows(%x, by"), "f.xir")
    with pytest.raises(IrError, match="row scales"):
        parse_module(text.replace(", by_group=true", "").replace("f32[N, 2]", "f32[N]"), "f.xir")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("k, group", [(1, 0), (37, 0), (40, 32), (64, 16)])
def test_rows(dtype: str, k: int, group: int) -> None:
    x = np.random.default_rng(k).standard_normal((5, k)).astype(np.float32)
    x = x.astype(BF16) if dtype == "bf16" else x
    x[1], x[2, 0], x[3, k - 1] = 0, np.nan, -np.inf
    count, padded = (-(-k // group), -(-k // group) * group) if group else (1, -(-k // 16) * 16)
    types = f"i8[N, {padded}], f32[N], i32[N, {count}]"
    text = f"""xir 1 stage=graph
dim N in [0, 512]

func @f(%x: {dtype}[N, {k}]) -> ({types}) {{
  %q, %s, %t = quant.rows(%x{f", group={group}" if group else ""}) : {types}
  return %q, %s, %t
}}
"""
    q, s, t = run(parse_module(text, "f.xir"), "f", {"x": x}, {})
    assert q.shape == (5, padded) and (q[:, k:] == 0).all() and np.isnan(s[2:4]).all() and s[1] == 0
    for row in (0, 1, 4):
        wide = x[row].astype(np.float64)
        top = np.abs(wide).max()
        assert s[row] == pytest.approx(top / 127, rel=1e-6)
        exact = wide * (127 / top) if top else wide
        assert (np.abs(q[row, :k] - exact) <= 0.5 + 1e-4).all() and (
            top == 0 or np.abs(q[row].astype(int)).max() == 127
        )
    for g in range(count):
        part = q[:, g * group : (g + 1) * group] if group else q
        assert (t[:, g] == part.astype(int).sum(axis=1)).all()


def hadamard(block: int) -> np.ndarray:
    """Sylvester's matrix, orthonormal."""
    return functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * int(np.log2(block))) / np.sqrt(block)


@pytest.mark.parametrize("block", ROTATIONS)
def test_a_rotation_is_its_own_inverse_and_spreads(block: int) -> None:
    x = matrix(5, 3, 4 * block)
    x[0, 7] = 100
    turned = quant.rotate(x, block)
    want = (x.reshape(-1, block).astype(np.float64) @ hadamard(block)).reshape(x.shape)
    assert turned.dtype == np.float32 and np.abs(turned - want).max() < 1e-5
    assert np.abs(quant.rotate(turned, block) - x).max() < 3e-5
    assert np.abs(turned[0]).max() < 100 / np.sqrt(block) + 8 and quant.rotate(x, 0) is x
    assert [quant.rotation(n) for n in (192, 48, 40, 0)] == [64, 16, 0, 64]


def test_rotated_on_both_sides_a_product_is_what_it_was() -> None:
    """Up to roundings, which an outlier in each row makes much smaller than without."""
    text = """xir 1 stage=graph
dim N in [0, 512]

func @f(%x: f32[N, 128], %w: f32[40, 128]) -> (f32[N, 40], f32[N, 40], f32[40, 128]) {
  %a, %b = quant.weight(%w, format="q8", rotate=64) : u8[40, 128], f32[40, 1]
  %back = quant.dequantize(%a, %b, format="q8", rotate=64, dtype=f32) : f32[40, 128]
  %q, %s, %t = quant.rows(%x, rotate=64) : i8[N, 128], f32[N], i32[N, 1]
  %y = quant.linear(%q, %s, %t, %a, %b, format="q8", dtype=f32) : f32[N, 40]
  %c, %d = quant.weight(%w, format="q8") : u8[40, 128], f32[40, 1]
  %r, %u, %v = quant.rows(%x) : i8[N, 128], f32[N], i32[N, 1]
  %z = quant.linear(%r, %u, %v, %c, %d, format="q8", dtype=f32) : f32[N, 40]
  return %y, %z, %back
}
"""
    x, w = matrix(6, 20, 128), matrix(7, 40, 128)
    x[np.arange(20), np.arange(20) * 5] = 60
    turned, plain, back = run(parse_module(text, "f.xir"), "f", {"x": x, "w": w}, {})
    want = x.astype(np.float64) @ w.T.astype(np.float64)
    spread = np.sqrt(np.square(back - w).mean(axis=1)) / np.abs(w).max(axis=1)
    assert (spread < 1 / 127).all()
    off, before = (np.sqrt(np.square(y - want).mean()) for y in (turned, plain))
    assert off < before / 2 and off < 0.01 * np.abs(want).max()


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bits, group, zeros", FORMS)
def test_linear_layers(bits: int, group: int, zeros: bool, glu: bool) -> None:
    """Sums of integers, written out by group."""
    n, k, out = 4, 40, 6
    rng = np.random.default_rng(bits + group)
    count, padded = (-(-k // group), -(-k // group) * group) if group else (1, 48)
    x = np.zeros((n, padded), np.int8)
    x[:, :k] = rng.integers(-127, 128, (n, k))
    given_ = {
        "x": x,
        "s": rng.uniform(0.01, 0.1, (n, count) if bits == 8 and group else n).astype(np.float32),
        "t": x.reshape(n, count, -1).sum(axis=2, dtype=np.int32),
        "w": rng.integers(0, 1 << bits, (out, k)).astype(np.uint8),
        "c": rng.uniform(0.001, 0.01, (out, count)).astype(np.float16 if group else np.float32),
        "z": rng.integers(0, 1 << bits, (out, count)).astype(np.uint8),
        "b": rng.standard_normal(out).astype(np.float32),
        "r": rng.standard_normal((n, out)).astype(np.float32),
    }  # fmt: skip
    scale = "f16" if group else "f32"
    by_group = f", {count}" if bits == 8 and group else ""
    args = (
        f"%x: i8[N, {padded}], %s: f32[N{by_group}], %t: i32[N, {count}], %w: u8[{out}, {k}], "
        f"%c: {scale}[{out}, {count}], %z: u8[{out}, {count}], %b: f32[{out}], %r: f32[N, {out}]"
    )
    form = f'format="{IntegerFormat(bits, group, zeros)}"'
    zero = ", zeros=%z" if zeros else ""
    rest = f"{form}, act=silu, dtype=f32" if not glu else f"{form}, dtype=f32"
    residual = "" if glu else ", residual=%r"
    name, width = ("quant.linear_glu", out // 2) if glu else ("quant.linear", out)
    text = f"xir 1 stage=graph\ndim N in [0, 512]\n\nfunc @f({args}) -> (f32[N, {width}]) {{\n"
    text += f"  %y = {name}(%x, %s, %t, %w, %c{zero}, bias=%b{residual}, {rest}) : f32[N, {width}]\n  return %y\n}}\n"
    (got,) = run(parse_module(text, "f.xir"), "f", given_, {})
    want = np.zeros((n, out))
    for i in range(n):
        for o in range(out):
            for g in range(count):
                ks = range(g * group, min(k, (g + 1) * group)) if group else range(k)
                point = int(given_["z"][o, g]) if zeros else 1 << (bits - 1)
                total = sum(int(x[i, j]) * (int(given_["w"][o, j]) - point) for j in ks)
                of_row = given_["s"][i, g] if by_group else given_["s"][i]
                want[i, o] += total * float(given_["c"][o, g]) * float(of_row)
            want[i, o] += given_["b"][o]
    if glu:
        want = want[:, : out // 2] / (1 + np.exp(-want[:, : out // 2])) * want[:, out // 2 :]
    else:
        want = want / (1 + np.exp(-want)) + given_["r"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_row_with_nan_is_nan_in_every_column() -> None:
    w = np.full((3, 16), 200, np.uint8)
    text = """xir 1 stage=graph
dim N in [0, 512]

func @f(%x: f32[N, 16], %w: u8[3, 16], %c: f32[3, 1]) -> (f32[N, 3]) {
  %q, %s, %t = quant.rows(%x) : i8[N, 16], f32[N], i32[N, 1]
  %y = quant.linear(%q, %s, %t, %w, %c, format="q8", dtype=f32) : f32[N, 3]
  return %y
}
"""
    x = np.ones((2, 16), np.float32)
    x[0, 9] = np.nan
    (y,) = run(parse_module(text, "f.xir"), "f", {"x": x, "w": w, "c": np.ones((3, 1), np.float32)}, {})
    assert np.isnan(y[0]).all() and np.allclose(y[1], 16 * 72)


def test_weight_and_dequantize_as_ops() -> None:
    text = """xir 1 stage=graph
dim N in [0, 512]

func @f(%w: bf16[5, 40]) -> (u8[5, 40], f16[5, 2], u8[5, 2], bf16[5, 40]) {
  %q, %c, %z = quant.weight(%w, format="q4g32z") : u8[5, 40], f16[5, 2], u8[5, 2]
  %back = quant.dequantize(%q, %c, zeros=%z, format="q4g32z") : bf16[5, 40]
  return %q, %c, %z, %back
}
"""
    w = matrix(2, 5, 40).astype(BF16)
    q, c, z, back = run(parse_module(text, "f.xir"), "f", {"w": w}, {})
    want = (q.astype(np.float64) - spread(z, 32, 40)) * spread(c, 32, 40)
    assert back.dtype == BF16 and (back == want.astype(np.float32).astype(BF16)).all()
    assert np.abs(want - w.astype(np.float64)).max() < 0.25 * np.abs(w.astype(np.float64)).max()
