"""Grouped-query attention spelled as repeated heads: the cache gets the heads that exist.

before:  %e = t.expand(%k, shape=[N, 2, 4, 64]), %r = t.reshape(%e, shape=[N, 8, 64]), written to kv<heads=8>
after:   %k written to kv<heads=2>; kv.attend reads each head for its group

Not a rule on one op: the type of the function's argument changes, and with it everything up to the returned cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_compiler.dims import Dim
from xllm_compiler.ir.clone import clone_op
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.ops import Expand, KvAttend, KvWrite, Reshape
from xllm_compiler.ir.retype import retype_state
from xllm_compiler.ir.state import chain_ops
from xllm_compiler.ir.types import Kv


def unrepeat_heads(func: Func) -> int:
    """Shrinks every cache whose keys and values are repeated alike; the number of caches changed."""
    return sum(1 for arg in list(func.args) if isinstance(arg.type, Kv) and _shrink(func, arg))


def _repeated(v: Value, heads: int) -> tuple[Value, int] | None:
    """(x [N, g, D] or what can be reshaped to it, g) where v [N, heads, D] repeats each of g heads heads / g times."""
    op = v.op
    if not isinstance(op, Reshape) or not isinstance(op.x.op, Expand):
        return None
    wide, narrow = op.x.shape, op.x.op.x.shape
    n, _, d = v.shape
    if len(wide) != len(narrow):
        return None

    def spelled(shape: tuple[Dim, ...]) -> list[Dim]:
        return [s for s in shape if s != 1]

    grown = [i for i, (a, b) in enumerate(zip(narrow, wide, strict=True)) if a is not b]
    if len(grown) != 1 or not wide[grown[0]].is_const:
        return None
    times = wide[grown[0]].value
    groups = heads // times
    want = [x for x in (n, groups, times, d) if x != 1]
    before = [x for x in wide[: grown[0]] if x != 1]
    if heads % times or spelled(wide) != want or before != [x for x in (n, groups) if x != 1]:
        return None
    return op.x.op.x, groups


def _shrink(func: Func, arg: Value) -> bool:
    """Gives one cache the heads that exist; False where its writes do not repeat them alike."""
    ty = arg.kv
    chain = chain_ops(arg)
    if not all(isinstance(op, (KvWrite, KvAttend)) for op in chain):
        return False
    heads: set[int] = set()
    for op in chain:
        if isinstance(op, KvWrite):
            k, v = _repeated(op.k, ty.heads), _repeated(op.v, ty.heads)
            if k is None or v is None or k[1] != v[1]:
                return False
            heads.add(k[1])
    if len(heads) != 1 or heads == {ty.heads}:
        return False
    (groups,) = heads
    if any(isinstance(op, KvAttend) and op.q.shape[1].value % groups for op in chain):
        return False
    retype_state(func, arg, ty.with_(heads=groups), _write_what_is_repeated)
    return True


def _write_what_is_repeated(op: Op, b: Builder, operands: Sequence[Value]) -> Op:
    """`op` over a cache with fewer heads: a kv.write takes keys and values from before they are repeated."""
    operands = list(operands)
    if isinstance(op, KvWrite):
        for field, v in (("k", op.k), ("v", op.v)):
            found = _repeated(v, op.kv.kv.heads)
            assert found is not None
            x, groups = found
            n, _, size = v.shape
            operands[op.field_index(field)] = b.create(Reshape, x, shape=(n, groups, size), hint=v.name).result
    return clone_op(op, b, operands)
