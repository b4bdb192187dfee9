"""Changing the type of a state argument. Owns the walk that makes all users of its versions anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xllm_compiler.ir.clone import clone_op
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.state import chain_ops
from xllm_compiler.ir.types import State

Remake = Callable[[Op, Builder, Sequence[Value]], Op]
"""remake(op, builder, operands): an op in place of `op`, made by `builder` right before it. `operands` are those of
`op`, with the new version of the state in place of the old one. It must yield as many results as `op`."""


def retype_state(func: Func, arg: Value, ty: State, remake: Remake | None = None) -> Value:
    """Gives the state argument `arg` the type `ty`; returns the argument that stands in its place.

    All that reads or writes a version of it is made anew, by `remake` where given, with the same attributes otherwise;
    so is the returned version. Results that are no versions of the state must keep their types. Raises IrError where
    they do not, or where an op cannot be made over the new type; `func` is then as it was.
    """
    if arg not in func.args or not isinstance(arg.type, State):
        raise IrError(f"%{arg.name}: {arg.type} is no state argument of @{func.name}", help="give one of `state_args`")
    had = set(func.ops)
    fresh = func.add_arg(arg.name, ty)
    func.args.pop()
    now: dict[Value, Value] = {arg: fresh}
    old = chain_ops(arg)
    try:
        for op in old:
            made = (remake or clone_op)(op, Builder.before(op), [now.get(v, v) for v in op.operands])
            for was, is_ in zip(op.results, made.results, strict=True):
                _check_result(op, was, is_)
                now[was] = is_
    except Exception:
        for op in reversed(list(func.ops)):
            if op not in had:
                op.erase()
        raise
    fresh.index = func.args.index(arg)
    func.args[fresh.index] = fresh
    aliases = {i: now.get(a, a) for i, a in func.aliases.items()}
    func.set_returns([now.get(v, v) for v in func.returns], aliases, func.outputs)
    for op in old:
        for r in op.results:
            if not isinstance(r.type, State):
                r.replace_all_uses_with(now[r])
    for op in reversed(old):
        op.erase()
    return fresh


def _check_result(op: Op, was: Value, is_: Value) -> None:
    """IrError unless a result is a version of a state as before, or has the type that its users expect."""
    if is_.type != was.type and not (isinstance(was.type, State) and isinstance(is_.type, State)):
        raise IrError(f"{op.name} yields {is_.type} in place of %{was.name}: {was.type}", op=op)
