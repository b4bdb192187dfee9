"""Which values are known before any step. Owns the classification of weight expressions; interp evaluates them.

A weight expression may depend on a rank dim, such as a slice that begins at R * 64: it is known once the rank is.
"""

from __future__ import annotations

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.groups import rank_symbols
from xllm_compiler.ir.ops import Cast
from xllm_compiler.ir.spec import dims_in
from xllm_compiler.ir.types import DTYPE_BYTES, Tensor


def is_weight_expr(value: Value) -> bool:
    """Whether `value` depends on params, constants and counting of fixed size only: then no step computes it."""
    seen: set[Op] = set()
    stack = [value]
    while stack:
        op = stack.pop().op
        if op is None:
            return False
        if op in seen:
            continue
        seen.add(op)
        if not _fixed(op):
            return False
        stack += op.operands
    return True


def unrounded(value: Value) -> Value:
    """A weight expression as it is before its last rounding to a narrower float type; itself where there is none."""
    op = value.op
    if isinstance(op, Cast) and op.x.tensor.is_float and DTYPE_BYTES[op.x.dtype] > DTYPE_BYTES[op.dtype]:
        return op.x
    return value


def weight_exprs(func: Func) -> dict[Value, None]:
    """All weight expressions of a function, in order of definition; one pass, for asking about many values."""
    out: dict[Value, None] = {}
    for op in func.ops:
        if _fixed(op) and all(v in out for v in op.operands):
            out.update(dict.fromkeys(op.results))
    return out


def weight_roots(func: Func) -> list[Value]:
    """Weight expressions that a step reads: those with a use by something that is not one. In order of definition."""
    known = weight_exprs(func)
    return [v for v in known if any(user is func.ret or user.results[0] not in known for user in v.users)]


def ranks_read(value: Value) -> list[str]:
    """The groups of whose rank dims a weight expression depends, in the order of their declaration."""
    found: set[str] = set()
    seen: set[Op] = set()
    stack = [value]
    while stack:
        op = stack.pop().op
        if op is None or op in seen:
            continue
        seen.add(op)
        found.update(s for d in dims_in(op.attrs.values()) for s in d.symbols)
        stack += op.operands
    assert value.op is not None
    return [group for symbol, group in rank_symbols(value.op.func.module.groups).items() if symbol in found]


def param_names(value: Value) -> list[str]:
    """Checkpoint names of the parameters that a weight expression reads, in order."""
    out: list[str] = []
    seen: set[Op] = set()

    def visit(v: Value) -> None:
        op = v.op
        if op is None or op in seen:
            return
        seen.add(op)
        if op.name == "param":
            out.append(str(op.attrs["name"]))
        for operand in op.operands:
            visit(operand)

    visit(value)
    return out


def _fixed(op: Op) -> bool:
    """Pure, and by itself independent of every symbol but those of ranks."""
    if not op.SPEC.pure or not op.results:
        return False
    dims: list[Dim] = []
    for r in op.results:
        if not isinstance(r.type, Tensor):
            return False
        dims += r.type.shape
    dims += dims_in(op.attrs.values())
    ranks = rank_symbols(op.func.module.groups)
    return all(d.is_const or all(name in ranks for name in d.symbols) for d in dims)
