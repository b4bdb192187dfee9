"""The functions of the team of threads that differ between architectures, as LLVM text:

    i64 @xllm_team_ticks()          a counter that runs at one rate on all cores
    i64 @xllm_pause_ticks()         by how much it grows in some 10 us
    void @xllm_pause()              waits for about as long as a cache line takes from another core
    i64 @xllm_yield()               sched_yield
    i64 @xllm_futex(i64 address, i64 operation, i64 value)      without a timeout
    @memcpy, @memmove, @memset      LLVM turns loops that copy or fill into calls of these, and no libc is linked

The copies are assembly so that LLVM does not turn them into calls of themselves.
"""

from __future__ import annotations

_X86 = """
define i64 @xllm_team_ticks() noinline nounwind {
  %ticks = call i64 @llvm.readcyclecounter()
  ret i64 %ticks
}
declare i64 @llvm.readcyclecounter()
; the time stamp counter, 2 to 4 GHz
define internal i64 @xllm_pause_ticks() nounwind {
  ret i64 30000
}
define internal void @xllm_pause() nounwind {
  call void asm sideeffect "pause", ""()
  ret void
}
define internal i64 @xllm_syscall(i64 %number, i64 %a, i64 %b, i64 %c) noinline nounwind {
  %r = call i64 asm sideeffect "xorl %r10d, %r10d\\0Asyscall",
    "={rax},{rax},{rdi},{rsi},{rdx},~{rcx},~{r10},~{r11},~{memory},~{dirflag},~{fpsr},~{flags}"(
    i64 %number, i64 %a, i64 %b, i64 %c)
  ret i64 %r
}
define internal i64 @xllm_yield() nounwind {
  %r = call i64 @xllm_syscall(i64 24, i64 0, i64 0, i64 0)
  ret i64 %r
}
define internal i64 @xllm_futex(i64 %address, i64 %operation, i64 %value) nounwind {
  %r = call i64 @xllm_syscall(i64 202, i64 %address, i64 %operation, i64 %value)
  ret i64 %r
}
define hidden ptr @memcpy(ptr %to, ptr %from, i64 %count) noinline nounwind {
  %r = call { i64, i64, i64 } asm sideeffect "rep movsb",
    "={rdi},={rsi},={rcx},0,1,2,~{memory},~{dirflag},~{fpsr},~{flags}"(ptr %to, ptr %from, i64 %count)
  ret ptr %to
}
define internal i64 @xllm_copy_down(ptr %to, ptr %from, i64 %count) noinline nounwind {
  %last = sub i64 %count, 1
  %to_end = getelementptr i8, ptr %to, i64 %last
  %from_end = getelementptr i8, ptr %from, i64 %last
  %r = call { i64, i64, i64 } asm sideeffect "std\\0Arep movsb\\0Acld",
    "={rdi},={rsi},={rcx},0,1,2,~{memory},~{dirflag},~{fpsr},~{flags}"(ptr %to_end, ptr %from_end, i64 %count)
  ret i64 0
}
define hidden ptr @memset(ptr %to, i32 %value, i64 %count) noinline nounwind {
  %r = call { i64, i64 } asm sideeffect "rep stosb",
    "={rdi},={rcx},0,1,{eax},~{memory},~{dirflag},~{fpsr},~{flags}"(ptr %to, i64 %count, i32 %value)
  ret ptr %to
}
"""

# 16 bytes at a time, then the rest byte by byte.
_ARM_COPY = (
    "subs x2, x2, #16", "b.lo 2f", "1: ldr q0, [x1], #16", "str q0, [x0], #16", "subs x2, x2, #16", "b.hs 1b",
    "2: adds x2, x2, #16", "b.eq 4f", "3: ldrb w3, [x1], #1", "strb w3, [x0], #1", "subs x2, x2, #1", "b.ne 3b", "4:",
)  # fmt: skip
_ARM_COPY_DOWN = (
    "add x0, x0, x2", "add x1, x1, x2",
    "subs x2, x2, #16", "b.lo 2f", "1: ldr q0, [x1, #-16]!", "str q0, [x0, #-16]!", "subs x2, x2, #16", "b.hs 1b",
    "2: adds x2, x2, #16", "b.eq 4f", "3: ldrb w3, [x1, #-1]!", "strb w3, [x0, #-1]!", "subs x2, x2, #1", "b.ne 3b",
    "4:",
)  # fmt: skip
_ARM_FILL = (
    "dup v0.16b, w1",
    "subs x2, x2, #16", "b.lo 2f", "1: str q0, [x0], #16", "subs x2, x2, #16", "b.hs 1b",
    "2: adds x2, x2, #16", "b.eq 4f", "3: strb w1, [x0], #1", "subs x2, x2, #1", "b.ne 3b", "4:",
)  # fmt: skip


def _lines(assembly: tuple[str, ...]) -> str:
    return "\\0A".join(assembly)


# The generic timer: its frequency differs from 19 MHz to 1 GHz, and cntfrq_el0 says it. `isb` waits some tens of
# cycles, where `yield` does nothing on most cores.
_ARM = f"""
define i64 @xllm_team_ticks() noinline nounwind {{
  %ticks = call i64 asm sideeffect "mrs $0, cntvct_el0", "=r,~{{memory}}"()
  ret i64 %ticks
}}
define internal i64 @xllm_pause_ticks() nounwind {{
  %rate = call i64 asm "mrs $0, cntfrq_el0", "=r"()
  %ticks = udiv i64 %rate, 100000
  ret i64 %ticks
}}
define internal void @xllm_pause() nounwind {{
  call void asm sideeffect "isb", "~{{memory}}"()
  ret void
}}
define internal i64 @xllm_yield() nounwind {{
  %r = call i64 asm sideeffect "svc #0", "={{x0}},{{x8}},~{{memory}},~{{cc}}"(i64 124)
  ret i64 %r
}}
define internal i64 @xllm_futex(i64 %address, i64 %operation, i64 %value) noinline nounwind {{
  %r = call i64 asm sideeffect "svc #0", "={{x0}},{{x8}},{{x0}},{{x1}},{{x2}},{{x3}},~{{memory}},~{{cc}}"(
    i64 98, i64 %address, i64 %operation, i64 %value, i64 0)
  ret i64 %r
}}
define hidden ptr @memcpy(ptr %to, ptr %from, i64 %count) noinline nounwind {{
  %r = call {{ i64, i64, i64 }} asm sideeffect "{_lines(_ARM_COPY)}",
    "={{x0}},={{x1}},={{x2}},0,1,2,~{{x3}},~{{v0}},~{{memory}},~{{cc}}"(ptr %to, ptr %from, i64 %count)
  ret ptr %to
}}
define internal i64 @xllm_copy_down(ptr %to, ptr %from, i64 %count) noinline nounwind {{
  %r = call {{ i64, i64, i64 }} asm sideeffect "{_lines(_ARM_COPY_DOWN)}",
    "={{x0}},={{x1}},={{x2}},0,1,2,~{{x3}},~{{v0}},~{{memory}},~{{cc}}"(ptr %to, ptr %from, i64 %count)
  ret i64 0
}}
define hidden ptr @memset(ptr %to, i32 %value, i64 %count) noinline nounwind {{
  %r = call {{ i64, i64 }} asm sideeffect "{_lines(_ARM_FILL)}",
    "={{x0}},={{x2}},0,1,{{x1}},~{{v0}},~{{memory}},~{{cc}}"(ptr %to, i64 %count, i32 %value)
  ret ptr %to
}}
"""

_MOVE = """
define hidden ptr @memmove(ptr %to, ptr %from, i64 %count) noinline nounwind {
entry:
  %a = ptrtoint ptr %to to i64
  %b = ptrtoint ptr %from to i64
  %distance = sub i64 %a, %b
  %clear = icmp uge i64 %distance, %count
  br i1 %clear, label %forward, label %backward
forward:
  %f = call ptr @memcpy(ptr %to, ptr %from, i64 %count)
  ret ptr %to
backward:
  %r = call i64 @xllm_copy_down(ptr %to, ptr %from, i64 %count)
  ret ptr %to
}
"""

MACHINES = {"x86_64": _X86 + _MOVE, "aarch64": _ARM + _MOVE}
"""The functions above by the kernel's name of the architecture."""
