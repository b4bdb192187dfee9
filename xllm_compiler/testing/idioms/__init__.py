"""What random graphs are made of: short runs of ops as models, kernels and other passes leave them.

Owns the list; every op that stands in a graph occurs in it. Simple ones first, since shrinking goes there. Two rules
keep a comparison of two runs meaningful. Values that grow or cancel are settled near 1. What jumps (floor, comparisons,
remainders) is only applied to integers and to exact multiples of powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xllm_compiler.testing.idioms.model import (
    attention,
    collective,
    cross,
    gated,
    linear,
    logits,
    norm,
    quantized,
    rope,
)
from xllm_compiler.testing.idioms.states import recurrent, remembered
from xllm_compiler.testing.idioms.tensor import (
    again,
    binary,
    casts,
    columns,
    constant,
    identity,
    integers,
    masks,
    positive,
    reduce,
    returned_ints,
    rows,
    shape,
    spelled_activation,
    unary,
)
from xllm_compiler.testing.sketch import Sketch

Idiom = Callable[[Sketch], None]

IDIOMS: Final[tuple[Idiom, ...]] = (
    *(unary, binary, constant, linear, norm, shape, attention, gated, rope, collective),
    *(identity, again, casts, positive, spelled_activation, reduce, rows, integers, masks, columns),
    *(cross, logits, returned_ints, quantized, recurrent, remembered),
)
