"""Converts torch.export's symbolic sizes (sympy) into Dims. The only place of the project that sees sympy.

Symbols are renamed through a table made from the traced inputs; a symbol that is not in it was born from data inside
the model, and that is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from xllm_compiler.dims import Dim, as_dim, ceildiv, dmax, dmin, sym
from xllm_compiler.errors import XllmError


def to_dim(size: int | torch.SymInt, names: Mapping[str, str]) -> Dim:
    """The Dim of one traced size. `names`: export's symbol -> ours. XllmError("unsupported") when it has none."""
    if isinstance(size, int):
        return as_dim(size)
    return _convert(size.node.expr, names)


def _convert(expr: Any, names: Mapping[str, str]) -> Dim:
    if expr.is_Integer:
        return as_dim(int(expr))
    if expr.is_Symbol:
        name = names.get(expr.name)
        if name is None:
            raise XllmError("unsupported", f"a size of the model depends on its data ({expr.name})")
        return sym(name)
    args = [_convert(a, names) for a in expr.args] if not expr.is_Pow else []
    match type(expr).__name__:
        case "Add":
            return reduce(lambda a, b: a + b, args)
        case "Mul":
            return reduce(lambda a, b: a * b, args)
        case "Pow" if expr.exp.is_Integer and 0 < int(expr.exp) <= 8:
            base = _convert(expr.base, names)
            return reduce(lambda a, b: a * b, [base] * int(expr.exp))
        case "FloorDiv" | "CleanDiv" | "IntTrueDiv":
            return args[0] // args[1]
        case "CeilToInt" | "CeilDiv":
            if len(args) == 2:
                return ceildiv(args[0], args[1])
        case "Mod" | "PythonMod":
            return args[0] % args[1]
        case "Max":
            return dmax(*args)
        case "Min":
            return dmin(*args)
    raise XllmError("unsupported", f"a size of the model is {expr}, which has no symbolic form here")
