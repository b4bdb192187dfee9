"""Deciding linear-ish inequalities over Dims by interval bounds and elimination.

Owns the search; knows ranges and facts, not where they came from. The method: to bound `e` from below, take the
interval bound; where that is not enough, pick a term of `e` and a fact `f >= 0` whose matching term has the same sign,
and bound `|k|*e - |c|*f` instead, in which that term is gone (one Fourier-Motzkin step, rounded back to integers).
Facts are the scope's assumptions and the defining inequalities of the atoms in `e`:
`0 <= a - b*(a // b) <= b - 1`, `min(a, ..) <= a`. A min or max that still stands in the way is split into its cases.

Sound by construction: every step only weakens. Incomplete on purpose: a question costs at most `BUDGET` steps.
"""

from __future__ import annotations

from math import gcd

from xllm_compiler.dims.expr import Atom, Dim, Mono, const, intern, private_sym, rebuild, sym
from xllm_compiler.errors import XllmError

Bounds = tuple[int | None, int | None]
BUDGET = 160  # elimination steps per question
DEPTH = 5  # eliminations in a row
TIGHTEN = 12  # steps spent on the bounds of one atom's argument
FAR = 1 << 14  # how far a symbol without an end is taken to go
MAX_SPLITS = 3  # min and max atoms in a question up to which all their cases are tried


class Prover:
    """Decides questions under fixed facts; answers are remembered."""

    def __init__(self, ranges: dict[str, tuple[int | None, int | None, int]], assumptions: list[Dim]) -> None:
        self._ranges: dict[str, Bounds] = {}
        self._meaning: dict[str, Dim] = {}  # N, a multiple of 16, is 16*N'
        for name, (lo, hi, multiple) in ranges.items():
            if multiple > 1:
                unit = private_sym(name)
                self._meaning[name] = multiple * unit
                name, lo, hi = unit.symbols[0], _ceil(lo, multiple), None if hi is None else hi // multiple
            self._ranges[name] = (lo, hi)
        self._facts = [self._normal(f) for f in assumptions]
        self._atoms: dict[Atom, Bounds] = {}
        self._loose_atoms: dict[Atom, Bounds] = {}
        self._loosely = False
        self._definitions: dict[Atom, tuple[Dim, ...]] = {}
        self._intervals: dict[Dim, Bounds] = {}
        self._answers: dict[Dim, bool | None] = {}
        self._proved: dict[Dim, bool] = {}
        self._samples: list[dict[str, int]] | None = None
        self._steps = 0
        self._seen: dict[Dim, tuple[int, int | None]] = {}  # lower bounds by remaining depth, of one round

    # ---- questions

    def nonnegative(self, dim: Dim) -> bool | None:
        """Is dim >= 0: always (True), never (False), or undecided (None)?"""
        if dim.is_const:
            return dim.value >= 0
        if dim in self._answers:
            return self._answers[dim]
        d = self._normal(dim)
        answer = True if self._always(d) or self._one_of(d) else False if self._always(-d - 1) else None
        self._answers[dim] = answer
        return answer

    def zero(self, dim: Dim) -> bool | None:
        """Is dim == 0: always, never, or undecided?"""
        if dim.is_const:
            return dim.value == 0
        d = self._normal(dim)
        if d.is_const:
            return d.value == 0
        if d.constant % gcd(*(k for mono, k in d.terms if mono)):
            return False  # 2*N - 1 is never 0
        below, above = self.nonnegative(dim), self.nonnegative(-dim)
        if below and above:
            return True
        if below is False or above is False or self.nonnegative(dim - 1) or self.nonnegative(-dim - 1):
            return False
        return None

    def bounds(self, dim: Dim) -> Bounds:
        """(lower, upper); None where no bound was found."""
        d = self._normal(dim)
        hi = self._search(-d, None)
        return self._search(d, None), None if hi is None else -hi

    def interval(self, dim: Dim) -> Bounds:
        """(lower, upper) from the symbols' ranges alone: looser than `bounds`, and cheap."""
        found = self._intervals.get(dim)
        if found is None:
            found = self._intervals[dim] = self._interval(self._normal(dim))
        return found

    # ---- intervals

    def _normal(self, d: Dim) -> Dim:
        """Multiples spelled out and `a % b` written as a - b*(a // b)."""

        def call(kind: str, args: list[Dim]) -> Dim:
            return args[0] - args[1] * (args[0] // args[1]) if kind == "mod" else rebuild(kind, args)

        return d.fold(lambda s: self._meaning[s] if s in self._meaning else _symbol(s), const, call)

    def _interval(self, d: Dim) -> Bounds:
        lo: int | None = 0
        hi: int | None = 0
        for mono, k in d.terms:
            a, b = self._product(mono)
            if k < 0:
                a, b = b, a
            lo = None if lo is None or a is None else lo + k * a
            hi = None if hi is None or b is None else hi + k * b
        return lo, hi

    def _product(self, mono: Mono) -> Bounds:
        bounds: Bounds = (1, 1)
        for i, atom in enumerate(mono):
            bounds = self._atom(atom) if i == 0 else _mul(bounds, self._atom(atom))
        return bounds

    def _atom(self, atom: Atom) -> Bounds:
        found = self._atoms.get(atom)
        if found is None:
            if atom.kind == "sym":
                found = self._ranges.get(atom.name, (None, None))
            elif self._loosely or not self._facts or all(len(a.terms) <= 1 for a in atom.args):
                found = _apply(atom.kind, [self._interval(a) for a in atom.args])
            else:  # a fact may know more about a sum
                found = _apply(atom.kind, [self._tight(a) for a in atom.args])
            self._atoms[atom] = found
        return found

    def _tight(self, d: Dim) -> Bounds:
        """Bounds of an atom's argument from the facts. Inside, atoms have the bounds of their arguments' intervals:
        with anything better an answer would depend on what was asked before, as a fact may mention this very atom."""
        kept, self._atoms, self._loosely = self._atoms, self._loose_atoms, True
        try:
            below, above = self._search(d, None, TIGHTEN), self._search(-d, None, TIGHTEN)
        finally:
            self._atoms, self._loosely = kept, False
        if below is not None and above is not None and below > -above:
            return None, None  # facts that contradict each other: there is nothing to know a bound of
        return below, None if above is None else -above

    # ---- elimination

    def _always(self, d: Dim) -> bool:
        """Whether d >= 0 is proved. A max is at least each of its arguments, and at most one of them; a min likewise:
        with that many fewer atoms each case is a question of its own, with a budget of its own."""
        lo, hi = self._interval(d)
        if (lo is not None and lo >= 0) or (hi is not None and hi < 0):
            return lo is not None and lo >= 0
        if d in self._proved:
            return self._proved[d]
        if self._refuted(d):
            self._proved[d] = False
            return False
        proved = False
        split = next((t for t in d.terms if len(t[0]) == 1 and t[0][0].kind in ("min", "max")), None)
        if split is not None and sum(a.kind in ("min", "max") for a in _atoms_inside(d)) <= MAX_SPLITS:
            (atom,), k = split
            cases = (self._always(_replace(d, atom, arg)) for arg in atom.args)
            proved = any(cases) if (k > 0) == (atom.kind == "max") else all(cases)
        proved = proved or _at_least(self._search(d, 0), 0)
        self._proved[d] = proved
        return proved

    def _refuted(self, d: Dim) -> bool:
        """Whether d < 0 at one of a few admissible assignments: then a search for d >= 0 would be spent in vain."""
        if self._samples is None:
            self._samples = self._corners()
        try:
            return any(d.evaluate(sample) < 0 for sample in self._samples)
        except XllmError:  # an undeclared symbol, or a divisor that is 0 there
            return False

    def _corners(self) -> list[dict[str, int]]:
        """All symbols at their upper ends, all at their lower ones, each alone at its upper one; as the facts allow."""
        ends = {name: (-FAR if lo is None else lo, hi) for name, (lo, hi) in self._ranges.items()}
        lows = {name: lo if hi is None else min(lo, hi) for name, (lo, hi) in ends.items()}
        highs = {name: lows[name] + FAR if hi is None else hi for name, (_, hi) in ends.items()}
        corners = [highs, lows, *({**lows, name: highs[name]} for name in lows)] if lows else []
        out = []
        for corner in corners:
            try:
                if all(f.evaluate(corner) >= 0 for f in self._facts):
                    out.append(corner)
            except XllmError:  # a fact about an undeclared symbol: no assignment is known to be admissible
                continue
        return out

    def _one_of(self, d: Dim) -> bool:
        """Whether d >= 0 is proved with one argument in the place of a max, of which there may be any number inside."""
        for mono, k in d.terms:
            if k > 0 and len(mono) == 1 and mono[0].kind == "max":
                return any(self._always(_replace(d, mono[0], arg)) for arg in mono[0].args)
        return False

    def _search(self, d: Dim, goal: int | None, budget: int = BUDGET) -> int | None:
        """The best lower bound of `d` within `budget` steps; shallow proofs first, so that a dead end costs little."""
        outer = self._steps, self._seen
        self._steps = budget
        best: int | None = None
        try:
            for depth in range(DEPTH + 1):
                self._seen = {}
                found = self._lower(d, goal, depth, ())
                if found is not None and (best is None or found > best):
                    best = found
                if _at_least(best, goal) or self._steps <= 0:
                    break
        finally:
            self._steps, self._seen = outer
        return best

    def _lower(self, e: Dim, goal: int | None, depth: int, extra: tuple[Dim, ...]) -> int | None:
        """The greatest lower bound found; the search stops early once `goal` is reached."""
        best = self._interval(e)[0]
        if depth == 0 or e.is_const or _at_least(best, goal):
            return best
        if not extra:  # the same remainder is reached in many orders
            known = self._seen.get(e)
            if known is not None and known[0] >= depth:
                return known[1]
            self._seen[e] = depth, best
        best = self._relax(e, best, goal, depth, extra)
        if best is not None:
            best = _round_up(e, best)
        if not extra:
            self._seen[e] = depth, best
        return best

    def _relax(self, e: Dim, best: int | None, goal: int | None, depth: int, extra: tuple[Dim, ...]) -> int | None:
        for scale, cofactor, fact in self._eliminations(e, extra):
            if self._steps <= 0:
                return best
            self._steps -= 1
            # scale*e == cofactor*fact + rest with cofactor*fact >= 0
            rest = scale * e - cofactor * fact
            low = self._lower(rest, None if goal is None else (goal - 1) * scale + 1, depth - 1, extra)
            bound = _ceil(low, scale)
            if bound is not None and (best is None or bound > best):
                best = bound
                if _at_least(_round_up(e, best), goal):
                    return best
        split = next((a for a in _atoms_inside(e) if a.kind in ("min", "max")), None)
        if split is not None and self._steps > 0:
            cases: list[int | None] = []
            for arg in split.args:
                sign = 1 if split.kind == "min" else -1
                beside = tuple(sign * (other - arg) for other in split.args if other is not arg)
                case = self._lower(_replace(e, split, arg), goal, depth - 1, extra + beside)
                cases.append(case)
                if case is None or (best is not None and case <= best):
                    break
            else:
                best = min(c for c in cases if c is not None)
        return best

    def _eliminations(self, e: Dim, extra: tuple[Dim, ...]) -> list[tuple[int, Dim, Dim]]:
        out: list[tuple[int, Dim, Dim]] = []
        for mono, c in e.terms:
            for i, atom in enumerate(mono):  # the atom's own definition removes the atom
                if atom.kind != "sym":
                    rest = mono[:i] + mono[i + 1 :]
                    for fact in self._defining(atom):
                        self._match(out, c, rest, (atom,), fact)
        for fact in (*self._facts, *extra):
            for mono, c in e.terms:
                if mono:
                    for target, _ in fact.terms:
                        remainder = _divide(mono, target) if target else None
                        if remainder is not None:
                            self._match(out, c, remainder, target, fact)
        return out

    def _match(self, out: list[tuple[int, Dim, Dim]], c: int, cofactor: Mono, target: Mono, fact: Dim) -> None:
        k = next(coefficient for mono, coefficient in fact.terms if mono == target)
        if (c > 0) != (k > 0) or (cofactor and not _at_least(self._product(cofactor)[0], 0)):
            return
        g = gcd(c, k)
        out.append((abs(k) // g, intern({cofactor: abs(c) // g}), fact))

    def _defining(self, atom: Atom) -> tuple[Dim, ...]:
        """Facts >= 0 that define the atom and are linear in it."""
        found = self._definitions.get(atom)
        if found is None:
            x = atom.dim
            if atom.kind == "min":
                found = tuple(a - x for a in atom.args)
            elif atom.kind == "max":
                found = tuple(x - a for a in atom.args)
            else:
                a, b = atom.args
                if not _at_least(self._interval(b)[0], 1):
                    found = ()
                elif atom.kind == "floordiv":
                    found = (a - b * x, b * x + b - 1 - a)
                else:
                    found = (b * x - a, a + b - 1 - b * x)
            # With a symbolic divisor the atom stands in a product; `_match` looks for it alone.
            found = tuple(f for f in found if any(mono == (atom,) for mono, _ in f.terms))
            self._definitions[atom] = found
        return found


def _round_up(e: Dim, bound: int) -> int:
    """The least value >= bound that e can take, given that e without its constant is a multiple of its coefficients'
    greatest common divisor."""
    g, c = gcd(*(k for mono, k in e.terms if mono)), e.constant
    return c - (c - bound) // g * g


def _symbol(name: str) -> Dim:
    return private_sym(name[:-1]) if name.endswith("'") else sym(name)


def _at_least(low: int | None, goal: int | None) -> bool:
    return low is not None and goal is not None and low >= goal


def _ceil(value: int | None, by: int) -> int | None:
    return None if value is None else -(-value // by)


def _divide(mono: Mono, by: Mono) -> Mono | None:
    """mono / by, where `by` divides it."""
    rest = list(mono)
    for atom in by:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def _atoms_inside(d: Dim) -> list[Atom]:
    out: list[Atom] = []
    for mono, _ in d.terms:
        for atom in mono:
            out.append(atom)
            for arg in atom.args:
                out.extend(_atoms_inside(arg))
    return out


def _replace(d: Dim, atom: Atom, value: Dim) -> Dim:
    total = const(0)
    for mono, k in d.terms:
        term = const(k)
        for factor in mono:
            if factor is atom:
                term = term * value
            elif factor.kind == "sym":
                term = term * factor.dim
            else:
                term = term * rebuild(factor.kind, [_replace(a, atom, value) for a in factor.args])
        total = total + term
    return total


def _neg(a: Bounds) -> Bounds:
    return (None if a[1] is None else -a[1], None if a[0] is None else -a[0])


def _mul(a: Bounds, b: Bounds) -> Bounds:
    (al, ah), (bl, bh) = a, b
    if al is not None and ah is not None and bl is not None and bh is not None:
        products = (al * bl, al * bh, ah * bl, ah * bh)
        return min(products), max(products)
    if a == (0, 0) or b == (0, 0):
        return (0, 0)
    if ah is not None and ah <= 0:
        return _neg(_mul(_neg(a), b))
    if bh is not None and bh <= 0:
        return _neg(_mul(a, _neg(b)))
    # From here each factor can be positive, and one of the four ends is infinite.
    if bl is not None and bl >= 0 and not (al is not None and al >= 0):
        (al, ah), (bl, bh) = b, a
    if al is None or al < 0:
        return (None, None)
    hi = None if ah is None or bh is None else ah * bh
    if bl is not None and bl >= 0:
        return (al * bl, hi)
    return (None if bl is None or ah is None else ah * bl, hi)


def _apply(kind: str, args: list[Bounds]) -> Bounds:
    if kind in ("min", "max"):
        lows, highs = [a[0] for a in args], [a[1] for a in args]
        known_lows, known_highs = [v for v in lows if v is not None], [v for v in highs if v is not None]
        if kind == "min":
            lo = min(known_lows) if len(known_lows) == len(args) else None
            return lo, min(known_highs, default=None)
        hi = max(known_highs) if len(known_highs) == len(args) else None
        return max(known_lows, default=None), hi
    a, b = args
    return _floor(a, b) if kind == "floordiv" else _neg(_floor(_neg(a), b))


def _floor(a: Bounds, b: Bounds) -> Bounds:
    """Interval of a // b; nothing is known unless b >= 1."""
    (al, ah), (bl, bh) = a, b
    if bl is None or bl < 1:
        return (None, None)
    if al is None:
        lo = None
    elif al < 0:
        lo = al // bl
    else:
        lo = 0 if bh is None else al // bh
    if ah is None:
        hi = None
    elif ah >= 0:
        hi = ah // bl
    else:
        hi = -1 if bh is None else ah // bh
    return lo, hi
