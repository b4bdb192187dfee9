"""How ggml packs values into blocks, in numpy: floats of every type that can be read, integers of those that our weight
formats hold exactly.

Source: ggml-common.h (the blocks) and ggml-quants.c (what they mean). Every block holds `values` neighbours of a row.
`d` and `m` are f16. Values of a block are computed in f32, in the order of operations of llama.cpp's own gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np

from xllm_compiler.weight_formats import IntegerFormat

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Block:
    """One type. `floats`: u8 [n, nbytes] to f32 [n, values]. `integers`, where `format` holds what is stored: to u8
    [n, values], as `format` has them, whose scales are `scales`. `why`: why no format does."""

    values: int
    nbytes: int
    floats: Callable[[Array], Array]
    integers: Callable[[Array], Array] | None = None
    format: IntegerFormat | None = None
    why: str = ""


def _half(blocks: Array, at: int) -> Array:
    """The f16 at byte `at` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")


def _wide(blocks: Array, at: int) -> Array:
    return _half(blocks, at).astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """u8 [n, k] to [n, 2 k]: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth(packed: Array) -> Array:
    """32 bits, the lowest first, as bit 4: u8 [n, 4] to [n, 32]."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


# ---- blocks of 32


def scales(blocks: Array) -> Array:
    """`d` of each block with integers, f16 [n]."""
    return _half(blocks, 0)[:, 0]


def _q4_0_integers(b: Array) -> Array:
    return _nibbles(b[:, 2:])


def _q4_0(b: Array) -> Array:
    return _wide(b, 0) * (_nibbles(b[:, 2:]).view(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(b: Array) -> Array:
    return _wide(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _wide(b, 2)


def _q5_0_integers(b: Array) -> Array:
    """5 bits around 16 as 8 bits around 128."""
    return np.asarray((_nibbles(b[:, 6:]) | _fifth(b[:, 2:6])) + np.uint8(128 - 16))


def _q5_0(b: Array) -> Array:
    return _wide(b, 0) * ((_nibbles(b[:, 6:]) | _fifth(b[:, 2:6])).view(np.int8) - np.int8(16)).astype(np.float32)


def _q5_1(b: Array) -> Array:
    return _wide(b, 0) * (_nibbles(b[:, 8:]) | _fifth(b[:, 4:8])).astype(np.float32) + _wide(b, 2)


def _q8_0_integers(b: Array) -> Array:
    return np.asarray(b[:, 2:] ^ np.uint8(128))


def _q8_0(b: Array) -> Array:
    return _wide(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


# ---- blocks of 256: groups of 16 or 32 with scales in 6 or 8 bits, which `d` scales


def _k_scales(packed: Array) -> tuple[Array, Array]:
    """12 bytes to 8 scales and 8 minimums of 6 bits each (get_scale_min_k4)."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minimums = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    return scales.astype(np.float32)[..., None], minimums.astype(np.float32)[..., None]


def _k_values(b: Array, values: Array) -> Array:
    """d * scale * value - dmin * minimum, of 8 groups of 32: values [n, 8, 32] to f32 [n, 256]."""
    scales, minimums = _k_scales(b[:, 4:16])
    wide = (_wide(b, 0)[..., None] * scales) * values.astype(np.float32) - _wide(b, 2)[..., None] * minimums
    return np.asarray(wide.reshape(len(b), 256))


def _q4_k(b: Array) -> Array:
    packed = b[:, 16:].reshape(-1, 4, 1, 32)  # 4 runs of 32 bytes: the low halves are one group, the high ones the next
    return _k_values(b, np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32))


def _q5_k(b: Array) -> Array:
    packed = b[:, 48:].reshape(-1, 4, 1, 32)
    low = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    fifth = (b[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1).transpose(0, 2, 1)  # bit i of a byte: group i
    return _k_values(b, low | (fifth << 4))


def _q6_k(b: Array) -> Array:
    low = b[:, :128].reshape(-1, 2, 1, 64)
    high = b[:, 128:192].reshape(-1, 2, 1, 32)
    values = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    values |= (high >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3) << 4
    signed = values.reshape(-1, 16, 16).view(np.int8) - np.int8(32)
    scales = b[:, 192:208].view(np.int8).astype(np.float32)[..., None]
    return np.asarray((_wide(b, 208)[..., None] * scales * signed.astype(np.float32)).reshape(len(b), 256))


_MINIMUM: Final = "has a minimum for each block, which no zero point holds exactly"
_SCALES: Final = "scales the scales of groups of {} once more, and no f16 holds the product"

BLOCKS: Final[dict[str, Block]] = {
    "F32": Block(1, 4, lambda b: b.view("<f4")),
    "F16": Block(1, 2, lambda b: b.view("<f2").astype(np.float32)),
    "BF16": Block(1, 2, lambda b: b.view(ml_dtypes.bfloat16).astype(np.float32)),
    "Q4_0": Block(32, 18, _q4_0, _q4_0_integers, IntegerFormat(4, 32)),
    "Q4_1": Block(32, 20, _q4_1, why=_MINIMUM),
    "Q5_0": Block(32, 22, _q5_0, _q5_0_integers, IntegerFormat(8, 32)),
    "Q5_1": Block(32, 24, _q5_1, why=_MINIMUM),
    "Q8_0": Block(32, 34, _q8_0, _q8_0_integers, IntegerFormat(8, 32)),
    "Q4_K": Block(256, 144, _q4_k, why=_SCALES.format(32)),
    "Q5_K": Block(256, 176, _q5_k, why=_SCALES.format(32)),
    "Q6_K": Block(256, 210, _q6_k, why=_SCALES.format(16)),
}
"""Every type of tensor that can be read."""

TYPES: Final = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    30: "BF16",
}
"""The numbers that stand for them in a file."""

UNREAD: Final = {
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS"},
    **{18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16"},
    **{26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
"""Types that are known by name alone."""
