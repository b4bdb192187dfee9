"""Compares two models' logits at the same positions: KL divergence, how often they agree, and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Loss:
    """Over `positions`: mean KL(reference || other) in nats, and the share at which both prefer the same token."""

    kl: float
    top1: float
    positions: int


@dataclass(frozen=True, slots=True)
class TextLoss:
    """The loss on a text, and both models' perplexity of it: exp of the mean loss of the tokens that follow."""

    loss: Loss
    reference_perplexity: float
    perplexity: float


def compare(reference: NDArray[np.float32], other: NDArray[np.float32]) -> Loss:
    """The loss of logits [positions, vocab]. A row that is finite on one side only makes it infinite."""
    return compare_on(reference, other, np.full(len(reference), -1, np.int32)).loss


def compare_on(reference: NDArray[np.float32], other: NDArray[np.float32], following: NDArray[np.integer]) -> TextLoss:
    """The same, and perplexities, where `following` is the token after each position, or -1 where none is known."""
    kl = np.empty(len(reference))
    surprise: list[tuple[float, float]] = []
    for i, (p, q) in enumerate(zip(reference, other, strict=True)):  # a row at a time: a row of a vocabulary is large
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        with np.errstate(invalid="ignore"):
            kl[i] = np.sum(np.exp(log_p) * (log_p - log_q))
        if following[i] >= 0:
            surprise.append((-log_p[following[i]], -log_q[following[i]]))
    kl = np.where(np.isfinite(kl), np.maximum(kl, 0), np.inf)  # below 0 is rounding
    agree = np.argmax(reference, axis=1) == np.argmax(other, axis=1)
    with np.errstate(over="ignore"):
        before, after = np.exp(np.mean(surprise, axis=0)) if surprise else (np.nan, np.nan)
    return TextLoss(Loss(float(kl.mean()), float(agree.mean()), len(kl)), float(before), float(after))


def merge(parts: Sequence[Loss]) -> Loss:
    """The loss over the positions of all parts."""
    count = sum(part.positions for part in parts)
    return Loss(
        sum(part.kl * part.positions for part in parts) / count,
        sum(part.top1 * part.positions for part in parts) / count,
        count,
    )


def _log_softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = row.astype(np.float64)
    wide -= wide.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))
