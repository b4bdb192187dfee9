"""Events between streams. Owns their rules; what they order is told by analysis.happens_before and verify_sched."""

from __future__ import annotations

import numpy as np

from xllm_compiler.ir.core import Op
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import Operand, op
from xllm_compiler.ir.rows import NoRows
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.ir.types import Event, Type


@op("sched.record", effects=("order",))
class Record(Op):
    """e = the event that fires once everything earlier on this op's stream is done."""

    rows = NoRows()
    noise = Noise.EXACT
    work = Work.NONE

    def infer(self) -> tuple[Type, ...]:
        return (Event(),)

    def interp(self, ctx: EvalContext) -> Array:
        return np.zeros(0, np.bool_)

    def default_hint(self, index: int) -> str:
        return "e"


@op("sched.wait", effects=("order",))
class WaitEvent(Op):
    """What follows on this op's stream starts after the event e has fired. Any number of streams may wait for one."""

    rows = NoRows()
    noise = Noise.EXACT
    work = Work.NONE
    e: Operand

    def infer(self) -> tuple[Type, ...]:
        if not isinstance(self.e.type, Event):
            raise IrError(f"sched.wait: %{self.e.name} is {self.e.type}, an event is needed here")
        return ()

    def interp(self, ctx: EvalContext, e: Array) -> tuple[Array, ...]:
        return ()
