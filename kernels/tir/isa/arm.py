"""The LLVM text of intrinsics that differ between the 64-bit Arm levels: bf16 and 8-bit dot products.

A register holds 4 of the 16 lanes, so each function calls its instruction on four quarters.

BFDOT adds the two products of a lane to each other, and then to the sum. It rounds both to odd and takes denormals as
zero (Arm Architecture Reference Manual, BFDOT without FEAT_EBF16). This order differs from x86's, but is the same for
all rows."""

from __future__ import annotations

from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.isa.portable import DOT_WITH_FMA, LOOPED_16, LOOPED_32, LOOPED_SPREAD, ROUND_BF16


def _quarters(name: str, intrinsic: str, sums: str, of: str) -> str:
    """A function that computes `sums` + dot(a, b) on 16 lanes: it calls an instruction for 4 lanes on each quarter.
    `of`: the type of the instruction's operands."""
    lines = [
        f"declare <4 x {sums}> @{intrinsic}(<4 x {sums}>, {of}, {of})",
        f"define linkonce_odr <16 x {sums}> @{name}(<16 x {sums}> %acc, <16 x i32> %a, <16 x i32> %b) {{",
    ]
    for i in range(4):
        lanes = f"<4 x i32> <{', '.join(f'i32 {4 * i + j}' for j in range(4))}>"
        lines.append(f"  %acc{i} = shufflevector <16 x {sums}> %acc, <16 x {sums}> poison, {lanes}")
        for v in "ab":
            lines.append(f"  %{v}{i} = shufflevector <16 x i32> %{v}, <16 x i32> poison, {lanes}")
            lines.append(f"  %{v}{i}x = bitcast <4 x i32> %{v}{i} to {of}")
        lines.append(f"  %r{i} = call <4 x {sums}> @{intrinsic}(<4 x {sums}> %acc{i}, {of} %a{i}x, {of} %b{i}x)")
    for name_, first, second, count in (("r01", "r0", "r1", 4), ("r23", "r2", "r3", 4), ("r", "r01", "r23", 8)):
        lanes = f"<{2 * count} x i32> <{', '.join(f'i32 {j}' for j in range(2 * count))}>"
        kind = f"<{count} x {sums}>"
        lines.append(f"  %{name_} = shufflevector {kind} %{first}, {kind} %{second}, {lanes}")
    return "\n".join([*lines, f"  ret <16 x {sums}> %r", "}", ""])


_ROUND_INSTRUCTION = """
define linkonce_odr <16 x i16> @xllm_round_bf16(<16 x float> %v) {
  %c = fptrunc <16 x float> %v to <16 x bfloat>
  %r = bitcast <16 x bfloat> %c to <16 x i16>
  ret <16 x i16> %r
}
"""

_BF16 = _quarters("xllm_dot_bf16", "llvm.aarch64.neon.bfdot.v4f32.v8bf16", "float", "<8 x bfloat>") + _ROUND_INSTRUCTION

_U8_INSTRUCTION = _quarters("xllm_dot_u8i8", "llvm.aarch64.neon.usdot.v4i32.v16i8", "i32", "<16 x i8>")

# a = (a - 128) + 128, where a - 128 is signed: flips the top bit, and takes off the dot product of -128 and b
_U8_WITH_SIGNED = """
define linkonce_odr <16 x i32> @xllm_dot_u8i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %s = xor <16 x i32> %a, splat (i32 -2139062144)
  %r = call <16 x i32> @xllm_dot_i8i8(<16 x i32> %acc, <16 x i32> %s, <16 x i32> %b)
  %o = call <16 x i32> @xllm_dot_i8i8(<16 x i32> zeroinitializer, <16 x i32> splat (i32 -2139062144), <16 x i32> %b)
  %d = sub <16 x i32> %r, %o
  ret <16 x i32> %d
}
"""

_SIGNED = _quarters("xllm_dot_i8i8", "llvm.aarch64.neon.sdot.v4i32.v16i8", "i32", "<16 x i8>")

# as bytes, 4-bit values are the same signed and unsigned
_U4 = """
define linkonce_odr <16 x i32> @xllm_dot_u4i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b) {
  %r = call <16 x i32> @xllm_dot_i8i8(<16 x i32> %acc, <16 x i32> %a, <16 x i32> %b)
  ret <16 x i32> %r
}
"""

# the conversion makes NaN 0
_ROUND_I32 = """
declare <16 x float> @llvm.rint.v16f32(<16 x float>)
declare <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float>)
define linkonce_odr <16 x i32> @xllm_round_i32(<16 x float> %v) {
  %near = call <16 x float> @llvm.rint.v16f32(<16 x float> %v)
  %r = call <16 x i32> @llvm.fptosi.sat.v16i32.v16f32(<16 x float> %near)
  ret <16 x i32> %r
}
"""


def arm_intrinsics(isa: Isa) -> str:
    """The LLVM text for one Arm level."""
    bf16 = _BF16 if isa.has_bf16_dot else DOT_WITH_FMA + ROUND_BF16
    int8 = _U8_INSTRUCTION if "+i8mm" in isa.features else _U8_WITH_SIGNED
    return LOOPED_16 + LOOPED_SPREAD + LOOPED_32 + _ROUND_I32 + bf16 + int8 + _SIGNED + _U4
