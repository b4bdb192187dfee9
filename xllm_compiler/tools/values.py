"""Arrays as lines of text: type, sizes, range and a digest. Owns that look; must not compute anything itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from xllm_compiler.ir.core import Func
from xllm_compiler.ir.printer import func_names
from xllm_compiler.ir.semantics import Array
from xllm_compiler.tools.console import table


def describe_returns(func: Func, arrays: Sequence[Array]) -> str:
    """One line per return: its name, type, actual shape, least, mean and greatest element, digest."""
    names = func_names(func)
    rows = [
        [names.of(value), str(value.type), f"[{', '.join(map(str, array.shape))}]", *summary(array), digest(array)]
        for value, array in zip(func.returns, arrays, strict=True)
    ]
    return table(rows) if rows else "  nothing is returned"


def summary(array: Array) -> tuple[str, str, str]:
    """Least, mean and greatest element. NaN shows as itself, and an empty array as "empty"."""
    if array.size == 0:
        return "empty", "", ""
    wide = array.astype(np.float64)
    with np.errstate(all="ignore"):
        found = float(wide.min()), float(wide.mean()), float(wide.max())
    return f"min {found[0]:.6g}", f"mean {found[1]:.6g}", f"max {found[2]:.6g}"


def digest(array: Array) -> str:
    """12 hex digits over dtype, shape and bits: equal for equal arrays only."""
    found = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:12]
