"""Work stealing between the members of a team, so that all finish together: `steal_work`.

Each member has a queue, which begins with an equal, contiguous part of the work. The member takes pieces from the front
of its queue, since memory is read fastest front to back. When its queue is empty, it steals pieces from the ends of the
others' queues. So a member whose core or memory is busy with something else delays the team by one piece at most.
(Blumofe and Leiserson, "Scheduling multithreaded computations by work stealing".)

A queue is one 64-bit word: the first piece that is left in the low half, the end in the high half. A piece is taken by
compare and swap. Only its owner fills a queue, at the beginning of the kernel, and no kernel ends before all queues are
empty. So a member that comes early finds an empty queue, not an old one. Each member's queues have a cache line of
their own, lest members slow each other down.

Two kernels without a barrier between them must not use the same queues. A queue might be filled for the second kernel
while another member still steals from it for the first.

Which member computes a piece must change no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import Scalars, address, share
from xllm_compiler.kernels.tir.codegen.kernel import Arg

Expr = Any
WORDS: Final = 8
"""Queues of one member: 64 bytes, a cache line."""
WORK_QUEUES: Final = Arg("turns", "i64", f"members, {WORDS}", written=True)
"""The kernel's queue in the cache line of each member. Zero before the first run; no reset is needed between runs."""

_WORDS = """
define linkonce_odr i32 @xllm_turns_fill(ptr %word, i32 %first, i32 %last) {
  %low = zext i32 %first to i64
  %wide = zext i32 %last to i64
  %high = shl i64 %wide, 32
  %both = or i64 %high, %low
  store atomic i64 %both, ptr %word release, align 8
  ret i32 0
}
; the piece that is now the caller's, or -1
define linkonce_odr i32 @xllm_turns_take(ptr %word, i32 %other) {
entry:
  %theirs = icmp ne i32 %other, 0
  %start = load atomic i64, ptr %word acquire, align 8
  br label %look
look:
  %seen = phi i64 [ %start, %entry ], [ %found, %try ]
  %first = trunc i64 %seen to i32
  %wide = lshr i64 %seen, 32
  %last = trunc i64 %wide to i32
  %some = icmp ult i32 %first, %last
  br i1 %some, label %try, label %none
try:
  %front = add i64 %seen, 1
  %back = sub i64 %seen, 4294967296
  %left = select i1 %theirs, i64 %back, i64 %front
  %swap = cmpxchg ptr %word, i64 %seen, i64 %left acq_rel acquire
  %found = extractvalue { i64, i1 } %swap, 0
  %mine = extractvalue { i64, i1 } %swap, 1
  br i1 %mine, label %took, label %look
took:
  %end = sub i32 %last, 1
  %piece = select i1 %theirs, i32 %end, i32 %first
  ret i32 %piece
none:
  ret i32 -1
}
"""


def steal_work(total: Expr, queues: Expr, member: Expr, team: Expr, body: Callable[[Expr, Expr], None]) -> None:
    """Emits `body(piece, onward)` for each of `total` pieces, on one member each.

    `onward`: the distance to the piece that this member probably takes next, 1 or -1. It is 0 for the last piece of its
    own share, when the others have probably finished theirs too."""
    first, last = share(total, member, team)
    with T.attr("default", "pragma_import_llvm", _WORDS):
        T.evaluate(T.call_extern("int32", "xllm_turns_fill", address(queues, member * WORDS), first, last))
    with T.serial(0, team) as other:
        whose = T.bind(T.truncmod(member + other, team) * WORDS)

        def take() -> Expr:
            return T.call_extern("int32", "xllm_turns_take", address(queues, whose), other)

        piece = Scalars(1, "int32")
        piece[0] = take()
        with T.While(piece[0] >= 0):
            here = T.bind(piece[0])
            own = T.if_then_else(here + 1 == last, T.int32(0), T.int32(1))
            body(here, T.bind(T.if_then_else(other == 0, own, T.int32(-1))))
            piece[0] = take()
