"""Shape rules shared by type inference. Owns comparing and broadcasting Dims under a scope; must not know any op."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_compiler.dims import Dim, DimScope, as_dim
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.types import Tensor


def same_dim(scope: DimScope, a: Dim, b: Dim) -> bool:
    """Provably equal: the same polynomial, or proved so under the scope's facts."""
    return a is b or scope.prove_eq(a, b) is True


def require_same_dim(scope: DimScope, a: Dim, b: Dim, what: str) -> None:
    """IrError naming both Dims unless they are provably equal."""
    if not same_dim(scope, a, b):
        raise IrError(f"{what}: {a} is not provably {b}", help=explain_dims(scope, a, b))


def require_shape(scope: DimScope, got: Sequence[Dim], want: Sequence[Dim | int], what: str) -> None:
    """IrError unless two shapes have provably equal Dims."""
    wanted = [as_dim(d) for d in want]
    if len(got) != len(wanted) or not all(same_dim(scope, a, b) for a, b in zip(got, wanted, strict=True)):
        raise IrError(
            f"{what} has shape {shape_text(got)}, wanted {shape_text(wanted)}", help=explain_dims(scope, *got, *wanted)
        )


def require_le(scope: DimScope, a: Dim, b: Dim, what: str) -> None:
    """IrError unless a <= b is proved."""
    if scope.prove_le(a, b) is not True:
        raise IrError(f"{what}: {a} <= {b} is not proved", help=explain_dims(scope, a, b))


def explain_dims(scope: DimScope, *dims: Dim) -> str:
    """The declared ranges of every symbol in `dims`: what the reader needs to see why it was not proved."""
    names = sorted({s for d in dims for s in d.symbols})
    lines = []
    for name in names:
        symbol = scope.symbols.get(name)
        lines.append(f"{name} in [{symbol.lo}, {symbol.hi}]" if symbol else f"{name} is not declared")
    return "; ".join(lines)


def shape_text(shape: Sequence[Dim]) -> str:
    return "[" + ", ".join(str(d) for d in shape) + "]"


def product(shape: Sequence[Dim]) -> Dim:
    n = as_dim(1)
    for d in shape:
        n = n * d
    return n


def broadcast(scope: DimScope, a: Sequence[Dim], b: Sequence[Dim], what: str) -> tuple[Dim, ...]:
    """numpy broadcasting: a Dim that is the constant 1 stretches, every other pair must be provably equal."""
    rank = max(len(a), len(b))
    one = as_dim(1)
    left = [one] * (rank - len(a)) + list(a)
    right = [one] * (rank - len(b)) + list(b)
    out: list[Dim] = []
    for i, (x, y) in enumerate(zip(left, right, strict=True)):
        if x is one:
            out.append(y)
        elif y is one or same_dim(scope, x, y):
            out.append(x)
        else:
            raise IrError(
                f"{what}: shapes {shape_text(a)} and {shape_text(b)} do not broadcast: "
                f"{x} against {y} at axis {i - rank}",
                help=explain_dims(scope, x, y),
            )
    return tuple(out)


def axis_of(axis: int, rank: int) -> int:
    """`axis` counted from the front; IrError when it is out of range."""
    if not -rank <= axis < rank:
        raise IrError(f"axis {axis} of a rank-{rank} tensor")
    return axis % rank


def is_const_scalar(v: Value) -> bool:
    """A rank-0 t.const, which takes the dtype of whatever it is combined with."""
    return v.op is not None and v.op.name == "t.const"


def common_dtype(what: str, a: Value, b: Value) -> str:
    """The dtype of an elementwise op: equal on both sides, or that of the side that is not a t.const scalar."""
    if a.dtype == b.dtype:
        return a.dtype
    for const, other in ((a, b), (b, a)):
        if is_const_scalar(const) and not is_const_scalar(other):
            if const.tensor.is_float and not other.tensor.is_float:
                raise IrError(f"{what}: a float constant cannot take the dtype {other.dtype}", help="cast first")
            if const.dtype == "bool" or other.dtype == "bool":
                break
            return other.dtype
    raise IrError(f"{what}: dtypes {a.dtype} and {b.dtype} differ", help="insert t.cast")


def no_partial(op: Op) -> None:
    """IrError when an operand still has to be summed over a group and the op is not linear."""
    for v in op.operands:
        if isinstance(v.type, Tensor) and v.type.partial is not None:
            raise IrError(
                f"{op.name} of %{v.name}, which is a partial sum over @{v.type.partial}",
                help="comm.all_reduce_start and comm.wait it first",
            )


def require_float(op: Op, *values: Value | None) -> None:
    for v in values:
        if v is not None and not v.tensor.is_float:
            raise IrError(f"{op.name} needs floats, %{v.name} is {v.dtype}", help="insert t.cast")


def require_int(op: Op, *values: Value | None) -> None:
    for v in values:
        if v is not None and not v.tensor.is_int:
            raise IrError(f"{op.name} needs integers, %{v.name} is {v.dtype}")


def require_rank(op: Op, v: Value, rank: int) -> None:
    if v.tensor.rank != rank:
        raise IrError(f"{op.name} needs a rank-{rank} tensor, %{v.name} is {v.type}")
