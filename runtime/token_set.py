"""Token ids that a request lists: a set, and a mapping to numbers, checked and compact.

A list may be as long as a request's body, and every token of every sequence looks it up. So it is checked and made
unique once, by a few calls over the whole list, and all sequences and prompts of the request share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_LISTED_IDS = 1 << 20
_LARGEST = (1 << 31) - 1


def _ids(values: Sequence[object]) -> NDArray[np.int32]:
    """Raises ValueError, whose argument is the first item that is no token id."""
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, values))):
        try:
            ids = np.array(values, np.int64)
        except OverflowError:
            pass
        else:
            if not len(ids) or (ids.min() >= 0 and ids.max() <= _LARGEST):
                return ids.astype(np.int32)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= _LARGEST:
            raise ValueError(value)
    raise AssertionError


class TokenSet(Sequence[int]):
    """Unique ids, rising."""

    __slots__ = ("_inside", "array")

    def __init__(self, values: Sequence[object]) -> None:
        """Raises ValueError, whose argument is the first item that is no token id."""
        self.array: NDArray[np.int32] = np.unique(_ids(values))
        self._inside: bytes | None = None

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        found = self.array[index]
        return found.tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    def __contains__(self, token: object) -> bool:
        """One look-up, whatever the length."""
        if self._inside is None:  # as long as the largest id, which is within the vocabulary by now
            inside = np.zeros(self.largest + 1, np.uint8)
            inside[self.array] = 1
            self._inside = inside.tobytes()
        return isinstance(token, int) and 0 <= token < len(self._inside) and self._inside[token] == 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    @property
    def largest(self) -> int:
        """-1 when there are none."""
        return int(self.array[-1]) if len(self.array) else -1

    @property
    def nbytes(self) -> int:
        return self.array.nbytes + self.largest + 1


class TokenBias(Mapping[int, float]):
    """Ids, rising, and a number for each."""

    __slots__ = ("array", "values_array")

    def __init__(self, ids: Sequence[object], numbers: Sequence[float]) -> None:
        """Raises ValueError, whose argument is the first item that is no token id. `ids` are unique."""
        array = _ids(ids)
        order = np.argsort(array, kind="stable")
        self.array: NDArray[np.int32] = array[order]
        self.values_array: NDArray[np.float32] = np.array(numbers, np.float64).astype(np.float32)[order]

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    def __getitem__(self, token: int) -> float:
        at = int(np.searchsorted(self.array, token))
        if at == len(self.array) or self.array[at] != token:
            raise KeyError(token)
        return float(self.values_array[at])

    def __repr__(self) -> str:
        return repr(dict(self))

    @property
    def largest(self) -> int:
        """-1 when there are none."""
        return int(self.array[-1]) if len(self.array) else -1

    @property
    def nbytes(self) -> int:
        return self.array.nbytes + self.values_array.nbytes
