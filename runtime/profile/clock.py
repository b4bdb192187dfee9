"""The time stamps' counter as nanoseconds of `time.perf_counter_ns`. Owns the calibration.

The counter of an x86 processor runs at one rate whatever the cores' clock (Intel's manual, volume 3, "Invariant TSC"),
so two pairs of (counter, clock), far enough apart, say everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_TRIES = 16
_APART_NS = 50_000_000  # a pair is exact to some 100 ns, so the rate to some millionths


class Clock:
    """Started when recording begins; `nanoseconds` reads the second pair."""

    def __init__(self, counter: Callable[[], int]) -> None:
        """`counter` reads the counter that the stamps are of."""
        self._ticks = counter
        self._first = self._pair()

    def _pair(self) -> tuple[int, int]:
        """(counter, nanoseconds) of the try that the fewest nanoseconds lie around."""
        tries = []
        for _ in range(_TRIES):
            before = time.perf_counter_ns()
            ticks = int(self._ticks())
            after = time.perf_counter_ns()
            tries.append((after - before, ticks, (before + after) // 2))
        _, ticks, at = min(tries)
        return ticks, at

    def nanoseconds(self, stamps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Stamps as nanoseconds on `perf_counter_ns`'s clock. Waits where the two pairs would be too close."""
        ticks, at = self._first
        left = at + _APART_NS - time.perf_counter_ns()
        if left > 0:
            time.sleep(left / 1e9)
        now, then = self._pair()
        rate = (then - at) / (now - ticks)
        return (stamps - ticks).astype(np.float64) * rate + at
