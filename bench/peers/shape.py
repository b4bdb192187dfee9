"""What a row is, and what the machine could do at best in it: bytes and operations of the model's shape.

Owns arithmetic on sizes only. A limit is the larger of two times, reading every weight once and doing every operation;
reading the KV cache is left out, so no way to store it can beat a limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROMPT = 128
"""Tokens before the first in every row of decode and of start."""


@dataclass(frozen=True)
class Row:
    """One figure of a peer and format. `kind` is decode, prefill, start or memory."""

    name: str
    kind: str
    size: int = 0
    """Requests of decode, tokens of prefill."""
    new: int = 0
    """Tokens for each request of decode."""

    @property
    def title(self) -> str:
        """For a table."""
        if self.kind == "decode":
            return f"decode, batch {self.size}, tok/s"
        if self.kind == "prefill":
            return f"prefill of {self.size:,}, tok/s"
        return "start to first token, s" if self.kind == "start" else "peak resident memory, GB"

    @property
    def more_is_better(self) -> bool:
        return self.kind in ("decode", "prefill")


ROWS = (
    Row("decode-1", "decode", 1, 48),
    Row("decode-8", "decode", 8, 32),
    Row("decode-32", "decode", 32, 24),
    Row("prefill-512", "prefill", 512),
    Row("prefill-2048", "prefill", 2048),
    Row("start", "start"),
    Row("memory", "memory"),
)

# bits of a weight in the layers and in the vocabulary, scales included; int4 as llama.cpp's Q4_0 file has them
BITS = {"bf16": (16.0, 16.0), "int8": (8.0, 8.0), "int4": (4.5, 6.5625)}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, from its config."""

    layers: int
    linears: int
    """Weights of all linears of all layers."""
    vocabulary: int
    """Weights of the vocabulary projection."""
    attention: int
    """Multiply-adds of attention for one token and one token of context."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a Hugging Face config."""
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        linears = layers * (hidden * (heads + 2 * kv) * dim + heads * dim * hidden + 3 * hidden * inner)
        return cls(layers, linears, config["vocab_size"] * hidden, 2 * layers * heads * dim)

    def weight_bytes(self, form: str) -> float:
        """Bytes of all weights that a step reads, the vocabulary included."""
        layers, vocabulary = BITS[form]
        return (self.linears * layers + self.vocabulary * vocabulary) / 8

    def operations(self, row: Row) -> tuple[float, float]:
        """(in linears, in attention) of the step or prompt that a row measures; a multiply-add is two."""
        if row.kind == "decode":
            context = PROMPT + row.new / 2
            return 2.0 * row.size * (self.linears + self.vocabulary), 2.0 * row.size * self.attention * context
        return 2.0 * (row.size * self.linears + self.vocabulary), row.size * self.attention * float(row.size)

    def tokens(self, row: Row) -> int:
        """Tokens that a step makes, or a prompt has."""
        return row.size

    def intensity(self, row: Row, form: str) -> float:
        """Operations for a byte of weights."""
        return sum(self.operations(row)) / self.weight_bytes(form)

    def limit(self, row: Row, form: str, read: float, bf16: float, int8: float) -> float | None:
        """Tokens a second at best, given bytes and operations a second; None for rows without such a limit."""
        if row.kind not in ("decode", "prefill"):
            return None
        linears, attention = self.operations(row)
        # 8 and 4 bit weights can be multiplied as int8; attention cannot
        arithmetic = linears / (bf16 if form == "bf16" or not int8 else int8) + attention / bf16
        return self.tokens(row) / max(self.weight_bytes(form) / read, arithmetic)
