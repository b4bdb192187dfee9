"""quantize-kv: the cache holds keys and values as 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.ir.core import Func
from xllm_compiler.ir.retype import retype_state
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
        caches = [(a, a.type) for a in func.args if isinstance(a.type, Kv) and not a.type.quantized]
        for arg, ty in caches:
            retype_state(func, arg, ty.with_(dtype="i8"))
        if caches:
            ctx.stat("caches", len(caches))
        return bool(caches)
