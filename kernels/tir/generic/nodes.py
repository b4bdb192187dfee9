"""What a generic kernel computes, as plain data: a straight-line list of nodes over tensors, and the loop around it.

It knows neither TVM nor the IR: the lowering translates ops to nodes, and eval.py translates nodes to code.
Descriptions are hashable: equal ones are one kernel, compiled once and called many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xllm_compiler.dims import Dim

Attr = int | float | bool | str | Dim | tuple[int, ...]

BINARY: Final = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "pow",
        "max",
        "min",
        "floordiv",
        "mod",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "and",
        "or",
    ]
)
COMPARE: Final = frozenset(["eq", "ne", "lt", "le", "gt", "ge"])
UNARY: Final = frozenset(
    [
        "neg",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "silu",
        "relu",
        "erf",
        "abs",
        "floor",
        "not",
    ]
)
POINTWISE: Final = BINARY | UNARY | {"where", "clamp", "cast", "gelu", "softplus"}
MOVES: Final = frozenset(["transpose", "expand", "slice", "take"])


@dataclass(frozen=True, slots=True)
class Node:
    """One value. `args` are indices of earlier nodes; `shape` is its own shape, and operands of pointwise nodes
    broadcast to it like numpy.

    op        attr
    arg       (slot,)           a dense row-major input buffer; `slot` is its place in the kernel's signature
    const     (value,)          rank 0
    iota      ()                0 .. shape[0]-1
    pointwise clamp (lo, hi); gelu (tanh,); others none
    transpose (perm,)
    expand    ()
    slice     (axis, start, step)
    take      (axis,)           args (x, idx); x must be an `arg` node
    """

    op: str
    dtype: str
    shape: tuple[Dim, ...]
    args: tuple[int, ...] = ()
    attr: tuple[Attr, ...] = ()


Body = tuple[Node, ...]
"""Nodes in order of definition; the last one is the value of the body."""


@dataclass(frozen=True, slots=True)
class Pointwise:
    """out[...] = body for every element. Several segments write one output, each into its window along `axis`
    starting at `starts[i]`: that is concat. One segment with start 0 otherwise."""

    segments: tuple[Body, ...]
    starts: tuple[Dim, ...]
    axis: int
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Reduce:
    """out = the reduction of body over `axes` (ascending); f32 accumulation for floats narrower than f64."""

    kind: str  # sum, mean, max, min
    body: Body
    axes: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Scan:
    """out = softmax or running sum of one input buffer along `axis`."""

    kind: str  # softmax, cumsum
    shape: tuple[Dim, ...]
    axis: int
    dtype_in: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Matmul:
    """out = a @ b with numpy's rules for vectors, matrices and broadcast batches; sequential f32 sums over K."""

    a: tuple[Dim, ...]
    b: tuple[Dim, ...]
    out: tuple[Dim, ...]
    dtype: str


GenericSpec = Pointwise | Reduce | Scan | Matmul


def symbols_of(spec: GenericSpec) -> tuple[str, ...]:
    """Names of the symbolic dims that the kernel needs as arguments, sorted."""
    dims: list[Dim] = []
    bodies: list[Body] = []
    match spec:
        case Pointwise():
            dims += [*spec.starts, *spec.shape]
            bodies += spec.segments
        case Reduce():
            bodies.append(spec.body)
        case Scan():
            dims += spec.shape
        case Matmul():
            dims += [*spec.a, *spec.b, *spec.out]
    for body in bodies:
        for node in body:
            dims += node.shape
            dims += [a for a in node.attr if isinstance(a, Dim)]
    return tuple(sorted({s for d in dims for s in d.symbols}))
