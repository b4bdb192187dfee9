"""Stop strings: finds them in a growing text, and the ends of a text that may become one.

Each string has an automaton (Knuth, Morris, Pratt). A character costs one look-up for each string, however long they
are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence


class StopWords(Sequence[str]):
    """The strings of a request, shared by all its sequences."""

    __slots__ = ("_borders", "_words", "longest")

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(dict.fromkeys(words))
        self._borders: tuple[array[int], ...] | None = None
        self.longest = max((len(word) for word in self._words), default=0)

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._words[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._words == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._words)

    @property
    def borders(self) -> tuple[array[int], ...]:
        """For each string, for each length of its beginning: the longest shorter beginning that this one ends in."""
        if self._borders is None:
            self._borders = tuple(_borders(word) for word in self._words)
        return self._borders

    @property
    def nbytes(self) -> int:
        return sum(6 * len(word) + 100 for word in self._words)


def _borders(word: str) -> array[int]:
    out = array("H", [0, 0])
    matched = 0
    for char in word[1:]:
        while matched and char != word[matched]:
            matched = out[matched]
        matched += char == word[matched]
        out.append(matched)
    return out


class StopWatch:
    """One text's progress through the strings."""

    __slots__ = ("_matched", "_words")

    def __init__(self, words: StopWords) -> None:
        self._words = words
        self._matched = [0] * len(words)

    def feed(self, text: str) -> bool:
        """Take in more of the text; whether some string ends in it."""
        ended = False
        for index, (word, borders) in enumerate(zip(self._words, self._words.borders, strict=True)):
            matched, size, first = self._matched[index], len(word), word[0]
            if not matched and first not in text:
                continue
            for char in text:
                if matched == size:
                    matched = borders[matched]
                while matched and char != word[matched]:
                    matched = borders[matched]
                matched += char == word[matched]
                ended = ended or matched == size
            self._matched[index] = matched
        return ended

    @property
    def held(self) -> int:
        """How many of the text's last characters may be the beginning of a string, less than the longest has."""
        longest = 0
        for matched, borders in zip(self._matched, self._words.borders, strict=True):
            if matched == self._words.longest:
                matched = borders[matched]
            if matched > longest:
                longest = matched
        return longest
