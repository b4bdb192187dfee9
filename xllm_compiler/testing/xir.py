"""Trying a pass on IR text: parse, run, compare meanings. Owns made-up inputs; must not know any single pass.

case = Case.parse(text).run("fuse-add-norm")
case.changed            # did the pipeline change anything?
case.op_names()         # what is left
case.check_same()       # before and after compute the same, at several step sizes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from xllm_compiler.interp import run
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Func, Module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.ops import Param
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.semantics import NP_DTYPE, Array
from xllm_compiler.ir.types import Kv, Tensor
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline

# Rounding to be forgiven in units of the dtype's spacing at the largest value: fused ops round less often.
ULPS = 12
EPS = {"f32": 2.0**-23, "bf16": 2.0**-8, "f16": 2.0**-10, "f64": 2.0**-52}


@dataclass
class Case:
    """A module before and after a pipeline."""

    before: Module
    after: Module
    ctx: PassContext = field(default_factory=PassContext)

    @staticmethod
    def parse(text: str) -> Case:
        module = parse_module(text, "test.xir")
        return Case(module, clone_module(module))

    def run(self, pipeline: str) -> Case:
        """Runs passes on `after`; may be called again."""
        run_pipeline(pipeline, self.after, self.ctx)
        return self

    @property
    def changed(self) -> bool:
        return structural_hash(self.before) != structural_hash(self.after)

    @property
    def text(self) -> str:
        return print_module(self.after)

    def op_names(self, func: str = "") -> list[str]:
        """Names of the ops left, without parameters and constants."""
        f = self.after.funcs[func] if func else next(iter(self.after.funcs.values()))
        return [op.name for op in f.ops if op.name not in ("param", "t.const")]

    def remarks(self) -> str:
        return "\n".join(map(str, self.ctx.remarks))

    def check_same(
        self, sizes: Sequence[int] = (1, 2, 7), seed: int = 0, algebra: float = 1e-11, typed: bool = True
    ) -> None:
        """AssertionError unless every function returns the same for random inputs of `sizes` tokens.

        Twice per size: in f64 without rounding, where only wrong algebra can differ (by more than `algebra`, relative),
        and, where `typed`, with the dtypes' rounding, within `ULPS`.
        """
        for name, func in self.before.funcs.items():
            for n in sizes:
                rng = np.random.default_rng([seed, n])
                dims = step_dims(func, n)
                inputs, params = make_inputs(func, dims, rng), make_params(func, rng)
                for precise in (True, False) if typed else (True,):
                    want = run(self.before, name, inputs, params, dims, precise)
                    got = run(self.after, name, inputs, params, dims, precise)
                    for i, (a, b) in enumerate(zip(want, got, strict=True)):
                        ty = func.returns[i].type
                        assert isinstance(ty, (Tensor, Kv))
                        what = f"return {i} of @{name} at N={n}, precise={precise}"
                        _compare(a, b, ty.dtype, algebra if precise else ULPS * EPS.get(ty.dtype, 0.0), what)


def _compare(a: Array, b: Array, dtype: str, bound: float, what: str) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape, what
    if dtype not in EPS:
        assert np.array_equal(a, b), what
        return
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    assert np.array_equal(x[~finite], y[~finite], equal_nan=True), f"{what}: inf and NaN differ"
    x, y = x[finite], y[finite]
    scale = float(np.max(np.abs(x), initial=1.0))
    error = float(np.max(np.abs(x - y), initial=0.0))
    assert error <= bound * scale, f"{what}: off by {error:.3g} where values reach {scale:.3g}"


def step_dims(func: Func, n: int) -> dict[str, int]:
    """Sizes of a step of `n` tokens: some requests, sampled rows and pages, as far as the module has them."""
    have = func.module.scope.symbols
    b = max(1, (n + 2) // 3)
    wanted = {"N": n, "B": b, "S": b, "P": 64}
    return {name: wanted.get(name, symbol.lo or 1) for name, symbol in have.items()}


def make_inputs(func: Func, dims: dict[str, int], rng: np.random.Generator) -> dict[str, Array]:
    """Random arguments; `pos seq start table sel` describe a sound step of consecutive tokens per request."""
    n, b = dims.get("N", 1), dims.get("B", 1)
    table = next((a for a in func.args if a.name == "table"), None)
    pages = table.shape[1].value if table is not None else 4
    page = next((a.type.page for a in func.args if isinstance(a.type, Kv)), 16)
    counts = np.bincount(np.arange(n) % b, minlength=b)
    start = np.concatenate([[0], np.cumsum(counts)])
    context = rng.integers(0, max(1, page * pages - counts.max() + 1), b)
    seq = np.repeat(np.arange(b), counts)
    known: dict[str, Array] = {
        "start": start,
        "seq": seq,
        "pos": np.concatenate([context[i] + np.arange(c) for i, c in enumerate(counts)]),
        "table": rng.permutation(max(b * pages, dims.get("P", 0)))[: b * pages].reshape(b, pages),
        "sel": start[1:] - 1,
    }
    out: dict[str, Array] = {}
    for arg in func.args:
        match arg.type:
            case Kv() as kv:
                rows = kv.pages.evaluate(dims) * kv.page
                out[arg.name] = rng.standard_normal((rows, kv.heads, kv.k_dim + kv.v_dim)).astype(NP_DTYPE[kv.dtype])
            case Tensor() as ty:
                shape = tuple(d.evaluate(dims) for d in ty.shape)
                array = known.get(arg.name) if ty.is_int else None
                if array is None:
                    array = (
                        rng.standard_normal(shape)
                        if ty.is_float
                        else rng.integers(0, 2 if ty.dtype == "bool" else 8, shape)
                    )
                out[arg.name] = np.asarray(array[: shape[0]] if arg.name == "sel" else array).astype(NP_DTYPE[ty.dtype])
    return out


def make_params(func: Func, rng: np.random.Generator) -> dict[str, Array]:
    """A random array for every parameter, of a size that keeps sums of a few hundred terms near 1."""
    out: dict[str, Array] = {}
    for op in func.ops:
        if isinstance(op, Param) and op.name_ not in out:
            ty = op.result.tensor
            shape = tuple(d.value for d in ty.shape)
            array = rng.standard_normal(shape) * 0.3 if ty.is_float else rng.integers(0, 4, shape)
            out[op.name_] = np.asarray(array).astype(NP_DTYPE[ty.dtype])
    return out
