"""Grouped-query attention spelled as repeated heads: the cache gets the heads that exist.

before:  %e = t.expand(%k, shape=[N, 2, 4, 64]), %r = t.reshape(%e, shape=[N, 8, 64]), written to kv<heads=8>
after:   %k written to kv<heads=2>; kv.attend reads each head for its group

Not a rule on one op: the type of the function's argument changes, and with it everything up to the returned cache.
"""

from __future__ import annotations

from xllm_compiler.dims import Dim
from xllm_compiler.ir.clone import clone_op
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.ops import Expand, KvAttend, KvWrite, Reshape
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
    """Follows one cache from the argument to the return."""
    ty = arg.kv
    chain: list[Op] = []
    at = arg
    while True:
        users = [u for u in at.users if u is not func.ret]
        writes = [u for u in users if isinstance(u, KvWrite)]
        if any(not isinstance(u, (KvWrite, KvAttend)) for u in users) or len(writes) > 1:
            return False
        chain += users
        if not writes:
            break
        at = writes[0].result
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
    small = Kv(ty.dtype, groups, ty.k_dim, ty.v_dim, ty.page, ty.pages)
    for op in chain:
        if isinstance(op, KvAttend) and op.q.shape[1].value % groups:
            return False
    fresh = func.add_arg(arg.name, small)
    func.args.remove(fresh)
    func.args[func.args.index(arg)] = fresh
    for i, a in enumerate(func.args):
        a.index = i
    _rebuild(func, arg, fresh, sorted(chain, key=func.ops.order), groups)
    return True


def _rebuild(func: Func, arg: Value, fresh: Value, chain: list[Op], groups: int) -> None:
    ty = arg.kv
    now: dict[Value, Value] = {arg: fresh}
    for op in chain:
        b = Builder.before(op)
        operands = [now.get(v, v) for v in op.operands]
        if isinstance(op, KvWrite):
            for i, v, size in ((1, op.k, ty.k_dim), (2, op.v, ty.v_dim)):
                found = _repeated(v, ty.heads)
                assert found is not None
                operands[i] = b.create(Reshape, found[0], shape=(v.shape[0], groups, size), hint=v.name).result
        made = clone_op(op, b, operands)
        for old, new in zip(op.results, made.results, strict=True):
            if isinstance(old.type, Kv):
                now[old] = new
            else:
                old.replace_all_uses_with(new)
    aliases = {i: now.get(a, a) for i, a in func.aliases.items()}
    func.set_returns([now.get(v, v) for v in func.returns], aliases, func.outputs)
    for op in reversed(chain):
        op.erase()
