"""Random well-typed modules and inputs for them, for property tests. Owns generation; must not know any test framework.

The caller supplies `choose(n)`, an integer in 0..n-1 (hypothesis' draw, or random.randrange), so that shrinking is the
caller's. Operands are drawn as distances back from the newest value: shrinking then keeps what is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Module, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.semantics import NP_DTYPE, Array
from xllm_compiler.ir.types import Kv, Tensor

Choose = Callable[[int], int]

PAGE = 4
HEADS = 2
WIDTH = 8  # of the residual stream; the cache's heads are half of it each

_UNARY = (ops.Neg, ops.Abs, ops.Exp, ops.Tanh, ops.Sigmoid, ops.Silu, ops.Relu, ops.Erf, ops.Softplus, ops.Cos)
_BINARY = (ops.Add, ops.Sub, ops.Mul, ops.Max, ops.Min)


def random_module(choose: Choose, size: int = 12) -> Module:
    """A module with one function @step over i32 token arrays, a float stream and two kv caches; it verifies.

    Symbols N (tokens), B (requests), P (pages). About `size` ops, most of them on the newest values; collectives and kv
    ops among them. Returns the newest value and the last version of each cache.
    """
    module = Module()
    n = module.scope.declare("N", 1, 64, why="tokens")
    b = module.scope.declare("B", 1, 8)
    p = module.scope.declare("P", 1, 64)
    module.scope.assume(n - b, why="every request has a token")
    module.groups["tp"] = 1
    dtype = ("f32", "bf16")[choose(2)]
    func = module.add_func("step")
    i32 = {name: func.add_arg(name, Tensor("i32", [size_])) for name, size_ in (("pos", n), ("seq", n))}
    start = func.add_arg("start", Tensor("i32", [b + 1]))
    table = func.add_arg("table", Tensor("i32", [b, 4]))
    x = func.add_arg("x", Tensor(dtype, [n, WIDTH]))
    kv_type = Kv(dtype, HEADS, WIDTH // HEADS, WIDTH // HEADS, PAGE, p)
    firsts = [func.add_arg(f"kv{i}", kv_type) for i in range(2)]
    maker = _Maker(choose, Builder.at_end(func), n, dtype, [x], list(firsts), i32, start, table)
    for _ in range(choose(size) + 1):
        maker.step()
    out = maker.stream[-1]
    func.set_returns([out, *maker.kvs], {i + 1: a for i, a in enumerate(firsts)})
    return module


class _Maker:
    """Adds one op or short idiom at a time."""

    def __init__(
        self,
        choose: Choose,
        builder: Builder,
        n: Dim,
        dtype: str,
        stream: list[Value],
        kvs: list[Value],
        tokens: Mapping[str, Value],
        start: Value,
        table: Value,
    ) -> None:
        self.choose, self.b, self.n, self.dtype = choose, builder, n, dtype
        self.stream, self.kvs, self.tokens, self.start, self.table = stream, kvs, tokens, start, table
        self.params = 0

    def back(self) -> Value:
        """A value [N, WIDTH], the newest most likely."""
        return self.stream[-1 - self.choose(min(len(self.stream), 4))]

    def param(self, *shape: int) -> Value:
        self.params += 1
        return self.b.create(ops.Param, name=f"w{self.params}", type=Tensor(self.dtype, shape)).result

    def step(self) -> None:
        kinds = (
            self.unary,
            self.binary,
            self.const,
            self.linear,
            self.norm,
            self.shape,
            self.take,
            self.kv,
            self.reduce,
        )
        kinds[self.choose(len(kinds))]()

    def unary(self) -> None:
        self.stream.append(self.b.create(_UNARY[self.choose(len(_UNARY))], self.back()).result)

    def binary(self) -> None:
        self.stream.append(self.b.create(_BINARY[self.choose(len(_BINARY))], self.back(), self.back()).result)

    def const(self) -> None:
        value = (0.5, 1.0, -2.0, 0.0, float("inf"), 1e-05)[self.choose(6)]
        c = self.b.create(ops.Const, value=value).result
        cls = _BINARY[self.choose(len(_BINARY))]
        pair = (c, self.back()) if self.choose(2) else (self.back(), c)
        self.stream.append(self.b.create(cls, *pair, hint="same").result)

    def linear(self) -> None:
        x = self.back()
        match self.choose(4):
            case 0:
                y = self.b.create(ops.Linear, x, self.param(WIDTH, WIDTH))
            case 1:
                bias, residual = self.param(WIDTH), self.back()
                y = self.b.create(ops.Linear, x, self.param(WIDTH, WIDTH), bias, residual=residual, act="silu")
            case 2:
                whole = self.b.create(ops.LinearGlu, x, self.param(2 * WIDTH, WIDTH), act="gelu_tanh")
                self.stream.append(whole.result)
                return
            case _:
                part = self.b.create(ops.Linear, x, self.param(WIDTH, WIDTH), partial="tp").result
                future = self.b.create(ops.AllReduceStart, part, group="tp").result
                self.stream.append(self.b.create(ops.Wait, future).result)
                return
        self.stream.append(y.result)

    def norm(self) -> None:
        w = self.param(WIDTH)
        match self.choose(3):
            case 0:
                self.stream.append(self.b.create(ops.RmsNorm, self.back(), w, eps=1e-6, offset=1.0).result)
            case 1:
                self.stream.append(self.b.create(ops.LayerNorm, self.back(), w=w, eps=1e-5).result)
            case _:
                self.stream += self.b.create(ops.AddRmsNorm, self.back(), self.back(), w, eps=1e-5).results

    def shape(self) -> None:
        x = self.back()
        match self.choose(3):
            case 0:
                split = self.b.create(ops.Reshape, x, shape=(self.n, HEADS, WIDTH // HEADS)).result
                turned = self.b.create(ops.Transpose, split, perm=(0, 2, 1)).result
                y = self.b.create(ops.Reshape, turned, shape=(self.n, WIDTH)).result
            case 1:
                cut = self.choose(WIDTH + 1)
                low = self.b.create(ops.Slice, x, axis=-1, start=0, stop=cut, hint="part").result
                high = self.b.create(ops.Slice, x, axis=-1, start=cut, stop=WIDTH, hint="part").result
                y = self.b.create(ops.Concat, high, low, axis=1).result
            case _:
                half = self.n // 2
                top = self.b.create(ops.Slice, x, axis=0, start=0, stop=half).result
                y = self.b.create(ops.Pad, top, axis=0, lo=0, hi=self.n - half, value=1.0).result
        self.stream.append(y)

    def take(self) -> None:
        table = self.param(16, WIDTH)
        self.stream.append(self.b.create(ops.Embedding, self.tokens["pos"], table).result)

    def reduce(self) -> None:
        kind = ("sum", "mean", "max")[self.choose(3)]
        r = self.b.create(ops.Reduce, self.back(), kind=kind, axes=(-1,), keep=True).result
        self.stream.append(self.b.create(ops.Add, self.back(), r).result)

    def kv(self) -> None:
        i = self.choose(len(self.kvs))
        d = WIDTH // HEADS
        pos, seq = self.tokens["pos"], self.tokens["seq"]
        if self.choose(2):
            qkv = self.b.create(ops.Linear, self.back(), self.param(3 * WIDTH, WIDTH)).result
            written = self.b.create(ops.KvAppend, self.kvs[i], qkv, pos, seq, self.table, q_heads=HEADS)
            self.kvs[i], q = written.results
        else:
            k, v, q = (
                self.b.create(ops.Reshape, self.back(), shape=(self.n, HEADS, d), hint=h).result
                for h in ("k", "v", "q")
            )
            self.kvs[i] = self.b.create(ops.KvWrite, self.kvs[i], k, v, pos, seq, self.table).result
        y = self.b.create(ops.KvAttend, self.kvs[i], q, pos, seq, self.start, self.table, scale=0.5).result
        self.stream.append(self.b.create(ops.Reshape, y, shape=(self.n, WIDTH)).result)


def random_inputs(
    module: Module, seed: int, lengths: tuple[int, ...] = (3, 1)
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(inputs, params) for a module of `random_module`: one request per entry of `lengths`, pages permuted."""
    rng = np.random.default_rng(seed)
    func = module.func("step")
    pages = 4 * len(lengths)
    dims = {"N": sum(lengths), "B": len(lengths), "P": pages}
    given: dict[str, Array] = {
        "pos": np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        "seq": np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        "start": np.cumsum([0, *lengths]).astype(np.int32),
        "table": rng.permutation(pages).reshape(len(lengths), 4).astype(np.int32),
    }
    for arg in func.args:
        match arg.type:
            case Kv():
                shape = (pages * arg.type.page, arg.type.heads, arg.type.k_dim + arg.type.v_dim)
                given[arg.name] = rng.normal(size=shape).astype(NP_DTYPE[arg.type.dtype])
            case Tensor() if arg.name not in given:
                sizes = [as_dim(d).evaluate(dims) for d in arg.type.shape]
                given[arg.name] = rng.normal(size=sizes).astype(NP_DTYPE[arg.type.dtype])
            case Tensor():
                pass
            case _:
                raise IrError(f"no input for %{arg.name}: {arg.type}")
    params: dict[str, Array] = {}
    for op in func.ops:
        if isinstance(op, ops.Param) and isinstance(op.type, Tensor):
            sizes = [d.evaluate(dims) for d in op.type.shape]
            params[op.name_] = (rng.normal(size=sizes) * 0.5).astype(NP_DTYPE[op.type.dtype])
    return given, params
