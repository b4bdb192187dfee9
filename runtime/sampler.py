"""From a row of logits to a token: penalties, filters, random numbers and log-probabilities of one sequence.

A row is sampled alone, so the answer cannot depend on its neighbours in the batch.

The order is vLLM's. Log-probabilities come from the raw row. Then allowed ids, bias, minimum length and penalties
apply; then greedy, or temperature, min-p, top-k, top-p and a draw. The draw is Philox, keyed by (seed, sequence), with
the position as counter. It depends on nothing else. Ties go to the lowest id.

It is fast on a vocabulary of 150k since nothing sorts all of it. Where the request changes no logit, most logits are
not even read: a threshold provably keeps the wanted candidates, and blocks whose maximum is below it are skipped.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.token_set import TokenBias, TokenSet
from xllm_compiler.step.interface import BLOCK

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_BLOCKS = 64  # rows of the folded view from which a top-n threshold is read
_BLOCK = 256  # weights that are summed in one go when drawing
_BINS = 4096  # of the nucleus search
_NEAR = (6.0, 12.0)  # distances from the largest logit within which nearly all mass is, nearly always
_REACH = 32.0  # distance from the largest logit that the bins cover; e**-32 of its probability is next to nothing
_FEW = 8  # one block in so many may be wanted; of more, looking at all is as fast
_MASK64 = (1 << 64) - 1
_INSIDE = np.arange(BLOCK)


@dataclass(slots=True)
class RawLogprobs:
    """Chosen token first, then the best alternatives from the most likely down; token text is not known here."""

    tokens: list[int]
    logprobs: list[float]
    ranks: list[int]


def not_finite() -> XllmError:
    return XllmError(
        "internal",
        "the model produced logits that are not numbers",
        help="check the weights for NaN or infinity: xllm-compile verify",
    )


def largest(row: F32, maxima: F32) -> int:
    """The lowest id of the largest logit, where `maxima` are those of its blocks. Raises XllmError("internal") when the
    row holds NaN, or its largest value is not finite."""
    block = int(maxima.argmax())  # the first of the largest; NaN counts as largest
    if not math.isfinite(maxima[block]):
        raise not_finite()
    start = block * BLOCK
    return start + int(row[start : start + BLOCK].argmax())


def top_ids(row: F32, n: int) -> I64:
    """Ids of the n largest values, largest first, ties by lowest id. `row` must hold no NaN."""
    size = len(row)
    n = min(n, size)
    if n == 1:
        return np.array([row.argmax()], np.int64)
    columns = size // _BLOCKS
    if n < columns:
        # At least n columns have a maximum >= the n-th largest maximum, so at least n values are >= it.
        maxima = row[: columns * _BLOCKS].reshape(_BLOCKS, columns).max(axis=0)
        candidates = np.flatnonzero(row >= np.partition(maxima, columns - n)[columns - n])
    else:
        candidates = np.arange(size)
    order = np.argsort(-row[candidates], kind="stable")[:n]
    return candidates[order].astype(np.int64, copy=False)


class Scratch:
    """Buffers of one row, shared by all samplers of a thread.

    Fresh arrays of this size would be mapped and unmapped at every use. The page faults cost more than the arithmetic.
    """

    __slots__ = ("blocks", "row", "weights", "work")

    def __init__(self, vocab: int) -> None:
        blocks = -(-vocab // _BLOCK)
        self.row: F32 = np.zeros(vocab, np.float32)
        self.work: F32 = np.zeros(vocab, np.float32)
        self.blocks: F32 = np.zeros((blocks, _BLOCK), np.float32)  # the same memory as `weights`, and a tail of zeros
        self.weights: F32 = self.blocks.reshape(-1)[:vocab]

    def take(self, row: F32) -> F32:
        """A copy of `row`: rows of a batch are aligned differently, and vector code may round its edges differently.

        Raises XllmError("internal") when it holds NaN or +inf.
        """
        np.copyto(self.row, row)
        if not math.isfinite(self.row.max()):
            raise not_finite()
        return self.row


def raw_logprobs(row: F32, token: int, n: int, scratch: Scratch) -> RawLogprobs:
    """Log-probabilities of `token` and of the n most likely ones under softmax(row), for a row that `take` gave."""
    top = row.max()
    weights = np.subtract(row, top, out=scratch.weights)
    np.exp(weights, out=weights)
    norm = float(top) + math.log(float(weights.sum()))
    rank = int(np.count_nonzero(row > row[token])) + 1
    out = RawLogprobs([token], [float(row[token]) - norm], [rank])
    if n:
        for place, other in enumerate(top_ids(row, n).tolist(), 1):
            if other != token:
                out.tokens.append(other)
                out.logprobs.append(float(row[other]) - norm)
                out.ranks.append(place)
    return out


def nucleus(values: F32, weights: F32, top_p: float) -> I64:
    """Indices of the fewest values, from the largest down, whose mass is >= top_p of all; at least one; in no given
    order.

    `weights` are exp(values - max). First only the likeliest values are read, which is nearly always enough. They go
    into bins by their distance from the maximum, and only the bin in which the mass is reached gets sorted. A broad
    distribution may take most of the vocabulary, and sorting that would take tens of milliseconds.
    """
    want = top_p * float(weights.sum())
    top = values.max()
    for near in _NEAR:
        ids = np.flatnonzero(values >= top - np.float32(near))
        if float(weights[ids].sum()) >= want:
            break
    else:
        ids = np.arange(len(values))
    distance, weights = top - values[ids], weights[ids]
    bins = np.minimum(distance * np.float32(_BINS / _REACH), np.float32(_BINS - 1)).astype(np.int32)
    mass = np.cumsum(np.bincount(bins, weights, _BINS))
    last = min(int(np.searchsorted(mass, want, side="left")), int(bins.max()))
    border = np.flatnonzero(bins == last)
    border = border[np.argsort(distance[border], kind="stable")]
    reached = np.cumsum(weights[border], dtype=np.float64) + (mass[last - 1] if last else 0.0)
    count = min(int(np.searchsorted(reached, want, side="left")) + 1, len(border))
    kept: I64 = ids[np.concatenate([np.flatnonzero(bins < last), border[:count]])]
    return kept


def pick(blocks: F32, u: float) -> int:
    """Where the running sum of `blocks` [n, _BLOCK], row by row, passes u times its total; 0 <= u < 1. Never a zero.

    Two levels: sums of the rows first, then inside one row, since a running sum over the whole vocabulary is slow.
    """
    upto = np.cumsum(blocks.sum(axis=1), dtype=np.float64)
    # Below the total, so that the block found has weight.
    at = min(u * float(upto[-1]), math.nextafter(float(upto[-1]), 0.0))
    block = int(np.searchsorted(upto, at, side="right"))
    inside = np.cumsum(blocks[block], dtype=np.float64)
    rest = at - (float(upto[block - 1]) if block else 0.0)
    index = int(np.searchsorted(inside, rest, side="right"))
    if index >= blocks.shape[1]:  # the two levels round differently, so `rest` may reach the end: take the last weight
        index = int(np.searchsorted(inside, inside[-1], side="left"))
    return block * int(blocks.shape[1]) + index


def prompt_ids(params: SamplingParams, prompt: NDArray[np.integer[Any]]) -> I64:
    """What samplers need of the prompt, for all sequences of a request: its ids, unique and rising."""
    return np.unique(prompt).astype(np.int64) if params.repetition_penalty != 1.0 else np.empty(0, np.int64)


def contains(rising: I64, ids: I64) -> NDArray[np.bool_]:
    """Which of `ids` are in `rising`."""
    if not len(rising):
        return np.zeros(len(ids), bool)
    at = np.minimum(np.searchsorted(rising, ids), len(rising) - 1)
    found: NDArray[np.bool_] = rising[at] == ids
    return found


class RowSampler:
    """The sampling state of one sequence: its parameters, its random key, and which tokens it has seen."""

    __slots__ = (
        "_allowed",
        "_bias",
        "_counts",
        "_drawn",
        "_key",
        "_params",
        "_penalised",
        "_prompt",
        "_scratch",
        "_slots",
        "_stop",
        "_vocab",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        index: int,
        prompt: I64,
        eos_ids: Sequence[int],
        vocab: int,
        scratch: Scratch,
    ) -> None:
        """`eos_ids` end the request as stop_token_ids do: both are forbidden before `min_tokens`. `prompt`: what
        `prompt_ids` gave. `seed` is used when params has none. Lists are those of `params`, not copies."""
        p = params
        self._params = p
        self._vocab = vocab
        self._scratch = scratch
        self._key = np.array([(seed if p.seed is None else p.seed) & _MASK64, index], np.uint64)
        self._stop: list[NDArray[np.integer[Any]]] = [np.array([t for t in eos_ids if t < vocab], np.int64)]
        if isinstance(p.stop_token_ids, TokenSet):
            self._stop.append(p.stop_token_ids.array)
        self._bias = p.logit_bias if isinstance(p.logit_bias, TokenBias) and len(p.logit_bias) else None
        self._allowed = p.allowed_token_ids.array if isinstance(p.allowed_token_ids, TokenSet) else None
        self._penalised = bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0)
        self._prompt = prompt
        self._slots: dict[int, int] = {}  # of a token that was drawn: its place in the two arrays
        self._drawn = array("q")
        self._counts = array("f")

    def sample(self, row: F32, maxima: F32, position: int, generated: int) -> tuple[int, RawLogprobs | None]:
        """The next token, which will stand at `position`, after `generated` tokens of output. `maxima`: of the blocks
        of `row`.

        Raises XllmError: "internal" when the row holds NaN or +inf, "request" when the request forbids every token.
        """
        p = self._params
        if p.logprobs is None and not self._touches(generated):
            best = largest(row, maxima)
            if p.greedy:
                return best, None
            ids = self._candidates(row[best], maxima)
            if ids is not None:
                return self._draw_of(row, ids, position), None
        row = self._scratch.take(row)
        work = self._modified(row, generated)
        best = int(work.argmax())
        if not math.isfinite(work[best]):
            raise XllmError(
                "request", "no token is allowed here: allowed_token_ids, logit_bias or min_tokens forbid all"
            )
        token = best if p.greedy else self._draw(work, position)
        if self._penalised:
            self._count(token)
        return token, None if p.logprobs is None else raw_logprobs(row, token, p.logprobs, self._scratch)

    def _count(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._drawn))
        if slot == len(self._drawn):
            self._drawn.append(token)
            self._counts.append(0.0)
        self._counts[slot] += 1.0

    def _touches(self, generated: int) -> bool:
        """Whether the request changes logits after `generated` tokens; then the row's maxima do not hold."""
        forbids = self._forbids_stop(generated)
        return self._penalised or forbids or self._bias is not None or self._allowed is not None

    def _forbids_stop(self, generated: int) -> bool:
        return generated < self._params.min_tokens and any(map(len, self._stop))

    def _candidates(self, top: np.float32, maxima: F32) -> I64 | None:
        """Ids, rising, among which are all that min-p and top-k leave; None when these are most, or all are left."""
        p = self._params
        wanted = np.ones(len(maxima), bool)
        if p.min_p > 0.0:
            wanted &= self._scaled(maxima, top, np.empty_like(maxima)) >= np.float32(math.log(p.min_p))
        if 0 < p.top_k <= len(maxima):
            # At least k blocks, so at least k values, reach the k-th largest maximum.
            wanted &= maxima >= np.partition(maxima, len(maxima) - p.top_k)[len(maxima) - p.top_k]
        blocks = np.flatnonzero(wanted)
        if len(blocks) * _FEW > len(maxima):
            return None
        ids = (blocks[:, None] * BLOCK + _INSIDE).reshape(-1)
        return ids[: int(np.searchsorted(ids, self._vocab))]

    def _scaled(self, row: F32, top: np.float32, out: F32) -> F32:
        """(row - top) / temperature. Subtracting the maximum first keeps a tiny temperature from overflowing."""
        values = np.subtract(row, top, out=out)
        if self._params.temperature != 1.0:
            np.divide(values, np.float32(self._params.temperature), out=values)
        return values

    def _modified(self, row: F32, generated: int) -> F32:
        if not self._touches(generated):
            return row
        forbid_stop = self._forbids_stop(generated)
        work = self._scratch.work
        if self._allowed is None:
            np.copyto(work, row)
        else:
            work.fill(-np.inf)
            work[self._allowed] = row[self._allowed]
        if self._bias is not None:
            work[self._bias.array] += self._bias.values_array
        if forbid_stop:
            for ids in self._stop:
                work[ids] = -np.inf
        if self._penalised:
            self._penalise(work)
        return work

    def _penalise(self, work: F32) -> None:
        p = self._params
        ids = np.frombuffer(self._drawn, np.int64) if self._drawn else np.empty(0, np.int64)
        if p.repetition_penalty != 1.0:
            self._repeat(work, self._prompt)
            # Those of the prompt were seen to just now.
            self._repeat(work, ids[~contains(self._prompt, ids)])
        if len(ids):
            counts = np.frombuffer(self._counts, np.float32)
            work[ids] -= np.float32(p.frequency_penalty) * counts + np.float32(p.presence_penalty)

    def _repeat(self, work: F32, seen: I64) -> None:
        values = work[seen]
        factor = np.float32(self._params.repetition_penalty)
        work[seen] = np.where(values > 0, values / factor, values * factor)

    def _draw(self, work: F32, position: int) -> int:
        """A draw from a row with a finite maximum; `work` is left with the scaled values."""
        values = self._scaled(work, work.max(), self._scratch.work)
        weights = np.exp(values, out=self._scratch.weights)
        ids = self._filtered(values, weights)
        u = self._uniform(position)
        if ids is None:
            return pick(self._scratch.blocks, u)
        return int(ids[pick(weights[ids][None], u)])

    def _draw_of(self, row: F32, ids: I64, position: int) -> int:
        """The same draw, where min-p and top-k leave nothing but some of `ids`, the largest of all among them."""
        values = self._scratch.work[: len(ids)]
        np.take(row, ids, out=values)
        self._scaled(values, values.max(), values)
        weights = np.exp(values, out=self._scratch.weights[: len(ids)])
        kept = self._filtered(values, weights)
        assert kept is not None
        return int(ids[kept[pick(weights[kept][None], self._uniform(position))]])

    def _filtered(self, values: F32, weights: F32) -> I64 | None:
        """Indices, rising, that min-p, top-k and top-p leave, in this order; None for all."""
        p = self._params
        ids: I64 | None = None
        if p.min_p > 0.0:
            ids = np.flatnonzero(values >= np.float32(math.log(p.min_p)))
        if 0 < p.top_k < self._vocab:
            ids = top_ids(values, p.top_k) if ids is None else ids[top_ids(values[ids], p.top_k)]
        if p.top_p < 1.0:
            ids = nucleus(values, weights, p.top_p) if ids is None else ids[nucleus(values[ids], weights[ids], p.top_p)]
        return None if ids is None else np.sort(ids)

    def _uniform(self, position: int) -> float:
        """A number in [0, 1) that depends on seed, sequence and position only."""
        bits = np.random.Philox(key=self._key, counter=[position, 0, 0, 0])
        return float(np.random.Generator(bits).random())
