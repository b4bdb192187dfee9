"""The LLVM text of intrinsics in plain operations, for levels that have no instruction for them: masked access by short
loops, the bf16 dot product by multiply and add, rounding to bf16."""

from __future__ import annotations

# A vector's first elements go through a buffer: without masked access LLVM would emit sixteen branches for each.
_COPY = """
define linkonce_odr i32 @xllm_copy_BITS(ptr %to, ptr %from, i32 %n) {
entry:
  %some = icmp sgt i32 %n, 0
  br i1 %some, label %copy, label %done
copy:
  %i = phi i32 [ 0, %entry ], [ %next, %copy ]
  %a = getelementptr iBITS, ptr %from, i32 %i
  %b = getelementptr iBITS, ptr %to, i32 %i
  %v = load iBITS, ptr %a, align BYTES
  store iBITS %v, ptr %b, align BYTES
  %next = add i32 %i, 1
  %more = icmp slt i32 %next, %n
  br i1 %more, label %copy, label %done
done:
  ret i32 0
}
define linkonce_odr <16 x iBITS> @xllm_load_first_iBITS(ptr %p, i32 %n) {
  %buffer = alloca <16 x iBITS>, align 32
  store <16 x iBITS> zeroinitializer, ptr %buffer, align 32
  %copied = call i32 @xllm_copy_BITS(ptr %buffer, ptr %p, i32 %n)
  %r = load <16 x iBITS>, ptr %buffer, align 32
  ret <16 x iBITS> %r
}
define linkonce_odr i32 @xllm_store_first_iBITS(ptr %p, <16 x iBITS> %v, i32 %n) {
  %buffer = alloca <16 x iBITS>, align 32
  store <16 x iBITS> %v, ptr %buffer, align 32
  %copied = call i32 @xllm_copy_BITS(ptr %p, ptr %buffer, i32 %n)
  ret i32 0
}
"""

LOOPED_16 = (
    _COPY.replace("BITS", "16").replace("BYTES", "2")
    + """
define linkonce_odr <16 x float> @xllm_load_first_bf16(ptr %p, i32 %n) {
  %v = call <16 x i16> @xllm_load_first_i16(ptr %p, i32 %n)
  %r = call <16 x float> @xllm_widen(<16 x i16> %v)
  ret <16 x float> %r
}
define linkonce_odr i32 @xllm_store_first_bf16(ptr %p, <16 x float> %v, i32 %n) {
  %w = call <16 x i16> @xllm_round_bf16(<16 x float> %v)
  %r = call i32 @xllm_store_first_i16(ptr %p, <16 x i16> %w, i32 %n)
  ret i32 %r
}
"""
)

LOOPED_32 = (
    _COPY.replace("BITS", "32").replace("BYTES", "4")
    + """
define linkonce_odr <16 x float> @xllm_load_first_f32(ptr %p, i32 %n) {
  %v = call <16 x i32> @xllm_load_first_i32(ptr %p, i32 %n)
  %r = bitcast <16 x i32> %v to <16 x float>
  ret <16 x float> %r
}
define linkonce_odr i32 @xllm_store_first_f32(ptr %p, <16 x float> %v, i32 %n) {
  %w = bitcast <16 x float> %v to <16 x i32>
  %r = call i32 @xllm_store_first_i32(ptr %p, <16 x i32> %w, i32 %n)
  ret i32 %r
}
"""
)

LOOPED_SPREAD = """
; 16 elements to every other place from %to on
define linkonce_odr i32 @xllm_spread_i16(ptr %to, ptr %from) {
entry:
  br label %copy
copy:
  %i = phi i32 [ 0, %entry ], [ %next, %copy ]
  %j = shl i32 %i, 1
  %a = getelementptr i16, ptr %from, i32 %i
  %b = getelementptr i16, ptr %to, i32 %j
  %v = load i16, ptr %a, align 2
  store i16 %v, ptr %b, align 2
  %next = add i32 %i, 1
  %more = icmp slt i32 %next, 16
  br i1 %more, label %copy, label %done
done:
  ret i32 0
}
"""

DOT_WITH_FMA = """
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
"""

ROUND_BF16 = """
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
