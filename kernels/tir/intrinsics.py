"""Small LLVM functions that TensorIR has no words for: the bf16 dot product, rounding, masked access, reductions.

Owns their text, one per instruction set level. TVM inlines an imported function wherever it is called and drops it.
All work on 16 lanes and name their result types as TVM does; `emit` wraps them for the kernels.
"""

from __future__ import annotations

from functools import cache

from xllm_compiler.kernels.tir.base import LANES, Isa
from xllm_compiler.kernels.tir.tile_intrinsics import tile_intrinsics

_COMMON = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, <16 x i1>, <16 x float>)
declare <16 x i32> @llvm.masked.load.v16i32.p0(ptr, <16 x i1>, <16 x i32>)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, <16 x i1>)
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
define linkonce_odr <16 x i32> @xllm_load_first_i32(ptr %p, i32 %n) {
  %m = call <16 x i1> @xllm_first(i32 %n)
  %r = call <16 x i32> @llvm.masked.load.v16i32.p0(ptr align 4 %p, <16 x i1> %m, <16 x i32> zeroinitializer)
  ret <16 x i32> %r
}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
; into the second-level cache: the first level has too few outstanding misses to keep memory busy
define linkonce_odr i32 @xllm_prefetch(ptr %p) {
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)
  ret i32 0
}
define linkonce_odr i32 @xllm_put_f32(ptr %p, float %v) {
  store float %v, ptr %p, align 4
  ret i32 0
}
define linkonce_odr i32 @xllm_put_i16(ptr %p, i16 %v) {
  store i16 %v, ptr %p, align 2
  ret i32 0
}
define linkonce_odr i32 @xllm_put_i8(ptr %p, i8 %v) {
  store i8 %v, ptr %p, align 1
  ret i32 0
}
define linkonce_odr <16 x float> @xllm_load_i8(ptr %p) {
  %v = load <16 x i8>, ptr %p, align 1
  %w = sext <16 x i8> %v to <16 x i32>
  %r = sitofp <16 x i32> %w to <16 x float>
  ret <16 x float> %r
}
; 8-bit integers at p and at q as pairs of bf16, which holds them exactly: the upper halves of their f32
define linkonce_odr <16 x i32> @xllm_pairs_i8(ptr %p, ptr %q) {
  %a = call <16 x float> @xllm_load_i8(ptr %p)
  %b = call <16 x float> @xllm_load_i8(ptr %q)
  %x = bitcast <16 x float> %a to <16 x i32>
  %y = bitcast <16 x float> %b to <16 x i32>
  %low = lshr <16 x i32> %x, splat (i32 16)
  %r = or <16 x i32> %low, %y
  ret <16 x i32> %r
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
declare <16 x float> @llvm.rint.v16f32(<16 x float>)
; 16 values as 8-bit integers, to nearest, ties to even; all but the first n are 0. Returns their sum
define linkonce_odr i32 @xllm_store_i8(ptr %p, <16 x float> %v, i32 %n) {
  %near = call <16 x float> @llvm.rint.v16f32(<16 x float> %v)
  %whole = call <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float> %near)
  %m = call <16 x i1> @xllm_first(i32 %n)
  %kept = select <16 x i1> %m, <16 x i32> %whole, <16 x i32> zeroinitializer
  %narrow = trunc <16 x i32> %kept to <16 x i8>
  store <16 x i8> %narrow, ptr %p, align 1
  %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %kept)
  ret i32 %sum
}
declare <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
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
define linkonce_odr <16 x float> @xllm_load_first_f32(ptr %p, i32 %n) {
  %m = call <16 x i1> @xllm_first(i32 %n)
  %r = call <16 x float> @llvm.masked.load.v16f32.p0(ptr align 4 %p, <16 x i1> %m, <16 x float> zeroinitializer)
  ret <16 x float> %r
}
define linkonce_odr i32 @xllm_store_first_f32(ptr %p, <16 x float> %v, i32 %n) {
  %m = call <16 x i1> @xllm_first(i32 %n)
  call void @llvm.masked.store.v16f32.p0(<16 x float> %v, ptr align 4 %p, <16 x i1> %m)
  ret i32 0
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
  %a = call <8 x float> @llvm.maxnum.v8f32(<8 x float> %a0, <8 x float> %a1)
  %b0 = shufflevector <8 x float> %a, <8 x float> poison, <4 x i32> <i32 0, i32 1, i32 2, i32 3>
  %b1 = shufflevector <8 x float> %a, <8 x float> poison, <4 x i32> <i32 4, i32 5, i32 6, i32 7>
  %b = call <4 x float> @llvm.maxnum.v4f32(<4 x float> %b0, <4 x float> %b1)
  %c0 = shufflevector <4 x float> %b, <4 x float> poison, <2 x i32> <i32 0, i32 1>
  %c1 = shufflevector <4 x float> %b, <4 x float> poison, <2 x i32> <i32 2, i32 3>
  %c = call <2 x float> @llvm.maxnum.v2f32(<2 x float> %c0, <2 x float> %c1)
  %d0 = extractelement <2 x float> %c, i32 0
  %d1 = extractelement <2 x float> %c, i32 1
  %d = call float @llvm.maxnum.f32(float %d0, float %d1)
  ret float %d
}
"""

_MASKED_16 = """
declare <16 x i16> @llvm.masked.load.v16i16.p0(ptr, <16 x i1>, <16 x i16>)
declare void @llvm.masked.store.v16i16.p0(<16 x i16>, ptr, <16 x i1>)
define linkonce_odr <16 x float> @xllm_load_first_bf16(ptr %p, i32 %n) {
  %m = call <16 x i1> @xllm_first(i32 %n)
  %v = call <16 x i16> @llvm.masked.load.v16i16.p0(ptr align 2 %p, <16 x i1> %m, <16 x i16> zeroinitializer)
  %r = call <16 x float> @xllm_widen(<16 x i16> %v)
  ret <16 x float> %r
}
define linkonce_odr i32 @xllm_store_first_bf16(ptr %p, <16 x float> %v, i32 %n) {
  %m = call <16 x i1> @xllm_first(i32 %n)
  %r = call <16 x i16> @xllm_round_bf16(<16 x float> %v)
  call void @llvm.masked.store.v16i16.p0(<16 x i16> %r, ptr align 2 %p, <16 x i1> %m)
  ret i32 0
}
"""

# Without masked 16-bit access LLVM makes sixteen branches of each; one short loop does it.
_LOOPED_16 = """
define linkonce_odr i32 @xllm_copy_16(ptr %to, ptr %from, i32 %n) {
entry:
  %some = icmp sgt i32 %n, 0
  br i1 %some, label %copy, label %done
copy:
  %i = phi i32 [ 0, %entry ], [ %next, %copy ]
  %a = getelementptr i16, ptr %from, i32 %i
  %b = getelementptr i16, ptr %to, i32 %i
  %v = load i16, ptr %a, align 2
  store i16 %v, ptr %b, align 2
  %next = add i32 %i, 1
  %more = icmp slt i32 %next, %n
  br i1 %more, label %copy, label %done
done:
  ret i32 0
}
define linkonce_odr <16 x float> @xllm_load_first_bf16(ptr %p, i32 %n) {
  %buffer = alloca <16 x i16>, align 32
  store <16 x i16> zeroinitializer, ptr %buffer, align 32
  %copied = call i32 @xllm_copy_16(ptr %buffer, ptr %p, i32 %n)
  %v = load <16 x i16>, ptr %buffer, align 32
  %r = call <16 x float> @xllm_widen(<16 x i16> %v)
  ret <16 x float> %r
}
define linkonce_odr i32 @xllm_store_first_bf16(ptr %p, <16 x float> %v, i32 %n) {
  %buffer = alloca <16 x i16>, align 32
  %r = call <16 x i16> @xllm_round_bf16(<16 x float> %v)
  store <16 x i16> %r, ptr %buffer, align 32
  %copied = call i32 @xllm_copy_16(ptr %p, ptr %buffer, i32 %n)
  ret i32 0
}
"""

_DOT_INSTRUCTION = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr <16 x float> @xllm_dot_bf16(<16 x float> %acc, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define linkonce_odr <16 x i16> @xllm_round_bf16(<16 x float> %v) {
  %c = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %v)
  %r = bitcast <16 x bfloat> %c to <16 x i16>
  ret <16 x i16> %r
}
"""

_DOT_WITH_FMA = """
define linkonce_odr <16 x float> @xllm_dot_bf16(<16 x float> %acc, <16 x i32> %a, <16 x i32> %b) {
  %al = shl <16 x i32> %a, splat (i32 16)
  %bl = shl <16 x i32> %b, splat (i32 16)
  %ah = and <16 x i32> %a, splat (i32 -65536)
  %bh = and <16 x i32> %b, splat (i32 -65536)
  %x0 = bitcast <16 x i32> %al to <16 x float>
  %y0 = bitcast <16 x i32> %bl to <16 x float>
  %x1 = bitcast <16 x i32> %ah to <16 x float>
  %y1 = bitcast <16 x i32> %bh to <16 x float>
  %r0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %x0, <16 x float> %y0, <16 x float> %acc)
  %r1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %x1, <16 x float> %y1, <16 x float> %r0)
  ret <16 x float> %r1
}
; to nearest, ties to even; a NaN stays one
define linkonce_odr <16 x i16> @xllm_round_bf16(<16 x float> %v) {
  %u = bitcast <16 x float> %v to <16 x i32>
  %h = lshr <16 x i32> %u, splat (i32 16)
  %odd = and <16 x i32> %h, splat (i32 1)
  %bias = add <16 x i32> %odd, splat (i32 32767)
  %sum = add <16 x i32> %u, %bias
  %near = lshr <16 x i32> %sum, splat (i32 16)
  %quiet = or <16 x i32> %h, splat (i32 64)
  %nan = fcmp uno <16 x float> %v, zeroinitializer
  %w = select <16 x i1> %nan, <16 x i32> %quiet, <16 x i32> %near
  %r = trunc <16 x i32> %w to <16 x i16>
  ret <16 x i16> %r
}
"""


_INT8_INSTRUCTION = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
define linkonce_odr <16 x i32> @xllm_dot_u8i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <64 x i8>
  %y = bitcast <16 x i32> %b to <64 x i8>
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %acc, <64 x i8> %x, <64 x i8> %y)
  ret <16 x i32> %r
}
define linkonce_odr <16 x i32> @xllm_dot_u4i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %r = call <16 x i32> @xllm_dot_u8i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b)
  ret <16 x i32> %r
}
"""

# Bytes at even and at odd places as 16-bit pairs, which the instruction for pairs multiplies and adds without loss.
_INT8_WITH_PAIRS = """
define linkonce_odr <16 x i32> @xllm_dot_u8i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %a16 = bitcast <16 x i32> %a to <32 x i16>
  %b16 = bitcast <16 x i32> %b to <32 x i16>
  %ae = and <32 x i16> %a16, splat (i16 255)
  %ao = lshr <32 x i16> %a16, splat (i16 8)
  %bl = shl <32 x i16> %b16, splat (i16 8)
  %be = ashr <32 x i16> %bl, splat (i16 8)
  %bo = ashr <32 x i16> %b16, splat (i16 8)
  %even = call <16 x i32> @xllm_pairs(<32 x i16> %ae, <32 x i16> %be)
  %odd = call <16 x i32> @xllm_pairs(<32 x i16> %ao, <32 x i16> %bo)
  %both = add <16 x i32> %even, %odd
  %r = add <16 x i32> %acc, %both
  ret <16 x i32> %r
}
; 4 times 15 * 127 stays within 16 bits, so the instruction that adds bytes in 16 bits loses nothing
define linkonce_odr <16 x i32> @xllm_dot_u4i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %a8 = bitcast <16 x i32> %a to <64 x i8>
  %b8 = bitcast <16 x i32> %b to <64 x i8>
  %pairs = call <32 x i16> @xllm_bytes(<64 x i8> %a8, <64 x i8> %b8)
  %quads = call <16 x i32> @xllm_pairs(<32 x i16> %pairs, <32 x i16> splat (i16 1))
  %r = add <16 x i32> %acc, %quads
  ret <16 x i32> %r
}
"""

_PAIRS_512 = """
declare <16 x i32> @llvm.x86.avx512.pmaddw.d.512(<32 x i16>, <32 x i16>)
declare <32 x i16> @llvm.x86.avx512.pmaddubs.w.512(<64 x i8>, <64 x i8>)
define linkonce_odr <16 x i32> @xllm_pairs(<32 x i16> %a, <32 x i16> %b) {
  %r = call <16 x i32> @llvm.x86.avx512.pmaddw.d.512(<32 x i16> %a, <32 x i16> %b)
  ret <16 x i32> %r
}
define linkonce_odr <32 x i16> @xllm_bytes(<64 x i8> %a, <64 x i8> %b) {
  %r = call <32 x i16> @llvm.x86.avx512.pmaddubs.w.512(<64 x i8> %a, <64 x i8> %b)
  ret <32 x i16> %r
}
"""


def _halves(name: str, intrinsic: str, of: tuple[str, int], to: tuple[str, int]) -> str:
    """A function on vectors of 512 bits that calls an instruction for 256 bits on each half."""
    lo, hi = (", ".join(f"i32 {i}" for i in range(s, s + of[1] // 2)) for s in (0, of[1] // 2))
    whole, half = f"<{of[1]} x {of[0]}>", f"<{of[1] // 2} x {of[0]}>"
    result, part = f"<{to[1]} x {to[0]}>", f"<{to[1] // 2} x {to[0]}>"
    mask = f"<{of[1] // 2} x i32>"
    lines = [
        f"declare {part} @{intrinsic}({half}, {half})",
        f"define linkonce_odr {result} @{name}({whole} %a, {whole} %b) {{",
    ]
    for v in "ab":
        for end, places in (("0", lo), ("1", hi)):
            lines.append(f"  %{v}{end} = shufflevector {whole} %{v}, {whole} poison, {mask} <{places}>")
    for end in "01":
        lines.append(f"  %r{end} = call {part} @{intrinsic}({half} %a{end}, {half} %b{end})")
    places = ", ".join(f"i32 {i}" for i in range(to[1]))
    lines.append(f"  %r = shufflevector {part} %r0, {part} %r1, <{to[1]} x i32> <{places}>")
    return "\n".join([*lines, f"  ret {result} %r", "}", ""])


_PAIRS_256 = _halves("xllm_pairs", "llvm.x86.avx2.pmadd.wd", ("i16", 32), ("i32", 16)) + _halves(
    "xllm_bytes", "llvm.x86.avx2.pmadd.ub.sw", ("i8", 64), ("i16", 32)
)


@cache
def intrinsics(isa: Isa) -> str:
    """The LLVM text to import into a kernel for `isa`."""
    wide = isa.register_lanes == LANES
    masks = _MASKED_16 if wide else _LOOPED_16
    bf16 = _DOT_INSTRUCTION if isa.has_bf16_dot else _DOT_WITH_FMA
    int8 = _INT8_INSTRUCTION if isa.has_int8_dot else _INT8_WITH_PAIRS + (_PAIRS_512 if wide else _PAIRS_256)
    tiles = tile_intrinsics() if isa.has_tiles else ""
    return _COMMON + masks + bf16 + int8 + tiles
