"""Modules, functions, ops and values: the places of the IR. Owns use-lists; must not know any op.

Values (Dim, Type, attributes, Loc) are frozen and compare by content. Places compare by identity and may be mutated,
always through the methods here, which keep use-lists right. A function is one straight-line block: list order is
dominance order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from xllm_compiler.dims import Dim, DimScope
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Rows, Work
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.loc import UNKNOWN, Loc
from xllm_compiler.ir.oplist import OpList
from xllm_compiler.ir.spec import COMMON, Attr, OperandField, OpSpec
from xllm_compiler.ir.types import Cell, Future, Kv, Tensor, Type
from xllm_compiler.step.interface import STEP, ValueRange

if TYPE_CHECKING:
    from xllm_compiler.ir.cost import Cost, CostContext
    from xllm_compiler.ir.semantics import Array, EvalContext

Stage = Literal["graph", "sched", "buf"]
T = TypeVar("T", bound="Op")


class Value:
    """An SSA value: a result of an op or an argument of a function. `name` is a hint; the printer makes it unique."""

    __slots__ = ("_uses", "index", "name", "owner", "type")

    def __init__(self, type: Type, owner: Op | Func, index: int, name: str) -> None:
        self.type = type
        self.owner = owner
        self.index = index
        self.name = name
        self._uses: dict[tuple[Op, int], None] = {}

    @property
    def op(self) -> Op | None:
        """The defining op, or None for a function argument."""
        return self.owner if isinstance(self.owner, Op) else None

    @property
    def uses(self) -> list[tuple[Op, int]]:
        """(op, operand index) pairs, oldest first. The function's `ret` op counts: returning is a use."""
        return list(self._uses)

    @property
    def has_uses(self) -> bool:
        return bool(self._uses)

    @property
    def has_one_use(self) -> bool:
        return len(self._uses) == 1

    @property
    def users(self) -> list[Op]:
        """The distinct ops that use this value, oldest use first."""
        return list(dict.fromkeys(op for op, _ in self._uses))

    @property
    def tensor(self) -> Tensor:
        """The type, which must be a tensor."""
        if not isinstance(self.type, Tensor):
            raise IrError(f"%{self.name} is {self.type}, a tensor is needed here")
        return self.type

    @property
    def kv(self) -> Kv:
        """The type, which must be a KV cache."""
        if not isinstance(self.type, Kv):
            raise IrError(f"%{self.name} is {self.type}, a kv value is needed here")
        return self.type

    @property
    def cell(self) -> Cell:
        """The type, which must be a cell."""
        if not isinstance(self.type, Cell):
            raise IrError(f"%{self.name} is {self.type}, a cell is needed here")
        return self.type

    @property
    def future(self) -> Future:
        """The type, which must be a future."""
        if not isinstance(self.type, Future):
            raise IrError(f"%{self.name} is {self.type}, a future is needed here")
        return self.type

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def replace_all_uses_with(self, new: Value) -> None:
        """Every use of this value, returns included, becomes a use of `new`, which must have the same type."""
        if new is self:
            return
        for op, index in list(self._uses):
            op.set_operand(index, new)
        if not new.name:
            new.name = self.name

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


class Op:
    """One operation. Subclasses are declared with `@op` in opdef; storage is the same for all of them."""

    SPEC: ClassVar[OpSpec]
    rows: ClassVar[Rows]
    noise: ClassVar[Noise]
    work: ClassVar[Work]

    def __init__(
        self,
        func: Func,
        operands: Sequence[Value],
        segments: Sequence[int],
        attrs: dict[str, Attr],
        loc: Loc = UNKNOWN,
        hints: Sequence[str] = (),
        types: Sequence[Type] | None = None,
    ) -> None:
        """`segments[i]` operands belong to the i-th declared operand field. `types`: of the results, by whoever knows
        them already; inferred where None. Not yet in `func`."""
        self.func = func
        self.attrs = attrs
        self.loc = loc
        self.segments = tuple(segments)
        self._operands = list(operands)
        self._prev: Op | None = None
        self._next: Op | None = None
        self._attached = False
        self._order = 0
        self.results: list[Value] = []
        for i, ty in enumerate(self.infer() if types is None else types):
            hint = hints[i] if i < len(hints) and hints[i] else self.default_hint(i)
            self.results.append(Value(ty, self, i, hint))
        for i, v in enumerate(self._operands):
            v._uses[(self, i)] = None

    # What subclasses define.

    def infer(self) -> tuple[Type, ...]:
        """Result types from operands and attributes. May put attributes into canonical form; raises IrError."""
        raise IrError(f"{self.name} has no type rule")

    def interp(self, ctx: EvalContext, *operands: Any, **none: Any) -> Array | tuple[Array, ...]:
        """The reference meaning. One argument per declared operand field (None: absent; a tuple: variadic); the caller
        rounds to the result types. `Any` because every op has its own operands: overrides spell them out."""
        raise IrError(f"{self.name} has no reference meaning")

    def cost(self, ctx: CostContext) -> Cost:
        """Bytes and operations, as formulas. Asked only of ops that run something (`work`), on values of a step."""
        raise IrError(f"{self.name} has no cost")

    def default_hint(self, index: int) -> str:
        """SSA name of a result that nobody named."""
        return self.name.rpartition(".")[2]

    # Reading.

    @property
    def name(self) -> str:
        """The op's name in text, such as "nn.linear"."""
        return self.SPEC.name

    @property
    def operands(self) -> tuple[Value, ...]:
        return tuple(self._operands)

    @property
    def result(self) -> Value:
        """The only result."""
        if len(self.results) != 1:
            raise IrError(f"{self.name} has {len(self.results)} results, not one", op=self)
        return self.results[0]

    @property
    def scope(self) -> DimScope:
        return self.func.module.scope

    @property
    def stream(self) -> int:
        """The in-order queue that runs the op, in stages sched and buf; list order is execution order within one."""
        stream = self.attrs.get("stream", 0)
        assert isinstance(stream, int)
        return stream

    @property
    def attached(self) -> bool:
        """Whether the op stands in its function."""
        return self._attached

    @property
    def next(self) -> Op | None:
        return self._next if self._attached else None

    @property
    def prev(self) -> Op | None:
        return self._prev if self._attached else None

    def field(self, name: str) -> tuple[Value, ...]:
        """The operands of one declared field: one, none or one, or any number of values."""
        place = self.SPEC.places[name]
        start = sum(self.segments[:place])
        return tuple(self._operands[start : start + self.segments[place]])

    def field_index(self, name: str) -> int:
        """Flat operand index at which a declared field starts."""
        return sum(self.segments[: self.SPEC.places[name]])

    def is_before(self, other: Op) -> bool:
        """Whether this op comes earlier in the list than `other`; both must be in the same function."""
        return self.func.ops.order(self) < self.func.ops.order(other)

    # Changing.

    def set_operand(self, index: int, value: Value) -> None:
        """Replaces one operand by a value of the same type, so that result types stay right."""
        old = self._operands[index]
        if old is value:
            return
        if old.type != value.type:
            raise IrError(
                f"operand {index} of {self.name} is {old.type}; %{value.name} is {value.type}",
                help="create a new op when types change, so that result types are inferred again",
                op=self,
            )
        del old._uses[(self, index)]
        self._operands[index] = value
        value._uses[(self, index)] = None

    def set_attr(self, name: str, value: object) -> None:
        """Sets a declared or common attribute (`stream`, `at`); the result types must stay what they are."""
        spec = self.SPEC.attr(name)
        if spec is None:
            raise IrError(f"{self.name} has no attribute {name!r}", op=self)
        if name in COMMON:
            set_common(self.attrs, name, value)
            return
        before = self.attrs.get(name)
        self.attrs[name] = spec.coerce(value)
        if self.infer() != tuple(r.type for r in self.results):
            if before is not None:
                self.attrs[name] = before
            raise IrError(f"{self.name}: {name}={value!r} would change the result type", op=self)

    def move_before(self, other: Op) -> None:
        """Takes the op out of its place and puts it before `other` of the same function."""
        self.func.ops.unlink(self)
        self.func.ops.insert_before(self, other)

    def erase(self) -> None:
        """Removes the op for good. None of its results may have a use."""
        for r in self.results:
            if r.has_uses:
                user = r.users[0]
                raise IrError(f"cannot erase {self.name}: %{r.name} is used by {user.name}", op=self)
        self.drop_operands()
        if self._attached:
            self.func.ops.unlink(self)

    def drop_operands(self) -> None:
        """Takes the op out of its operands' use-lists. For erasing; the op is unusable afterwards."""
        for i, v in enumerate(self._operands):
            v._uses.pop((self, i), None)
        self._operands.clear()
        self.segments = tuple(0 for _ in self.segments)

    def __repr__(self) -> str:
        results = ", ".join(f"%{r.name}" for r in self.results)
        operands = ", ".join(f"%{v.name}" for v in self._operands)
        return f"<{results} = {self.name}({operands})>"


class Func:
    """A function: arguments, ops, returned values. `aliases[i]` is the argument whose storage return i shares,
    `outputs[i]` the name under which callers know return i; a return may have neither. `ranges`: of integer arguments
    whose callers keep all values in them."""

    def __init__(self, module: Module, name: str) -> None:
        self.module = module
        self.name = name
        self.args: list[Value] = []
        self.ops = OpList()
        self.aliases: dict[int, Value] = {}
        self.outputs: dict[int, str] = {}
        self.ranges: dict[Value, ValueRange] = {}
        self.arena: Dim | None = None
        self.ret: Op = ReturnOp(self, (), (0,), {})

    @property
    def returns(self) -> tuple[Value, ...]:
        return self.ret.operands

    def add_arg(self, name: str, type: Type, range: ValueRange | None = None) -> Value:
        """A further argument. Raises IrError for a range of what is no integer tensor, or an empty one."""
        value = Value(type, self, len(self.args), name)
        if range is not None:
            if not isinstance(type, Tensor) or not type.is_int:
                raise IrError(f"%{name}: {type} has no range", help="integer tensors have")
            if range.lo > range.hi:
                raise IrError(f"%{name}: the range {range} is empty")
            self.ranges[value] = range
        self.args.append(value)
        return value

    def arg(self, name: str) -> Value:
        """The argument called `name`."""
        for v in self.args:
            if v.name == name:
                return v
        raise IrError(f"@{self.name} has no argument %{name}", help="it has " + ", ".join(v.name for v in self.args))

    def set_returns(
        self,
        values: Sequence[Value],
        aliases: Mapping[int, Value] | None = None,
        outputs: Mapping[int, str] | None = None,
    ) -> None:
        """Replaces what the function returns. `aliases`: return index to the argument whose storage it shares.
        `outputs`: return index to its name."""
        self.ret.drop_operands()
        self.ret = ReturnOp(self, values, (len(values),), {})
        self.aliases = dict(sorted((aliases or {}).items()))
        self.outputs = dict(sorted((outputs or {}).items()))

    def __repr__(self) -> str:
        return f"<func @{self.name}, {len(self.ops)} ops>"


class ReturnOp(Op):
    """What a function returns, so that returning counts as a use. Stands in `Func.ret`, never in `Func.ops`."""

    SPEC: ClassVar[OpSpec]

    def infer(self) -> tuple[Type, ...]:
        return ()


class Module:
    """A compilation unit: symbols and their constraints, rank groups, functions, and the stage they are in."""

    def __init__(self, stage: Stage = "graph", scope: DimScope | None = None) -> None:
        self.scope = DimScope() if scope is None else scope
        self.stage: Stage = stage
        self.groups: dict[str, RankGroup] = {}
        self.funcs: dict[str, Func] = {}

    def add_func(self, name: str) -> Func:
        if name in self.funcs:
            raise IrError(f"the module already has a function @{name}")
        func = Func(self, name)
        self.funcs[name] = func
        return func

    def func(self, name: str = STEP) -> Func:
        """The function called `name`."""
        if name not in self.funcs:
            raise IrError(f"no function @{name}", help="functions: " + ", ".join(self.funcs))
        return self.funcs[name]


class Builder:
    """Creates ops at one place of a function. `loc` is used for ops that are created without their own."""

    def __init__(self, func: Func, before: Op | None, loc: Loc = UNKNOWN) -> None:
        self.func = func
        self.anchor = before
        self.loc = loc

    @staticmethod
    def at_end(func: Func, loc: Loc = UNKNOWN) -> Builder:
        return Builder(func, None, loc)

    @staticmethod
    def at_start(func: Func, loc: Loc = UNKNOWN) -> Builder:
        return Builder(func, func.ops.first, loc)

    @staticmethod
    def before(op: Op, loc: Loc | None = None) -> Builder:
        """New ops go before `op` and, unless told otherwise, come from where `op` came from."""
        anchor = None if isinstance(op, ReturnOp) else op
        return Builder(op.func, anchor, op.loc if loc is None else loc)

    @staticmethod
    def after(op: Op, loc: Loc | None = None) -> Builder:
        """New ops go, in creation order, between `op` and what now follows it."""
        return Builder(op.func, op.next, op.loc if loc is None else loc)

    def create(
        self,
        cls: type[T],
        *operands: Value | None,
        loc: Loc | None = None,
        hint: str | Sequence[str] = "",
        **fields: object,
    ) -> T:
        """A new op of class `cls`, inserted here.

        `operands` fill the declared operand fields in order (None: an absent optional); a variadic field takes all of
        them. Operand fields may also be given by keyword, attributes only so. `hint` names the results.
        """
        flat, segments, attrs = bind(cls, operands, fields)
        hints = (hint,) if isinstance(hint, str) else tuple(hint)
        place = self.loc if loc is None else loc
        try:
            made = cls(self.func, flat, segments, attrs, place, hints)
        except IrError as e:
            raise _in_context(e, cls, flat, place) from None
        self.insert(made)
        return made

    def insert(self, op: Op) -> None:
        """Puts a detached op of this function here."""
        if self.anchor is None:
            self.func.ops.append(op)
        else:
            self.func.ops.insert_before(op, self.anchor)


def bind(
    cls: type[Op], positional: Sequence[Value | None], fields: Mapping[str, object]
) -> tuple[list[Value], list[int], dict[str, Attr]]:
    """Sorts what was given to `create` into flat operands, operands per declared field, and coerced attributes."""
    spec = cls.SPEC
    left = dict(fields)
    given = list(positional)
    flat: list[Value] = []
    segments: list[int] = []
    for field in spec.operands:
        if field.arity == "many":
            named = left.pop(field.name, None)
            values: list[object] = list(given) if named is None else list(_sequence(named))
            if named is None:
                given.clear()
        else:
            if given and field.name in left:
                raise IrError(f"{spec.name}: operand {field.name} given twice")
            one = given.pop(0) if given else left.pop(field.name, None)
            if one is None and field.arity == "one":
                raise IrError(f"{spec.name}: operand {field.name} is missing")
            values = [] if one is None else [one]
        for v in values:
            if not isinstance(v, Value):
                raise IrError(f"{spec.name}: operand {field.name} is not a Value but {v!r}")
            flat.append(v)
        segments.append(len(values))
    if given:
        raise IrError(f"{spec.name}: {len(given)} operands too many")
    attrs: dict[str, Attr] = {}
    for attr in spec.attrs:
        if attr.name in left:
            attrs[attr.name] = attr.coerce(left.pop(attr.name))
        elif attr.required:
            raise IrError(f"{spec.name}: attribute {attr.name} is missing")
        else:
            attrs[attr.name] = attr.coerce(attr.default)
    for name in COMMON:
        if left and left.get(name) is not None:
            set_common(attrs, name, left.pop(name))
    if left:
        known = [f.name for f in spec.operands] + [a.name for a in spec.attrs]
        raise IrError(f"{spec.name} has no {', '.join(sorted(left))}", help="it has " + ", ".join(known))
    return flat, segments, attrs


def set_common(attrs: dict[str, Attr], name: str, value: object) -> None:
    """Stores a common attribute in its one form: absent where it has its default."""
    field = COMMON[name]
    stored = field.coerce(value)
    if field.is_default(stored):
        attrs.pop(name, None)
    else:
        attrs[name] = stored


def _sequence(value: object) -> Sequence[object]:
    if not isinstance(value, Sequence):
        raise IrError(f"a sequence of values is needed, got {value!r}")
    return value


def _in_context(e: IrError, cls: type[Op], operands: Sequence[Value], loc: Loc) -> IrError:
    """The same error, saying which op with which operands it was about, and where that came from."""
    args = ", ".join(f"%{v.name}: {v.type}" for v in operands)
    where = f"{cls.SPEC.name}({args})"
    traced = loc.describe()
    if traced:
        where += f", traced from {traced}"
    if loc.lineage:
        where += f", last touched by {loc.lineage[-1]}"
    return IrError(e.message, where=e.where or where, help=e.help)


ReturnOp.SPEC = OpSpec(
    name="return",
    operands=(OperandField("values", "many"),),
    attrs=(),
    effects=frozenset({"return"}),
    consumes="",
    linear=False,
    view=False,
    commutative=False,
    gathers="",
)
