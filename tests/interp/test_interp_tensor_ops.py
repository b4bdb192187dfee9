"""The reference meaning of every t.* op against torch, in f32, in bf16 and in f64 (precise)."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from xllm_compiler.interp.run import run
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Module, Op, Value
from xllm_compiler.ir.opdef import OPS
from xllm_compiler.ir.semantics import NP_DTYPE, OUR_DTYPE, Array
from xllm_compiler.ir.types import Tensor
from xllm_compiler.ir.verify import verify

F = torch.nn.functional
TORCH = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16, "i32": torch.int32}
TORCH |= {"i64": torch.int64, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool}


def to_torch(x: Array) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def to_numpy(x: torch.Tensor) -> Array:
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def execute(cls: type[Op], arrays: list[Array], attrs: dict[str, Any], precise: bool = False) -> Array:
    module = Module()
    func = module.add_func("f")
    args = [func.add_arg(f"x{i}", Tensor(OUR_DTYPE[a.dtype], a.shape)) for i, a in enumerate(arrays)]
    func.set_returns([Builder.at_end(func).create(cls, *args, **attrs).result])
    verify(module)
    return run(module, "f", {f"x{i}": a for i, a in enumerate(arrays)}, precise=precise)[0]


def ulps(a: Array, b: Array) -> float:
    """Largest distance in units of b's last place, for bf16."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    np.testing.assert_array_equal(np.where(both, 0, x), np.where(both, 0, y))
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(y), 1e-30))) - 7)
    return float(np.max(np.where(both, np.abs(x - y) / step, 0), initial=0))


def compare(cls: type[Op], ref: Callable[..., torch.Tensor], arrays: list[Array], attrs: dict[str, Any]) -> None:
    got, want = execute(cls, arrays, attrs), to_numpy(ref(*map(to_torch, arrays)))
    assert got.dtype == want.dtype and got.shape == want.shape
    if got.dtype == ml_dtypes.bfloat16:
        assert ulps(got, want) <= 1
    elif got.dtype.kind == "f":
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    else:
        np.testing.assert_array_equal(got, want)
    if got.dtype.kind == "f" or got.dtype == ml_dtypes.bfloat16:
        wide = [a.astype(np.float64) if OUR_DTYPE[a.dtype] in ("f32", "bf16") else a for a in arrays]
        exact = execute(cls, arrays, attrs, precise=True)
        assert exact.dtype == np.float64
        np.testing.assert_allclose(exact, to_numpy(ref(*map(to_torch, wide))), rtol=1e-12, atol=1e-12)


def floats(*shape: int, dtype: str = "f32", low: float = -4, high: float = 4, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(NP_DTYPE[dtype])


UNARY: dict[str, tuple[Callable[..., torch.Tensor], float, dict[str, Any]]] = {
    "t.neg": (torch.neg, -4, {}),
    "t.abs": (torch.abs, -4, {}),
    "t.relu": (torch.relu, -4, {}),
    "t.exp": (torch.exp, -4, {}),
    "t.log": (torch.log, 0.1, {}),
    "t.sqrt": (torch.sqrt, 0, {}),
    "t.rsqrt": (torch.rsqrt, 0.1, {}),
    "t.sin": (torch.sin, -4, {}),
    "t.cos": (torch.cos, -4, {}),
    "t.tanh": (torch.tanh, -4, {}),
    "t.sigmoid": (torch.sigmoid, -40, {}),
    "t.silu": (F.silu, -40, {}),
    "t.erf": (torch.erf, -4, {}),
    "t.floor": (torch.floor, -4, {}),
    "t.softplus": (F.softplus, -40, {}),
    "t.gelu": (F.gelu, -4, {}),
}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, dtype: str) -> None:
    ref, low, attrs = UNARY[name]
    compare(OPS[name], ref, [floats(7, 5, dtype=dtype, low=low)], attrs)


def test_gelu_tanh_and_extremes() -> None:
    compare(ops.Gelu, lambda x: F.gelu(x, approximate="tanh"), [floats(64)], {"tanh": True})
    big = np.array([-np.inf, -200, -90, 90, 200, np.inf, np.nan, 0.0, -0.0], np.float32)
    for name in ("t.sigmoid", "t.exp", "t.tanh", "t.softplus", "t.abs", "t.neg"):
        got = execute(OPS[name], [big], {})
        np.testing.assert_allclose(got, to_numpy(UNARY[name][0](to_torch(big))), rtol=1e-6, atol=1e-30)


BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "t.add": torch.add,
    "t.sub": torch.sub,
    "t.mul": torch.mul,
    "t.div": torch.div,
    "t.max": torch.maximum,
    "t.min": torch.minimum,
    "t.floordiv": torch.floor_divide,
    "t.mod": torch.remainder,
    "t.eq": torch.eq,
    "t.ne": torch.ne,
    "t.lt": torch.lt,
    "t.le": torch.le,
    "t.gt": torch.gt,
    "t.ge": torch.ge,
}


CASES = [(n, d) for n in BINARY for d in ("f32", "bf16", "i32", "i64") if n != "t.div" or not d.startswith("i")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_binary(name: str, dtype: str) -> None:
    a, b = floats(4, 1, 5, dtype=dtype, low=-9, high=9), floats(3, 5, dtype=dtype, low=1.5, high=4, seed=1)
    if dtype.startswith("i"):
        b = np.where(floats(3, 5, seed=2) > 0, b, -b).astype(b.dtype)
    if name in ("t.eq", "t.ne", "t.le", "t.ge"):
        a = np.where(floats(4, 3, 5, seed=3) > 0, a, b).astype(a.dtype)
    if name in ("t.floordiv", "t.mod") and dtype == "bf16":
        # torch rounds the quotient to bf16 first; with representable quotients both agree.
        a, b = np.round(a.astype(np.float32)).astype(a.dtype), np.full_like(b, 2)
    compare(OPS[name], BINARY[name], [a, b], {})


def test_pow_and_logic() -> None:
    compare(ops.Pow, torch.pow, [floats(5, 4, low=0.1), floats(4, seed=1)], {})
    compare(ops.Pow, torch.pow, [floats(5, 4), np.full((1,), 2, np.float32)], {})
    a, b = floats(6, 4) > 0, floats(6, 1, seed=1) > 0
    compare(ops.And, torch.logical_and, [a, b], {})
    compare(ops.Or, torch.logical_or, [a, b], {})
    compare(ops.Not, torch.logical_not, [a], {})
    compare(ops.Where, torch.where, [a, floats(6, 4), floats(1, 4, seed=2)], {})
    compare(ops.Where, torch.where, [a, floats(6, 4, dtype="bf16"), floats(1, 4, dtype="bf16", seed=2)], {})


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("name", "value"), [("t.mul", 0.1), ("t.add", 1e-5), ("t.div", 3.0), ("t.pow", 2.0), ("t.sub", 0.3)]
)
def test_a_constant_takes_the_dtype_and_is_not_rounded(name: str, value: float, dtype: str) -> None:
    x = floats(5, 4, dtype=dtype)
    module = Module()
    func = module.add_func("f")
    arg = func.add_arg("x", Tensor(dtype, x.shape))
    b = Builder.at_end(func)
    func.set_returns([b.create(OPS[name], arg, b.create(ops.Const, value=value).result).result])
    got = run(module, "f", {"x": x})[0]
    fn: Any = getattr(torch, name[2:])
    want = to_numpy(fn(to_torch(x).float(), value).to(TORCH[dtype]))
    assert got.dtype == want.dtype
    if dtype == "bf16":
        assert ulps(got, want) == 0
    else:
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("dst", ["f32", "bf16", "f16", "f64", "i64", "i32", "i8", "bool"])
@pytest.mark.parametrize("src", ["f32", "bf16", "f16", "i32", "i64", "u8", "bool"])
def test_cast(src: str, dst: str) -> None:
    x = floats(100, low=0 if src == "u8" else -100, high=100)
    a = (x > 0) if src == "bool" else x.astype(NP_DTYPE[src])
    got, want = execute(ops.Cast, [a], {"dtype": dst}), to_numpy(to_torch(a).to(TORCH[dst]))
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def test_bf16_rounds_to_nearest_even_once() -> None:
    x = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    got = execute(ops.Cast, [x], {"dtype": "bf16"})
    np.testing.assert_array_equal(got.view(np.int16), to_numpy(torch.from_numpy(x).bfloat16()).view(np.int16))


def test_clamp() -> None:
    x = np.append(floats(20), [np.nan, np.inf]).astype(np.float32)
    compare(ops.Clamp, lambda t: torch.clamp(t, -1.5, 2.0), [x], {"lo": -1.5, "hi": 2.0})
    compare(ops.Clamp, lambda t: torch.clamp(t, min=0.5), [x], {"lo": 0.5})
    compare(ops.Clamp, lambda t: torch.clamp(t, max=3), [np.arange(8, dtype=np.int64)], {"hi": 3})
    compare(ops.Clamp, lambda t: t, [x], {})


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("axes", "keep"), [((-1,), True), ((0,), False), ((0, 2), False), ((2, 1), True), ((), False)])
def test_reduce(axes: tuple[int, ...], keep: bool, dtype: str) -> None:
    x = floats(3, 4, 5, dtype=dtype)
    for kind, ref in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax), ("min", torch.amin)):
        if not axes:
            continue  # torch reads an empty tuple as "all axes"; ours is the identity, tested below
        fn: Any = ref
        compare(ops.Reduce, lambda t, fn=fn: fn(t, axes, keepdim=keep), [x], {"kind": kind, "axes": axes, "keep": keep})
    if not axes:
        np.testing.assert_array_equal(execute(ops.Reduce, [x], {"kind": "sum", "axes": ()}), x)


def test_reduce_integers() -> None:
    x = np.arange(-10, 10, dtype=np.int32).reshape(4, 5)
    got = execute(ops.Reduce, [x], {"kind": "sum", "axes": (1,)})
    assert got.dtype == np.int32 and got.tolist() == x.sum(1).tolist()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_softmax_and_cumsum(dtype: str) -> None:
    x = floats(3, 4, 5, dtype=dtype)
    for axis in (-1, 1):
        compare(ops.Softmax, lambda t, a=axis: torch.softmax(t, a), [x], {"axis": axis})
    compare(ops.CumSum, lambda t: torch.cumsum(t, 1), [floats(3, 4)], {"axis": 1})
    ints = np.arange(6, dtype=np.int32).reshape(2, 3)
    got = execute(ops.CumSum, [ints], {"axis": 1})
    np.testing.assert_array_equal(got, np.cumsum(ints, 1))


def test_shapes() -> None:
    x = floats(3, 4, 6)
    compare(ops.Reshape, lambda t: t.reshape(12, 3, 2), [x], {"shape": (12, 3, 2)})
    compare(ops.Transpose, lambda t: t.permute(2, 0, 1), [x], {"perm": (-1, 0, 1)})
    compare(ops.Expand, lambda t: t.expand(5, 3, 4, 6), [x], {"shape": (5, 3, 4, 6)})
    compare(ops.Expand, lambda t: t.expand(3, 7), [floats(3, 1)], {"shape": (3, 7)})
    compare(ops.Slice, lambda t: t[:, :, 1:6:2], [x], {"axis": -1, "start": 1, "stop": 6, "step": 2})
    compare(ops.Slice, lambda t: t[3:3], [x], {"axis": 0, "start": 3, "stop": 3})
    compare(ops.Concat, lambda a, b: torch.cat([a, b], 1), [x, floats(3, 2, 6, seed=1)], {"axis": -2})
    compare(ops.Pad, lambda t: F.pad(t, (0, 0, 2, 1), value=-3.5), [x], {"axis": 1, "lo": 2, "hi": 1, "value": -3.5})


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_matmul(dtype: str) -> None:
    a, b = floats(2, 1, 4, 6, dtype=dtype, high=1, low=-1), floats(3, 6, 5, dtype=dtype, high=1, low=-1, seed=1)
    compare(ops.MatMul, torch.matmul, [a, b], {})


def test_take_and_iota() -> None:
    x, idx = floats(4, 6, 3), np.array([[5, 0], [2, 2]], np.int32)
    compare(ops.Take, lambda t, i: t[:, i.long()], [x, idx], {"axis": 1})
    for dtype in ("i32", "i64", "f32", "bf16"):
        np.testing.assert_array_equal(execute(ops.Iota, [], {"size": 9, "dtype": dtype}), np.arange(9))


def test_every_tensor_op_is_covered() -> None:
    here = {"t.pow", "t.and", "t.or", "t.not", "t.where", "t.const", "t.cast", "t.clamp", "t.reduce", "t.softmax"}
    here |= {"t.cumsum", "t.reshape", "t.transpose", "t.expand", "t.slice", "t.concat", "t.pad", "t.matmul", "t.take"}
    here |= {"t.iota", *UNARY, *BINARY}
    assert {name for name in OPS if name.startswith("t.")} == here


@pytest.mark.parametrize(
    ("cls", "types", "attrs", "message"),
    [
        (ops.Add, ["f32[2]", "bf16[2]"], {}, "dtypes f32 and bf16 differ"),
        (ops.Add, ["f32[2]", "f32[3]"], {}, "2 against 3 at axis -1"),
        (ops.Add, ["bool[2]", "bool[2]"], {}, "arithmetic"),
        (ops.Div, ["i32[2]", "i32[2]"], {}, "needs floats"),
        (ops.And, ["i32[2]", "i32[2]"], {}, "needs bool"),
        (ops.Exp, ["i32[2]"], {}, "needs floats"),
        (ops.Where, ["f32[2]", "f32[2]", "f32[2]"], {}, "bool condition"),
        (ops.Cast, ["f32[2]"], {"dtype": "f8"}, "unknown dtype"),
        (ops.Reduce, ["f32[2, 3]"], {"kind": "sum", "axes": (2,)}, "axis 2 of a rank-2"),
        (ops.Reduce, ["f32[2, 3]"], {"kind": "sum", "axes": (1, -1)}, "twice"),
        (ops.Reduce, ["f32[2, 3]"], {"kind": "prod", "axes": (1,)}, "kind='prod' is not allowed"),
        (ops.Reduce, ["i32[2, 3]"], {"kind": "mean", "axes": (1,)}, "needs floats"),
        (ops.Reshape, ["f32[2, 3]"], {"shape": (7,)}, "6 elements are not provably 7"),
        (ops.Transpose, ["f32[2, 3]"], {"perm": (0, 0)}, "not a permutation"),
        (ops.Expand, ["f32[2, 3]"], {"shape": (2, 4)}, "3 against 4"),
        (ops.Expand, ["f32[2, 3]"], {"shape": (1, 3)}, "2 is not provably 1"),
        (ops.Slice, ["f32[2, 3]"], {"axis": 1, "start": 0, "stop": 4}, "4 <= 3 is not proved"),
        (ops.Slice, ["f32[2, 3]"], {"axis": 1, "start": 2, "stop": 1}, "2 <= 1 is not proved"),
        (ops.Slice, ["f32[2, 3]"], {"axis": 1, "start": -1, "stop": 1}, "0 <= -1 is not proved"),
        (ops.Concat, ["f32[2, 3]", "f32[3, 3]"], {"axis": 1}, "2 is not provably 3"),
        (ops.Concat, [], {"axis": 1}, "concat of nothing"),
        (ops.MatMul, ["f32[2, 3]", "f32[4, 2]"], {}, "3 is not provably 4"),
        (ops.MatMul, ["f32[3]", "f32[3, 2]"], {}, "ranks of at least 2"),
        (ops.Take, ["f32[3]", "f32[3]"], {}, "needs integers"),
        (ops.Const, [], {"value": 300, "dtype": "u8"}, "does not fit u8"),
        (ops.Const, [], {"value": 1.5, "dtype": "i32"}, "cannot be 1.5"),
    ],
)
def test_type_rules_refuse(cls: type[Op], types: list[str], attrs: dict[str, Any], message: str) -> None:
    from xllm_compiler.errors import XllmError
    from xllm_compiler.ir.lexer import Source
    from xllm_compiler.ir.parser import _Parser

    func = Module().add_func("f")
    args: list[Value] = [func.add_arg(f"x{i}", _Parser(Source(t, "")).read_type()) for i, t in enumerate(types)]
    with pytest.raises(XllmError, match=message) as e:
        Builder.at_end(func).create(cls, *args, **attrs)
    assert e.value.kind == "ir"


def test_out_of_range_indices_are_errors() -> None:
    from xllm_compiler.ir.diag import IrError

    for bad in (-1, 4):
        with pytest.raises(IrError, match=f"index {bad} is out of range for 4 rows"):
            execute(ops.Take, [floats(4, 2), np.array([0, bad], np.int32)], {})
