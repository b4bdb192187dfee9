"""One orthogonal matrix for each width, and weights multiplied by it. Owns the matrix; must not know ops.

    Q = diag(signs) (S x H)        of width m * p, p the largest power of two in it

H is the Walsh-Hadamard matrix of p and S the discrete Hartley matrix of the odd rest m, both of length 1 by row, "x" is
the Kronecker product. A vector v becomes v Q: whatever it had in one place is spread over all of them, so that no value
is much larger than the others. The random signs keep vectors of equal numbers from becoming a single large one.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from xllm_compiler.ir.blocks import in_blocks
from xllm_compiler.ir.semantics import Array

_LEAST: Final = 32  # vectors in one go, however long they are


def signs(width: int) -> npt.NDArray[np.float32]:
    """The diagonal of signs, from SHA-256 of the width and a counter: the same on every machine."""
    count = -(-width // 256)
    text = b"".join(hashlib.sha256(f"rotation {width} {i}".encode()).digest() for i in range(count))
    bits = np.unpackbits(np.frombuffer(text, np.uint8))[:width]
    return np.where(bits == 1, np.float32(-1), np.float32(1))


def hartley(m: int) -> npt.NDArray[np.float64]:
    """The discrete Hartley matrix of size m, orthonormal and symmetric: cos(2 pi i j / m) + sin(2 pi i j / m)."""
    angles = [2 * math.pi * k / m for k in range(m)]
    table = np.array([(math.cos(a) + math.sin(a)) / math.sqrt(m) for a in angles])
    return np.asarray(table[np.outer(np.arange(m), np.arange(m)) % m])


def rotated(
    w: Array, axis: int, wide: type[Any], scale: Array | None = None, offset: float = 0.0, centre: bool = False
) -> Array:
    """`w` [a] or [a, b] in the float type `wide`, with each vector v along `axis` in place of it

        (v * (scale + offset) - mean) Q

    `scale`: one factor for each place of v, without it no factor; the mean is subtracted with `centre`. Nothing of w's
    size is held but w and the result.
    """
    width = w.shape[axis]
    across = axis == w.ndim - 1  # vectors lie along memory
    vectors = w.reshape(-1, width) if across else w
    out = np.empty(vectors.shape, wide)
    factor = np.ones(width, wide) if scale is None else scale.astype(wide) + wide(offset)
    turned = signs(width).astype(wide)
    first = turned if centre else factor * turned
    count = len(vectors) if across else w.shape[1]

    def block(part: slice) -> None:
        # vectors side by side: every step then works on runs of memory
        v = np.ascontiguousarray(_widened(vectors[part].T if across else w[:, part], wide))
        if centre:
            v = v * factor[:, None]
            v -= v.mean(axis=0, keepdims=True, dtype=np.float64).astype(wide)
        v = _mixed(v * first[:, None])
        if across:
            out[part] = v.T
        else:
            out[:, part] = v

    in_blocks(count, width, block, _LEAST)
    return out.reshape(w.shape)


def _mixed(v: Array) -> Array:
    """S x H of the columns of v [width, k], which is used up. Sums are made by halves, partners 1 apart first."""
    width, k = v.shape
    p = width & -width
    m = width // p
    other = np.empty_like(v)
    apart = 1
    with np.errstate(invalid="ignore", over="ignore"):
        while apart < p:
            pairs, made = (x.reshape(-1, 2, apart, k) for x in (v, other))
            np.add(pairs[:, 0], pairs[:, 1], out=made[:, 0])
            np.subtract(pairs[:, 0], pairs[:, 1], out=made[:, 1])
            v, other = other, v
            apart *= 2
        if m == 1:
            v *= v.dtype.type(p**-0.5)
            return v
        runs, sums = v.reshape(m, -1), other.reshape(m, -1)
        product = np.empty_like(runs[0])
        for row, total in zip((hartley(m) * p**-0.5).astype(v.dtype), sums, strict=True):
            np.multiply(runs[0], row[0], out=total)
            for each, number in zip(runs[1:], row[1:], strict=True):
                np.multiply(each, number, out=product)
                total += product
    return other


def _widened(x: Array, wide: type[Any]) -> Array:
    """x in a float type at least as wide. bf16 is the upper half of an f32, and widened by moves alone."""
    if x.dtype == ml_dtypes.bfloat16:
        x = (np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(wide, copy=False)
