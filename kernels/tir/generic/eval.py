"""Turns nodes into TensorIR expressions at one place of the output, for one element or for a vector of them.

It has the meaning of every pointwise and index op, and the conversions between storage and compute types. bf16 and f16
are computed in f32, and rounded only where a value is stored or cast. So a fused chain is at least as exact as one op
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from xllm_compiler.dims import Dim
from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.codegen import vmath
from xllm_compiler.kernels.tir.generic.nodes import COMPARE, POINTWISE, Body, Node
from xllm_compiler.kernels.tir.isa.levels import LANES

Expr = Any
Stmt = Any

STORAGE: Final = {
    "f64": "float64",
    "f32": "float32",
    "bf16": "uint16",
    "f16": "float16",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
    "u8": "uint8",
    "bool": "uint8",
}
COMPUTE: Final = STORAGE | {"bf16": "float32", "f16": "float32", "bool": "bool"}


def i64(value: int) -> Expr:
    """An int64 constant."""
    return tirx.const(value, "int64")


def vec(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def pointer(name: str, dtype: str) -> Expr:
    """A parameter that points at elements of a storage type."""
    return tirx.Var(name, PointerType(PrimType(dtype)))


def dim_expr(dim: Dim, env: dict[str, Expr]) -> Expr:
    """A Dim as an int64 expression over `env`'s symbols."""

    def call(kind: str, args: list[Expr]) -> Expr:
        a, b = args[0], args[-1]
        if kind == "add":
            return a + b
        if kind == "mul":
            return a * b
        if kind == "floordiv":
            return tirx.floordiv(a, b)
        if kind == "mod":
            return tirx.floormod(a, b)
        if kind == "ceildiv":
            return i64(0) - tirx.floordiv(i64(0) - a, b)
        result = a
        for other in args[1:]:
            result = tirx.min(result, other) if kind == "min" else tirx.max(result, other)
        return result

    return dim.fold(lambda name: env[name], i64, call)


@dataclass(frozen=True, eq=False, slots=True)
class Index:
    """Where along one dimension: lane l stands at base + l * stride; or, lane by lane, at `lanes` (a vector)."""

    base: Expr
    stride: int = 0
    lanes: Expr | None = None

    @property
    def uniform(self) -> bool:
        return self.stride == 0 and self.lanes is None


@dataclass(frozen=True, slots=True)
class Val:
    """A scalar that all lanes share, or a vector."""

    expr: Expr
    vector: bool


def round_bf16(x: Expr, lanes: int) -> Expr:
    """f32 to the bits of the nearest bf16 (ties to even), as uint16."""
    u = vec("uint32", lanes)
    bits = tirx.reinterpret(u, x)
    odd = tirx.bitwise_and(tirx.shift_right(bits, tirx.const(16, u)), tirx.const(1, u))
    rounded = tirx.shift_right(bits + odd + tirx.const(0x7FFF, u), tirx.const(16, u))
    quiet = tirx.bitwise_or(tirx.shift_right(bits, tirx.const(16, u)), tirx.const(0x40, u))
    # not x != x: TVM simplifies that to false
    nan = tirx.GT(tirx.bitwise_and(bits, tirx.const(0x7FFFFFFF, u)), tirx.const(0x7F800000, u))
    return tirx.Select(nan, quiet, rounded).astype(vec("uint16", lanes))


def widen_bf16(bits: Expr, lanes: int) -> Expr:
    """The bits of bf16 values (uint16) to f32."""
    u = vec("uint32", lanes)
    return tirx.reinterpret(vec("float32", lanes), tirx.shift_left(bits.astype(u), tirx.const(16, u)))


def to_compute(stored: Expr, dtype: str, lanes: int) -> Expr:
    """A stored value as a compute value."""
    if dtype == "bf16":
        return widen_bf16(stored, lanes)
    if dtype == "f16":
        return stored.astype(vec("float32", lanes))
    if dtype == "bool":
        return tirx.NE(stored, tirx.const(0, vec("uint8", lanes)))
    return stored


def to_storage(value: Expr, dtype: str, lanes: int) -> Expr:
    """A compute value as it is stored, rounded to nearest even."""
    if dtype == "bf16":
        return round_bf16(value, lanes)
    if dtype == "f16":
        return value.astype(vec("float16", lanes))
    if dtype == "bool":
        return tirx.Select(value, tirx.const(1, vec("uint8", lanes)), tirx.const(0, vec("uint8", lanes)))
    return value


def convert(value: Expr, source: str, target: str, lanes: int) -> Expr:
    """A compute value of dtype `source` as a compute value of `target`, rounded to what `target` can hold."""
    if source == target:
        return value
    kind = vec(COMPUTE[target], lanes)
    if target == "bool":
        return value if source == "bool" else tirx.NE(value, tirx.const(0, vec(COMPUTE[source], lanes)))
    if source == "bool":
        return tirx.Select(value, tirx.const(1, kind), tirx.const(0, kind))
    cast = value.astype(kind)
    if target == "bf16":
        return widen_bf16(round_bf16(cast, lanes), lanes)
    if target == "f16":
        return cast.astype(vec("float16", lanes)).astype(kind)
    return cast


def as_compute(value: Expr, source: str, target: str, lanes: int) -> Expr:
    """A compute value of `source` in the compute type of `target`, not rounded to what `target` itself can hold."""
    same = COMPUTE[source] == COMPUTE[target]
    return value if same else convert(value, source, target, lanes)


class Code:
    """Statements under construction, and the stack slots (`slots`, the function's own) that they use."""

    def __init__(self, slots: list[Any]) -> None:
        self.slots = slots
        self.stmts: list[Stmt] = []

    def bind(self, value: Expr, t: str) -> Expr:
        """A variable of type `t` that holds `value`, so that using it twice computes it once.

        The value goes through a stack slot, which LLVM removes: TVM's analysers follow a variable to its definition,
        and over a polynomial of bound values that takes time exponential in its length. They do not follow memory.
        """
        var = tirx.Var("v", t)
        base, _, count = t.partition("x")
        lanes = int(count or 1)
        slot = tirx.decl_buffer((lanes,), STORAGE.get(base, base), name=f"v{len(self.slots)}", scope="local")
        self.slots.append(slot)
        at = [i64(0) if lanes == 1 else tirx.Ramp(i64(0), i64(1), lanes)]
        if base == "bool":  # as bytes; and not bound, since the analysers have no vectors of truth values
            self.stmts.append(tirx.BufferStore(slot, to_storage(value, "bool", lanes), at))
            return to_compute(tirx.BufferLoad(slot, at), "bool", lanes)
        self.stmts.append(tirx.BufferStore(slot, value, at))
        self.stmts.append(tirx.Bind(var, tirx.BufferLoad(slot, at)))
        return var


class Evaluator:
    """Evaluates one body. `code` collects the bindings of intermediate values, which the caller puts before its use of
    the result. Every loop body needs a new Evaluator, since bindings are visible in their own body only."""

    def __init__(self, body: Body, buffers: Sequence[Expr], env: dict[str, Expr], lanes: int, code: Code) -> None:
        self.body = body
        self.buffers = buffers
        self.env = env
        self.lanes = lanes
        self.code = code
        self._done: dict[tuple[int, tuple[int, ...]], Val] = {}
        self._keep: list[Sequence[Index]] = []  # ids are keys, so the objects must live
        self._zero = Index(i64(0))

    def result(self, idx: Sequence[Index]) -> Expr:
        """The body's value at an output index, as a vector of `lanes` (a scalar for lanes 1), in compute type."""
        return self.widen(self.value(len(self.body) - 1, idx), COMPUTE[self.body[-1].dtype])

    def widen(self, v: Val, dtype: str) -> Expr:
        """`v` with all its lanes."""
        if v.vector or self.lanes == 1:
            return v.expr
        return tirx.Broadcast(v.expr, self.lanes)

    def value(self, i: int, idx: Sequence[Index]) -> Val:
        """Node i at an index of its own shape."""
        node = self.body[i]
        assert len(idx) == len(node.shape), (node, len(idx))
        key = (i, tuple(id(x) for x in idx))
        found = self._done.get(key)
        if found is None:
            self._keep.append(tuple(idx))
            found = self._bind(self._compute(node, idx), node)
            self._done[key] = found
        return found

    def _bind(self, v: Val, node: Node) -> Val:
        if node.op == "const" or isinstance(v.expr, tirx.Var):
            return v
        return Val(self.code.bind(v.expr, vec(COMPUTE[node.dtype], self.lanes if v.vector else 1)), v.vector)

    def _compute(self, node: Node, idx: Sequence[Index]) -> Val:
        if node.op in POINTWISE:
            return self._pointwise(node, idx)
        match node.op:
            case "arg":
                return self._load(node, idx)
            case "const":
                return Val(tirx.const(node.attr[0], COMPUTE[node.dtype]), False)
            case "iota":
                at, vector = self._position(idx[0])
                return Val(self._of_i64(at, node.dtype, vector), vector)
            case "transpose":
                perm = node.attr[0]
                assert isinstance(perm, tuple)
                source = [idx[perm.index(d)] for d in range(len(perm))]
                return self.value(node.args[0], source)
            case "expand":
                return self.value(node.args[0], self._broadcast(node.args[0], idx))
            case "slice":
                axis, start, step = node.attr
                assert isinstance(axis, int) and isinstance(step, (int, Dim))
                return self.value(node.args[0], [*idx[:axis], self._affine(idx[axis], start, step), *idx[axis + 1 :]])
            case "take":
                return self._take(node, idx)
        raise XllmError("internal", f"no code for generic node {node.op}")

    # ---- indices

    def _int(self, value: object) -> Expr:
        return dim_expr(value, self.env) if isinstance(value, Dim) else i64(int(value))  # type: ignore[call-overload]

    def _position(self, ix: Index) -> tuple[Expr, bool]:
        """The position as an int64 scalar or vector."""
        if ix.lanes is not None:
            return ix.lanes, True
        if ix.stride == 0 or self.lanes == 1:
            return ix.base, False
        return tirx.Ramp(ix.base, i64(ix.stride), self.lanes), True

    def _of_i64(self, at: Expr, dtype: str, vector: bool) -> Expr:
        return convert(at, "i64", dtype, self.lanes if vector else 1)

    def _affine(self, ix: Index, start: object, step: object) -> Index:
        """start + step * ix."""
        s, k = self._int(start), step
        if isinstance(k, Dim) and k.is_const:
            k = k.value
        if ix.lanes is None and isinstance(k, int):
            return Index(ix.base * i64(k) + s, ix.stride * k)
        at, vector = self._position(ix)
        by = self._int(step)
        if vector:
            at = at * tirx.Broadcast(by, self.lanes) + tirx.Broadcast(s, self.lanes)
            return Index(i64(0), lanes=at)
        return Index(at * by + s)

    def _broadcast(self, i: int, idx: Sequence[Index]) -> list[Index]:
        """An index of a bigger shape as an index of node i, which broadcasts to it."""
        shape = self.body[i].shape
        tail = idx[len(idx) - len(shape) :] if shape else []
        return [self._zero if d.is_const and d.value == 1 else ix for d, ix in zip(shape, tail, strict=True)]

    def _load(self, node: Node, idx: Sequence[Index]) -> Val:
        slot = node.attr[0]
        assert isinstance(slot, int)
        base: Expr = i64(0)
        lanes: Expr | None = None
        stride = 0
        for d, ix in enumerate(idx):
            pitch: Dim | int = 1
            for size in node.shape[d + 1 :]:
                pitch = size * pitch
            step = self._int(pitch)
            if ix.lanes is not None:
                part = ix.lanes * tirx.Broadcast(step, self.lanes)
            elif ix.stride and self.lanes > 1 and not (isinstance(pitch, int) or pitch.is_const):
                part = self._position(ix)[0] * tirx.Broadcast(step, self.lanes)
            else:
                base = base + ix.base * step
                if ix.stride and self.lanes > 1:
                    stride += ix.stride * (pitch if isinstance(pitch, int) else pitch.value)
                continue
            lanes = part if lanes is None else lanes + part
        buffer = self.buffers[slot]
        if lanes is not None:
            at = lanes + (tirx.Ramp(base, i64(stride), self.lanes) if stride else tirx.Broadcast(base, self.lanes))
            return Val(to_compute(tirx.BufferLoad(buffer, [at]), node.dtype, self.lanes), True)
        if stride:
            at = tirx.Ramp(base, i64(stride), self.lanes)
            return Val(to_compute(tirx.BufferLoad(buffer, [at]), node.dtype, self.lanes), True)
        return Val(to_compute(tirx.BufferLoad(buffer, [base]), node.dtype, 1), False)

    def _take(self, node: Node, idx: Sequence[Index]) -> Val:
        axis = node.attr[0]
        x, where = self.body[node.args[0]], self.body[node.args[1]]
        assert isinstance(axis, int) and x.op == "arg"
        rank = len(where.shape)
        picked = self.value(node.args[1], idx[axis : axis + rank])
        n = self.lanes if picked.vector else 1
        at = convert(picked.expr, where.dtype, "i64", n)
        ix = Index(i64(0), lanes=at) if picked.vector else Index(at)
        return self._load(x, [*idx[:axis], ix, *idx[axis + rank :]])

    # ---- arithmetic

    def _pointwise(self, node: Node, idx: Sequence[Index]) -> Val:
        values = [self.value(a, self._broadcast(a, idx)) for a in node.args]
        vector = any(v.vector for v in values)
        lanes = self.lanes if vector else 1
        kinds = [self.body[a].dtype for a in node.args]
        args = [self.widen(v, "") if vector else v.expr for v in values]
        if node.op == "cast":
            return Val(convert(args[0], kinds[0], node.dtype, lanes), vector)
        if node.op == "where":
            x, y = (as_compute(a, k, node.dtype, lanes) for a, k in zip(args[1:], kinds[1:], strict=True))
            return Val(tirx.Select(args[0], x, y), vector)
        kind = node.dtype
        if node.op in COMPARE:  # a constant is compared in the other side's type
            kind = kinds[1] if self.body[node.args[0]].op == "const" else kinds[0]
        args = [as_compute(a, k, kind, lanes) for a, k in zip(args, kinds, strict=True)]
        return Val(scalar_op(node, args, kind, lanes, self.body, self.code), vector)


def extreme(kind: str, a: Expr, b: Expr, t: str) -> Expr:
    """max or min of two values of TVM type `t`; a NaN on either side stays, as in numpy and torch."""
    if t.startswith("float"):
        return tirx.call_llvm_pure_intrin(t, "llvm.maximum" if kind == "max" else "llvm.minimum", a, b)
    return tirx.Select(tirx.GT(a, b) if kind == "max" else tirx.LT(a, b), a, b)


def _const_of(body: Body, i: int) -> int | float | None:
    node = body[i]
    value = node.attr[0] if node.op == "const" else None
    return value if isinstance(value, (int, float)) else None


def scalar_op(node: Node, args: list[Expr], kind: str, lanes: int, body: Body, code: Code) -> Expr:
    """A pointwise op on compute values of dtype `kind`, all of `lanes` lanes."""
    t = vec(COMPUTE[kind], lanes)
    floating = kind in ("f64", "f32", "bf16", "f16")
    a = args[0]
    b = args[1] if len(args) > 1 else None

    def c(value: float) -> Expr:
        return tirx.const(value, t)

    match node.op:
        case "add":
            return tirx.Add(a, b)
        case "sub":
            return tirx.Sub(a, b)
        case "mul":
            return tirx.Mul(a, b)
        case "div":
            return tirx.Div(a, b)
        case "floordiv":
            return tirx.floor(tirx.Div(a, b)) if floating else tirx.FloorDiv(a, b)
        case "mod":
            return tirx.Sub(a, tirx.Mul(tirx.floor(tirx.Div(a, b)), b)) if floating else tirx.FloorMod(a, b)
        case "max" | "min":
            return extreme(node.op, a, b, t)
        case "eq":
            return tirx.EQ(a, b)
        case "ne":
            return tirx.NE(a, b)
        case "lt":
            return tirx.LT(a, b)
        case "le":
            return tirx.LE(a, b)
        case "gt":
            return tirx.GT(a, b)
        case "ge":
            return tirx.GE(a, b)
        case "and" | "or":
            return tirx.And(a, b) if node.op == "and" else tirx.Or(a, b)
        case "not":
            return tirx.Not(a)
        case "clamp":
            low, high = node.attr
            out = a
            if isinstance(low, (int, float)) and low != -math.inf:
                out = tirx.Select(tirx.LT(out, c(low)), c(low), out)
            if isinstance(high, (int, float)) and high != math.inf:
                out = tirx.Select(tirx.GT(out, c(high)), c(high), out)
            return out
        case "neg":
            return tirx.Sub(c(0), a) if not floating else tirx.Mul(a, c(-1.0))
        case "abs":
            return tirx.abs(a)
        case "relu":
            return tirx.Select(tirx.LT(a, c(0)), c(0), a)
        case "pow":
            return _power(a, b, kind, t, _const_of(body, node.args[1]))
    if not floating:
        raise XllmError("internal", f"t.{node.op} of {kind}")
    name = "gelu_tanh" if node.op == "gelu" and node.attr and node.attr[0] else node.op
    return transcendental(name, a, t, lanes, code)


def transcendental(name: str, a: Expr, t: str, lanes: int, code: Code) -> Expr:
    """A unary float function of compute values of TVM type `t`; what it binds on the way goes to `code`.

    The frequent functions are vmath's polynomials, also for a single element, so that a value does not depend on
    whether it was computed in a vector. The rare ones are libm's.
    """

    def c(value: float) -> Expr:
        return tirx.const(value, t)

    match name:
        case "sqrt":
            return tirx.sqrt(a)
        case "rsqrt":
            return tirx.Div(c(1.0), tirx.sqrt(a))
        case "floor":
            return tirx.floor(a)
        case "log":
            return tirx.log(a)
        case "sin":
            return tirx.sin(a)
        case "cos":
            return tirx.cos(a)
        case "softplus":  # log(1 + e^x) without overflow
            size = tirx.Select(tirx.LT(a, c(0.0)), a, tirx.Mul(a, c(-1.0)))
            e = transcendental("exp", size, t, lanes, code)
            # log1p by the compensated quotient (Higham, Accuracy and Stability, 1.14.1), exact enough for tiny e
            u = code.bind(tirx.Add(c(1.0), e), t)
            tiny = tirx.EQ(u, c(1.0))
            log1p = tirx.Select(tiny, e, tirx.Div(tirx.Mul(tirx.log(u), e), tirx.Sub(u, c(1.0))))
            return tirx.Add(tirx.Select(tirx.LT(a, c(0.0)), c(0.0), a), log1p)
    if not t.startswith("float32"):
        raise XllmError("unsupported", f"t.{name} of f64", help="cast to f32 first")
    function = vmath.erf if name == "erf" else vmath.exp if name == "exp" else vmath.ACTIVATIONS[name]
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_name("captured")
        wide = function(a if lanes == LANES else T.broadcast(a, LANES))
        T.evaluate(T.int32(0))
    for stmt in builder.get().body.seq:
        if isinstance(stmt, tirx.AllocBuffer):
            code.slots.append(stmt.buffer)
        elif not isinstance(stmt, tirx.Evaluate):
            code.stmts.append(stmt)
    return wide if lanes == LANES else tirx.Shuffle([wide], [tirx.const(0, "int32")])


def _power(a: Expr, b: Expr, kind: str, t: str, exponent: float | None) -> Expr:
    floating = kind in ("f64", "f32", "bf16", "f16")
    if exponent is not None and float(exponent).is_integer() and 1 <= exponent <= 8:
        out = a
        for _ in range(int(exponent) - 1):
            out = tirx.Mul(out, a)
        return out
    if floating:
        if exponent == 0.5:
            return tirx.sqrt(a)
        if exponent == -0.5:
            return tirx.Div(tirx.const(1.0, t), tirx.sqrt(a))
        if exponent == -1:
            return tirx.Div(tirx.const(1.0, t), a)
        return tirx.pow(a, b)
    wide = t.replace(COMPUTE[kind], "float64")  # exact up to 2^53, far above any index
    return tirx.pow(a.astype(wide), b.astype(wide)).astype(t)
