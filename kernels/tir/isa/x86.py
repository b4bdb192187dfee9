"""The LLVM text of intrinsics that differ between the x86 levels: masked access, bf16 and 8-bit dot products.

`common` has what all architectures share, `amx` has AMX."""

from __future__ import annotations

from xllm_compiler.kernels.tir.isa.amx import amx_intrinsics
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.isa.portable import DOT_WITH_FMA, LOOPED_16, LOOPED_SPREAD, ROUND_BF16

_MASKED_32 = """
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, <16 x i1>, <16 x float>)
declare <16 x i32> @llvm.masked.load.v16i32.p0(ptr, <16 x i1>, <16 x i32>)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, <16 x i1>)
define linkonce_odr <16 x i32> @xllm_load_first_i32(ptr %p, i32 %n) {
  %m = call <16 x i1> @xllm_first(i32 %n)
  %r = call <16 x i32> @llvm.masked.load.v16i32.p0(ptr align 4 %p, <16 x i1> %m, <16 x i32> zeroinitializer)
  ret <16 x i32> %r
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

_SPREAD = """
declare void @llvm.masked.store.v32i16.p0(<32 x i16>, ptr, <32 x i1>)
; 16 elements to every other place from %to on; what lies between is not written, not even with what it holds
define linkonce_odr i32 @xllm_spread_i16(ptr %to, ptr %from) {
  %v = load <16 x i16>, ptr %from, align 2
  %w = shufflevector <16 x i16> %v, <16 x i16> poison, <32 x i32> <
    i32 0, i32 poison, i32 1, i32 poison, i32 2, i32 poison, i32 3, i32 poison, i32 4, i32 poison, i32 5, i32
    poison, i32 6, i32 poison, i32 7, i32 poison, i32 8, i32 poison, i32 9, i32 poison, i32 10, i32 poison, i32
    11, i32 poison, i32 12, i32 poison, i32 13, i32 poison, i32 14, i32 poison, i32 15, i32 poison>
  call void @llvm.masked.store.v32i16.p0(<32 x i16> %w, ptr align 2 %to, <32 x i1> <
    i1 true, i1 false, i1 true, i1 false, i1 true, i1 false, i1 true, i1 false, i1 true, i1 false, i1 true, i1
    false, i1 true, i1 false, i1 true, i1 false, i1 true, i1 false, i1 true, i1 false, i1 true, i1 false, i1 true,
    i1 false, i1 true, i1 false, i1 true, i1 false, i1 true, i1 false, i1 true, i1 false>)
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

# To nearest, ties to even, as the processor rounds unless told otherwise; NaN becomes 0, not what the
# least integer.
_ROUND_512 = """
declare <16 x i32> @llvm.x86.avx512.mask.cvtps2dq.512(<16 x float>, <16 x i32>, i16, i32)
define linkonce_odr <16 x i32> @xllm_round_i32(<16 x float> %v) {
  %m = fcmp ord <16 x float> %v, %v
  %b = bitcast <16 x i1> %m to i16
  %r = call <16 x i32> @llvm.x86.avx512.mask.cvtps2dq.512(<16 x float> %v, <16 x i32> zeroinitializer, i16 %b, i32 4)
  ret <16 x i32> %r
}
"""

_ROUND_256 = """
declare <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float>)
define linkonce_odr <16 x i32> @xllm_round_i32(<16 x float> %v) {
  %lo = shufflevector <16 x float> %v, <16 x float> poison,
    <8 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7>
  %hi = shufflevector <16 x float> %v, <16 x float> poison,
    <8 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %a = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %lo)
  %b = call <8 x i32> @llvm.x86.avx.cvt.ps2dq.256(<8 x float> %hi)
  %w = shufflevector <8 x i32> %a, <8 x i32> %b, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7,
                                                           i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>
  %m = fcmp ord <16 x float> %v, %v
  %r = select <16 x i1> %m, <16 x i32> %w, <16 x i32> zeroinitializer
  ret <16 x i32> %r
}
"""

_INT8_INSTRUCTION = """
define linkonce_odr <16 x i32> @xllm_dot_u8i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <64 x i8>
  %y = bitcast <16 x i32> %b to <64 x i8>
  %r = call <16 x i32> @xllm_quads(<16 x i32> %acc, <64 x i8> %x, <64 x i8> %y)
  ret <16 x i32> %r
}
define linkonce_odr <16 x i32> @xllm_dot_u4i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %r = call <16 x i32> @xllm_dot_u8i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b)
  ret <16 x i32> %r
}
"""

_QUADS_512 = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
define linkonce_odr <16 x i32> @xllm_quads(<16 x i32> %acc, <64 x i8> %a, <64 x i8> %b) {
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %acc, <64 x i8> %a, <64 x i8> %b)
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
; 4 times 15 * 127 stays within 16 bits, so the instruction that adds bytes in 16 bits loses nothing; where its sums are
; widened they are multiplied by a step at no cost
define linkonce_odr <16 x i32> @xllm_dot_u4i8_by(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b, <16 x i32> %steps) {
  %a8 = bitcast <16 x i32> %a to <64 x i8>
  %b8 = bitcast <16 x i32> %b to <64 x i8>
  %s16 = bitcast <16 x i32> %steps to <32 x i16>
  %pairs = call <32 x i16> @xllm_bytes(<64 x i8> %a8, <64 x i8> %b8)
  %quads = call <16 x i32> @xllm_pairs(<32 x i16> %pairs, <32 x i16> %s16)
  %r = add <16 x i32> %acc, %quads
  ret <16 x i32> %r
}
define linkonce_odr <16 x i32> @xllm_dot_u4i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %r = call <16 x i32> @xllm_dot_u4i8_by(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b, <16 x i32> splat (i32 65537))
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


Lanes = tuple[str, int]


def _halves(name: str, intrinsic: str, operands: list[Lanes], to: Lanes) -> str:
    """A function on vectors of 512 bits that calls an instruction for 256 bits on each half."""

    def vector(lanes: Lanes, parts: int) -> str:
        return f"<{lanes[1] // parts} x {lanes[0]}>"

    names = [f"%{letter}" for letter in "abc"[: len(operands)]]
    wholes, halves = ([vector(lanes, parts) for lanes in operands] for parts in (1, 2))
    result, part = vector(to, 1), vector(to, 2)
    taken = ", ".join(f"{whole} {v}" for whole, v in zip(wholes, names, strict=True))
    lines = [
        f"declare {part} @{intrinsic}({', '.join(halves)})",
        f"define linkonce_odr {result} @{name}({taken}) {{",
    ]
    for v, whole, (_, count) in zip(names, wholes, operands, strict=True):
        for end in range(2):
            places = ", ".join(f"i32 {end * count // 2 + i}" for i in range(count // 2))
            mask = f"<{count // 2} x i32> <{places}>"
            lines.append(f"  {v}{end} = shufflevector {whole} {v}, {whole} poison, {mask}")
    for end in range(2):
        given = ", ".join(f"{half} {v}{end}" for half, v in zip(halves, names, strict=True))
        lines.append(f"  %r{end} = call {part} @{intrinsic}({given})")
    places = ", ".join(f"i32 {i}" for i in range(to[1]))
    lines.append(f"  %r = shufflevector {part} %r0, {part} %r1, <{to[1]} x i32> <{places}>")
    return "\n".join([*lines, f"  ret {result} %r", "}", ""])


_PAIRS_256 = _halves("xllm_pairs", "llvm.x86.avx2.pmadd.wd", [("i16", 32)] * 2, ("i32", 16)) + _halves(
    "xllm_bytes", "llvm.x86.avx2.pmadd.ub.sw", [("i8", 64)] * 2, ("i16", 32)
)
_QUADS_256 = _halves("xllm_quads", "llvm.x86.avx512.vpdpbusd.256", [("i32", 16), ("i8", 64), ("i8", 64)], ("i32", 16))


def x86_intrinsics(isa: Isa) -> str:
    """The LLVM text for one x86 level."""
    wide = isa.register_lanes == LANES
    masks = _MASKED_32 + (_MASKED_16 + _SPREAD if wide else LOOPED_16 + LOOPED_SPREAD)
    rounds = _ROUND_512 if wide else _ROUND_256
    bf16 = _DOT_INSTRUCTION if isa.has_bf16_dot else DOT_WITH_FMA + ROUND_BF16
    if isa.has_int8_dot:
        int8 = _INT8_INSTRUCTION + (_QUADS_512 if wide else _QUADS_256)
    else:
        int8 = _INT8_WITH_PAIRS + (_PAIRS_512 if wide else _PAIRS_256)
    return masks + rounds + bf16 + int8 + (amx_intrinsics() if isa.has_amx else "")
