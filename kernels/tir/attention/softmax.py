"""The softmax of attention over one KV block: from the scores of some rows to their weights. Owns `Softmax`."""

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
"""`part(at, place, seen)`, for the row whose scores are row `at` of `scores`."""


class Softmax(ABC):
    """What `Tiles` inherits. `at`: a row of `scores`; `place`: one of the query block."""

    kernel: Attend
    state: State
    shift: Expr
    """Where the places of the query block begin in the state."""
    scores: Expr
    tops: Expr
    """A row's largest score of the block at hand."""

    @abstractmethod
    def seen_here(self, place: Expr) -> tuple[Expr, Expr]:
        """[first, last) of the block's 64 tokens that a row sees; of no row that sees none is first < last."""

    def all_see_all(self, place: Expr, here: Expr) -> Expr:
        """Whether `here` rows from `place` on see the whole block."""
        first, _ = self.seen_here(place + here - 1)
        _, last = self.seen_here(place)
        return last - first == BLOCK

    @abstractmethod
    def write_weights(self, at: Expr, place: Expr, weights: list[Expr], only_seen: OnlySeen) -> None:
        """Keeps the weights of a row, whose scores nobody reads any more, for the values."""

    def weigh_rows(self, place: Expr, here: Expr, at: Expr) -> None:
        """Turns the scores of `here` rows from `place` on, 64 each from row `at` of `scores` on, into weights and
        brings the rows' maxima, sums and accumulators up to date.

        A row's softmax is one long chain, in which each instruction waits for the one before. So all rows go through
        one part of it before any goes through the next: parts are short enough for the processor to see some rows.
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
        """What is done to the rows one after the other; what a part leaves for the next lies in `scores` and `tops`."""
        return [self.find_top, self.weigh]

    @staticmethod
    def only_seen(seen: Seen) -> OnlySeen:
        """`only_seen(i, value, other)`: vector i of the block's tokens, with `other` where a row does not see one."""

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
        """tops = the largest score."""
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
        """The rest, from the largest score on."""
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
        """The scores of a row before `scale`, which are in `scores` from now on."""
        return [load(self.scores, at * BLOCK + i * LANES, "f32") for i in range(BLOCK_PAGES)]
