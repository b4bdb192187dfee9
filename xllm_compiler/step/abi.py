"""The argument block of a native program: int64 words in an order that follows from the function's interface.

    int32_t SYMBOL(const int64_t *words, int32_t member, int32_t team)

The compiler emits reads of these words and the runtime writes them; both ask here for a word's place. Owns the order
and the names; must not know what a word's value is. Words that hold addresses come first, then sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from xllm_compiler.step.interface import Function

Space = Literal["arena", "weights", "state", "input", "output", "dim", "barrier", "profile"]

SYMBOL_PREFIX: Final = "xllm_fn_"
"""What the name of every program begins with; a library exports these and its team of threads."""


def symbol_of(function: str, variant: int = 0) -> str:
    """The name of a function's program; `variant` 0 is the one that runs any step."""
    return f"{SYMBOL_PREFIX}{function}" + (f"_{variant}" if variant else "")


@dataclass(frozen=True, slots=True)
class ArgumentBlock:
    """The words of one function. `arena`, `weights` (the mapped file), each state, input and output: addresses.
    `barrier`: 64 zeroed bytes and a line of 64 for each member. `profile`: 0, or where time stamps go."""

    words: tuple[tuple[Space, str], ...]

    @classmethod
    def of(cls, function: Function, dims: Iterable[str]) -> ArgumentBlock:
        """`dims`: the symbols of all sizes, in any order."""
        return cls(
            (
                ("arena", ""),
                ("weights", ""),
                *(("state", name) for name in function.states),
                *(("input", spec.name) for spec in function.inputs),
                *(("output", spec.name) for spec in function.outputs),
                *(("dim", name) for name in sorted(dims)),
                ("barrier", ""),
                ("profile", ""),
            )
        )

    def __len__(self) -> int:
        return len(self.words)

    def place(self, space: Space, name: str = "") -> int:
        """The index of a word."""
        return self.words.index((space, name))

    def dims(self) -> dict[str, int]:
        """The index of every size's word, in their order; they lie side by side."""
        return {name: i for i, (space, name) in enumerate(self.words) if space == "dim"}

    def sizes(self) -> slice:
        """All sizes' words at once."""
        places = self.dims().values()
        return slice(min(places, default=0), max(places, default=-1) + 1)
