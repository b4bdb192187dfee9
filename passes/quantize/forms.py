"""The forms of quantization that have a name, and what passes make them. Owns the spelling of `--quantize`; imports
nothing but errors, since option parsing asks it before anything slow is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from xllm_compiler.errors import XllmError

GROUPS: Final = (32, 64, 128)
GRIDS: Final = (16, 32)
_DEFAULT_GROUP: Final = {8: 0, 4: 32}
_DEFAULT_GRID: Final = 32
_ALIASES: Final = {"int8": "w8a8", "int4": "w4a8"}
MIXED: Final = "mixed"
"""A choice among forms by what they lose: 4 bits, and 8 where that pays most (`quant_eval.mixed_precision`)."""
_KV: Final = "kv8"
_HEADS: Final = (*_ALIASES, "w8a8", "w8a16", "w4a8", "w4a16", _KV)
_HELP: Final = (
    "int8, int4, mixed, kv8, or wNaM[-gG][-asym][-gridR][-kv8] such as int8-kv8, w4a8-grid16, w4a8-g64, w4a16-g128-asym"
)


@dataclass(frozen=True, slots=True)
class QuantForm:
    """Linear layers on weights of `weights` bits, with a scale per `group` values (0: per row), and zero points where
    `zeros`; their inputs rounded to 8 bits by row (before 8-bit weights in groups: by group), or (activations=16) as
    they are; and a cache of `kv` bits. 16 bits stand for what the model has. `grid`: weights of 4 bits with a scale per
    row, and every so many values on a grid of their own (ir/quant.py)."""

    weights: int
    activations: int = 8
    group: int = 0
    zeros: bool = False
    kv: int = 16
    grid: int = 0

    def __str__(self) -> str:
        """The canonical spelling, which says everything: w8a8, w4a8-grid32, w4a16-g128-asym-kv8, kv8."""
        if self.weights == 16:
            return _KV
        group = f"-g{self.group}" if self.group else f"-grid{self.grid}" if self.grid else ""
        zeros, kv = "-asym" if self.zeros else "", f"-{_KV}" if self.kv == 8 else ""
        return f"w{self.weights}a{self.activations}{group}{zeros}{kv}"

    @property
    def rotate(self) -> bool:
        """Whether weights are rotated where that pays: by rows of 8 bits. Of 4-bit weights it was seen to lose more."""
        return self.weights == self.activations == 8

    @property
    def options(self) -> str:
        """What quantize-weights is told of it: bits=4,grid=32."""
        group = f",group={self.group}" if self.group else f",grid={self.grid}" if self.grid else ""
        return f"bits={self.weights}{group}{',zeros=true' if self.zeros else ''}{',rotate=true' if self.rotate else ''}"

    def passes(self) -> tuple[str, ...]:
        """The passes that make it of a module of plain linear layers."""
        weights = (f"quantize-weights{{{self.options}}}",) if self.weights < 16 else ()
        rows = ("quantize-rows",) if self.activations == 8 else ()
        return (*weights, *rows, *(("quantize-kv",) if self.kv == 8 else ()))


NARROW: Final = QuantForm(4, grid=16)
WIDE: Final = QuantForm(8)
"""What mixed chooses between."""


def parse_form(text: str) -> QuantForm:
    """The form that `text` names: `int8` is w8a8, `int4` is w4a8-grid32; any case. Raises kind "option"."""
    head, *suffixes = text.strip().lower().split("-")
    if head == _KV and not suffixes:
        return QuantForm(16, 16, kv=8)
    found = re.fullmatch(r"w(\d+)a(\d+)", _ALIASES.get(head, head))
    if found is None:
        near = get_close_matches(head, (*_HEADS, MIXED), 1)
        raise XllmError(
            "option",
            f"--quantize {text!r} is not a form",
            help=f"{f'did you mean {near[0]}? ' if near else ''}{_HELP}",
        )
    weights, activations = int(found[1]), int(found[2])
    if weights not in _DEFAULT_GROUP or activations not in (8, 16):
        raise XllmError(
            "option",
            f"--quantize {text!r}: weights of {weights} bits by activations of {activations}",
            help="weights have 8 or 4 bits, activations 8, or 16 for those of the model's own dtype",
        )
    given = [suffix for suffix in suffixes if re.fullmatch(r"g(rid)?\d+", suffix)]
    for suffix in suffixes:
        if suffix not in given and suffix not in ("asym", _KV):
            raise XllmError("option", f"--quantize {text!r}: {suffix!r} is not known", help=_HELP)
    if len(given) > 1 or len(set(suffixes)) < len(suffixes):
        raise XllmError("option", f"--quantize {text!r} says twice what it wants", help=_HELP)
    zeros, kv = "asym" in suffixes, 8 if _KV in suffixes else 16
    if (given and given[0].startswith("grid")) or (not given and not zeros and weights == 4 and activations == 8):
        grid = int(given[0].removeprefix("grid")) if given else _DEFAULT_GRID
        if grid not in GRIDS or weights != 4 or activations != 8 or zeros:
            raise XllmError(
                "option",
                f"--quantize {text!r}: grids of {grid}",
                help="grid16 or grid32, of w4a8, and without -asym: every grid has a zero point",
            )
        return QuantForm(4, 8, kv=kv, grid=grid)
    group = int(given[0][1:]) if given else _DEFAULT_GROUP[weights]
    if given and group not in GROUPS:
        raise XllmError(
            "option",
            f"--quantize {text!r}: groups of {group}",
            help="g32, g64 or g128; without it 8 bits have a scale per row, w4a8 a grid for 32 values, w4a16 a scale",
        )
    if weights == 8 and "asym" in suffixes:
        raise XllmError(
            "option",
            f"--quantize {text!r}: zero points are for weights of 4 bits",
            help="at 8 bits they gain next to nothing; leave out -asym",
        )
    return QuantForm(weights, activations, group, zeros, kv)
