"""Symbolic dimensions: `Dim` expressions, their text, and a scope that proves facts about them.

The one package that compiler, artifact and runtime share; it depends on the error type only.
"""

from xllm_compiler.dims.expr import Atom, Dim, DimLike, UndecidedDim, as_dim, ceildiv, const, dmax, dmin, sym
from xllm_compiler.dims.parse import parse_dim
from xllm_compiler.dims.scope import Assumption, DimScope, Symbol

__all__ = [
    "Assumption",
    "Atom",
    "Dim",
    "DimLike",
    "DimScope",
    "Symbol",
    "UndecidedDim",
    "as_dim",
    "ceildiv",
    "const",
    "dmax",
    "dmin",
    "parse_dim",
    "sym",
]
