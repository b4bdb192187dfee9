"""How an op class is declared. Owns the registry, `@op` and the field annotations; must not know any single op.

    @op("nn.rms_norm")
    class RmsNorm(Op):
        x: Operand
        w: OptOperand
        eps: float
        offset: float = 0.0

Annotations say what a field is: `Operand` (exactly one), `OptOperand` (none or one; keyword in text), `Operands`
(variadic; must be the only operand field, or be followed by optional ones only), and every other annotation is an
attribute: int, float, bool, str, Dim, Type, DType, Group, Number, a Literal of strings, or a tuple of one of those. An
attribute whose name Op needs for itself gets a trailing underscore in Python only (`name_` is `name=` in text).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Op, ReturnOp, Value
from xllm_compiler.ir.spec import COMMON, MISSING, Arity, Attr, AttrField, AttrKind, OperandField, OpSpec
from xllm_compiler.ir.types import Type

Operand = Annotated[Value, "one"]
OptOperand = Annotated[Value | None, "opt"]
Operands = Annotated[tuple[Value, ...], "many"]
DType = Annotated[str, "dtype"]
Group = Annotated[str, "group"]
Number = Annotated[int | float | bool, "number"]

OPS: Final[dict[str, type[Op]]] = {}

T = TypeVar("T", bound=Op)

_OWN: Final = frozenset(get_type_hints(Op, include_extras=True))
_SCALARS: Final[dict[object, AttrKind]] = {int: "int", float: "float", bool: "bool", str: "str", Dim: "dim"}


def op(
    name: str,
    *,
    effects: Iterable[str] = (),
    consumes: str = "",
    linear: bool = False,
    view: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Declares an op class under its text name and registers it in OPS.

    `effects`: anything that keeps a dead op alive and stops reordering; none means pure. `consumes`: the operand field
    whose linear value is used up. `linear`: partial sums may pass through. `view`: the result may share the bytes of
    operand 0.
    """

    def declare(cls: type[T]) -> type[T]:
        if name in OPS and (OPS[name].__module__, OPS[name].__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"op {name} is already declared by {OPS[name].__qualname__}")
        if not inspect.getdoc(cls) or cls.__doc__ is None:
            raise ValueError(f"op {name} needs a docstring: its equation")
        operands: list[OperandField] = []
        attrs: list[AttrField] = []
        for field, hint in get_type_hints(cls, include_extras=True).items():
            if field in _OWN or get_origin(hint) is ClassVar:
                continue
            default = cls.__dict__.get(field, MISSING)
            arity = _arity(hint)
            key = field.removesuffix("_")
            if key in COMMON:
                raise ValueError(f"op {name}: every op may carry {key}; name this field otherwise")
            if arity is not None:
                operands.append(OperandField(field, arity))
                setattr(cls, field, _operand_property(field, arity))
            else:
                raw = _attr_field(key, hint, MISSING)
                attr = raw if default is MISSING else _attr_field(key, hint, raw.coerce(default))
                attrs.append(attr)
                setattr(cls, field, _attr_property(key))
        for i, f in enumerate(operands):
            if f.arity != "opt" and i > 0 and operands[i - 1].arity != "one":
                raise ValueError(f"op {name}: operand {f.name} must come before optional and variadic ones")
            if f.arity == "many" and i > 0:
                raise ValueError(f"op {name}: a variadic operand must be the only positional one")
        cls.SPEC = OpSpec(name, tuple(operands), tuple(attrs), frozenset(effects), consumes, linear, view)
        OPS[name] = cls
        return cls

    return declare


def _arity(hint: Any) -> Arity | None:
    for mark in getattr(hint, "__metadata__", ()):
        if mark in ("one", "opt", "many"):
            arity: Arity = mark
            return arity
    return None


def _attr_field(name: str, hint: Any, default: object) -> AttrField:
    many = False
    if get_origin(hint) is tuple:
        args = get_args(hint)
        if len(args) != 2 or args[1] is not Ellipsis:
            raise ValueError(f"attribute {name}: a tuple attribute is tuple[kind, ...]")
        hint, many = args[0], True
    for mark in getattr(hint, "__metadata__", ()):
        if mark in ("dtype", "group", "number"):
            kind: AttrKind = mark
            return AttrField(name, kind, many, (), default)
    if get_origin(hint) is Literal:
        return AttrField(name, "enum", many, get_args(hint), default)
    if isinstance(hint, UnionType) and hint == Type:
        return AttrField(name, "type", many, (), default)
    if hint in _SCALARS:
        return AttrField(name, _SCALARS[hint], many, (), default)
    raise ValueError(f"attribute {name}: {hint!r} is not a kind of attribute")


def _operand_property(name: str, arity: Arity) -> property:
    def many(self: Op) -> tuple[Value, ...]:
        return self.field(name)

    def one(self: Op) -> Value | None:
        values = self.field(name)
        return values[0] if values else None

    return property(many if arity == "many" else one)


def _attr_property(name: str) -> property:
    def read(self: Op) -> Attr:
        return self.attrs[name]

    def write(self: Op, value: object) -> None:
        self.set_attr(name, value)

    return property(read, write)


def op_class(name: str) -> type[Op] | None:
    """The class of a text name; "return" is not among them, since it never stands in an op list."""
    return OPS.get(name)


__all__ = [
    "OPS",
    "DType",
    "Group",
    "Number",
    "Op",
    "Operand",
    "Operands",
    "OptOperand",
    "ReturnOp",
    "op",
    "op_class",
]
