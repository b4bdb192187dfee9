"""The invariants of streams and events. Owns the proof that every read, write and collective has its order.

Each stream runs its ops in list order. Between streams there is no order but this: what follows a sched.wait comes
after what its record came after, and what follows a comm.wait comes after the whole collective. A collective's start
only issues it: what follows the start on its stream may run while the collective is in flight. Weight expressions are
computed before the step, and the function returns when all streams have run dry.

It computes that order with its own eyes (a bit per op) instead of asking the analysis (vector clocks) that the passes
use: a shared mistake would not show.

V16  `stream`, events and the sched ops stand in stages sched and buf only. An event is neither argument nor returned.
     (It may be waited for any number of times. Never is legal, too: it costs nothing, and whoever drops a wait should
     see the order that is missing, not be sent looking for the record.)
V17  What an op reads was provably written before: the defining op happens before it.
V18  Every read of a state version provably happens before the op that uses it up.
V19  Of two collectives of one group one happens before the other; else ranks could issue them in different orders.
"""

from __future__ import annotations

from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.diag import IrError, blame
from xllm_compiler.ir.ops.comm import Collective
from xllm_compiler.ir.state import readers, used_version
from xllm_compiler.ir.types import Event
from xllm_compiler.ir.verify_buf import Order, weight_values


def check_stage(module: Module, func: Func) -> None:
    """V16."""
    for a in func.args:
        if isinstance(a.type, Event):
            raise IrError(f"V16: argument %{a.name} of @{func.name} is an event; events live inside a function")
    for v in func.returns:
        if isinstance(v.type, Event):
            text = f"V16: @{func.name} returns event %{v.name}; events live inside a function"
            raise blame(v.op, text) if v.op is not None else IrError(text)
    if module.stage != "graph":
        return
    for op in func.ops:
        if op.stream or op.name.startswith("sched."):
            what = f"stands on stream {op.stream}" if op.stream else "orders streams"
            raise blame(op, f"V16: {op.name} {what} in stage graph", "pass assign-streams leaves stage sched")


def order_of(func: Func) -> Order | None:
    """What is done before each op begins; None where one stream runs everything in list order."""
    ops = list(func.ops)
    if not any("stream" in op.attrs for op in ops):
        return None
    weights = weight_values(func)
    index = {op: i for i, op in enumerate(ops)}
    before: dict[Op, int] = {}
    newest: dict[int, int] = {}
    known = 0
    for i, op in enumerate(ops):
        if op.results and all(r in weights for r in op.results):
            before[op] = known
            known |= 1 << i
            continue
        done = newest.get(op.stream, 0)
        if op.name in ("sched.wait", "comm.wait"):
            source = op.operands[0].op
            assert source is not None, "V8 and V16: futures and events are results"
            done |= before[source] | 1 << index[source]
        before[op] = done
        newest[op.stream] = done | 1 << i
    return Order(index, before, known)


def check_order(func: Func, order: Order) -> None:
    """V17 to V19 of a function with several streams."""
    last: dict[str, Op] = {}
    for op in func.ops:
        for v in op.operands:
            if v.op is not None and not order.done(v.op, op):
                raise blame(
                    op,
                    f"V17: {op.name} on stream {op.stream} reads %{v.name}, which {v.op.name} on stream {v.op.stream} "
                    "may not have written yet",
                    _missing(v.op, op),
                )
        version = used_version(op)
        if version is not None:
            _check_reads(op, version, order)
        if isinstance(op, Collective):
            earlier = last.get(op.group)
            if earlier is not None and not order.done(earlier, op):
                raise blame(
                    op,
                    f"V19: {op.name} of %{op.results[0].name} on stream {op.stream} is not ordered after that of "
                    f"%{earlier.results[0].name} on stream {earlier.stream}: ranks could issue the collectives of "
                    f"@{op.group} in different orders",
                    "start all collectives of a group on one stream, or order them: " + _missing(earlier, op),
                )
            last[op.group] = op


def _check_reads(writer: Op, version: Value, order: Order) -> None:
    for reader in readers(version):
        if not order.done(reader, writer):
            raise blame(
                writer,
                f"V18: {writer.name} on stream {writer.stream} uses up state version %{version.name}, which "
                f"{reader.name} on stream {reader.stream} may still be reading",
                _missing(reader, writer),
            )


def _missing(first: Op, second: Op) -> str:
    return (
        f"record an event on stream {first.stream} after {first.name} and wait for it on stream {second.stream} "
        f"before {second.name}"
    )
