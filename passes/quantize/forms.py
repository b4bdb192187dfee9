"""The named forms of quantization, as `--quantize` spells them, and the passes that make them.

Each weight format defines its part of the spelling (`weight_formats`). This module imports nothing slow, since option
parsing imports it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from xllm_compiler.errors import XllmError
from xllm_compiler.weight_formats import FORMATS, GridFormat, IntegerFormat, WeightFormat

_ALIASES: Final = {"int8": "w8a8", "int4": "w4a8"}
MIXED: Final = "mixed"
"""A choice among forms by what they lose: 4 bits, and 8 where that pays most (`quant_eval.mixed_precision`)."""
MIXED_MAX_KL: Final = 0.03
"""What it may lose unless told otherwise, in nats: it is for those who want less than 4 bits lose."""
_KV: Final = "kv8"
_KV_MAX_KL: Final = 0.01
_ACTIVATIONS: Final = (8, 16)
_HELP: Final = (
    "int8, int4, mixed, kv8, or wNaM[-gG][-asym][-gridR][-kv8] such as int8-kv8, w4a8-grid16, w4a8-g64, w4a16-g128-asym"
)


@dataclass(frozen=True, slots=True)
class QuantForm:
    """Linear layers on weights in the format `weights` (None: as they are); their inputs rounded to 8 bits as that asks
    for, or (activations=16) as they are; and a cache of `kv` bits. 16 bits stand for what the model has."""

    weights: WeightFormat | None
    activations: int = 8
    kv: int = 16

    def __str__(self) -> str:
        """The canonical spelling, which says everything: w8a8, w4a8-grid32, w4a16-g128-asym-kv8, kv8."""
        if self.weights is None:
            return _KV
        head, words = self.weights.option
        return f"{head}a{self.activations}{words}{f'-{_KV}' if self.kv == 8 else ''}"

    @property
    def rotate(self) -> bool:
        """Whether weights are rotated where that pays: by rows of 8 bits."""
        return self.weights is not None and self.weights.rotates and self.activations == 8

    @property
    def preparation(self) -> tuple[str, ...]:
        """Those of `passes` that round nothing: the module computes what it did, and loses less when it is rounded."""
        return ("rotate-stream",) if self.weights is not None and self.activations == 8 else ()

    @property
    def max_kl(self) -> float:
        """What it may lose unless told otherwise, in nats."""
        return _KV_MAX_KL if self.weights is None else self.weights.max_kl

    @property
    def options(self) -> str:
        """What quantize-weights is told of it: format=q4grid32."""
        return f"format={self.weights}{',rotate=true' if self.rotate else ''}"

    def passes(self, wide: Sequence[str] = ()) -> tuple[str, ...]:
        """The passes that make it of a module of plain linear layers; weights that read a checkpoint tensor of the
        names `wide` get 8 bits."""
        if self.weights is None:
            weights: tuple[str, ...] = ()
        else:  # a weight is quantized once, so the exceptions come first
            only = (f"quantize-weights{{{WIDE.options},only={':'.join(wide)}}}",) if wide else ()
            weights = (*only, f"quantize-weights{{{self.options}}}")
        rows = ("quantize-rows",) if self.activations == 8 else ()  # wherever the weight is quantized
        return (*self.preparation, *weights, *rows, *(("quantize-kv",) if self.kv == 8 else ()))


NARROW: Final = QuantForm(GridFormat(16))
WIDE: Final = QuantForm(IntegerFormat(8))
"""What mixed chooses between."""


def parse_form(text: str) -> QuantForm:
    """The form that `text` names: `int8` is w8a8, `int4` is w4a8-grid32; any case. Raises kind "option"."""
    head, *suffixes = text.strip().lower().split("-")
    if head == _KV and not suffixes:
        return QuantForm(None, 16, 8)
    found = re.fullmatch(r"([a-z0-9]+)a(\d+)", _ALIASES.get(head, head))
    known = {each for cls in FORMATS for each in cls.heads}
    if found is None or (found[1] not in known and not re.fullmatch(r"w\d+", found[1])):
        heads = [f"{each}a{activations}" for each in sorted(known) for activations in _ACTIVATIONS]
        near = get_close_matches(head, (*_ALIASES, *heads, _KV, MIXED), 1)
        raise XllmError(
            "option",
            f"--quantize {text!r} is not a form",
            help=f"{f'did you mean {near[0]}? ' if near else ''}{_HELP}",
        )
    activations = int(found[2])
    if found[1] not in known or activations not in _ACTIVATIONS:
        raise XllmError(
            "option",
            f"--quantize {text!r}: weights of {found[1].removeprefix('w')} bits by activations of {activations}",
            help="weights have 8 or 4 bits, activations 8, or 16 for those of the model's own dtype",
        )
    words = [suffix for suffix in suffixes if suffix != _KV]
    for word in words:
        if not any(re.fullmatch(cls.words, word) for cls in FORMATS):
            raise XllmError("option", f"--quantize {text!r}: {word!r} is not known", help=_HELP)
    kinds = [re.sub(r"grid\d+|g\d+", "g", suffix) for suffix in suffixes]
    if len(set(kinds)) < len(kinds):
        raise XllmError("option", f"--quantize {text!r} says twice what it wants", help=_HELP)
    return QuantForm(_weights(text, found[1], words, activations), activations, 8 if _KV in suffixes else 16)


def _weights(text: str, head: str, words: list[str], activations: int) -> WeightFormat:
    try:
        for cls in FORMATS:
            if (made := cls.parse_option(head, words, activations)) is not None:
                break
        else:
            raise XllmError("option", f"{head} has no {' and '.join(words)}", help=_HELP)
        if activations == 8 and made.rows is None:
            raise XllmError("option", f"{head} by activations of 8", help=f"{head}a16")
        return made
    except XllmError as error:
        raise XllmError("option", f"--quantize {text!r}: {error.message}", help=error.help) from None
