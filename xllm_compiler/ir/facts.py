"""What is known about an op, on its class. Owns the words for it; must not know any op.

Every op class says all of this, or inherits it from its family (`opdef.op` refuses a class that does not):

    docstring   its equation
    infer       result types, from operands and attributes
    interp      the reference meaning, in numpy
    rows        what it does to the rows of its operands (ir/rows.py)
    noise       whether its results are rounded
    work        what one element of its results takes
    cost        bytes and operations, as formulas (ir/cost.py); not where `work` is NONE
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Op


class Word(Enum):
    """A word that classes say about themselves, and what they mean by it."""

    def __init__(self, word: str, meaning: str) -> None:
        self.word = word
        self.meaning = meaning


class Noise(Word):
    """How the results of two right implementations may differ on the same operands."""

    MOVES = "moves", "Not at all: they are elements of the operands, perhaps converted, negated or bounded."
    EXACT = "exact", "Not at all: they are flags, integers or stored forms, defined to the bit."
    ROUNDS = "rounds", "In the last place: they are computed in a wider type, in some order, and rounded."


class Work(Word):
    """What one element of the results takes."""

    NONE = "none", "Nothing runs: leaves, views, waits."
    COPY = "copy", "A load and a store."
    LIGHT = "light", "A few operations: cheaper to repeat than to store and load again."
    HEAVY = "heavy", "A function value, a quotient, a pass over a row: too dear to repeat."
    DOT = "dot", "A sum of products of two operands: what matrix units are for."


class Rows(ABC):
    """What an op does to the rows of its operands. `str()` of it is a few words for the table of ops.

    A row is what an operand holds at one index of an axis, such as the values of one token. An op treats rows one by
    one when row i of its results is made from row i of its operands alone, in the same way for every i.
    """

    @abstractmethod
    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        """The axis of the results along which the rows lie that operand number `operand` has along `axis`.

        A text where they are not treated one by one: why, to stand behind the op's name. `op` is `Any` because a rule
        reads the fields of the ops that name it.
        """

    def begin(self, op: Op, axis: int) -> str | None:
        """Why the rows differ that a result has along `axis` and no operand has; None where all are alike."""
        return "numbers the tokens by their index in the step, not by their position"
