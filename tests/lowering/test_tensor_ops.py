"""Every t.* op through the compiled path, against numpy and torch. The interpreter is not trusted here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xllm_compiler.ir.opdef import OPS

COLS = 37  # two whole vectors and a tail


def _tokens(n: int) -> dict[str, Any]:
    return {"ids": np.arange(n, dtype=np.int32) % 5, "pos": np.arange(n, dtype=np.int32)}


RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((5, COLS)).astype(np.float32)
OTHER = RNG.standard_normal((5, COLS)).astype(np.float32)


def _step(body: str, out: str, result: str = "%y") -> str:
    """A step with f32 rows x and y [N, 37], gathered so that no weight folding can compute the op beforehand."""
    return f"""func @step(%ids: i32[N], %pos: i32[N]) -> ({out}) {{
  %wx = param(name="x") : f32[5, {COLS}]
  %wz = param(name="z") : f32[5, {COLS}]
  %x = t.take(%wx, %ids, axis=0) : f32[N, {COLS}]
  %z = t.take(%wz, %ids, axis=0) : f32[N, {COLS}]
{body}
  return {result}
}}
"""


def _run(build: Any, body: str, out: str, n: int, team: int = 1, scale: float = 1.0) -> tuple[Any, Any, Any]:
    params = {"x": TABLE * np.float32(scale), "z": OTHER}
    c = build(_step(body, out), params)
    got, _ = c.step(_tokens(n), {"N": n}, c.lowering.isas[0], team)
    rows = np.arange(n) % 5
    return got, torch.from_numpy(params["x"][rows]), torch.from_numpy(OTHER[rows])


F32 = f"f32[N, {COLS}]"
UNARY: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "neg": ("t.neg(%x)", torch.neg),
    "exp": ("t.exp(%x)", torch.exp),
    "log": ("t.log(%a)", lambda x: torch.log(x.abs())),
    "sqrt": ("t.sqrt(%a)", lambda x: torch.sqrt(x.abs())),
    "rsqrt": ("t.rsqrt(%a)", lambda x: torch.rsqrt(x.abs())),
    "sin": ("t.sin(%x)", torch.sin),
    "cos": ("t.cos(%x)", torch.cos),
    "tanh": ("t.tanh(%x)", torch.tanh),
    "sigmoid": ("t.sigmoid(%x)", torch.sigmoid),
    "silu": ("t.silu(%x)", torch.nn.functional.silu),
    "relu": ("t.relu(%x)", torch.relu),
    "erf": ("t.erf(%x)", torch.erf),
    "abs": ("t.abs(%x)", torch.abs),
    "floor": ("t.floor(%x)", torch.floor),
    "gelu": ("t.gelu(%x)", torch.nn.functional.gelu),
    "gelu_tanh": ("t.gelu(%x, tanh=true)", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "softplus": ("t.softplus(%x)", torch.nn.functional.softplus),
    "clamp": ("t.clamp(%x, lo=-0.5, hi=1.5)", lambda x: torch.clamp(x, -0.5, 1.5)),
}


@pytest.mark.parametrize("name", sorted(UNARY))
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_unary(build: Any, name: str, scale: float) -> None:
    text, want = UNARY[name]
    body = f"  %a = t.abs(%x) : {F32}\n  %y = {text} : {F32}"
    got, x, _ = _run(build, body, F32, 3, scale=scale)
    np.testing.assert_allclose(got, want(x).numpy(), rtol=3e-6, atol=1e-6 if name in ("gelu_tanh", "gelu") else 1e-7)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
    "floordiv": lambda a, b: torch.floor(a / b),
    "mod": torch.remainder,
}


@pytest.mark.parametrize("name", sorted(BINARY))
def test_binary_f32(build: Any, name: str) -> None:
    got, x, z = _run(build, f"  %y = t.{name}(%x, %z) : {F32}", F32, 4)
    np.testing.assert_allclose(got, BINARY[name](x, z).numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("exponent", ["2.0", "3.0", "0.5", "-0.5", "-1.0", "2.5", "0.0"])
def test_pow(build: Any, exponent: str) -> None:
    body = f"  %a = t.abs(%x) : {F32}\n  %c = t.const(value={exponent}) : f32[]\n  %y = t.pow(%a, %c) : {F32}"
    got, x, _ = _run(build, body, F32, 2)
    np.testing.assert_allclose(got, torch.pow(x.abs(), float(exponent)).numpy(), rtol=2e-6)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_compare_and_where(build: Any, name: str) -> None:
    body = f"  %c = t.{name}(%x, %z) : bool[N, {COLS}]\n  %y = t.where(%c, %x, %z) : {F32}"
    got, x, z = _run(build, body, F32, 3)
    np.testing.assert_array_equal(got, torch.where(getattr(torch, name)(x, z), x, z).numpy())


def test_logic_and_bool_memory(build: Any) -> None:
    """The bool values have two users of different kinds, so they are written as bytes and read back."""
    body = f"""  %zero = t.const(value=0.0) : f32[]
  %p = t.gt(%x, %zero) : bool[N, {COLS}]
  %q = t.gt(%z, %zero) : bool[N, {COLS}]
  %a = t.and(%p, %q) : bool[N, {COLS}]
  %o = t.or(%p, %q) : bool[N, {COLS}]
  %n = t.not(%a) : bool[N, {COLS}]
  %r = t.reshape(%n, shape=[{COLS}*N]) : bool[{COLS}*N]
  %b = t.reshape(%r, shape=[N, {COLS}]) : bool[N, {COLS}]
  %w = t.where(%b, %x, %z) : {F32}
  %y = t.where(%o, %w, %zero) : {F32}"""
    got, x, z = _run(build, body, F32, 3)
    p, q = x > 0, z > 0
    want = torch.where(p | q, torch.where(~(p & q), x, z), torch.tensor(0.0))
    np.testing.assert_array_equal(got, want.numpy())


def test_nan_wins(build: Any) -> None:
    """max, min, relu and clamp keep NaN, as numpy and torch do."""
    body = f"""  %zero = t.const(value=0.0) : f32[]
  %s = t.sub(%x, %x) : {F32}
  %nan = t.div(%s, %s) : {F32}
  %a = t.max(%nan, %z) : {F32}
  %b = t.min(%z, %a) : {F32}
  %c = t.relu(%b) : {F32}
  %y = t.clamp(%c, lo=0.0, hi=1.0) : {F32}"""
    got, _, _ = _run(build, body, F32, 2)
    assert np.isnan(got).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64", "i32", "i64", "i8", "bool"])
def test_cast_round_trip(build: Any, dtype: str) -> None:
    """A cast that is stored in memory and read back (the reduce over rows needs it there)."""
    body = f"""  %k = t.cast(%x, dtype={dtype}) : {dtype}[N, {COLS}]
  %r = t.reshape(%k, shape=[{COLS}*N]) : {dtype}[{COLS}*N]
  %u = t.reshape(%r, shape=[N, {COLS}]) : {dtype}[N, {COLS}]
  %y = t.cast(%u, dtype=f32) : {F32}"""
    got, x, _ = _run(build, body, F32, 3, scale=3.0)
    names = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
    names |= {"i32": "int32", "i64": "int64", "i8": "int8", "bool": "bool"}
    np.testing.assert_array_equal(got, x.to(getattr(torch, names[dtype])).float().numpy())


@pytest.mark.parametrize("kind", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_reduce(build: Any, kind: str, axes: tuple[int, ...]) -> None:
    text = {(0,): f"f32[{COLS}]", (1,): "f32[N]", (0, 1): "f32[]"}[axes]
    body = (
        f"  %m = t.mul(%x, %z) : {F32}\n  %y = t.reduce(%m, kind={kind}, axes=[{', '.join(map(str, axes))}]) : {text}"
    )
    got, x, z = _run(build, body, text, 7)
    product = (x * z).double()
    fn = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[kind]
    np.testing.assert_allclose(got, fn(product, dim=axes).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["softmax", "cumsum"])
def test_scan(build: Any, op: str, axis: int) -> None:
    got, x, _ = _run(build, f"  %m = t.neg(%x) : {F32}\n  %y = t.{op}(%m, axis={axis}) : {F32}", F32, 9)
    want = torch.softmax(-x.double(), axis) if op == "softmax" else torch.cumsum(-x.double(), axis)
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6, atol=2e-6)


def test_moves(build: Any) -> None:
    """transpose, slice, concat, pad, expand, reshape and take, chained so that each reads the one before."""
    body = f"""  %t = t.transpose(%x, perm=[1, 0]) : f32[{COLS}, N]
  %s = t.slice(%t, axis=0, start=1, stop=36, step=2) : f32[18, N]
  %c = t.concat(%s, %t, axis=0) : f32[55, N]
  %p = t.pad(%c, axis=0, lo=2, hi=3, value=7.5) : f32[60, N]
  %b = t.transpose(%p, perm=[1, 0]) : f32[N, 60]
  %r = t.reshape(%b, shape=[N, 4, 15]) : f32[N, 4, 15]
  %q = t.slice(%r, axis=2, start=0, stop=1) : f32[N, 4, 1]
  %e = t.expand(%q, shape=[N, 4, 20]) : f32[N, 4, 20]
  %i = t.iota(size=3) : i32[3]
  %k = t.take(%e, %i, axis=1) : f32[N, 3, 20]
  %y = t.add(%k, %k) : f32[N, 3, 20]"""
    got, x, _ = _run(build, body, "f32[N, 3, 20]", 5, team=2)
    t = x.T
    p = torch.nn.functional.pad(torch.cat([t[1:36:2], t]).T, (2, 3), value=7.5)
    want = p.reshape(5, 4, 15)[:, :, :1].expand(5, 4, 20)[:, :3] * 2
    np.testing.assert_array_equal(got, want.numpy())


def test_take_along_the_last_axis(build: Any) -> None:
    """Lanes gather: every element of a vector comes from a place of its own."""
    body = f"""  %i = t.iota(size=20) : i32[20]
  %k = t.const(value=36, dtype=i32) : i32[]
  %j = t.sub(%k, %i) : i32[20]
  %n = t.neg(%x) : {F32}
  %y = t.take(%n, %j, axis=1) : f32[N, 20]"""
    got, x, _ = _run(build, body, "f32[N, 20]", 3)
    np.testing.assert_array_equal(got, -x[:, 36 - torch.arange(20)].numpy())


def test_matmul(build: Any) -> None:
    body = f"""  %n = t.neg(%z) : {F32}
  %t = t.transpose(%n, perm=[1, 0]) : f32[{COLS}, N]
  %g = t.matmul(%x, %t) : f32[N, N]
  %y = t.matmul(%g, %x) : {F32}"""
    got, x, z = _run(build, body, F32, 21, team=2)
    want = (x.double() @ -z.double().T) @ x.double()
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-3)


def test_batched_matmul_broadcasts(build: Any) -> None:
    body = f"""  %a = t.reshape(%x, shape=[N, 1, {COLS}]) : f32[N, 1, {COLS}]
  %t = t.transpose(%z, perm=[1, 0]) : f32[{COLS}, N]
  %y = t.matmul(%a, %t) : f32[N, 1, N]"""
    got, x, z = _run(build, body, "f32[N, 1, N]", 4)
    np.testing.assert_allclose(got, (x[:, None].double() @ z.double().T).numpy(), rtol=1e-5, atol=1e-5)


def test_integer_arithmetic(build: Any) -> None:
    text = """func @step(%ids: i32[N], %pos: i32[N]) -> (i64[N]) {
  %c = t.const(value=-3, dtype=i32) : i32[]
  %a = t.floordiv(%pos, %c) : i32[N]
  %b = t.mod(%pos, %c) : i32[N]
  %m = t.mul(%a, %b) : i32[N]
  %s = t.sub(%m, %ids) : i32[N]
  %p = t.const(value=2, dtype=i32) : i32[]
  %q = t.pow(%s, %p) : i32[N]
  %r = t.max(%q, %pos) : i32[N]
  %w = t.cast(%r, dtype=i64) : i64[N]
  %i = t.iota(size=N, dtype=i64) : i64[N]
  %y = t.add(%w, %i) : i64[N]
  return %y
}
"""
    c = build(text)
    tokens = _tokens(11)
    got, _ = c.step(tokens, {"N": 11}, c.lowering.isas[0], 2)
    pos, ids = tokens["pos"].astype(np.int64), tokens["ids"].astype(np.int64)
    want = np.maximum(((pos // -3) * (pos % -3) - ids) ** 2, pos) + np.arange(11)
    np.testing.assert_array_equal(got, want)


def test_every_tensor_op_is_tried_here() -> None:
    """A new t.* op has to come with a test: this file's text names all of them."""
    text = Path(__file__).read_text(encoding="utf-8")
    tried = set(UNARY) | set(BINARY) | {"eq", "ne", "lt", "le", "gt", "ge", "softmax", "cumsum"}
    missing = [name for name in OPS if name.startswith("t.") and name[2:] not in tried and f"{name}(" not in text]
    assert not missing, missing
