"""What an op class declares: operand fields and typed attributes. Owns attribute coercion; must not know graphs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.types import Event, Future, State, Tensor, Type, check_dtype

Scalar = int | float | bool | str | Dim | Type
Attr = Scalar | tuple[Scalar, ...]
AttrKind = Literal["int", "float", "bool", "str", "dim", "dtype", "type", "group", "number", "enum"]
Arity = Literal["one", "opt", "many"]

MISSING: Final = object()


def dims_in(attrs: Iterable[Attr]) -> list[Dim]:
    """The Dims among attributes' values, types apart."""
    return [d for a in attrs for d in (a if isinstance(a, tuple) else (a,)) if isinstance(d, Dim)]


@dataclass(frozen=True, slots=True)
class OperandField:
    name: str
    arity: Arity


@dataclass(frozen=True, slots=True)
class AttrField:
    """`many`: a tuple of `kind`. `choices` only for kind "enum". `default` is MISSING when it is required. `least`: the
    smallest allowed value, for kind "int"."""

    name: str
    kind: AttrKind
    many: bool = False
    choices: tuple[str, ...] = ()
    default: object = MISSING
    least: int | None = None

    @property
    def required(self) -> bool:
        return self.default is MISSING

    def is_default(self, value: Attr) -> bool:
        """Whether `value` need not be printed. NaN never equals; 1 and 1.0 and true do not equal each other."""
        return not self.required and type(value) is type(self.default) and value == self.default

    def coerce(self, value: object) -> Attr:
        """`value` in the one form in which this attribute is stored; IrError when it is not of this kind."""
        if not self.many:
            return self._one(value)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self._bad(value)
        return tuple(self._one(v) for v in value)

    def _one(self, value: object) -> Scalar:
        kind = self.kind
        if kind == "bool":
            if isinstance(value, bool):
                return value
        elif kind == "int":
            if isinstance(value, Dim) and value.is_const:
                value = value.value
            if isinstance(value, int) and not isinstance(value, bool):
                if self.least is not None and value < self.least:
                    raise IrError(f"attribute {self.name}={value} is not allowed", help=f"at least {self.least}")
                return value
        elif kind == "float":
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        elif kind == "number":
            if isinstance(value, (bool, int, float)):
                return value
        elif kind == "dim":
            if isinstance(value, Dim) or (isinstance(value, int) and not isinstance(value, bool)):
                return as_dim(value)
        elif kind in ("str", "group"):
            if isinstance(value, str):
                return value
        elif kind == "dtype":
            if isinstance(value, str):
                return check_dtype(value)
        elif kind == "type":
            if isinstance(value, (Tensor, State, Future, Event)):
                return value
        elif kind == "enum":
            if isinstance(value, str) and value in self.choices:
                return value
            raise IrError(f"attribute {self.name}={value!r} is not allowed", help="one of " + ", ".join(self.choices))
        raise self._bad(value)

    def _bad(self, value: object) -> IrError:
        kind = f"tuple of {self.kind}" if self.many else self.kind
        return IrError(f"attribute {self.name} wants {kind}, got {value!r}")


# What every op may carry besides its own attributes; stored only where it says something.
# stream: the in-order queue the op runs on, 0 where absent (stages sched and buf).
STREAM_FIELD: Final = AttrField("stream", "int", default=0, least=0)
# at: byte offsets of its results from the arena's base, one Dim per result (stage buf).
AT_FIELD: Final = AttrField("at", "dim", many=True)
COMMON: Final[dict[str, AttrField]] = {"stream": STREAM_FIELD, "at": AT_FIELD}  # in the order of printing


@dataclass(frozen=True, slots=True)
class OpSpec:
    """Everything the generic machinery knows about an op class."""

    name: str
    operands: tuple[OperandField, ...]
    attrs: tuple[AttrField, ...]
    effects: frozenset[str]
    consumes: str  # name of the operand field whose value, a state, this op uses up, or ""
    linear: bool  # maps partial sums to partial sums: f(a + b) = f(a) + f(b)
    view: bool  # result 0 is the same bytes as operand 0 in a dense row-major layout
    commutative: bool  # operands may change places
    gathers: str  # name of the operand field of which only as much is read as the result holds, or ""
    places: dict[str, int] = field(init=False, compare=False, repr=False)  # of operand fields, by name

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {f.name: i for i, f in enumerate(self.operands)})

    @property
    def pure(self) -> bool:
        return not self.effects

    def attr(self, name: str) -> AttrField | None:
        for attr in self.attrs:
            if attr.name == name:
                return attr
        return COMMON.get(name)


def format_float(value: float) -> str:
    """Shortest text that reads back to the same float; always recognisable as one."""
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return repr(value)
