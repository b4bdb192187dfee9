"""The generic kernels: any pointwise tree, reduction, softmax, running sum or matrix product, correct for every shape.

An op gets one when no special kernel fits. Pointwise ones are fused and vectorised; matrix products are slow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, scalar
from xllm_compiler.kernels.tir.generic.eval import (
    COMPUTE,
    STORAGE,
    Code,
    Evaluator,
    Expr,
    Index,
    Stmt,
    convert,
    extreme,
    i64,
    to_compute,
    to_storage,
    transcendental,
    vec,
)
from xllm_compiler.kernels.tir.generic.loops import BLOCK, Frame, blocks, loop, prim_func, seq, split, sweep, unravel
from xllm_compiler.kernels.tir.generic.nodes import (
    Body,
    GenericSpec,
    Matmul,
    Node,
    Pointwise,
    Reduce,
    Scan,
    symbols_of,
)
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa

ONE = as_dim(1)


@dataclass(frozen=True)
class Generic(Kernel):
    """A kernel made from a description. Arguments: inputs in slot order, out, the symbols of the description."""

    spec: GenericSpec

    @property
    def args(self) -> tuple[Arg, ...]:
        inputs = [Arg(f"in{i}", t) for i, t in enumerate(input_dtypes(self.spec))]
        sizes = [scalar(name) for name in self.sizes]
        return (*inputs, Arg("out", self.spec.dtype, written=True), *sizes, *MEMBER_ARGS)

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the symbols whose values are passed."""
        return symbols_of(self.spec)

    @property
    def symbol(self) -> str:
        digest = hashlib.sha256(repr(self.spec).encode()).hexdigest()[:20]
        return f"generic_{type(self.spec).__name__.lower()}_{digest}"

    def build(self, isa: Isa) -> Any:
        spec = self.spec
        params = [(f"in{i}", STORAGE[t]) for i, t in enumerate(input_dtypes(spec))] + [("out", STORAGE[spec.dtype])]

        def body(frame: Frame) -> Stmt:
            match spec:
                case Pointwise():
                    return seq([_segment(frame, spec, b, s) for b, s in zip(spec.segments, spec.starts, strict=True)])
                case Reduce():
                    return _reduce(frame, spec)
                case Scan():
                    return _softmax(frame, spec) if spec.kind == "softmax" else _cumsum(frame, spec)
                case Matmul():
                    return _matmul(frame, spec)

        return prim_func(params, self.sizes, LANES, body)


def input_dtypes(spec: GenericSpec) -> list[str]:
    """Dtypes of the input buffers, in slot order."""
    if isinstance(spec, Scan):
        return [spec.dtype_in]
    if isinstance(spec, Matmul):
        return [spec.dtype, spec.dtype]
    bodies = spec.segments if isinstance(spec, Pointwise) else (spec.body,)
    found: dict[int, str] = {}
    for body in bodies:
        for node in body:
            if node.op == "arg" and isinstance(slot := node.attr[0], int):
                found[slot] = node.dtype
    return [found[i] for i in range(len(found))]


# ------------------------------------------------------------------------------------------------------------ pointwise


def _flat(frame: Frame, idx: Sequence[Index], shape: Sequence[Dim]) -> Expr:
    """Flat base position of an index in a dense row-major tensor."""
    at: Expr = i64(0)
    for d, ix in enumerate(idx):
        at = at + ix.base * frame.product(shape[d + 1 :])
    return at


def _store(frame: Frame, out: Any, value: Expr, at: Expr, dtype: str, lanes: int) -> Stmt:
    where = at if lanes == 1 else tirx.Ramp(at, i64(1), lanes)
    return tirx.BufferStore(out, to_storage(value, dtype, lanes), [where])


def _rows(frame: Frame, shape: tuple[Dim, ...], row: Any) -> Stmt:
    """Splits rows over the team; long rows are cut into blocks. `row(outer index, sweep)` makes the work of one unit.
    `sweep(body)` runs a body over the unit's part of the last dimension."""
    extent = shape[-1]
    pieces, fixed = blocks(extent)
    units = frame.product(shape[:-1]) * i64(pieces)

    def unit(u: Expr) -> Stmt:
        which, r = (tirx.truncmod(u, i64(pieces)), tirx.truncdiv(u, i64(pieces))) if pieces > 1 else (i64(0), u)
        stmts, outer = unravel(frame, r, shape[:-1])
        base = which * i64(BLOCK)
        size = frame.dim(extent)
        count = size if pieces == 1 else tirx.min(i64(BLOCK), size - base)
        return seq([*stmts, *row(outer, lambda body: sweep(frame, extent, base, count, fixed, body))])

    return split(frame, units, unit)


def _segment(frame: Frame, spec: Pointwise, body: Body, start: Dim) -> Stmt:
    out = frame.buffers[-1]
    shape, full = (body[-1].shape, spec.shape) if spec.shape else ((ONE,), (ONE,))

    def row(outer: list[Index], run: Any) -> list[Stmt]:
        def at(lanes: int, ix: Index) -> Stmt:
            code = Code(frame.locals)
            idx = [*outer, ix]
            value = Evaluator(body, frame.buffers, frame.env, lanes, code).result(idx if body[-1].shape else [])
            place = list(idx)
            place[spec.axis] = Index(idx[spec.axis].base + frame.dim(start))
            value = convert(value, body[-1].dtype, spec.dtype, lanes)
            return seq([*code.stmts, _store(frame, out, value, _flat(frame, place, full), spec.dtype, lanes)])

        done: list[Stmt] = run(at)
        return done

    return _rows(frame, shape, row)


# --------------------------------------------------------------------------------------------------------- accumulators


class _Acc:
    """A running sum, maximum or minimum: one local array of `lanes` values."""

    def __init__(self, frame: Frame, kind: str, dtype: str, lanes: int) -> None:
        self.kind = "sum" if kind == "mean" else kind
        self.dtype, self.lanes = dtype, lanes
        self.buffer = frame.local(dtype, lanes)
        self.at = i64(0) if lanes == 1 else tirx.Ramp(i64(0), i64(1), lanes)

    def init(self) -> Stmt:
        t = vec(self.dtype, self.lanes)
        if self.kind == "sum":
            value = tirx.const(0, t)
        elif self.dtype.startswith("float"):
            value = tirx.const(float("-inf") if self.kind == "max" else float("inf"), t)
        else:
            value = tirx.const(-(1 << 63) if self.kind == "max" else (1 << 63) - 1, t)
        return tirx.BufferStore(self.buffer, value, [self.at])

    def add(self, value: Expr) -> Stmt:
        return tirx.BufferStore(self.buffer, self.combine(self.load(), value, self.lanes), [self.at])

    def combine(self, a: Expr, b: Expr, lanes: int = 1) -> Expr:
        if self.kind == "sum":
            return tirx.Add(a, b)
        return extreme(self.kind, a, b, vec(self.dtype, lanes))

    def load(self) -> Expr:
        return tirx.BufferLoad(self.buffer, [self.at])

    def fold(self) -> Expr:
        """All lanes in one, as a balanced tree."""
        parts = [tirx.BufferLoad(self.buffer, [i64(i)]) for i in range(self.lanes)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [self.combine(parts[i], parts[i + half]) for i in range(half)]
        return parts[0]


def _wide(dtype: str) -> str:
    """The IR dtype in which values of `dtype` are accumulated."""
    if dtype == "f64":
        return "f64"
    return "f32" if dtype in ("f32", "bf16", "f16") else "i64"


def _nest(frame: Frame, dims: Sequence[tuple[int, Dim]], body: Any, idx: dict[int, Index] | None = None) -> Stmt:
    """Loops over some dimensions, outermost first; `body` gets dimension -> Index."""
    have = dict(idx or {})
    if not dims:
        result: Stmt = body(have)
        return result
    (d, size), rest = dims[0], dims[1:]
    return loop(i64(0), frame.dim(size), lambda i: _nest(frame, rest, body, {**have, d: Index(i)}))


# --------------------------------------------------------------------------------------------------------------- reduce


def _reduce(frame: Frame, spec: Reduce) -> Stmt:
    body, out = spec.body, frame.buffers[-1]
    shape, source = body[-1].shape, body[-1].dtype
    wide = _wide(source)
    kept = [d for d in range(len(shape)) if d not in spec.axes]
    reduced = [(d, shape[d]) for d in spec.axes]
    last = len(shape) - 1
    along = last in spec.axes  # lanes run along the reduced dimension
    vector = shape[last].is_const and shape[last].value >= frame.lanes
    single = _Acc(frame, spec.kind, COMPUTE[wide], 1)
    many = _Acc(frame, spec.kind, COMPUTE[wide], frame.lanes) if vector else None

    def take(acc: _Acc, lanes: int, idx: dict[int, Index]) -> Stmt:
        code = Code(frame.locals)
        value = Evaluator(body, frame.buffers, frame.env, lanes, code).result([idx[d] for d in range(len(shape))])
        return seq([*code.stmts, acc.add(convert(value, source, wide, lanes))])

    def finish(value: Expr, lanes: int) -> Expr:
        if spec.kind == "mean":
            count = frame.product([s for _, s in reduced]).astype(COMPUTE[wide])
            value = tirx.Div(value, count if lanes == 1 else tirx.Broadcast(count, lanes))
        return convert(value, wide, spec.dtype, lanes)

    kept_shape = tuple(shape[d] for d in kept) or (ONE,)
    if along:

        def unit(u: Expr) -> Stmt:
            stmts, outer = unravel(frame, u, kept_shape)
            fixed = dict(zip(kept, outer, strict=False))

            def inner(idx: dict[int, Index]) -> Stmt:
                def step(lanes: int, ix: Index) -> Stmt:
                    acc = single if lanes == 1 or many is None else many
                    return take(acc, lanes, {**idx, last: ix})

                n = shape[last]
                return seq(sweep(frame, n, i64(0), frame.dim(n), n.value if n.is_const else None, step))

            work = _nest(frame, reduced[:-1], inner, fixed)
            total = single.load() if many is None else single.combine(many.fold(), single.load())
            init = [single.init()] if many is None else [single.init(), many.init()]
            return seq([*stmts, *init, work, _store(frame, out, finish(total, 1), u, spec.dtype, 1)])

        return split(frame, frame.product(kept_shape), unit)

    def row(outer: list[Index], run: Any) -> list[Stmt]:
        def at(lanes: int, ix: Index) -> Stmt:
            acc = single if lanes == 1 or many is None else many
            place = [*outer, ix]
            work = _nest(frame, reduced, lambda idx: take(acc, lanes, idx), dict(zip(kept, place, strict=True)))
            value = finish(acc.load(), lanes)
            return seq(
                [acc.init(), work, _store(frame, out, value, _flat(frame, place, kept_shape), spec.dtype, lanes)]
            )

        done: list[Stmt] = run(at)
        return done

    return _rows(frame, kept_shape, row)


# ----------------------------------------------------------------------------------------------------- softmax, cumsum


def _at(shape: Sequence[Dim], axis: int, outer: Sequence[Index], ix: Index) -> list[Index]:
    """An index from the index without `axis` and the place along it."""
    return [*outer[:axis], ix, *outer[axis:]]


def _softmax(frame: Frame, spec: Scan) -> Stmt:
    shape, axis = spec.shape, spec.axis
    source, out = frame.buffers[0], frame.buffers[-1]
    wide = COMPUTE[_wide(spec.dtype_in)]
    rest = shape[:axis] + shape[axis + 1 :]
    n = shape[axis]
    last = axis == len(shape) - 1
    vector = shape[-1].is_const and shape[-1].value >= frame.lanes
    sizes = [1, frame.lanes] if vector else [1]
    tops = {k: _Acc(frame, "max", wide, k) for k in sizes}
    sums = {k: _Acc(frame, "sum", wide, k) for k in sizes}

    def load(idx: Sequence[Index], lanes: int) -> tuple[Expr, Expr]:
        at = _flat(frame, idx, shape)
        where = at if lanes == 1 else tirx.Ramp(at, i64(1), lanes)
        return to_compute(tirx.BufferLoad(source, [where]), spec.dtype_in, lanes).astype(vec(wide, lanes)), at

    def many(x: Expr, lanes: int) -> Expr:
        return x if lanes == 1 else tirx.Broadcast(x, lanes)

    def exp_of(x: Expr, lanes: int, use: Callable[[Expr], Stmt]) -> Stmt:
        code = Code(frame.locals)
        e = transcendental("exp", code.bind(x, vec(wide, lanes)), vec(wide, lanes), lanes, code)
        return seq([*code.stmts, use(e)])

    top, total = tirx.Var("top", wide), tirx.Var("total", wide)
    if last:

        def unit(u: Expr) -> Stmt:
            stmts, outer = unravel(frame, u, rest or (ONE,))
            outer = outer if rest else []

            def run(body: Any) -> list[Stmt]:
                return sweep(frame, n, i64(0), frame.dim(n), n.value if n.is_const else None, body)

            def find(lanes: int, ix: Index) -> Stmt:
                return tops[lanes].add(load([*outer, ix], lanes)[0])

            def add(lanes: int, ix: Index) -> Stmt:
                return exp_of(load([*outer, ix], lanes)[0] - many(top, lanes), lanes, sums[lanes].add)

            def put(lanes: int, ix: Index) -> Stmt:
                x, at = load([*outer, ix], lanes)

                def store(e: Expr) -> Stmt:
                    return _store(frame, out, tirx.Div(e, many(total, lanes)), at, spec.dtype, lanes)

                return exp_of(x - many(top, lanes), lanes, store)

            def folded(accs: dict[int, _Acc]) -> Expr:
                return accs[1].load() if not vector else accs[1].combine(accs[frame.lanes].fold(), accs[1].load())

            inits = [a.init() for k in sizes for a in (tops[k], sums[k])]
            bind_top, bind_total = tirx.Bind(top, folded(tops)), tirx.Bind(total, folded(sums))
            return seq([*stmts, *inits, *run(find), bind_top, *run(add), bind_total, *run(put)])

        return split(frame, frame.product(rest), unit)

    def row(outer: list[Index], run: Any) -> list[Stmt]:
        def at(lanes: int, ix: Index) -> Stmt:
            place = [*outer, ix]

            def each(body: Any) -> Stmt:
                return loop(i64(0), frame.dim(n), lambda i: body(*load(_at(shape, axis, place, Index(i)), lanes)))

            t, s = tops[lanes], sums[lanes]

            def add(x: Expr, _: Expr) -> Stmt:
                return exp_of(x - t.load(), lanes, s.add)

            def put(x: Expr, p: Expr) -> Stmt:
                return exp_of(x - t.load(), lanes, lambda e: _store(frame, out, e / s.load(), p, spec.dtype, lanes))

            return seq([t.init(), s.init(), each(lambda x, _: t.add(x)), each(add), each(put)])

        done: list[Stmt] = run(at)
        return done

    return _rows(frame, rest, row)


def _cumsum(frame: Frame, spec: Scan) -> Stmt:
    shape, axis = spec.shape, spec.axis
    source, out = frame.buffers[0], frame.buffers[-1]
    wide = _wide(spec.dtype_in)
    rest = shape[:axis] + shape[axis + 1 :]
    vector = axis != len(shape) - 1 and shape[-1].is_const and shape[-1].value >= frame.lanes
    accs = {k: _Acc(frame, "sum", COMPUTE[wide], k) for k in ([1, frame.lanes] if vector else [1])}

    def run_along(place: Sequence[Index], lanes: int) -> Stmt:
        def step(i: Expr) -> Stmt:
            at = _flat(frame, _at(shape, axis, place, Index(i)), shape)
            where = at if lanes == 1 else tirx.Ramp(at, i64(1), lanes)
            x = to_compute(tirx.BufferLoad(source, [where]), spec.dtype_in, lanes)
            value = convert(accs[lanes].load(), wide, spec.dtype, lanes)
            return seq(
                [
                    accs[lanes].add(convert(x, spec.dtype_in, wide, lanes)),
                    _store(frame, out, value, at, spec.dtype, lanes),
                ]
            )

        return seq([accs[lanes].init(), loop(i64(0), frame.dim(shape[axis]), step)])

    if axis == len(shape) - 1:

        def unit(u: Expr) -> Stmt:
            stmts, outer = unravel(frame, u, rest or (ONE,))
            return seq([*stmts, run_along(outer if rest else [], 1)])

        return split(frame, frame.product(rest), unit)

    def row(outer: list[Index], run: Any) -> list[Stmt]:
        done: list[Stmt] = run(lambda lanes, ix: run_along([*outer, ix], lanes))
        return done

    return _rows(frame, rest, row)


# --------------------------------------------------------------------------------------------------------------- matmul


def _matmul(frame: Frame, spec: Matmul) -> Stmt:
    a, b = spec.a, spec.b
    out = list(spec.out)
    if len(a) == 1:
        a = (ONE, *a)
        out.insert(len(out) if len(spec.b) == 1 else len(out) - 1, ONE)
    if len(b) == 1:
        b = (*b, ONE)
        out.append(ONE)
    if len(out) < 2:
        out = [ONE] * (2 - len(out)) + out
    shape = tuple(out)
    wide = _wide(spec.dtype)
    depth = a[-1]
    vector = shape[-1].is_const and shape[-1].value >= frame.lanes
    accs = {k: _Acc(frame, "sum", COMPUTE[wide], k) for k in ([1, frame.lanes] if vector else [1])}
    batch = len(shape) - 2
    left: Body = (Node("arg", spec.dtype, a, (), (0,)), Node("expand", spec.dtype, (*shape[:batch], *a[-2:]), (0,)))
    right: Body = (Node("arg", spec.dtype, b, (), (1,)), Node("expand", spec.dtype, (*shape[:batch], *b[-2:]), (0,)))

    def row(outer: list[Index], run: Any) -> list[Stmt]:
        def at(lanes: int, ix: Index) -> Stmt:
            acc = accs[lanes]

            def step(k: Expr) -> Stmt:
                code = Code(frame.locals)
                depth_ix = Index(k)
                x = Evaluator(left, frame.buffers, frame.env, lanes, code).result([*outer, depth_ix])
                y = Evaluator(right, frame.buffers, frame.env, lanes, code).result([*outer[:-1], depth_ix, ix])
                x, y = convert(x, spec.dtype, wide, lanes), convert(y, spec.dtype, wide, lanes)
                return seq([*code.stmts, acc.add(tirx.Mul(x, y))])

            place = _flat(frame, [*outer, ix], shape)
            value = convert(acc.load(), wide, spec.dtype, lanes)
            work = loop(i64(0), frame.dim(depth), step)
            return seq([acc.init(), work, _store(frame, frame.buffers[-1], value, place, spec.dtype, lanes)])

        done: list[Stmt] = run(at)
        return done

    return _rows(frame, shape, row)
