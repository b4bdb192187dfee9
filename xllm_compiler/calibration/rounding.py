"""Rounding that knows the inputs: the error of each weight is made up for by the weights that are rounded after it.

For inputs X and H = X^T X, errors e of a row of weights change the row's outputs by e H e^T, all squares added up. With
H = (1 + U) D (1 + U)^T, where U is strictly upper and D diagonal, that is the sum over inputs j of

    D_j (w_j + (e U)_j - q_j)^2

so each q_j is the number nearest to what w_j and the errors before it ask for (GPTQ, Frantar et al. 2022, in the form
that QuIP, Chee et al. 2023, calls LDLQ). It needs one Cholesky factor and no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from xllm_compiler.calibration.grids import Grid, grid_of
from xllm_compiler.ir import quant
from xllm_compiler.ir.semantics import Array
from xllm_compiler.weight_formats import WeightFormat

DAMP: Final = 0.01
"""What is added to the diagonal of H, of its mean: what the text does not show may still happen."""
_BLOCK: Final = 32  # inputs that are rounded between two products of matrices
_COLUMNS: Final = 256
_FACTOR: Final = 64


@dataclass(frozen=True)
class Feedback:
    """What earlier errors ask of later weights.

    `order` [in]: the order in which inputs are rounded, the most important first, whole groups at a time. `v` f32
    [in, in]: upper, with v v^T = H in that order, damped and over its mean diagonal. `u` = v / `root` by columns."""

    order: Array
    v: Array
    u: Array
    root: Array

    @classmethod
    def of(cls, h: Array, length: int) -> Feedback | None:
        """Of H [in, in], symmetric, for groups of `length` inputs. None where H is not finite."""
        n = len(h)
        mean = float(np.trace(h, dtype=np.float64)) / n
        if not np.isfinite(h).all() or not np.isfinite(mean):
            return None
        if mean <= np.finfo(np.float32).tiny:  # nothing was seen: all inputs count alike
            h, mean = np.eye(n, dtype=np.float32), 1.0
        order = _importance(np.diagonal(h), length)
        last_first = order[::-1]
        wide = h[np.ix_(last_first, last_first)].astype(np.float64)
        wide /= mean
        wide[np.diag_indices(n)] += DAMP
        v = _cholesky(wide)[::-1, ::-1]
        root = np.diagonal(v).astype(np.float32)
        u = (v / np.diagonal(v)).astype(np.float32)
        return cls(order, np.ascontiguousarray(v.astype(np.float32)), u, root)

    def losses(self, t: Array) -> Array:
        """e H e^T of each row e of a matrix, which comes as `t` f32 [in, rows] in the order of rounding: f64 [rows]."""
        out = np.zeros(t.shape[1])
        for start in range(0, len(t), _COLUMNS):
            end = min(start + _COLUMNS, len(t))
            part = self.v[:end, start:end].T @ t[:end]
            out += np.square(part, out=part).sum(axis=0, dtype=np.float64)
        return out


@dataclass(frozen=True)
class Rounded:
    """Rows of a weight as integers u8 [rows, in], scales [rows, groups] and zero points u8 [rows, groups] if the format
    has them. `size`, `plain` and `loss`: w H w^T of all rows, and e H e^T after plain rounding and after this."""

    parts: tuple[Array, ...]
    size: float
    plain: float
    loss: float


def round_rows(w: Array, format: WeightFormat, feedback: Feedback) -> Rounded:
    """Rows w f32 [rows, in]. A row that would lose more than by plain rounding is rounded plainly."""
    plain = quant.quantize_weight(w, format)
    order = feedback.order
    t = np.ascontiguousarray(w.T[order])
    grid, errors = _round(t, format, feedback, plain[1])
    back = quant.dequantize_weight(plain[0], plain[1], plain[2] if format.zeros else None, format, np.float32)
    losses = feedback.losses(errors)
    before = feedback.losses(np.ascontiguousarray((w - back).T[order]))
    better: Array = np.asarray(losses < before)
    parts = [x.copy() for x in plain]
    made = _in_place(grid, order)
    for part, other in zip(parts, made, strict=True):
        part[better] = other[better]
    size = float(feedback.losses(t).sum())
    return Rounded(tuple(parts), size, float(before.sum()), float(np.where(better, losses, before).sum()))


def _round(t: Array, format: WeightFormat, feedback: Feedback, scales: Array) -> tuple[Grid, Array]:
    """Weights t f32 [in, rows] on their grids, and their errors f32 [in, rows]. A group's grid is chosen when its first
    input is reached, for the weights as errors have changed them by then."""
    u, weights = feedback.u, np.square(feedback.root)
    in_, rows = t.shape
    grid = grid_of(format, t, scales)
    errors, made = np.zeros_like(t), np.empty(rows, np.float32)
    for start in range(0, in_, _BLOCK):
        end = min(start + _BLOCK, in_)
        wanted = t[start:end] + u[:start, start:end].T @ errors[:start]
        since = start  # errors from here on are not in `wanted`
        for i in range(start, end):
            row = wanted[i - start]
            if i % grid.length == 0:
                stop = min(i + grid.length, in_)
                if i > since:
                    wanted[i - start :] += u[since:i, i:end].T @ errors[since:i]
                    since = i
                inside = wanted[i - start : stop - start]
                if stop > end:
                    rest = t[end:stop] + u[:i, end:stop].T @ errors[:i]
                    inside = np.concatenate((inside, rest))
                grid.begin(i // grid.length, inside, weights[i:stop])
            elif i > since:
                row += u[since:i, i] @ errors[since:i]
            grid.round(i, row, made)
            np.subtract(t[i], made, out=errors[i])
    return grid, errors


def _in_place(grid: Grid, order: Array) -> tuple[Array, ...]:
    """What the grid found as a format has it: [rows, in] and [rows, groups], in the order of the weight's inputs."""
    stored = np.empty_like(grid.stored)
    stored[order] = grid.stored
    tables = [grid.scales] if grid.zeros is None else [grid.scales, grid.zeros]
    groups = order[:: grid.length] // grid.length
    out = [np.ascontiguousarray(stored.T)]
    for table in tables:
        placed = np.empty_like(table)
        if len(table) == len(groups):
            placed[groups] = table
        else:  # of a row
            placed[:] = table
        out.append(np.ascontiguousarray(placed.T))
    return tuple(out)


def _importance(diagonal: Array, length: int) -> Array:
    """Inputs by the size of what they bring, largest first: by groups, and within each. A last group that is short
    stays the last."""
    n = len(diagonal)
    whole = n // length * length
    by = diagonal[:whole].reshape(-1, length)
    groups = np.argsort(-by.mean(axis=1, dtype=np.float64), kind="stable")
    within = np.argsort(-by, axis=1, kind="stable")
    first = (groups[:, None] * length + within[groups]).reshape(-1)
    rest = whole + np.argsort(-diagonal[whole:], kind="stable")
    return np.concatenate((first, rest))


def _cholesky(a: Array) -> Array:
    """The lower Cholesky factor of `a`, which is overwritten, block by block: products of matrices do nearly all of the
    work. LAPACK's own was seen to take ten times as long where another process had a core."""
    n = len(a)
    for start in range(0, n, _FACTOR):
        end = min(start + _FACTOR, n)
        panel = a[start:, start:end] - a[start:, :start] @ a[start:end, :start].T
        top = np.linalg.cholesky(panel[: end - start])
        a[start:end, start:end] = top
        a[end:, start:end] = panel[end - start :] @ np.linalg.inv(top).T
        a[start:end, end:] = 0
    return a
