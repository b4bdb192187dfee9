"""The LLVM text of the native team of threads: one call runs one step on all members, and barriers synchronise them.
`team_machine` has the few functions that differ between architectures.

It runs any `int32_t step(const int64_t *args, int32_t member, int32_t team)`. Every library that `NativeModule` builds
with an entry function exports, with the C calling convention:

    int32_t xllm_team_join(void *ctx, int32_t member)       member 1 .. team-1; returns 0 after xllm_team_stop
    int32_t xllm_team_run(void *ctx, void *step, const int64_t *args)    called by member 0; returns the first non-zero
                                                            status of any member, else 0, after all have finished
    int32_t xllm_team_stop(void *ctx)                       makes all members leave xllm_team_join; not during a run
    int64_t xllm_team_ticks(void)                           the counter that time stamps are taken from

`ctx` is 192 zeroed bytes, aligned to 64, that outlive every joined member. The caller sets `team` and nothing else:

    offset 0    i32 epoch        one more for each run; members wait on it      4  i32 sleepers waiting on it
    offset 64   i32 finished     epoch of the last run that all have finished  68  i32 sleepers waiting on it
    offset 128  i32 done         132 i32 status    136 i32 stop    140 i32 team    144 i64 step    152 i64 args

A barrier is 64 zeroed bytes: i32 arrived, i32 generation, i32 sleepers. It needs no reset between runs.

`xllm_team_stamp(stamps, index)`, for steps only, writes the counter to the i64 `stamps[index]`. `stamps` is null unless
the step is profiled, and then it costs a call and a comparison. Reading the counter does not serialise: up to some ten
ns of one kernel's last stores count as the next kernel's time. `xllm_team_ticks` defines which counter it is.

From Python (the GIL is released inside a `ctypes.CDLL` call, so a `threading.Thread` per member is enough):

    library = ctypes.CDLL(path)
    memory = ctypes.create_string_buffer(192 + 63); ctx = (ctypes.addressof(memory) + 63) & ~63
    ctypes.c_int32.from_address(ctx + 140).value = team
    threading.Thread(target=library.xllm_team_join, args=(c_void_p(ctx), m), daemon=True).start()  # 0 < m < team
    step = ctypes.cast(library.xllm_fn_step, ctypes.c_void_p)
    status = library.xllm_team_run(ctypes.c_void_p(ctx), step, (ctypes.c_int64 * n)(...))
    library.xllm_team_stop(ctypes.c_void_p(ctx)); join the threads; only then free the memory

A run may start before all members have joined: it waits for them. With `team` 1 it calls the step directly.

A member waits with the processor's pause for some 10 us, then with sched_yield up to some 80 us, then on a futex.
sched_yield lets a team that has more members than there are free cores make progress. (Drepper, "Futexes Are Tricky":
the sleeper counts itself before the system compares the word, and the waker changes the word before it reads the count.
So no wake-up is lost.)
"""

from __future__ import annotations

from xllm_compiler.kernels.tir.native.team_machine import MACHINES

CTX_BYTES = 192
CTX_TEAM_OFFSET = 140
BARRIER_BYTES = 64

_TEAM = """
; returns when *word is no longer value
define internal void @xllm_team_wait(ptr %word, i32 %value, ptr %sleepers) noinline nounwind {
entry:
  %start = call i64 @xllm_team_ticks()
  %limit = call i64 @xllm_pause_ticks()
  %yield_limit = shl i64 %limit, 3
  br label %look
look:
  %now = load atomic i32, ptr %word acquire, align 4
  %same = icmp eq i32 %now, %value
  br i1 %same, label %wait, label %done
wait:
  %tick = call i64 @xllm_team_ticks()
  %waited = sub i64 %tick, %start
  %short = icmp ult i64 %waited, %limit
  br i1 %short, label %pause, label %longer
pause:
  call void @xllm_pause()
  br label %look
longer:
  %medium = icmp ult i64 %waited, %yield_limit
  br i1 %medium, label %yield, label %sleep
yield:
  %ignored = call i64 @xllm_yield()
  br label %look
sleep:
  %address = ptrtoint ptr %word to i64
  %wide = zext i32 %value to i64
  %before = atomicrmw add ptr %sleepers, i32 1 seq_cst
  %woken = call i64 @xllm_futex(i64 %address, i64 128, i64 %wide)
  %after = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  br label %look
done:
  ret void
}

; *word = value, and whoever sleeps on it wakes
define internal void @xllm_team_signal(ptr %word, i32 %value, ptr %sleepers) nounwind {
entry:
  %old = atomicrmw xchg ptr %word, i32 %value seq_cst
  %count = load atomic i32, ptr %sleepers seq_cst, align 4
  %none = icmp eq i32 %count, 0
  br i1 %none, label %done, label %wake
wake:
  %address = ptrtoint ptr %word to i64
  %woken = call i64 @xllm_futex(i64 %address, i64 129, i64 2147483647)
  br label %done
done:
  ret void
}

define hidden i32 @xllm_team_barrier(ptr %barrier, i32 %team) noinline nounwind {
entry:
  %alone = icmp sle i32 %team, 1
  br i1 %alone, label %done, label %arrive
arrive:
  %generation = getelementptr i8, ptr %barrier, i64 4
  %sleepers = getelementptr i8, ptr %barrier, i64 8
  %before = load atomic i32, ptr %generation acquire, align 4
  %old = atomicrmw add ptr %barrier, i32 1 seq_cst
  %count = add i32 %old, 1
  %last = icmp eq i32 %count, %team
  br i1 %last, label %open, label %wait
open:
  store atomic i32 0, ptr %barrier release, align 4
  %next = add i32 %before, 1
  call void @xllm_team_signal(ptr %generation, i32 %next, ptr %sleepers)
  br label %done
wait:
  call void @xllm_team_wait(ptr %generation, i32 %before, ptr %sleepers)
  br label %done
done:
  ret i32 0
}

define i32 @xllm_team_join(ptr %ctx, i32 %member) noinline nounwind {
entry:
  %epoch_sleepers = getelementptr i8, ptr %ctx, i64 4
  %finished = getelementptr i8, ptr %ctx, i64 64
  %finished_sleepers = getelementptr i8, ptr %ctx, i64 68
  %done = getelementptr i8, ptr %ctx, i64 128
  %status_at = getelementptr i8, ptr %ctx, i64 132
  %stop_at = getelementptr i8, ptr %ctx, i64 136
  %team_at = getelementptr i8, ptr %ctx, i64 140
  %step_at = getelementptr i8, ptr %ctx, i64 144
  %args_at = getelementptr i8, ptr %ctx, i64 152
  br label %next
next:
  %seen = phi i32 [ 0, %entry ], [ %epoch, %finish ], [ %epoch, %signal ]
  call void @xllm_team_wait(ptr %ctx, i32 %seen, ptr %epoch_sleepers)
  %epoch = load atomic i32, ptr %ctx acquire, align 4
  %stop = load atomic i32, ptr %stop_at acquire, align 4
  %stopped = icmp ne i32 %stop, 0
  br i1 %stopped, label %home, label %work
work:
  %team = load i32, ptr %team_at, align 4
  %step = load ptr, ptr %step_at, align 8
  %args = load ptr, ptr %args_at, align 8
  %status = call i32 %step(ptr %args, i32 %member, i32 %team)
  %good = icmp eq i32 %status, 0
  br i1 %good, label %finish, label %bad
bad:
  %first = cmpxchg ptr %status_at, i32 0, i32 %status seq_cst seq_cst
  br label %finish
finish:
  %others = sub i32 %team, 1
  %old = atomicrmw add ptr %done, i32 1 seq_cst
  %count = add i32 %old, 1
  %last = icmp eq i32 %count, %others
  br i1 %last, label %signal, label %next
signal:
  call void @xllm_team_signal(ptr %finished, i32 %epoch, ptr %finished_sleepers)
  br label %next
home:
  ret i32 0
}

define i32 @xllm_team_run(ptr %ctx, ptr %step, ptr %args) noinline nounwind {
entry:
  %team_at = getelementptr i8, ptr %ctx, i64 140
  %team = load i32, ptr %team_at, align 4
  %alone = icmp sle i32 %team, 1
  br i1 %alone, label %single, label %many
single:
  %only = call i32 %step(ptr %args, i32 0, i32 1)
  ret i32 %only
many:
  %epoch_sleepers = getelementptr i8, ptr %ctx, i64 4
  %finished = getelementptr i8, ptr %ctx, i64 64
  %finished_sleepers = getelementptr i8, ptr %ctx, i64 68
  %done = getelementptr i8, ptr %ctx, i64 128
  %status_at = getelementptr i8, ptr %ctx, i64 132
  %step_at = getelementptr i8, ptr %ctx, i64 144
  %args_at = getelementptr i8, ptr %ctx, i64 152
  store ptr %step, ptr %step_at, align 8
  store ptr %args, ptr %args_at, align 8
  store atomic i32 0, ptr %done release, align 4
  store atomic i32 0, ptr %status_at release, align 4
  %before = load atomic i32, ptr %finished acquire, align 4
  %epoch = add i32 %before, 1
  call void @xllm_team_signal(ptr %ctx, i32 %epoch, ptr %epoch_sleepers)
  %mine = call i32 %step(ptr %args, i32 0, i32 %team)
  call void @xllm_team_wait(ptr %finished, i32 %before, ptr %finished_sleepers)
  %theirs = load atomic i32, ptr %status_at acquire, align 4
  %good = icmp eq i32 %mine, 0
  %status = select i1 %good, i32 %theirs, i32 %mine
  ret i32 %status
}

define i32 @xllm_team_stop(ptr %ctx) noinline nounwind {
  %stop_at = getelementptr i8, ptr %ctx, i64 136
  %epoch_sleepers = getelementptr i8, ptr %ctx, i64 4
  store atomic i32 1, ptr %stop_at release, align 4
  %epoch = load atomic i32, ptr %ctx acquire, align 4
  %next = add i32 %epoch, 1
  call void @xllm_team_signal(ptr %ctx, i32 %next, ptr %epoch_sleepers)
  ret i32 0
}

define hidden i32 @xllm_team_stamp(ptr %stamps, i32 %index) noinline nounwind {
entry:
  %off = icmp eq ptr %stamps, null
  br i1 %off, label %done, label %write
write:
  %ticks = call i64 @xllm_team_ticks()
  %wide = sext i32 %index to i64
  %at = getelementptr i64, ptr %stamps, i64 %wide
  store i64 %ticks, ptr %at, align 8
  br label %done
done:
  ret i32 0
}
"""


def team_llvm(machine: str) -> str:
    """The whole runtime as one LLVM module for `machine`, without a target."""
    return _TEAM + MACHINES[machine]
