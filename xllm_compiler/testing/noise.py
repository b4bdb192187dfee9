"""What rounding does to a function, as watchers for the interpreter that put errors in. Owns those errors only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from xllm_compiler.interp.run import Watch
from xllm_compiler.ir.core import Func, Value
from xllm_compiler.ir.ops import Const
from xllm_compiler.ir.semantics import OUR_DTYPE, Array
from xllm_compiler.ir.types import FLOATS, Tensor

EPS: Final = {"f64": 2.0**-52, "f32": 2.0**-23, "bf16": 2.0**-7, "f16": 2.0**-10}
BITS: Final = {"f64": 53, "f32": 24, "bf16": 8, "f16": 11}
EXACT_BITS: Final = 12  # a constant that these hold is meant exactly
_MOVES: Final = frozenset(  # results that are elements of their operands, so that nothing is rounded
    {
        *("t.reshape", "t.transpose", "t.expand", "t.slice", "t.concat", "t.pad", "t.take", "t.where", "t.cast"),
        *("t.clamp", "t.relu", "t.max", "t.min", "t.neg", "t.abs", "t.const", "t.iota", "param"),
        *("nn.embedding", "kv.write", "comm.all_gather_start", "comm.all_to_all_start", "comm.broadcast_start"),
        "comm.wait",
        *(
            "quant.weight",
            "quant.rows",
            "quant.norm_rows",
        ),  # their results are what is stored, in its dtype, exact arithmetic or not
    }
)


def noise(rng: np.random.Generator) -> Watch:
    """One unit in the last place, up or down, on every float argument and every result that was rounded."""

    def watch(v: Value, rank: int, x: Array) -> Array:
        dtype = OUR_DTYPE[x.dtype]
        if dtype not in FLOATS or (v.op is not None and v.op.name in _MOVES) or (v.op is None and dtype != "f64"):
            return x  # an argument in its own dtype is what it is
        wide = x.astype(np.float64)
        off = wide * (1 + EPS[dtype] * rng.choice((-1.0, 1.0), x.shape))
        # What fits half of the bits was most likely computed exactly (counts, masks, halves), and would be again.
        exact = False if v.op is None else _fits(wide, BITS[dtype] // 2)
        with np.errstate(over="ignore"):
            return np.asarray(np.where(exact, wide, off).astype(x.dtype))

    return watch


def rounding(constants: Mapping[Value, float], rng: np.random.Generator | None) -> Watch:
    """Constants and what is made of them alone, as if their dtype had rounded them."""

    def watch(v: Value, rank: int, x: Array) -> Array:
        if v not in constants or x.dtype != np.float64:
            return x
        sign = 1.0 if rng is None else rng.choice((-1.0, 1.0), x.shape)
        return np.where(_fits(x, EXACT_BITS), x, x * (1 + constants[v] * sign))

    return watch


def _fits(x: Array, bits: int) -> Array:
    """Whether so many bits hold the value."""
    mantissa, _ = np.frexp(x)
    scaled = mantissa * 2.0**bits
    return np.asarray(scaled == np.floor(scaled))


def constant_values(func: Func) -> dict[Value, float]:
    """Float values made of constants only, with half of their dtype's relative spacing; empty where all are exact."""
    known: set[Value] = set()
    out: dict[Value, float] = {}
    telling = False
    for op in func.ops:
        if not op.SPEC.pure or any(v not in known for v in op.operands) or op.name == "param":
            continue
        if any(isinstance(r.type, Tensor) and not all(d.is_const for d in r.shape) for r in op.results):
            continue
        known.update(op.results)
        for r in op.results:
            if isinstance(r.type, Tensor) and r.type.is_float:
                out[r] = EPS[r.dtype] / 2
                telling |= not isinstance(op, Const) or not bool(_fits(np.asarray(float(op.value)), EXACT_BITS))
    return out if telling else {}
