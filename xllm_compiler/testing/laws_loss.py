"""The law about passes that give up precision on purpose: how much they may. Owns that bound and its report.

In exact arithmetic, what a module computes is compared with what it computed before. How far errors in linear layers
carry is measured on the module before: in a few runs everything that a linear layer multiplies, and every table that is
looked up in, is off by random numbers whose RMS is the pass's `loss`, as a share of its own. A float result may then be
off, in RMS, by

    4 * effect of these errors + loss / 16 * RMS of the result

It must stay finite where it was, unless the errors alone already change that. Integers, which may jump, are not judged.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from xllm_compiler.interp import run_ranks
from xllm_compiler.interp.run import Watch
from xllm_compiler.ir.core import Module, Op, Value
from xllm_compiler.ir.ops import Embedding, Linear, LinearGlu
from xllm_compiler.ir.semantics import Array
from xllm_compiler.testing.equiv import Reference

FACTOR: Final = 4.0
OWN: Final = 1 / 16
RUNS: Final = 4


def excess(reference: Reference, after: Module, loss: float) -> str | None:
    """What is wrong with `after`, or None."""
    for func, changed, dims in reference.places(after):
        runs = reference.runs(func, dims)
        given = runs.given
        names = {a.name for a in changed.args}
        inputs = [{k: v for k, v in rank.items() if k in names} for rank in given.inputs]
        got = run_ranks(after, changed.name, inputs, given.params, dims, True)
        shaken = [
            run_ranks(func.module, func.name, given.inputs, given.params, given.dims, True, errors(loss, seed))
            for seed in range(RUNS)
        ]
        for rank, wants in enumerate(runs.exact):
            for i, want in enumerate(wants):
                wrong = _judge(want, got[rank][i], [s[rank][i] for s in shaken], loss)
                if wrong is not None:
                    sizes = ", ".join(f"{k}={v}" for k, v in dims.items())
                    return f"return {i} of @{func.name}, %{func.returns[i].name}: {wrong}\n  at {sizes}, rank {rank}"
    return None


def errors(loss: float, seed: int) -> Watch:
    """Adds to what linear layers and look-ups read random numbers of `loss` times its RMS."""
    rng = np.random.default_rng(seed)

    def watch(v: Value, rank: int, x: Array) -> Array:
        if x.dtype.kind in "iub" or not any(_factor(v, user) for user in v.users):
            return x
        return np.asarray(x + rng.standard_normal(x.shape) * (loss * _rms(x)), x.dtype)

    return watch


def _factor(v: Value, user: Op) -> bool:
    return (isinstance(user, (Linear, LinearGlu)) and v in (user.x, user.w)) or (
        isinstance(user, Embedding) and v is user.w
    )


def _judge(want: Array, got: Array, shaken: list[Array], loss: float) -> str | None:
    if want.dtype.kind in "iub" or not want.size:
        return None
    sure = np.isfinite(want)
    for other in shaken:
        sure &= np.isfinite(other)
    if not np.isfinite(got[sure]).all():
        return "finite numbers became infinite or NaN"
    error = _rms((got - want)[sure])
    effect = max(_rms((other - want)[sure]) for other in shaken)
    allowed = FACTOR * effect + OWN * loss * _rms(want[sure])
    if error <= allowed:
        return None
    return f"off by {error:.3g} in RMS, allowed {allowed:.3g} (the values have {_rms(want[sure]):.3g})"


def _rms(x: Array) -> float:
    finite = x[np.isfinite(x)].astype(np.float64)
    return float(np.sqrt(np.square(finite).mean())) if finite.size else 0.0
