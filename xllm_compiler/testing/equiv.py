"""Do two modules compute the same? Owns the rule of comparison and its report; must not know any pass.

    mismatch = check_equal(before, after, [{"N": 1}, {"N": 7}])      # None, or a text that says where and by how much

Every function of `before` is interpreted with the inputs of inputs.py and compared with its namesake in `after`, twice.

In exact arithmetic (f64, nothing rounded) only wrong algebra can make a difference. What rounding to f64 can do is
measured on `before` itself: a second run in which every result of arithmetic, and every float argument, is off by one
unit in its last place. So a chain of exp and tanh gets the freedom that it takes, and nothing else does. A constant may
be kept in its own dtype: what that does is measured by a third run. Per row of the last axis, a result may be off by

    2^14 * max(2^-52 * largest value of the row, effect of noise) + 8 * effect of rounded constants

In the real dtypes a rewrite may round at other places than before. The result may be off, per row, by

    ulps * spacing of the dtype at the largest value of the row + 4 * what rounding does to `before`

where the latter is the greater of typed - exact and of what noise of one unit does in the dtypes.

A row counts as no smaller than 2^-20 of the tensor's largest value. Infinities, NaNs, integers and truth values must
agree exactly, but for elements where the noise of `before` alone already flips them. Caches are compared in all rows:
those that nobody writes must stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run_ranks
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.diag import render
from xllm_compiler.ir.semantics import Array
from xllm_compiler.ir.types import FLOATS, State, Tensor, Type
from xllm_compiler.testing.inputs import Given, Sizes, make, step_dims, telling_sizes
from xllm_compiler.testing.noise import EPS, constant_values, noise, rounding

ULPS: Final = 12  # what a pass may add unless it says otherwise: fused ops round less often
ALGEBRA: Final = 2.0**14  # how many units of f64 another order of summing may make
CONSTANTS: Final = 8.0
ROUNDING: Final = 4.0
SMALLEST_ROW: Final = 2.0**-20
BLIND: Final = 0.25  # a bound above this share of the values says nothing about them


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One result that is not what it was. `str()` is the whole report."""

    func: str
    index: int  # of the return; -1 where the function as a whole is to blame
    sizes: dict[str, int]
    precise: bool
    error: float
    bound: float
    message: str
    where: str = ""
    help: str = ""
    op: Op | None = field(default=None, compare=False)

    @property
    def finding(self) -> str:
        """What is wrong and where, without what to do about it."""
        return f"{self.message}\n  at {self.where}" if self.where else self.message

    def __str__(self) -> str:
        help = self.help or "`xllm-bisect FILE -p PIPELINE` finds the pass and the one rewrite that did it"
        return f"{self.finding}\n  help: {help}"


def check_equal(
    before: Module,
    after: Module,
    sizes: Sequence[Sizes] | None = None,
    *,
    ulps: int = ULPS,
    typed: bool = True,
    seed: int = 0,
) -> Mismatch | None:
    """The first difference in what the modules compute, or None.

    `sizes`: symbols given are kept, the others completed (inputs.step_dims); None: those of inputs.telling_sizes.
    Modules with collectives run on as many ranks as their group has. Functions match by name and arguments by name:
    `after` may have lost arguments, and functions and last results may have been added; a new argument or other
    result types are an XllmError, since nothing is known of what they mean.
    """
    return Reference(before, sizes, typed=typed, seed=seed).compare(after, ulps=ulps)


class Reference:
    """What a module computes, and how sure that is: made once, compared with as many modules as one likes."""

    def __init__(
        self, module: Module, sizes: Sequence[Sizes] | None = None, *, typed: bool = True, seed: int = 0
    ) -> None:
        self.module, self.sizes, self.typed, self.seed = module, sizes, typed, seed
        self.blind: list[str] = []  # results of which the noise is so large that nothing could be said, so far
        self._runs: dict[tuple[str, tuple[tuple[str, int], ...]], _Runs] = {}

    def compare(self, after: Module, *, ulps: int = ULPS, modes: Sequence[bool] = (True, False)) -> Mismatch | None:
        """The first difference between this module's results and those of `after`.

        `modes`: what is compared; True stands for exact arithmetic, False for the real dtypes.
        """
        for name, func in self.module.funcs.items():
            if name not in after.funcs:
                return Mismatch(name, -1, {}, True, 0.0, 0.0, f"function @{name} is gone", help="keep every function")
            changed = after.funcs[name]
            _check_signature(func, changed)
            for dims in self._dims(func, after):
                found = self._compare(func, changed, dims, ulps, modes)
                if found is not None:
                    return found
        return None

    def places(self, after: Module) -> list[tuple[Func, Func, dict[str, int]]]:
        """What is compared: functions here and in `after`, at each of the sizes."""
        out = []
        for name, func in self.module.funcs.items():
            changed = after.func(name)
            _check_signature(func, changed)
            out += [(func, changed, dims) for dims in self._dims(func, after)]
        return out

    def _dims(self, func: Func, after: Module) -> list[dict[str, int]]:
        if self.sizes is None:
            return telling_sizes(func, after.scope)
        return [step_dims(func, s, after.scope) for s in self.sizes]

    def runs(self, func: Func, dims: Sizes) -> _Runs:
        """The reference runs at completed sizes, computed when first asked for."""
        mine = {k: v for k, v in dims.items() if k in func.module.scope.symbols}
        key = (func.name, tuple(sorted(mine.items())))
        if key not in self._runs:
            self._runs[key] = _Runs(func, make(func, mine, self.seed), self.typed, self.seed)
        return self._runs[key]

    def _compare(
        self, func: Func, changed: Func, dims: dict[str, int], ulps: int, modes: Sequence[bool]
    ) -> Mismatch | None:
        runs = self.runs(func, dims)
        for precise in [m for m in modes if m or self.typed]:
            try:
                got = _run(changed, runs.given, dims, precise)
            except XllmError as e:
                text = f"@{func.name} cannot be run any more at {_sizes_text(dims)}: {e.message}"
                return Mismatch(func.name, -1, dims, precise, float("inf"), 0.0, text, e.where, e.help)
            for i, ret in enumerate(func.returns):
                for rank, results in enumerate(got):
                    allowed = runs.allowed(rank, i, ret.type, precise, ulps)
                    if allowed.blind:
                        what = f"return {i} of @{func.name} at {_sizes_text(dims)}{'' if precise else ', typed'}"
                        self.blind += [] if what in self.blind else [what]
                    bad = allowed.first_bad(results[i])
                    if bad is not None:
                        return _report(func, changed, i, rank, dims, precise, allowed, results[i], bad, runs)
        return None


def _check_signature(func: Func, changed: Func) -> None:
    where = f"@{func.name}"
    have = {a.name: a for a in func.args}
    for arg in changed.args:
        if arg.name not in have:
            raise XllmError(
                "option",
                f"%{arg.name}: {arg.type} is a new argument: meanings cannot be compared",
                where=where,
                help="compare modules whose functions take the same arguments, or fewer",
            )
        if str(arg.type) != str(have[arg.name].type):
            was = have[arg.name].type
            raise XllmError(
                "option", f"%{arg.name} was {was} and is {arg.type}: meanings cannot be compared", where=where
            )
    old, new = [str(v.type) for v in func.returns], [str(v.type) for v in changed.returns]
    if old != new[: len(old)]:
        text = f"it returned ({', '.join(old)}) and returns ({', '.join(new)}): meanings cannot be compared"
        raise XllmError("option", text, where=where)


# ---------------------------------------------------------------------------------------------------------------- runs


def _run(
    func: Func,
    given: Given,
    dims: Sizes,
    precise: bool,
    watch: Callable[[Value, int, Array], Array] | None = None,
) -> list[list[Array]]:
    names = {a.name for a in func.args}
    inputs = [{k: v for k, v in rank.items() if k in names} for rank in given.inputs]
    return run_ranks(func.module, func.name, inputs, given.params, dims, precise, watch)


class _Runs:
    """One function at one size: exact, with noise, with rounded constants, and in its dtypes."""

    def __init__(self, func: Func, given: Given, typed: bool, seed: int) -> None:
        self.func, self.given = func, given
        self.exact = _run(func, given, given.dims, True)
        self.noisy = _run(func, given, given.dims, True, noise(np.random.default_rng(seed)))
        constants = constant_values(func)
        # Once all errors upward, once either way, so that two constants that happen to cancel do not hide their effect.
        self.rounded = (
            [_run(func, given, given.dims, True, rounding(constants, r)) for r in (None, np.random.default_rng(1))]
            if constants
            else []
        )
        self.typed = _run(func, given, given.dims, False) if typed else []
        # Where rounding grows without bounds, one sample of its effect may be small by luck.
        self.shaken = _run(func, given, given.dims, False, noise(np.random.default_rng(seed))) if typed else []

    def allowed(self, rank: int, index: int, ty: Type, precise: bool, ulps: int) -> Allowed:
        """What return `index` of a rank may be."""
        assert isinstance(ty, (Tensor, State))
        exact, noisy = self.exact[rank][index], self.noisy[rank][index]
        rounded = [r[rank][index] for r in self.rounded]
        if ty.dtype not in FLOATS:
            want = exact if precise else self.typed[rank][index]
            unsure = np.zeros(want.shape, bool)
            for other in (noisy, *rounded) if precise else (exact, noisy, *rounded):
                unsure |= other != want
            return Allowed(want, None, unsure)
        if precise:
            bound = ALGEBRA * np.maximum(EPS["f64"] * _row_scale(exact), _row_effect(exact, noisy))
            for other in rounded:
                bound = bound + CONSTANTS * _row_effect(exact, other)
            unsure = np.isfinite(noisy) != np.isfinite(exact)
            for other in rounded:
                unsure |= np.isfinite(other) != np.isfinite(exact)
            return Allowed(exact, bound, unsure)
        want = self.typed[rank][index].astype(np.float64)
        effect = np.maximum(_row_effect(exact, want), _row_effect(want, self.shaken[rank][index].astype(np.float64)))
        bound = ulps * _spacing(_row_scale(want), ty.dtype) + ROUNDING * effect
        return Allowed(want, bound, np.isfinite(want) != np.isfinite(exact))


@dataclass(slots=True)
class Allowed:
    """`want` within `bound` (per row, broadcast; None: exactly), but where `unsure`."""

    want: Array
    bound: Array | None
    unsure: Array

    @property
    def blind(self) -> bool:
        """Whether hardly any wrong value would be noticed."""
        if not self.want.size:
            return False
        if self.bound is None:
            return bool(self.unsure.all())
        finite = np.isfinite(self.want)
        loose = np.broadcast_to(self.bound, self.want.shape) > BLIND * np.abs(self.want).max(where=finite, initial=0.0)
        return bool((loose | ~finite | self.unsure).mean() > 0.5)

    def first_bad(self, got: Array) -> tuple[int, ...] | None:
        """Index of the first element that is wrong."""
        bad = self._wrong(got)
        if not bad.any():
            return None
        return tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))

    def _wrong(self, got: Array) -> Array:
        if self.bound is None:
            return np.asarray((got != self.want) & ~self.unsure)
        x, y = self.want, got.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        with np.errstate(invalid="ignore"):
            far = finite & (np.abs(x - y) > self.bound)
            other = ~finite & ~((x == y) | (np.isnan(x) & np.isnan(y)))
        return np.asarray((far | other) & ~self.unsure)


def _rows(x: Array) -> Array:
    return x.reshape(1) if x.ndim == 0 else x


def _row_scale(x: Array) -> Array:
    """Largest finite magnitude per row of the last axis, which stays as 1."""
    a = np.where(np.isfinite(x), np.abs(x), 0.0)
    scale = np.max(_rows(a), axis=-1, keepdims=True, initial=0.0)
    least = SMALLEST_ROW * float(a.max(initial=0.0))
    return np.asarray(np.maximum(scale, least).reshape((*x.shape[:-1], 1) if x.ndim else ()))


def _spacing(x: Array, dtype: str) -> Array:
    """The distance from |x| to the next value of a dtype."""
    _, exponent = np.frexp(x)
    return np.asarray(np.ldexp(EPS[dtype], exponent - 1))


def _row_effect(x: Array, y: Array) -> Array:
    """Largest difference per row, where both are finite."""
    with np.errstate(invalid="ignore"):
        d = np.where(np.isfinite(x) & np.isfinite(y), np.abs(x - y), 0.0)
    return np.asarray(
        np.max(_rows(d), axis=-1, keepdims=True, initial=0.0).reshape((*x.shape[:-1], 1) if x.ndim else ())
    )


# -------------------------------------------------------------------------------------------------------------- report


def _sizes_text(dims: Sizes) -> str:
    return ", ".join(f"{k}={v}" for k, v in dims.items()) or "its only size"


def _report(
    func: Func,
    changed: Func,
    index: int,
    rank: int,
    dims: dict[str, int],
    precise: bool,
    allowed: Allowed,
    got: Array,
    bad: tuple[int, ...],
    runs: _Runs,
) -> Mismatch:
    value = changed.returns[index]
    x, y = allowed.want[bad], got[bad]
    error = abs(float(x) - float(y))
    bound = 0.0 if allowed.bound is None else float(np.broadcast_to(allowed.bound, allowed.want.shape)[bad])
    mode = "in exact arithmetic (f64): wrong algebra" if precise else "in the real dtypes: more rounding than allowed"
    ranks = f" on rank {rank} of {len(runs.exact)}" if len(runs.exact) > 1 else ""
    lines = [
        f"@{func.name} does not compute what it did: return {index}, %{value.name}: {value.type}, "
        f"at {_sizes_text(dims)}{ranks}, {mode}",
        f"  element {list(bad)} was {_number(x)} and is {_number(y)}: off by {error:.3g}, allowed {bound:.3g}",
    ]
    suspect = _first_difference(func, changed, runs.given, dims, precise)
    op = value.op if suspect is None else suspect.op
    if suspect is not None and suspect is not value:
        lines.append(f"  the first value that is not what its namesake was: %{suspect.name}")
    where = f"@{changed.name}, argument %{value.name}" if op is None else render(op, 3) + _nearest_rewrite(op)
    return Mismatch(func.name, index, dims, precise, error, bound, "\n".join(lines), where, op=op)


def _nearest_rewrite(op: Op) -> str:
    """A line about the nearest op that `op` is made of and that a rewrite touched, where `op` itself was left alone."""
    if op.loc.lineage:
        return ""
    seen: dict[Op, None] = {op: None}
    for near in (queue := [op]):
        if near.loc.lineage:
            return f"\n  made of %{near.results[0].name}, touched by {', '.join(near.loc.lineage)}"
        for v in near.operands:
            if v.op is not None and v.op not in seen and v.op.results:
                seen[v.op] = None
                queue.append(v.op)
    return ""


def _number(x: np.generic) -> str:
    return str(x) if x.dtype.kind in "iub" else f"{float(x):.9g}"


def _first_difference(func: Func, changed: Func, given: Given, dims: Sizes, precise: bool) -> Value | None:
    """The first value of `changed` that differs from the value of the same name and type in `func`.

    Rewrites keep names where they keep values, so this is most often the op that is wrong; names that two values of a
    function share tell nothing and are left out.
    """
    names = _unique_names(func)
    was: dict[tuple[str, int], Array] = {}

    def record(v: Value, rank: int, x: Array) -> Array:
        if names.get(v.name) is v:
            was[v.name, rank] = x
        return x

    found: list[Value] = []
    others = _unique_names(changed)

    def compare(v: Value, rank: int, x: Array) -> Array:
        old = was.get((v.name, rank))
        if found or old is None or others.get(v.name) is not v or names[v.name].type != v.type:
            return x
        if old.shape == x.shape and _plainly_differ(old, x, precise):
            found.append(v)
        return x

    mine = {k: n for k, n in dims.items() if k in func.module.scope.symbols}
    _run(func, given, mine, precise, record)
    _run(changed, given, dims, precise, compare)
    return found[0] if found else None


def _unique_names(func: Func) -> dict[str, Value]:
    count: dict[str, int] = {}
    out: dict[str, Value] = {}
    for op in func.ops:
        for r in op.results:
            count[r.name] = count.get(r.name, 0) + 1
            out[r.name] = r
    return {name: v for name, v in out.items() if count[name] == 1}


def _plainly_differ(x: Array, y: Array, precise: bool) -> bool:
    if x.dtype.kind in "iub":
        return not np.array_equal(x, y)
    a, b = x.astype(np.float64), y.astype(np.float64)
    eps = EPS["f64"] if x.dtype == np.float64 else 2.0**-7 if x.dtype.itemsize == 2 else EPS["f32"]
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return True
    scale = float(np.abs(a).max(where=finite, initial=0.0))
    error = float(np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)).max(initial=0.0))
    return error > (2.0**24 if precise else 64.0) * eps * scale
