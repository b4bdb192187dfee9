"""`Softmax`: attention's softmax over one KV block, from the scores of some rows to their weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.attention.state import BLOCK, BLOCK_PAGES, State
from xllm_compiler.kernels.tir.codegen.builder import fma, horizontal_max, keep_between, load, splat, store
from xllm_compiler.kernels.tir.codegen.vmath import exp_of_negative, maximum, tanh
from xllm_compiler.kernels.tir.isa.levels import LANES

if TYPE_CHECKING:
    from xllm_compiler.kernels.tir.attention.attend import Attend

Expr = Any
Seen = tuple[Expr, Expr] | None
"""The tokens lo .. hi-1 of a block that a row sees; None: all."""
OnlySeen = Callable[[int, Expr, float], Expr]
PartOfWeighing = Callable[[Expr, Expr, Seen], None]
"""`part(at, place, seen)` emits one part of a row's softmax. The row's scores are row `at` of `scores`."""


class Softmax(ABC):
    """The softmax part of `Tiles`. `at`: a row of `scores`; `place`: a row of the query block."""

    kernel: Attend
    state: State
    shift: Expr
    """Where the places of the query block begin in the state."""
    scores: Expr
    tops: Expr
    """Each row's largest score of the current block."""

    @abstractmethod
    def seen_here(self, place: Expr) -> tuple[Expr, Expr]:
        """[first, last) of the block's 64 tokens that a row sees. first >= last for a row that sees none."""

    def all_see_all(self, place: Expr, here: Expr) -> Expr:
        """Whether `here` rows from `place` on see the whole block."""
        first, _ = self.seen_here(place + here - 1)
        _, last = self.seen_here(place)
        return last - first == BLOCK

    @abstractmethod
    def write_weights(self, at: Expr, place: Expr, weights: list[Expr], only_seen: OnlySeen) -> None:
        """Emits the store of a row's weights, with which values are multiplied. Its scores are not read any more."""

    def weigh_rows(self, place: Expr, here: Expr, at: Expr) -> None:
        """Computes the weights of `here` rows from `place` on, and updates the rows' maxima, sums and accumulators. The
        scores are 64 for each row, from row `at` of `scores` on.

        In a row's softmax each instruction waits for the one before. So it is cut into parts, and all rows go through
        one part before any goes through the next. Parts are so short that the processor overlaps several rows.
        """
        whole = T.bind(self.all_see_all(place, here))
        for part in self.parts_of_weighing():
            with T.If(whole):
                with T.Then(), T.serial(0, here) as i:
                    part(T.bind(at + i), T.bind(place + i), None)
                with T.Else(), T.serial(0, here) as i:
                    one = T.bind(place + i)
                    seen = self.seen_here(one)
                    with T.If(seen[0] < seen[1]), T.Then():
                        part(T.bind(at + i), one, seen)

    def parts_of_weighing(self) -> list[PartOfWeighing]:
        """The parts of the softmax, in order. A part leaves its results for the next in `scores` and `tops`."""
        return [self.find_top, self.weigh]

    @staticmethod
    def only_seen(seen: Seen) -> OnlySeen:
        """`only_seen(i, value, other)` is vector i of the block's tokens, with `other` for tokens that are not seen."""

        def only(i: int, value: Expr, other: float) -> Expr:
            if seen is None:
                return value
            return keep_between(value, seen[0] - i * LANES, seen[1] - i * LANES, other)

        return only

    @property
    def factor(self) -> Expr:
        """What a score is multiplied by last."""
        return splat(self.kernel.softcap or self.kernel.scale)

    def find_top(self, at: Expr, place: Expr, seen: Seen) -> None:
        """Emits tops = the row's largest score."""
        kernel, factor, only_seen = self.kernel, self.factor, self.only_seen(seen)
        scores = []
        for i, score in enumerate(self.read_scores(at, place)):
            if kernel.softcap:
                score = tanh(score * splat(kernel.scale) * splat(1.0 / kernel.softcap))
            scores.append(T.bind(score))
            if kernel.softcap:
                store(self.scores, at * BLOCK + i * LANES, scores[i], "f32")
        tops = [T.bind(only_seen(i, score * factor, float("-inf"))) for i, score in enumerate(scores)]
        top = T.bind(maximum(T.bind(maximum(tops[0], tops[1])), T.bind(maximum(tops[2], tops[3]))))
        T.buffer_store(self.tops, horizontal_max(top), [place])

    def weigh(self, at: Expr, place: Expr, seen: Seen) -> None:
        """Emits the rest of the softmax, once the largest score is known."""
        row, factor, only_seen = T.bind(self.shift + place), self.factor, self.only_seen(seen)
        before, highest = T.bind(self.state.maxima[row]), T.bind(self.tops[place])
        now = T.bind(T.Select(before < highest, highest, before))
        T.buffer_store(self.state.maxima, now, [row])
        lower = T.bind(splat(0.0) - splat(now))
        with T.If(before < highest), T.Then():
            shrink = exp_of_negative(splat(before) + lower)
            store(self.state.sums, row * LANES, load(self.state.sums, row * LANES, "f32") * shrink, "f32")
            for vector in range(self.state.value_vectors):
                total = self.state.total(row, vector)
                store(self.state.totals, total, load(self.state.totals, total, "f32") * shrink, "f32")
        scores = [load(self.scores, at * BLOCK + i * LANES, "f32") for i in range(BLOCK_PAGES)]
        weights = [
            T.bind(only_seen(i, exp_of_negative(fma(score, factor, lower)), 0.0)) for i, score in enumerate(scores)
        ]
        self.write_weights(at, place, weights, only_seen)
        added = (weights[0] + weights[1]) + (weights[2] + weights[3])
        store(self.state.sums, row * LANES, load(self.state.sums, row * LANES, "f32") + added, "f32")

    def read_scores(self, at: Expr, place: Expr) -> list[Expr]:
        """A row's scores before `scale`. They are in `scores` afterwards."""
        return [load(self.scores, at * BLOCK + i * LANES, "f32") for i in range(BLOCK_PAGES)]
