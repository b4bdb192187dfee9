"""Work stealing between the members of a team, so that all finish together: `by_turns`; and the words that say what is
left of the work.

Every member begins with an equal, contiguous part and takes it piece by piece, front to back, as memory is read best;
then it takes pieces of the others' parts, from their ends. So a member that was held up, by whoever else wants its core
or its memory, keeps nobody waiting for longer than a piece lasts. (Blumofe and Leiserson, "Scheduling multithreaded
computations by work stealing": the owner takes from one end and whoever has nothing left from the other.)

A part is one 64-bit word, the first piece left in the low half and the end in the high one; who takes a piece compares
and swaps. Only a part's owner fills it, at the beginning of the kernel, and no kernel ends before it is empty: so
whoever comes early finds an empty part and not an old one. Words of a member are a cache line of their own. Two kernels
between which members do not meet must not share a word: one might be filled for the second while somebody still takes
from it for the first.

Which member does a piece must change no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import Scalars, address, share
from xllm_compiler.kernels.tir.codegen.kernel import Arg

Expr = Any
WORDS: Final = 8
"""Of a member: 64 bytes."""
TURNS: Final = Arg("turns", "i64", f"members, {WORDS}", written=True)
"""A kernel's own word of each member's line, zero before the first run; it needs no reset between runs."""

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


def by_turns(total: Expr, turns: Expr, member: Expr, team: Expr, body: Callable[[Expr, Expr], None]) -> None:
    """Emits `body(piece, onward)` for each of `total` pieces, on one member each. `onward`: how far it is to the piece
    that this member probably takes next, 1 or -1; 0 at the end of its share, where the others probably are too."""
    first, last = share(total, member, team)
    with T.attr("default", "pragma_import_llvm", _WORDS):
        T.evaluate(T.call_extern("int32", "xllm_turns_fill", address(turns, member * WORDS), first, last))
    with T.serial(0, team) as other:
        whose = T.bind(T.truncmod(member + other, team) * WORDS)

        def take() -> Expr:
            return T.call_extern("int32", "xllm_turns_take", address(turns, whose), other)

        piece = Scalars(1, "int32")
        piece[0] = take()
        with T.While(piece[0] >= 0):
            here = T.bind(piece[0])
            own = T.if_then_else(here + 1 == last, T.int32(0), T.int32(1))
            body(here, T.bind(T.if_then_else(other == 0, own, T.int32(-1))))
            piece[0] = take()
