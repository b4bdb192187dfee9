"""What is known about symbols: ranges, divisibility and constraints, each with the reason it holds.

Owns the facts and the questions asked of them; the deciding is in prove.py. A scope is a place: declarations may be
added at any time and never removed, so a True or False once given stays right.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.dims.expr import Dim, DimLike, as_dim, sym
from xllm_compiler.dims.prove import Prover
from xllm_compiler.errors import XllmError

Bounds = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Symbol:
    """`name` in [lo, hi] (None: unbounded), a whole multiple of `multiple`."""

    name: str
    lo: int | None
    hi: int | None
    multiple: int = 1
    why: str = ""


@dataclass(frozen=True, slots=True)
class Assumption:
    """`expr` >= 0 at run time."""

    expr: Dim
    why: str = ""


class DimScope:
    """The symbols of a module and what may be assumed of them.

    Answers are three-valued. True: holds for every admissible assignment. False: holds for none. None: not decided,
    either because it depends on the assignment or because the prover is not strong enough.
    A symbol that was never declared may be any integer.
    """

    def __init__(self) -> None:
        self.symbols: dict[str, Symbol] = {}
        self.assumptions: list[Assumption] = []
        self.undecided = 0  # how many questions were answered None; a rising number is a design smell
        self._prover: Prover | None = None

    def declare(self, name: str, lo: int | None, hi: int | None, multiple: int = 1, why: str = "") -> Dim:
        """Adds a symbol and returns it; declaring it again with other facts is an error."""
        symbol = Symbol(name, lo, hi, multiple, why)
        if multiple < 1:
            raise XllmError("ir", f"dim {name}: multiple must be at least 1, not {multiple}")
        if lo is not None and hi is not None and -(-lo // multiple) > hi // multiple:
            raise XllmError("ir", f"dim {name}: no multiple of {multiple} lies in [{lo}, {hi}]")
        old = self.symbols.get(name)
        if old is not None and (old.lo, old.hi, old.multiple) != (lo, hi, multiple):
            raise XllmError("ir", f"dim {name} is declared twice: {old} and {symbol}")
        result = sym(name)
        if old is None:
            self.symbols[name] = symbol
            self._prover = None
        return result

    def assume(self, expr: DimLike, why: str = "") -> None:
        """Records that `expr` >= 0."""
        dim = as_dim(expr)
        if any(a.expr is dim for a in self.assumptions):
            return
        self.assumptions.append(Assumption(dim, why))
        self._prover = None

    def copy(self) -> DimScope:
        """An independent scope with the same facts."""
        new = DimScope()
        new.symbols = dict(self.symbols)
        new.assumptions = list(self.assumptions)
        return new

    @property
    def prover(self) -> Prover:
        if self._prover is None:
            ranges = {s.name: (s.lo, s.hi, s.multiple) for s in self.symbols.values()}
            self._prover = Prover(ranges, [a.expr for a in self.assumptions])
        return self._prover

    def bounds(self, dim: DimLike) -> Bounds:
        """Proved (least, greatest) value; None where nothing is known. Not always tight."""
        return self.prover.bounds(as_dim(dim))

    def prove(self, dim: DimLike) -> bool | None:
        """Is `dim` >= 0?"""
        answer = self.prover.nonnegative(as_dim(dim))
        if answer is None:
            self.undecided += 1
        return answer

    def prove_le(self, a: DimLike, b: DimLike) -> bool | None:
        """Is a <= b?"""
        return self.prove(as_dim(b) - a)

    def prove_eq(self, a: DimLike, b: DimLike) -> bool | None:
        """Is a == b? True also where the two are written differently but proved equal."""
        answer = self.prover.zero(as_dim(a) - b)
        if answer is None:
            self.undecided += 1
        return answer
