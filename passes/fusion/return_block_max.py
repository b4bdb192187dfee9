"""return-block-max: a step says of its logits where the large ones are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.ir.core import Builder, Func, Value
from xllm_compiler.ir.ops import BlockMax
from xllm_compiler.ir.state import state_args
from xllm_compiler.ir.types import Tensor
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass
from xllm_compiler.step.interface import BLOCK, BLOCK_MAX, LOGITS


@register_pass("return-block-max")
@dataclass(frozen=True)
class ReturnBlockMax(FuncPass):
    """Returns, last, the largest logit of every `PANEL`, which is 64: the projection's kernel has those in registers
    when it writes them. A sampler then reads those and one block, not the vocabulary.

    before:  return %logits, %kv1                after:  %m = nn.block_max(%logits) : f32[S, 2374]
                                                         return %logits, %kv1, %m

    They are those of the values returned, whatever made these of the projection (softcap, scale, bias). A function that
    returns another number of tensors than one, no f32 rows of a fixed length, or something that is not called logits,
    is left alone.
    """

    changes_signature: ClassVar[bool] = True

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        tensors = [v for v in func.returns if isinstance(v.type, Tensor)]
        if len(tensors) == 2 and _tells_of(tensors[1], tensors[0]):
            return False
        if set(func.outputs.values()) - {LOGITS}:
            return False
        if len(tensors) != 1 or (why := _unfit(tensors[0])):
            if state_args(func):  # a step of a model, whose sampler will miss them
                why = why if len(tensors) == 1 else f"@{func.name} returns {len(tensors)} tensors"
                ctx.remark(tensors[0].op if tensors else None, f"{why}: no block maxima of logits")
            return False
        (logits,) = tensors
        op = logits.op
        assert op is not None
        if not ctx.allows("return-block-max/append", op):
            return False
        made = Builder.after(op, op.loc.touched_by("return-block-max/append")).create(
            BlockMax, logits, block=BLOCK, hint="block_max"
        )
        outputs = {**func.outputs, len(func.returns): BLOCK_MAX}
        func.set_returns([*func.returns, made.result], func.aliases, outputs)
        ctx.tried("return-block-max/append", op, fired=True, made=[made])
        ctx.stat("appended")
        return True


def _tells_of(value: Value, logits: Value) -> bool:
    return isinstance(value.op, BlockMax) and value.op.x is logits


def _unfit(v: Value) -> str:
    """Why `v` is not what a sampler reads; nothing where it is."""
    if v.op is None or is_weight_expr(v):
        return f"%{v.name} is not computed"
    if v.dtype != "f32" or v.tensor.rank != 2 or not v.shape[1].is_const:
        return f"%{v.name} is {v.type}, not f32 rows of a fixed length"
    return ""
