"""A random function under construction: what there is to build on, and how ops are added. Owns the pools of values.

Choices come from `choose(n)`, an integer in 0..n-1. Operands are drawn as distances back from the newest value:
shrinking then keeps what is alive. Arguments, symbols and groups are declared when something first needs them, for the
same reason. What is added is idioms.py's; must not know any idiom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.types import Cell, Kv, Tensor
from xllm_compiler.step.interface import ValueRange

Choose = Callable[[int], int]
T = TypeVar("T")

PAGE: Final = 4
TABLE: Final = 4  # pages that one request may have
POSITIONS: Final = 64  # rows of tables that are read by position; positions are below PAGE * TABLE


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention of a function: query heads, cache heads, sizes of a key and of a value; all may be odd."""

    q: int
    kv: int
    k: int
    v: int

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.q * self.v


HEADS: Final = (
    Heads(2, 2, 4, 4),
    Heads(2, 1, 4, 4),
    Heads(4, 2, 4, 4),
    Heads(3, 1, 5, 5),
    Heads(2, 2, 6, 4),
    Heads(1, 1, 7, 7),
)
DTYPES: Final = ("f32", "bf16", "f16")


class Sketch:
    """A function under construction: what there is to build on, and the few ways of adding to it.

    `stream`: values [N, width] of `dtype`. `ints`: exact i32[N], below POSITIONS. `flags`: bool[N], made from these, so
    that no rounding decides them.
    """

    def __init__(self, choose: Choose, func: Func, dtype: str, heads: Heads, ranks: int) -> None:
        self.choose, self.func, self.dtype, self.heads, self.ranks = choose, func, dtype, heads, ranks
        self.module = func.module
        self.b = Builder.at_end(func)
        self.n = self.module.scope.declare("N", 1, 64, why="tokens")
        self.width = heads.width
        self.x = func.add_arg("x", Tensor(dtype, [self.n, self.width]))
        self.stream: list[Value] = [self.x]
        self.ints: list[Value] = []
        self.flags: list[Value] = []
        self.states: dict[str, Value] = {}  # name of the argument -> latest version
        self.extra: list[Value] = []  # further values to return
        self.params = 0

    # What there is.

    def pick(self, of: Sequence[T]) -> T:
        return of[self.choose(len(of))] if len(of) > 1 else of[0]

    def back(self) -> Value:
        """A value [N, width], the newest most likely."""
        return self.pick(self.stream[:-5:-1])

    def arg(self, name: str) -> Value:
        """One of the arguments that every step function has, declared when it is first asked for."""
        for a in self.func.args:
            if a.name == name:
                return a
        match name:
            case "pos" | "seq" | "slot":
                if name == "seq":
                    self.requests()
                shape: list[Dim | int] = [self.n]
            case "start":
                shape = [self.requests() + 1]
            case "table":
                shape = [self.requests(), TABLE]
            case _:
                shape = [self.module.scope.declare("S", 0, 64, why="rows whose logits are wanted")]
        return self.func.add_arg(name, Tensor("i32", shape), ValueRange(0, POSITIONS - 1) if name == "pos" else None)

    def requests(self) -> Dim:
        b = self.module.scope.declare("B", 1, 8, why="requests")
        self.module.scope.assume(self.n - b, why="every request has a token")
        return b

    def context(self) -> Value:
        """A float argument [C, width] with a size of its own, an even one."""
        for a in self.func.args:
            if a.name == "context":
                return a
        c = self.module.scope.declare("C", 2, 32, multiple=2, why="rows of another sequence")
        return self.func.add_arg("context", Tensor(self.dtype, [c, self.width]))

    def cache(self) -> str:
        """The name of a cache; its latest version is `states[name]`."""
        name = self.pick(("kv0", "kv1"))
        if name not in self.states:
            h = self.heads
            p = self.module.scope.declare("P", 1, 64, why="KV pages")
            self.module.scope.assume(p - TABLE * self.requests(), why="a full table for every request")
            self.states[name] = self.func.add_arg(name, Kv(self.dtype, h.kv, h.k, h.v, PAGE, p))
        return name

    def cell(self, name: str, dtype: str, shape: Sequence[int]) -> str:
        """The name of a cell with a slot for every token; its latest version is `states[name]`."""
        if name not in self.states:
            q = self.module.scope.declare("Q", 1, 64, why="slots")
            self.module.scope.assume(q - self.n, why="a slot for every token")
            self.states[name] = self.func.add_arg(name, Cell(dtype, shape, q))
        return name

    def group(self) -> str:
        """@tp, or @ep: of two ranks they are the axes of a mesh, otherwise the same ranks."""
        name = self.pick(("tp", "ep"))
        stride = 2 if (name, self.ranks) == ("ep", 2) else 1
        self.module.groups.setdefault(name, RankGroup(self.ranks, stride))
        return name

    # Adding to it.

    def op(self, cls: type[Op], *operands: Value | None, **fields: object) -> Value:
        """The result of a new op with one result."""
        return self.b.create(cls, *operands, **fields).result  # type: ignore[arg-type]

    def param(self, *shape: int, dtype: str = "") -> Value:
        self.params += 1
        name = f"{self.func.name}.w{self.params}"
        return self.op(ops.Param, name=name, type=Tensor(dtype or self.dtype, shape))

    def const(self, value: float, dtype: str = "f32") -> Value:
        return self.op(ops.Const, value=value, dtype=dtype)

    def push(self, value: Value) -> None:
        """Puts a value into the stream; what has one number per token or column is added to what is there."""
        if value.dtype != self.dtype:
            value = self.op(ops.Cast, value, dtype=self.dtype)
        if value.tensor.rank == 1 and value.shape[0] is self.n:
            value = self.op(ops.Reshape, value, shape=(self.n, 1))
        if value.shape != (self.n, as_dim(self.width)):
            value = self.op(ops.Add, self.back(), value)
        self.stream.append(value)

    def settle(self, value: Value) -> Value:
        """Keeps what may grow or cancel near 1, so that rounding stays rounding."""
        match self.choose(3):
            case 0:
                return self.op(ops.Tanh, value)
            case 1:
                return self.op(ops.Clamp, value, lo=-2.0, hi=2.0)
            case _:
                return self.op(ops.RmsNorm, value, eps=0.5)

    def heads_of(self, x: Value, heads: int, size: int, hint: str = "") -> Value:
        """[N, heads, size] from the stream, by a projection where the widths differ."""
        if heads * size != self.width:
            x = self.op(ops.Linear, x, self.param(heads * size, self.width))
        return self.op(ops.Reshape, x, shape=(self.n, heads, size), hint=hint)

    def finish(self) -> None:
        """Returns the newest value, what idioms wanted returned, most values that nothing reads, and the states."""
        unread = [v for v in self.stream[:-1] if not v.has_uses and self.choose(4) != 1]  # the others are dead
        values = [self.stream[-1], *self.extra, *unread]
        made = [v for v in dict.fromkeys(values) if v.op is not None]  # an argument is not returned as it is
        aliases = {len(made) + i: self.func.arg(name) for i, name in enumerate(self.states)}
        self.func.set_returns([*made, *self.states.values()], aliases)
