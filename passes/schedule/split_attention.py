"""split-attention: room in which a team may share out the attention of one long request. Owns how much room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from xllm_compiler.ir.core import Func
from xllm_compiler.ir.ops import KvAttend
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass

_CHUNK: Final = 512  # cached tokens that one member at least takes
_LANES: Final = 16


@register_pass("split-attention")
@dataclass(frozen=True)
class SplitAttention(FuncPass):
    """Gives each attention scratch for a decode step of one request of full length, divided among many.

    before:  func @step(.., %pos: i32[N] in [0, 8191], ..)
             %a = kv.attend(%kv1, %q, ..) : bf16[N, 8, 64]
    after:   %a, %scratch = kv.attend(%kv1, %q, .., scratch=12288) : bf16[N, 8, 64], f32[12288]

    For every 512 tokens that a row may see: its maximum, its sums and its values, in vectors of 16. Attention over 512
    tokens at the most, or at positions without a range, stays as it is. What is computed does not depend on it.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [split], self.name, ctx).changed


@rule(KvAttend)
def split(op: KvAttend, rw: Rewriter) -> bool:
    limits = op.func.ranges.get(op.pos)
    if op.scratch or limits is None:
        return False
    kv, heads = op.kv.kv, op.q.shape[1].value
    tokens = limits.hi + 1
    if op.window:
        tokens = min(tokens, op.window + _CHUNK)  # a window may begin anywhere in a chunk
    chunks = -(-tokens // _CHUNK)
    if chunks < 2:
        return False
    fields: dict[str, Any] = {name: op.attrs[name] for name in ("scale", "window", "softcap") if name in op.attrs}
    made = rw.create(
        KvAttend,
        *(op.kv, op.q, op.pos, op.seq, op.start, op.table),
        sinks=op.sinks,
        scratch=chunks * heads * (2 + -(-kv.v_dim // _LANES)) * _LANES,
        hint=(op.results[0].name, "scratch"),
        **fields,
    )
    rw.replace_value(op.results[0], made.results[0])
    rw.erase(op)
    return True
