"""quantize-kv: the cache holds keys and values as 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.ir.clone import clone_op
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.ops import KvAppend, KvAttend, KvWrite
from xllm_compiler.ir.types import Kv
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("quantize-kv")
@dataclass(frozen=True)
class QuantizeKv(FuncPass):
    """Every cache of floats becomes one of 8-bit integers with a scale for each token's key and value of a head.

    before:  func @step(.., %kv0: kv<bf16, heads=2, k=64, v=64, page=16>[P])
             %kv1, %q = kv.append(%kv0, %qkv, ..) : kv<bf16, ..>[P], bf16[N, 8, 64]
    after:   func @step(.., %kv0: kv<i8, heads=2, k=64, v=64, page=16>[P])
             %kv1, %q = kv.append(%kv0, %qkv, ..) : kv<i8, ..>[P], bf16[N, 8, 64]

    A page has little more than half the bytes. Keys and values are rounded once, when they are written.
    """

    changes_signature: ClassVar[bool] = True

    @property
    def loss(self) -> float:
        """Steps of 1/127 of the largest value of a head."""
        return 0.01

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        caches = [a for a in func.args if isinstance(a.type, Kv) and not a.type.quantized]
        for arg in caches:
            _shrink(func, arg)
        if caches:
            ctx.stat("caches", len(caches))
        return bool(caches)


def _shrink(func: Func, arg: Value) -> None:
    """Follows one cache from the argument to the return; all that reads or writes it is made anew."""
    ty = arg.kv
    fresh = func.add_arg(arg.name, Kv("i8", ty.heads, ty.k_dim, ty.v_dim, ty.page, ty.pages))
    func.args.remove(fresh)
    func.args[func.args.index(arg)] = fresh
    for i, a in enumerate(func.args):
        a.index = i
    now: dict[Value, Value] = {arg: fresh}
    old: list[Op] = []
    for op in list(func.ops):
        if not isinstance(op, (KvWrite, KvAppend, KvAttend)) or op.kv not in now:
            continue
        made = clone_op(op, Builder.before(op), [now.get(v, v) for v in op.operands])
        for was, is_ in zip(op.results, made.results, strict=True):
            if isinstance(was.type, Kv):
                now[was] = is_
            else:
                was.replace_all_uses_with(is_)
        old.append(op)
    aliases = {i: now.get(a, a) for i, a in func.aliases.items()}
    func.set_returns([now.get(v, v) for v in func.returns], aliases, func.outputs)
    for op in reversed(old):
        op.erase()
