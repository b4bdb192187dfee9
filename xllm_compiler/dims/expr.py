"""Symbolic dimensions: interned canonical polynomials over integer symbols.

Owns `Dim`, its arithmetic, its canonical form, its text and its evaluation. It must not know ranges or constraints
(scope.py) and never decides an inequality (prove.py).

Canonical form. A Dim is a sum of `coefficient * product of atoms`, terms in a fixed order that depends on names only;
an atom is a symbol or an opaque `floordiv / mod / ceildiv / min / max` of Dims. With a constant divisor the divisions
are reduced first (whole multiples leave the quotient, common factors cancel, the leading sign is made positive), so
that `(N + 15) // 16 is ceildiv(N, 16)` and `(32*N + 5) // 16 is 2*N`. Two equal Dims are the same object.

Division follows Python: `//` rounds to minus infinity, `%` has the sign of the divisor, and
`ceildiv(a, b) == -((-a) // b)`. A zero divisor is an error when it is met.
"""

from __future__ import annotations

import math
import operator
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeVar
from weakref import WeakValueDictionary

from xllm_compiler.errors import XllmError

T = TypeVar("T")
AtomKind = Literal["sym", "floordiv", "mod", "ceildiv", "min", "max"]
Mono = tuple["Atom", ...]  # a product of atoms, sorted, repeated for powers; () is the constant 1
FUNCTIONS = ("ceildiv", "min", "max")
MAX_TERMS = 4096  # a product of hostile sums grows without end; no honest formula comes near these
MAX_FACTORS = 64  # of a term
MAX_ARGUMENTS = 256  # of a min or max, each of which is compared with each
MAX_NUMBER = 1 << 4096  # coefficients are below
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z", re.ASCII)
_lock = threading.Lock()


class UndecidedDim(XllmError):
    """A symbolic comparison was used as if it were a Python bool."""

    def __init__(self, what: str) -> None:
        super().__init__(
            "internal",
            f"{what} depends on symbolic dims and is not a Python bool",
            help="ask DimScope.prove / prove_le / prove_eq and handle True, False and None; `==` is identity",
        )


class Atom:
    """One interned factor: a symbol (`name`) or a function of Dims (`args`). Compare with `is`."""

    __slots__ = ("__weakref__", "args", "key", "kind", "name", "symbols")
    kind: AtomKind
    name: str
    args: tuple[Dim, ...]
    key: tuple[int, str]
    symbols: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Atom({self.key[1]})"

    @property
    def dim(self) -> Dim:
        """The Dim that consists of this atom alone."""
        return intern({(self,): 1})

    def __reduce__(self) -> tuple[Callable[[AtomKind, str, tuple[Dim, ...]], Atom], tuple[object, ...]]:
        return _atom, (self.kind, self.name, self.args)


class Dim:
    """An integer expression, see the module docstring. Takes ints wherever it takes Dims."""

    __slots__ = ("__weakref__", "_hash", "_symbols", "_text", "terms")
    terms: tuple[tuple[Mono, int], ...]
    _hash: int
    _text: str | None
    _symbols: tuple[str, ...] | None

    # ---- what it is

    @property
    def is_const(self) -> bool:
        return not self.terms or (len(self.terms) == 1 and not self.terms[0][0])

    @property
    def value(self) -> int:
        """The integer that this constant is; an error for anything symbolic."""
        if not self.terms:
            return 0
        mono, coefficient = self.terms[-1]
        if mono or len(self.terms) != 1:
            raise UndecidedDim(f"the value of {self}")
        return coefficient

    @property
    def constant(self) -> int:
        """The constant term."""
        return self.terms[-1][1] if self.terms and not self.terms[-1][0] else 0

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of all symbols inside, sorted."""
        if self._symbols is None:
            self._symbols = tuple(sorted({s for mono, _ in self.terms for atom in mono for s in atom.symbols}))
        return self._symbols

    @property
    def atom(self) -> Atom | None:
        """The atom, where this Dim is one atom and nothing else."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            return self.terms[0][0][0]
        return None

    # ---- arithmetic

    def __add__(self, other: DimLike) -> Dim:
        if other.__class__ is int and other == 0:
            return self
        rhs = _coerce(other)
        if rhs is None:
            return NotImplemented
        out = dict(self.terms)
        for mono, k in rhs.terms:
            out[mono] = out.get(mono, 0) + k
        return intern(out)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return intern({mono: -k for mono, k in self.terms})

    def __pos__(self) -> Dim:
        return self

    def __sub__(self, other: DimLike) -> Dim:
        rhs = _coerce(other)
        if rhs is None:
            return NotImplemented
        out = dict(self.terms)
        for mono, k in rhs.terms:
            out[mono] = out.get(mono, 0) - k
        return intern(out)

    def __rsub__(self, other: int) -> Dim:
        lhs = _coerce(other)
        return NotImplemented if lhs is None else lhs - self

    def __mul__(self, other: DimLike) -> Dim:
        rhs = _coerce(other)
        if rhs is None:
            return NotImplemented
        if len(self.terms) * len(rhs.terms) > MAX_TERMS:
            raise XllmError("ir", f"a dim expression grew beyond {MAX_TERMS} terms")
        out: dict[Mono, int] = {}
        for m1, k1 in self.terms:
            for m2, k2 in rhs.terms:
                mono = m1 + m2 if not (m1 and m2) else tuple(sorted(m1 + m2, key=_atom_key))
                out[mono] = out.get(mono, 0) + k1 * k2
        for mono, k in out.items():
            if len(mono) > MAX_FACTORS or not -MAX_NUMBER < k < MAX_NUMBER:
                raise XllmError("ir", f"a dim expression grew beyond {MAX_FACTORS} factors, or its numbers too long")
        return intern(out)

    __rmul__ = __mul__

    def __floordiv__(self, other: DimLike) -> Dim:
        rhs = _coerce(other)
        return NotImplemented if rhs is None else _floordiv(self, rhs)

    def __rfloordiv__(self, other: int) -> Dim:
        lhs = _coerce(other)
        return NotImplemented if lhs is None else _floordiv(lhs, self)

    def __mod__(self, other: DimLike) -> Dim:
        rhs = _coerce(other)
        return NotImplemented if rhs is None else _mod(self, rhs)

    def __rmod__(self, other: int) -> Dim:
        lhs = _coerce(other)
        return NotImplemented if lhs is None else _mod(lhs, self)

    # ---- comparison: identity only

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, int) and self.is_const and self.value == other

    def __hash__(self) -> int:
        return self._hash

    def __bool__(self) -> bool:
        raise UndecidedDim(f"the truth of {self}")

    def __lt__(self, other: DimLike) -> bool:
        raise UndecidedDim(f"{self} < {other}")

    def __le__(self, other: DimLike) -> bool:
        raise UndecidedDim(f"{self} <= {other}")

    def __gt__(self, other: DimLike) -> bool:
        raise UndecidedDim(f"{self} > {other}")

    def __ge__(self, other: DimLike) -> bool:
        raise UndecidedDim(f"{self} >= {other}")

    # ---- use

    def fold(self, symbol: Callable[[str], T], number: Callable[[int], T], call: Callable[[str, list[T]], T]) -> T:
        """Rebuilds the expression in another algebra.

        `call` gets "add" or "mul" (two arguments) or an atom's kind with its arguments in order. Shared atoms are
        built once. Used by printers, by lowering and by `compile`.
        """
        return self._fold(symbol, number, call, {})

    def _fold(
        self,
        symbol: Callable[[str], T],
        number: Callable[[int], T],
        call: Callable[[str, list[T]], T],
        done: dict[Atom, T],
    ) -> T:
        total: T | None = None
        for mono, k in self.terms:
            product: T | None = None if k == 1 and mono else number(k)
            for atom in mono:
                part = done.get(atom)
                if part is None:
                    if atom.kind == "sym":
                        part = symbol(atom.name)
                    else:
                        part = call(atom.kind, [a._fold(symbol, number, call, done) for a in atom.args])
                    done[atom] = part
                product = part if product is None else call("mul", [product, part])
            assert product is not None
            total = product if total is None else call("add", [total, product])
        return number(0) if total is None else total

    def evaluate(self, env: Mapping[str, int]) -> int:
        """The value with every symbol taken from `env`; a missing symbol or a zero divisor is an XllmError."""
        total = 0
        for mono, k in self.terms:
            for atom in mono:
                k *= _evaluate_atom(atom, env)
            total += k
        return total

    def substitute(self, env: Mapping[str, DimLike]) -> Dim:
        """Replaces symbols, simultaneously; symbols not in `env` stay."""
        if not any(s in env for s in self.symbols):
            return self
        values = {name: as_dim(value) for name, value in env.items()}
        return self.fold(lambda s: values[s] if s in values else sym(s), const, rebuild)

    def compile(self, names: Iterable[str]) -> Callable[..., int]:
        """A closure of the named symbols, in that order, as positional ints.

        The Python source is generated from canonical nodes only (integers, operators and names of our own making),
        never from text that came from outside. A zero divisor raises Python's ZeroDivisionError.
        """
        order = tuple(names)
        missing = [s for s in self.symbols if s not in order]
        if missing:
            raise XllmError("internal", f"{self} needs {', '.join(missing)}, which compile({order}) does not provide")
        lines: list[str] = []

        def call(kind: str, args: list[str]) -> str:
            if kind == "add":
                return f"{args[0]} + {args[1]}"
            if kind == "mul":
                return f"{args[0]}*{args[1]}"
            name = f"t{len(lines)}"
            a, b = args[0], args[-1]
            text = {
                "floordiv": f"({a}) // ({b})",
                "mod": f"({a}) % ({b})",
                "ceildiv": f"-(-({a}) // ({b}))",
                "min": f"min({', '.join(args)})",
                "max": f"max({', '.join(args)})",
            }[kind]
            lines.append(f"    {name} = {text}")
            return name

        result = self.fold(lambda s: f"a{order.index(s)}", lambda v: f"({v:#x})" if v < 0 else f"{v:#x}", call)
        head = ", ".join(f"a{i}" for i in range(len(order)))
        source = "\n".join([f"def formula({head}):", *lines, f"    return {result}"])
        namespace: dict[str, Callable[..., int]] = {}
        exec(compile(source, f"<dim {self}>"[:120], "exec"), {"min": min, "max": max, "__builtins__": {}}, namespace)
        return namespace["formula"]

    # ---- text

    def __str__(self) -> str:
        if self._text is None:
            self._text = _text(self)
        return self._text

    def __repr__(self) -> str:
        return f"Dim({self})"

    def __copy__(self) -> Dim:
        return self

    def __deepcopy__(self, memo: object) -> Dim:
        return self

    def __reduce__(self) -> tuple[Callable[[tuple[tuple[Mono, int], ...]], Dim], tuple[object, ...]]:
        return _from_terms, (self.terms,)


DimLike = Dim | int

_dims: WeakValueDictionary[tuple[tuple[Mono, int], ...], Dim] = WeakValueDictionary()
_atoms: WeakValueDictionary[tuple[str, str, tuple[Dim, ...]], Atom] = WeakValueDictionary()


# ---------------------------------------------------------------------------------------------- making canonical nodes


def _atom_key(atom: Atom) -> tuple[int, str]:
    return atom.key


def _term_key(term: tuple[Mono, int]) -> tuple[int, tuple[tuple[int, str], ...]]:
    return -len(term[0]), tuple(a.key for a in term[0])


def intern(terms: dict[Mono, int]) -> Dim:
    """The Dim with these terms; zero coefficients are dropped, every product must already be sorted."""
    items = [t for t in terms.items() if t[1]]
    if len(items) > 1:
        items.sort(key=_term_key)
    return _from_terms(tuple(items))


def _from_terms(key: tuple[tuple[Mono, int], ...]) -> Dim:
    with _lock:  # two threads must not make two objects of one Dim: equality is identity
        found = _dims.get(key)
        if found is None:
            found = Dim.__new__(Dim)
            found.terms = key
            found._text = None
            found._symbols = None
            found._hash = hash(key[0][1] if key and not key[0][0] else key) if key else hash(0)
            _dims[key] = found
        return found


def _atom(kind: AtomKind, name: str, args: tuple[Dim, ...]) -> Atom:
    key = (kind, name, args)
    with _lock:
        found = _atoms.get(key)
        if found is not None:
            return found
    fresh = Atom()
    fresh.kind, fresh.name, fresh.args = kind, name, args
    fresh.symbols = (name,) if kind == "sym" else tuple(sorted({s for a in args for s in a.symbols}))
    fresh.key = (0, name) if kind == "sym" else (1, _call_text(kind, args))
    with _lock:
        return _atoms.setdefault(key, fresh)


def _coerce(value: object) -> Dim | None:
    if isinstance(value, Dim):
        return value
    if isinstance(value, bool):
        return None
    try:
        return const(operator.index(value))  # type: ignore[arg-type]
    except TypeError:
        return None


def as_dim(value: DimLike) -> Dim:
    """The Dim of an int (or of a Dim itself); anything else is an XllmError."""
    dim = _coerce(value)
    if dim is None:
        raise XllmError("internal", f"a dim must be an int or a Dim, got {value!r}")
    return dim


def const(value: int) -> Dim:
    """The constant Dim."""
    return _from_terms((((), value),)) if value else _from_terms(())


def sym(name: str) -> Dim:
    """The symbol of that name (a letter or underscore, then letters, digits, underscores)."""
    if not _NAME.match(name) or name in FUNCTIONS:
        raise XllmError("ir", f"{name!r} cannot name a dim", help="use letters, digits and underscores")
    return _atom("sym", name, ()).dim


def private_sym(name: str) -> Dim:
    """A symbol under a name that no text can spell; for the prover's own variables."""
    return _atom("sym", name + "'", ()).dim


def _split(a: Dim, b: int, reduce: Callable[[int], int]) -> tuple[dict[Mono, int], int]:
    rest = {mono: k for mono, k0 in a.terms if mono and (k := reduce(k0))}
    return rest, math.gcd(b, *rest.values())


def _floordiv(a: Dim, b: Dim) -> Dim:
    if b.is_const:
        if not b.terms:
            raise XllmError("ir", f"({a}) // 0 has no value")
        return _floor_const(a, b.value) if b.value > 0 else _floor_const(-a, -b.value)
    return _atom("floordiv", "", (a, b)).dim


def _floor_const(a: Dim, b: int) -> Dim:
    """floor(a / b) for b > 0."""
    if b == 1:
        return a
    whole = {mono: k // b for mono, k in a.terms if mono and k % b == 0}
    whole[()], c = divmod(a.constant, b)
    rest, g = _split(a, b, lambda k: k if k % b else 0)
    quotient = intern(whole)
    if not rest:
        return quotient
    rest, b, c = {m: k // g for m, k in rest.items()}, b // g, c // g
    x = intern(rest)
    flip = x.terms[0][1] < 0
    if flip:  # floor((c - y) / b) == -floor((y + b - 1 - c) / b)
        x, c = -x, b - 1 - c
    inner = x.atom
    if inner is not None and inner.kind in ("floordiv", "ceildiv") and inner.args[1].is_const:
        # floor((floor(y / d) + c) / b) == floor((y + c*d) / (b*d)) for b, d > 0
        y, d = inner.args[0], inner.args[1].value
        part = _floor_const(y + (c * d + (d - 1 if inner.kind == "ceildiv" else 0)), b * d)
    elif c == b - 1:
        part = _atom("ceildiv", "", (x, const(b))).dim
    else:
        part = _atom("floordiv", "", (x + c, const(b))).dim
    return quotient - part if flip else quotient + part


def _mod(a: Dim, b: Dim) -> Dim:
    if b.is_const:
        if not b.terms:
            raise XllmError("ir", f"({a}) % 0 has no value")
        return _mod_const(a, b.value) if b.value > 0 else -_mod_const(-a, -b.value)
    return _atom("mod", "", (a, b)).dim


def _mod_const(a: Dim, b: int) -> Dim:
    """a mod b in [0, b) for b > 0; coefficients are reduced to (-b/2, b/2] so that `(-N) % 16` stays readable."""

    def reduce(k: int) -> int:
        k %= b
        return k - b if 2 * k > b else k

    rest, g = _split(a, b, reduce)
    c = a.constant % b
    if not rest:
        return const(c)
    if g > 1:
        high, low = divmod(c, g)
        return g * _mod_const(intern({m: k // g for m, k in rest.items()}) + high, b // g) + low
    return _atom("mod", "", (intern(rest) + c, const(b))).dim


def ceildiv(a: DimLike, b: DimLike) -> Dim:
    """a / b rounded to plus infinity."""
    x, y = as_dim(a), as_dim(b)
    if y.is_const:
        return -_floordiv(-x, y)
    return _atom("ceildiv", "", (x, y)).dim


def _extreme(kind: Literal["min", "max"], args: tuple[DimLike, ...]) -> Dim:
    flat: list[Dim] = []
    for arg in args:
        d = as_dim(arg)
        flat.extend(d.atom.args if d.atom is not None and d.atom.kind == kind else (d,))
    if len(flat) > MAX_ARGUMENTS:
        raise XllmError("ir", f"{kind}() of {len(flat)} arguments; at most {MAX_ARGUMENTS} are compared")
    kept: list[Dim] = []
    for d in flat:
        for i, other in enumerate(kept):
            gap = d - other
            if gap.is_const:  # comparable without knowing any symbol: keep one of the two
                if (gap.value < 0) == (kind == "min"):
                    kept[i] = d
                break
        else:
            kept.append(d)
    if not kept:
        raise XllmError("ir", f"{kind}() of nothing")
    if len(kept) == 1:
        return kept[0]
    return _atom(kind, "", tuple(sorted(kept, key=lambda d: (d.is_const, str(d))))).dim


def dmin(*args: DimLike) -> Dim:
    """The least of the arguments."""
    return _extreme("min", args)


def dmax(*args: DimLike) -> Dim:
    """The greatest of the arguments."""
    return _extreme("max", args)


def rebuild(kind: str, args: list[Dim]) -> Dim:
    """The `call` of `Dim.fold` that makes Dims again."""
    match kind:
        case "add":
            return args[0] + args[1]
        case "mul":
            return args[0] * args[1]
        case "floordiv":
            return _floordiv(args[0], args[1])
        case "mod":
            return _mod(args[0], args[1])
        case "ceildiv":
            return ceildiv(args[0], args[1])
        case _:
            return (dmin if kind == "min" else dmax)(*args)


def _evaluate_atom(atom: Atom, env: Mapping[str, int]) -> int:
    if atom.kind == "sym":
        try:
            return env[atom.name]
        except KeyError:
            known = ", ".join(sorted(env)) or "none"
            raise XllmError("internal", f"dim {atom.name} has no value", help=f"given: {known}") from None
    values = [a.evaluate(env) for a in atom.args]
    if atom.kind == "min":
        return min(values)
    if atom.kind == "max":
        return max(values)
    a, b = values
    if b == 0:
        raise XllmError("ir", f"{atom.key[1]} divides by zero", where=str(dict(env)))
    if atom.kind == "floordiv":
        return a // b
    return a % b if atom.kind == "mod" else -(-a // b)


# ---------------------------------------------------------------------------------------------------------------- text


def _operand_text(d: Dim) -> str:
    atom = d.atom
    if (d.is_const and d.value >= 0) or (atom is not None and atom.kind not in ("floordiv", "mod")):
        return str(d)
    return f"({d})"


def _call_text(kind: str, args: tuple[Dim, ...]) -> str:
    if kind in ("floordiv", "mod"):
        return f"{_operand_text(args[0])} {'//' if kind == 'floordiv' else '%'} {_operand_text(args[1])}"
    return f"{kind}({', '.join(map(str, args))})"


def _text(d: Dim) -> str:
    """Positive terms first, each group in canonical order: `N - B`, `8 - N`, `4*N + 1`."""
    if not d.terms:
        return "0"
    out = ""
    for mono, k in sorted(d.terms, key=lambda t: t[1] < 0):  # stable
        factors = [a.key[1] for a in mono]
        bare = len(factors) == 1 and abs(k) == 1
        if not bare or (not out and k < 0):  # `//` and `%` bind like `*`, and a leading minus binds tighter still
            factors = [f"({f})" if a.kind in ("floordiv", "mod") else f for f, a in zip(factors, mono, strict=True)]
        if abs(k) != 1 or not factors:
            factors.insert(0, str(abs(k)))
        sign = (" - " if k < 0 else " + ") if out else ("-" if k < 0 else "")
        out += sign + "*".join(factors)
    return out
