"""The LLVM text of Intel AMX's tile instructions: a function for each register, or combination of registers."""

from __future__ import annotations

_TILES = 8
_DOTS = {"bf16": "tdpbf16ps", "i8u8": "tdpbsud", "i8i8": "tdpbssd"}


_BYTES = """
define linkonce_odr i32 @xllm_store_bytes_less(ptr %p, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <64 x i8>
  %y = bitcast <16 x i32> %b to <64 x i8>
  %r = sub <64 x i8> %x, %y
  store <64 x i8> %r, ptr %p, align 1
  ret i32 0
}
"""


def amx_intrinsics() -> str:
    """The LLVM text to import into a kernel."""
    lines = [
        "declare void @llvm.x86.ldtilecfg(ptr)",
        "declare void @llvm.x86.tilerelease()",
        "declare void @llvm.x86.tilezero(i8 immarg)",
        "declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)",
        "declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)",
        *(f"declare void @llvm.x86.{name}(i8 immarg, i8 immarg, i8 immarg)" for name in _DOTS.values()),
        _function("xllm_tile_shapes(ptr %p)", "@llvm.x86.ldtilecfg(ptr %p)"),
        _function("xllm_tile_release()", "@llvm.x86.tilerelease()"),
    ]
    for tile in range(_TILES):
        lines.append(_function(f"xllm_tile_zero_{tile}()", f"@llvm.x86.tilezero(i8 {tile})"))
        for name, instruction in (("load", "tileloadd64"), ("store", "tilestored64")):
            head = f"xllm_tile_{name}_{tile}(ptr %p, i64 %stride)"
            lines.append(_function(head, f"@llvm.x86.{instruction}(i8 {tile}, ptr %p, i64 %stride)"))
    for kind, instruction in _DOTS.items():
        for sums in range(4):
            for a in (4, 5):
                for b in (5, 6, 7):
                    if a != b:
                        call = f"@llvm.x86.{instruction}(i8 {sums}, i8 {a}, i8 {b})"
                        lines.append(_function(f"xllm_tile_dot_{kind}_{sums}_{a}_{b}()", call))
    return "\n".join(lines) + _BYTES


def _function(head: str, call: str) -> str:
    return f"define linkonce_odr i32 @{head} {{\n  call void {call}\n  ret i32 0\n}}"
