"""A compiler pass of your own: -(a - b) is b - a. `python examples/custom_pass.py` shows it at work.

On a checkpoint, before the passes of the CPU's preset:

    xllm-compile models/bundled -o my-artifact --load examples/custom_pass.py --pipeline turn-subtraction,@cpu
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.ir.core import Func
from xllm_compiler.ir.ops import Neg, Sub
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.passes.registry import register_pass


@rule(Neg)
def turned(op: Neg, rw: Rewriter) -> bool:
    difference = op.x.op
    if not isinstance(difference, Sub):
        return False
    rw.replace(op, rw.create(Sub, difference.b, difference.a))
    return True


@register_pass("turn-subtraction")
@dataclass(frozen=True)
class TurnSubtraction(FuncPass):
    """Subtracts the other way round instead of negating a difference."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [turned], self.name, ctx).changed


MODULE = """\
xir 1 stage=graph
dim N in [1, 64]

func @f(%a: f32[N, 8], %b: f32[N, 8]) -> (f32[N, 8]) {
  %d = t.sub(%a, %b) : f32[N, 8]
  %y = t.neg(%d) : f32[N, 8]
  return %y
}
"""

if __name__ == "__main__":
    module = parse_module(MODULE, "example")
    report = run_pipeline("turn-subtraction", module)
    print(report.table())
    print(print_module(module))
