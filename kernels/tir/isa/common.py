"""Intrinsics: small LLVM functions for what TensorIR cannot say, such as dot products, rounding and masked access.

This file has the text that all architectures share. `x86` and `arm` have what depends on instructions, `portable` what
has no instruction. TVM inlines an imported function wherever it is called, and then drops it. All work on 16 lanes, and
name their result types as TVM does. `codegen/builder` wraps them for kernels.
"""

from __future__ import annotations

from functools import cache

from xllm_compiler.kernels.tir.isa.arm import arm_intrinsics
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.isa.x86 import x86_intrinsics

_COMMON = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <8 x float> @llvm.maxnum.v8f32(<8 x float>, <8 x float>)
declare <4 x float> @llvm.maxnum.v4f32(<4 x float>, <4 x float>)
declare <2 x float> @llvm.maxnum.v2f32(<2 x float>, <2 x float>)
declare float @llvm.maxnum.f32(float, float)

define linkonce_odr i32 @xllm_load_pair(ptr %p) {
  %r = load i32, ptr %p, align 2
  ret i32 %r
}
define linkonce_odr <16 x float> @xllm_load_f32(ptr %p) {
  %r = load <16 x float>, ptr %p, align 4
  ret <16 x float> %r
}
define linkonce_odr <16 x i32> @xllm_load_i32(ptr %p) {
  %r = load <16 x i32>, ptr %p, align 4
  ret <16 x i32> %r
}
define linkonce_odr i32 @xllm_store_i32(ptr %p, <16 x i32> %v) {
  store <16 x i32> %v, ptr %p, align 4
  ret i32 0
}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
; into the second-level cache: the first level has too few outstanding misses to keep memory busy
define linkonce_odr i32 @xllm_prefetch(ptr %p) {
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)
  ret i32 0
}
define linkonce_odr i32 @xllm_prefetch_at(i64 %at) {
  %p = inttoptr i64 %at to ptr
  %r = call i32 @xllm_prefetch(ptr %p)
  ret i32 %r
}
define linkonce_odr i32 @xllm_put_f32(ptr %p, float %v) {
  store float %v, ptr %p, align 4
  ret i32 0
}
define linkonce_odr i32 @xllm_put_i16(ptr %p, i16 %v) {
  store i16 %v, ptr %p, align 2
  ret i32 0
}
define linkonce_odr i32 @xllm_put_pair(ptr %p, i32 %v) {
  store i32 %v, ptr %p, align 2
  ret i32 0
}
define linkonce_odr i32 @xllm_put_i8(ptr %p, i8 %v) {
  store i8 %v, ptr %p, align 1
  ret i32 0
}
define linkonce_odr <16 x float> @xllm_load_f16(ptr %p) {
  %v = load <16 x half>, ptr %p, align 2
  %r = fpext <16 x half> %v to <16 x float>
  ret <16 x float> %r
}
define linkonce_odr <16 x i32> @xllm_load_u8(ptr %p) {
  %v = load <16 x i8>, ptr %p, align 1
  %r = zext <16 x i8> %v to <16 x i32>
  ret <16 x i32> %r
}
define linkonce_odr i32 @xllm_store_i8(ptr %p, <16 x i32> %v) {
  %narrow = trunc <16 x i32> %v to <16 x i8>
  store <16 x i8> %narrow, ptr %p, align 1
  ret i32 0
}
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define linkonce_odr i32 @xllm_sum_i32(<16 x i32> %v) {
  %r = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %v)
  ret i32 %r
}
declare i16 @llvm.vector.reduce.add.v16i16(<16 x i16>)
define linkonce_odr i32 @xllm_sum_i8(ptr %p) {
  %v = load <16 x i8>, ptr %p, align 1
  %w = sext <16 x i8> %v to <16 x i16>
  %s = call i16 @llvm.vector.reduce.add.v16i16(<16 x i16> %w)
  %r = sext i16 %s to i32
  ret i32 %r
}
declare i32 @llvm.vector.reduce.smax.v16i32(<16 x i32>)
; the largest of 16 sizes, given as the bits of |x|, which are ordered as integers: infinity and NaN, which come last,
; make it NaN
define linkonce_odr float @xllm_largest_size(<16 x i32> %v) {
  %top = call i32 @llvm.vector.reduce.smax.v16i32(<16 x i32> %v)
  %bad = icmp sge i32 %top, 2139095040
  %size = bitcast i32 %top to float
  %r = select i1 %bad, float 0x7FF8000000000000, float %size
  ret float %r
}
define linkonce_odr float @xllm_scale_f16(ptr %p) {
  %v = load half, ptr %p, align 2
  %r = fpext half %v to float
  ret float %r
}
define linkonce_odr float @xllm_scale_f32(ptr %p) {
  %r = load float, ptr %p, align 4
  ret float %r
}
define linkonce_odr i32 @xllm_round_put_bf16(ptr %p, float %v) {
  %i = insertelement <16 x float> zeroinitializer, float %v, i32 0
  %r = call i32 @xllm_store_one_bf16(ptr %p, <16 x float> %i)
  ret i32 %r
}
define linkonce_odr i32 @xllm_store_f32(ptr %p, <16 x float> %v) {
  store <16 x float> %v, ptr %p, align 4
  ret i32 0
}
define linkonce_odr <16 x float> @xllm_widen(<16 x i16> %v) {
  %w = zext <16 x i16> %v to <16 x i32>
  %s = shl <16 x i32> %w, splat (i32 16)
  %r = bitcast <16 x i32> %s to <16 x float>
  ret <16 x float> %r
}
define linkonce_odr <16 x float> @xllm_load_bf16(ptr %p) {
  %v = load <16 x i16>, ptr %p, align 2
  %r = call <16 x float> @xllm_widen(<16 x i16> %v)
  ret <16 x float> %r
}
define linkonce_odr i32 @xllm_store_bf16(ptr %p, <16 x float> %v) {
  %r = call <16 x i16> @xllm_round_bf16(<16 x float> %v)
  store <16 x i16> %r, ptr %p, align 2
  ret i32 0
}
define linkonce_odr <16 x i1> @xllm_first(i32 %n) {
  %i = insertelement <16 x i32> poison, i32 %n, i32 0
  %s = shufflevector <16 x i32> %i, <16 x i32> poison, <16 x i32> zeroinitializer
  %m = icmp sgt <16 x i32> %s, <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
                                i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  ret <16 x i1> %m
}
define linkonce_odr <16 x float> @xllm_keep_between(<16 x float> %v, i32 %first, i32 %last, float %other) {
  %below = call <16 x i1> @xllm_first(i32 %last)
  %under = call <16 x i1> @xllm_first(i32 %first)
  %not = xor <16 x i1> %under, splat (i1 true)
  %m = and <16 x i1> %below, %not
  %i = insertelement <16 x float> poison, float %other, i32 0
  %s = shufflevector <16 x float> %i, <16 x float> poison, <16 x i32> zeroinitializer
  %r = select <16 x i1> %m, <16 x float> %v, <16 x float> %s
  ret <16 x float> %r
}
define linkonce_odr i32 @xllm_store_one_f32(ptr %p, <16 x float> %v) {
  %r = extractelement <16 x float> %v, i32 0
  store float %r, ptr %p, align 4
  ret i32 0
}
define linkonce_odr i32 @xllm_store_one_bf16(ptr %p, <16 x float> %v) {
  %w = call <16 x i16> @xllm_round_bf16(<16 x float> %v)
  %r = extractelement <16 x i16> %w, i32 0
  store i16 %r, ptr %p, align 2
  ret i32 0
}
; lanes i and i+8, then i+4, i+2, i+1: the same tree at every level
define linkonce_odr float @xllm_sum(<16 x float> %v) {
  %a0 = shufflevector <16 x float> %v, <16 x float> poison,
    <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %a1 = shufflevector <16 x float> %v, <16 x float> poison,
    <8 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %a = fadd <8 x float> %a0, %a1
  %b0 = shufflevector <8 x float> %a, <8 x float> poison, <4 x i32> <i32 0, i32 1, i32 2, i32 3>
  %b1 = shufflevector <8 x float> %a, <8 x float> poison, <4 x i32> <i32 4, i32 5, i32 6, i32 7>
  %b = fadd <4 x float> %b0, %b1
  %c0 = shufflevector <4 x float> %b, <4 x float> poison, <2 x i32> <i32 0, i32 1>
  %c1 = shufflevector <4 x float> %b, <4 x float> poison, <2 x i32> <i32 2, i32 3>
  %c = fadd <2 x float> %c0, %c1
  %d0 = extractelement <2 x float> %c, i32 0
  %d1 = extractelement <2 x float> %c, i32 1
  %d = fadd float %d0, %d1
  ret float %d
}
define linkonce_odr float @xllm_max(<16 x float> %v) {
  %a0 = shufflevector <16 x float> %v, <16 x float> poison,
    <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %a1 = shufflevector <16 x float> %v, <16 x float> poison,
    <8 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %ac = fcmp ogt <8 x float> %a0, %a1
  %a = select <8 x i1> %ac, <8 x float> %a0, <8 x float> %a1
  %b0 = shufflevector <8 x float> %a, <8 x float> poison, <4 x i32> <i32 0, i32 1, i32 2, i32 3>
  %b1 = shufflevector <8 x float> %a, <8 x float> poison, <4 x i32> <i32 4, i32 5, i32 6, i32 7>
  %bc = fcmp ogt <4 x float> %b0, %b1
  %b = select <4 x i1> %bc, <4 x float> %b0, <4 x float> %b1
  %c0 = shufflevector <4 x float> %b, <4 x float> poison, <2 x i32> <i32 0, i32 1>
  %c1 = shufflevector <4 x float> %b, <4 x float> poison, <2 x i32> <i32 2, i32 3>
  %cc = fcmp ogt <2 x float> %c0, %c1
  %c = select <2 x i1> %cc, <2 x float> %c0, <2 x float> %c1
  %d0 = extractelement <2 x float> %c, i32 0
  %d1 = extractelement <2 x float> %c, i32 1
  %dc = fcmp ogt float %d0, %d1
  %r = select i1 %dc, float %d0, float %d1
  ret float %r
}
"""


def _rotate() -> str:
    """The Walsh-Hadamard transform of 16 lanes, without its scale: sums and differences of lanes 1, 2, 4, 8 apart. The
    product with 1 or -1 is exact, so each of them is rounded once."""
    lines, name = ["define linkonce_odr <16 x float> @xllm_rotate(<16 x float> %v0) {"], "%v0"
    for apart in (1, 2, 4, 8):
        partners = ", ".join(f"i32 {lane ^ apart}" for lane in range(LANES))
        signs = ", ".join(f"float {'-1.0' if lane & apart else '1.0'}" for lane in range(LANES))
        lines += [
            f"  %p{apart} = shufflevector <16 x float> {name}, <16 x float> poison, <16 x i32> <{partners}>",
            f"  %v{apart} = call <16 x float> @llvm.fma.v16f32(<16 x float> {name}, <16 x float> <{signs}>, "
            f"<16 x float> %p{apart})",
        ]
        name = f"%v{apart}"
    return "\n".join([*lines, f"  ret <16 x float> {name}", "}", ""])


def _grids() -> str:
    """Intrinsics for runs of bytes on grids (grid_bytes.py).

    From the heads of 64 columns they compute the steps and the bases, 128 - point * step. For 16 columns they spread
    the steps to both halves of each 32-bit lane, and the bases to all four bytes. From these they compute the bytes."""
    lines = [
        "define linkonce_odr <16 x i32> @xllm_grid_steps(<16 x i32> %v) {",
        "  %r = and <16 x i32> %v, splat (i32 252645135)",
        "  ret <16 x i32> %r",
        "}",
        "define linkonce_odr <16 x i32> @xllm_grid_bases(<16 x i32> %v) {",
        "  %a = bitcast <16 x i32> %v to <64 x i8>",
        "  %s = and <64 x i8> %a, splat (i8 15)",
        "  %z = lshr <64 x i8> %a, splat (i8 4)",
        "  %x = mul <64 x i8> %s, %z",
        "  %b = sub <64 x i8> splat (i8 -128), %x",
        "  %r = bitcast <64 x i8> %b to <16 x i32>",
        "  ret <16 x i32> %r",
        "}",
        "define linkonce_odr <16 x i32> @xllm_on_grid(<16 x i32> %n, <16 x i32> %steps, <16 x i32> %bases) {",
        "  %a = bitcast <16 x i32> %n to <32 x i16>",
        "  %s = bitcast <16 x i32> %steps to <32 x i16>",
        "  %x = mul <32 x i16> %a, %s",  # of two bytes at once: a product of a byte stays in its byte
        "  %y = bitcast <32 x i16> %x to <64 x i8>",
        "  %b = bitcast <16 x i32> %bases to <64 x i8>",
        "  %z = add <64 x i8> %y, %b",
        "  %r = bitcast <64 x i8> %z to <16 x i32>",
        "  ret <16 x i32> %r",
        "}",
    ]
    for vector in range(4):
        from_ = [byte & ~15 | 4 * vector | (byte & 15) // 4 for byte in range(4 * LANES)]
        for name, bytes_ in (("steps", [64 if i % 2 else byte for i, byte in enumerate(from_)]), ("bases", from_)):
            lines += [
                f"define linkonce_odr <16 x i32> @xllm_grid_{name}_{vector}(<16 x i32> %v) {{",
                "  %a = bitcast <16 x i32> %v to <64 x i8>",
                "  %b = shufflevector <64 x i8> %a, <64 x i8> zeroinitializer, <64 x i32> "
                f"<{', '.join(f'i32 {byte}' for byte in bytes_)}>",
                "  %r = bitcast <64 x i8> %b to <16 x i32>",
                "  ret <16 x i32> %r",
                "}",
            ]
    return "\n".join([*lines, ""])


_OF_MACHINE = {"x86_64": x86_intrinsics, "aarch64": arm_intrinsics}
_REGISTERS = {"x86_64": "xmm", "aarch64": "v"}


def _forget_vectors(isa: Isa) -> str:
    """An intrinsic without instructions that declares every vector register overwritten; see `all_registers`."""
    names = ",".join(f"~{{{_REGISTERS[isa.machine]}{i}}}" for i in range(isa.vector_registers))
    return (
        "define linkonce_odr i32 @xllm_forget_vectors() alwaysinline {\n"
        f'  call void asm sideeffect "", "{names}"()\n  ret i32 0\n}}\n'
    )


@cache
def intrinsics(isa: Isa) -> str:
    """The LLVM text to import into a kernel for `isa`."""
    return _COMMON + _grids() + _rotate() + _forget_vectors(isa) + _OF_MACHINE[isa.machine](isa)
