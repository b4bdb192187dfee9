"""Loops of the generic kernels: function assembly, work splitting over a team, vector sweeps with scalar tails.

Work is split by output element. Whether an element is computed in a vector or in the tail depends only on its place in
its row, never on the number of rows or members. So bits do not depend on batch or team.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.ir import make_node

from xllm_compiler.dims import Dim
from xllm_compiler.kernels.tir.generic.eval import Expr, Index, Stmt, dim_expr, i64, pointer

BLOCK = 1024  # elements of a row that one member takes at a time


@dataclass
class Frame:
    """A kernel under construction. `env` maps symbols to int64 parameters; `buffers` are flat views of the pointers."""

    lanes: int
    buffers: list[Any]
    env: dict[str, Expr]
    member: Expr
    team: Expr
    locals: list[Any] = field(default_factory=list)

    def dim(self, d: Dim | int) -> Expr:
        return dim_expr(d, self.env) if isinstance(d, Dim) else i64(d)

    def product(self, dims: Sequence[Dim]) -> Expr:
        total: Dim | int = 1
        for d in dims:
            total = d * total
        return self.dim(total)

    def local(self, dtype: str, size: int) -> Any:
        """A small array on the stack (in registers, once LLVM has seen it)."""
        buffer = tirx.decl_buffer((size,), dtype, name=f"acc{len(self.locals)}", scope="local")
        self.locals.append(buffer)
        return buffer


def prim_func(
    params: Sequence[tuple[str, str]],
    symbols: Sequence[str],
    lanes: int,
    body: Callable[[Frame], Stmt],
) -> Any:
    """A private function of pointers, int32 symbols, member and team, as kernels of codegen/kernel.py are."""
    pointers = [pointer(name, dtype) for name, dtype in params]
    # the extent is never read: addresses come from the index alone
    views = [
        tirx.decl_buffer((i64(1 << 40),), dtype, name=name.upper(), data=p)
        for (name, dtype), p in zip(params, pointers, strict=True)
    ]
    sizes = {s: tirx.Var(s, "int32") for s in symbols}
    env = {s: tirx.Var(f"{s}_", "int64") for s in symbols}
    member, team = tirx.Var("member", "int32"), tirx.Var("team", "int32")
    frame = Frame(lanes, views, env, member, team)
    work = body(frame)
    stmts = [tirx.DeclBuffer(v, data=p) for v, p in zip(views, pointers, strict=True)]
    stmts += [tirx.Bind(env[s], sizes[s].astype("int64")) for s in symbols]
    stmts += [tirx.AllocBuffer(b) for b in frame.locals]
    attrs = make_node("ir.DictAttrs", **{"tirx.noalias": True})
    return tirx.PrimFunc([*pointers, *sizes.values(), member, team], seq([*stmts, work]), attrs=attrs)


def seq(stmts: Sequence[Stmt]) -> Stmt:
    """One statement out of several."""
    flat = [s for s in stmts if s is not None]
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def loop(start: Expr, stop: Expr, body: Callable[[Expr], Stmt]) -> Stmt:
    """for i in start..stop; counts from zero so that LLVM sees the trip count."""
    i = tirx.Var("i", "int64")
    at = start + i
    return tirx.For(i, i64(0), stop - start, tirx.ForKind.SERIAL, body(at))


def split(frame: Frame, units: Expr, body: Callable[[Expr], Stmt]) -> Stmt:
    """A loop over the member's share of `units` pieces of work. Shares differ by one unit at most."""
    lo, hi = tirx.Var("lo", "int64"), tirx.Var("hi", "int64")
    m, t = frame.member.astype("int64"), frame.team.astype("int64")
    first = tirx.truncdiv(units * m, t)
    last = tirx.truncdiv(units * (m + i64(1)), t)
    return seq([tirx.Bind(lo, first), tirx.Bind(hi, last), loop(lo, hi, body)])


def unravel(frame: Frame, flat: Expr, shape: Sequence[Dim]) -> tuple[list[Stmt], list[Index]]:
    """A flat position as an index of `shape`, and the bindings it needs."""
    stmts: list[Stmt] = []
    out: list[Index] = []
    rest = flat
    for d in range(len(shape) - 1, -1, -1):
        if shape[d].is_const and shape[d].value == 1:
            out.append(Index(i64(0)))
            continue
        if all(s.is_const and s.value == 1 for s in shape[:d]):
            out.append(Index(rest))
            rest = i64(0)
            continue
        size = frame.dim(shape[d])
        here, left = tirx.Var("i", "int64"), tirx.Var("r", "int64")
        stmts += [tirx.Bind(here, tirx.truncmod(rest, size)), tirx.Bind(left, tirx.truncdiv(rest, size))]
        out.append(Index(here))
        rest = left
    return stmts, out[::-1]


def sweep(frame: Frame, extent: Dim, base: Expr, count: Expr, fixed: int | None, body: Sweep) -> list[Stmt]:
    """Runs over `count` consecutive positions from `base`: whole vectors, then single elements.

    Only a row of constant `extent` is swept in vectors: with a symbolic one, whether an element falls into the tail
    would depend on the batch. `fixed` is `count` where that is a constant.
    """
    if not extent.is_const or extent.value < frame.lanes or frame.lanes == 1:
        return [loop(base, base + count, lambda at: body(1, Index(at)))]
    lanes = frame.lanes
    if fixed is not None:
        whole: Expr = i64(fixed // lanes)
    else:
        whole = tirx.truncdiv(count, i64(lanes))
    j = tirx.Var("j", "int64")
    out = [tirx.For(j, i64(0), whole, tirx.ForKind.SERIAL, body(lanes, Index(base + j * i64(lanes), 1)))]
    if fixed is None or fixed % lanes:
        tail = base + whole * i64(lanes)
        out.append(loop(tail, base + count, lambda at: body(1, Index(at))))
    return out


Sweep = Callable[[int, Index], Stmt]


def blocks(extent: Dim) -> tuple[int, int | None]:
    """How a row is cut into units: number of pieces and, where all are equal, their length."""
    if not extent.is_const or extent.value <= BLOCK:
        return 1, extent.value if extent.is_const else None
    n = -(-extent.value // BLOCK)
    return n, BLOCK if extent.value % BLOCK == 0 else None
