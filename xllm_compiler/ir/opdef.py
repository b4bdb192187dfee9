"""How an op class is declared. Owns the registry, `@op` and the field annotations; must not know any single op.

    @op("nn.rms_norm")
    class RmsNorm(Op):
        \"\"\"y = x / sqrt(mean(x^2) + eps) * (w + offset) over the last axis.\"\"\"

        rows = LastAxis()
        noise = Noise.ROUNDS
        work = Work.HEAVY
        x: Operand
        w: OptOperand
        eps: float
        offset: float = 0.0

        def infer(self) -> tuple[Type, ...]: ...
        def cost(self, ctx: CostContext) -> Cost: ...
        def interp(self, ctx: EvalContext, x: Array, w: Array | None) -> Array: ...

All of these are asked for (ir/facts.py says what they mean). A class that lacks one, and inherits it from no base, is
an error where it is declared.

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
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Rows, Work
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

_OWN: Final = frozenset(get_type_hints(Op))
_SCALARS: Final[dict[object, AttrKind]] = {int: "int", float: "float", bool: "bool", str: "str", Dim: "dim"}


def op(
    name: str,
    *,
    effects: Iterable[str] = (),
    consumes: str = "",
    linear: bool = False,
    view: bool = False,
    commutative: bool = False,
    gathers: str = "",
) -> Callable[[type[T]], type[T]]:
    """Declares an op class under its text name and registers it in OPS; IrError where something of it is missing.

    What most ops are not is said here. `effects`: anything that keeps a dead op alive and stops reordering; none means
    pure. `consumes`: the operand field whose state is used up. `linear`: partial sums may pass through. `view`:
    the result may share the bytes of operand 0. `commutative`: operands may change places. `gathers`: the operand field
    of which no more is read than the result holds.
    """

    def declare(cls: type[T]) -> type[T]:
        if name in OPS and (OPS[name].__module__, OPS[name].__qualname__) != (cls.__module__, cls.__qualname__):
            raise _refused(name, cls, f"is already declared by {OPS[name].__qualname__}", "give it another name")
        operands: list[OperandField] = []
        attrs: list[AttrField] = []
        for field, hint in get_type_hints(cls, include_extras=True).items():
            if get_origin(hint) is ClassVar:
                if field not in _OWN and not hasattr(cls, field):
                    raise _refused(name, cls, f"says no {field}", "its family asks every op for it")
                continue
            if field in _OWN or hasattr(Op, field):
                raise _refused(name, cls, f"declares {field}, which every op has", f"{field}_ is {field} in text")
            default = cls.__dict__.get(field, MISSING)
            arity = _arity(hint)
            key = field.removesuffix("_")
            if key in COMMON:
                raise _refused(name, cls, f"declares {key}, which every op may carry", "name this field otherwise")
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
                raise _refused(name, cls, f"has operand {f.name} after optional or variadic ones", "put it before them")
            if f.arity == "many" and i > 0:
                raise _refused(name, cls, f"has operands before {f.name}", "a variadic operand stands alone")
        for flag, field in (("consumes", consumes), ("gathers", gathers)):
            if field and all(f.name != field for f in operands):
                raise _refused(name, cls, f"{flag} {field}, which is none of its operands", f"{flag}: an operand field")
        _check_facts(name, cls, view)
        cls.SPEC = OpSpec(
            name, tuple(operands), tuple(attrs), frozenset(effects), consumes, linear, view, commutative, gathers
        )
        OPS[name] = cls
        return cls

    return declare


_VALUES: Final[dict[str, tuple[type, str]]] = {
    "rows": (Rows, "rows = one of xllm_compiler.ir.rows: what it does to the rows of its operands"),
    "noise": (Noise, "noise = Noise.ROUNDS, MOVES or EXACT: whether its results are rounded"),
    "work": (Work, "work = Work.NONE, COPY, LIGHT, HEAVY or DOT: what one element of its results takes"),
}
_METHODS: Final[dict[str, str]] = {
    "infer": "def infer(self) -> tuple[Type, ...]: result types from operands and attributes",
    "interp": "def interp(self, ctx, ...) -> Array: the reference meaning in numpy",
    "cost": "def cost(self, ctx) -> Cost: bytes and operations as formulas",
}


def _check_facts(name: str, cls: type[Op], view: bool) -> None:
    """IrError at the first fact that the class neither states nor inherits."""
    if cls.__doc__ is None or not inspect.getdoc(cls):
        raise _refused(name, cls, "says no equation", "its docstring is the equation")
    for fact, (kind, help) in _VALUES.items():
        if not isinstance(getattr(cls, fact, None), kind):
            raise _refused(name, cls, f"says no {fact}", help)
    if view and cls.work is not Work.NONE:
        raise _refused(name, cls, f"is a view with work {cls.work.word}", "nothing runs for a view: work = Work.NONE")
    for fact, help in _METHODS.items():
        if fact == "cost" and cls.work is Work.NONE:
            continue
        if getattr(cls, fact) is getattr(Op, fact):
            raise _refused(name, cls, f"says no {fact}", help)


def _refused(name: str, cls: type[Op], what: str, help: str) -> IrError:
    return IrError(f"op {name} {what}", where=f"{cls.__module__}.{cls.__qualname__}", help=help)


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
            raise IrError(f"attribute {name}: {hint!r} is not a kind of attribute", help="tuple[kind, ...]")
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
    raise IrError(
        f"attribute {name}: {hint!r} is not a kind of attribute", help="the docstring of ir/opdef.py lists them"
    )


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
