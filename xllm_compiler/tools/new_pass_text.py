"""What `xllm-new-pass` writes: a pass that works and three tests. Owns those texts, which must pass ruff, mypy --strict
and the laws."""

from __future__ import annotations

_PASS = '''\
"""%NAME%: removes pairs of negations. Owns that rewrite only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func
from xllm_compiler.ir.ops import Neg
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("%NAME%")
@dataclass(frozen=True)
class %CLASS%(FuncPass):
    """Takes the operand of a negated negation instead of computing it twice.

    before:  %a = t.neg(%x) : f32[N, 8]        after:  %y = t.exp(%x) : f32[N, 8]
             %b = t.neg(%a) : f32[N, 8]
             %y = t.exp(%b) : f32[N, 8]

    The inner negation goes too where nobody else uses it. Tensors of less than
    `min_rank` axes are left alone.
    """

    min_rank: int = 0

    # Settings that the laws are to try beside the defaults.
    samples: ClassVar[tuple[str, ...]] = ("{min_rank=2}",)

    def __post_init__(self) -> None:
        if self.min_rank < 0:
            raise XllmError(
                "option",
                f"%NAME%: min_rank={self.min_rank} is negative",
                help="give the least number of axes, 0 for all tensors",
            )

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        rules = [rule(Neg)(self.double_neg)]
        return apply_rules(func, rules, self.name, ctx).changed

    def double_neg(self, op: Neg, rw: Rewriter) -> bool:
        """Changes the IR through `rw` and returns True, or returns False."""
        inner = op.x.op
        if not isinstance(inner, Neg):
            return False
        if op.result.tensor.rank < self.min_rank:
            if rw.ctx is not None:  # for `xllm-opt --remarks`: what was not done, why
                rw.ctx.remark(op, f"has less than {self.min_rank} axes; left alone")
            return False
        rw.replace(op, inner.x)  # `inner` is erased by the driver once it has no use
        return True
'''

_HEAD = """\
xir 1 stage=graph
dim N in [1, 64]

"""

_FIRES = (
    """\
// The pair goes; what used it takes the operand. EQUIV runs the module before and
// after in the interpreter, in exact arithmetic and with rounding.
// RUN: xllm-opt %s -p %NAME% | filecheck %s
// EQUIV: N=1,2,7

"""
    + _HEAD
    + """\
func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
  // CHECK: func @f
  // CHECK-NOT: t.neg
  // CHECK: %y = t.exp(%x) : f32[N, 8]
  %a = t.neg(%x) : f32[N, 8]
  %b = t.neg(%a) : f32[N, 8]
  %y = t.exp(%b) : f32[N, 8]
  return %y
}
"""
)

_UNCHANGED = (
    """\
// A single negation stays, and so do two that are not next to each other.
// RUN: xllm-opt %s -p %NAME%
// UNCHANGED

"""
    + _HEAD
    + """\
func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
  %a = t.neg(%x) : f32[N, 8]
  %b = t.abs(%a) : f32[N, 8]
  %y = t.neg(%b) : f32[N, 8]
  return %y
}
"""
)

_ERROR = (
    """\
// An ERROR above everything may be about any line; behind an op it must be about
// that op.
// RUN: xllm-opt %s -p %NAME%{min_rank=-1}
// ERROR: %NAME%: min_rank=-1 is negative

"""
    + _HEAD
    + """\
func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
  %y = t.neg(%x) : f32[N, 8]
  return %y
}
"""
)


def files(name: str) -> dict[str, str]:
    """The texts for a pass of that name: "pass" and the three tests."""
    camel = "".join(word.capitalize() for word in name.split("-"))
    texts = {"pass": _PASS, "fires": _FIRES, "unchanged": _UNCHANGED, "error": _ERROR}
    return {key: text.replace("%NAME%", name).replace("%CLASS%", camel) for key, text in texts.items()}
