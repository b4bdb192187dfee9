"""cse: computes equal things once. Equal means the same op, operands and attributes."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.printer import attr_text
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("cse")
@dataclass(frozen=True)
class Cse(FuncPass):
    """Replaces a pure op by an earlier equal one; parameters of one name become one.

    before:  %a = t.exp(%x) : f32[N]        after:  %a = t.exp(%x) : f32[N]
             %b = t.exp(%x) : f32[N]                %y = t.add(%a, %a) : f32[N]
             %y = t.add(%a, %b) : f32[N]

    Two equal writes to one cache version cannot stand in sound IR: each version is used up once.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        seen: dict[tuple[object, ...], Op] = {}
        number: dict[Value, int] = {}
        for arg in func.args:
            number[arg] = len(number)
        merged = 0
        for op in func.ops:
            if op.SPEC.pure:
                first = seen.setdefault(_key(op, number), op)
                if first is not op and ctx.allows("cse/merge", op):
                    for old, new in zip(op.results, first.results, strict=True):
                        old.replace_all_uses_with(new)
                    op.erase()
                    ctx.tried("cse/merge", op, True, [first])
                    merged += 1
                    continue
            for r in op.results:
                number[r] = len(number)
        if merged:
            ctx.stat("merged", merged)
        return merged > 0


def _key(op: Op, number: dict[Value, int]) -> tuple[object, ...]:
    operands = [number[v] for v in op.operands]
    if op.SPEC.commutative:
        operands.sort()
    # Attributes by text: 0.0 and -0.0, 1 and 1.0 and true are equal in Python and are not the same attribute.
    attrs = []
    for name, value in sorted(op.attrs.items()):
        field = op.SPEC.attr(name)
        attrs.append((name, str(value) if field is None or field.kind == "type" else attr_text(field, value)))
    return (op.name, op.segments, tuple(operands), tuple(attrs))
