"""Weight formats: how a linear layer's weight is rounded to small integers, and how it lies in the weight file.

A format is known by one name everywhere: `q8`, `q4g32z`, `q4grid32`. Ops, layouts and kernels carry that name, and
`--quantize` has its own spelling of it, which `option` and `parse_option` translate. A new format is a class here, its
numbers in `ir/quant.py`, its bytes in `kernels/layouts.py`, and its kernels. Imports nothing slow: options and the
runtime ask it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Final, Self, TypeVar

from xllm_compiler.dims import Dim
from xllm_compiler.errors import Kind, XllmError

PANEL: Final = 64
"""Rows of a weight (output columns) that are stored together, and read as one stream."""
GLU_HALF: Final = PANEL // 2
QUAD: Final = 4
"""8-bit values that the integer dot instruction takes at once, along `in`."""
STEP: Final = 16
"""Rows of quantized activations are padded to a multiple of so many values, or to whole groups."""
LARGEST: Final = 127
"""Of a quantized activation, which is -127 .. 127."""
ROTATIONS: Final = (64, 16)
"""Blocks that are rotated, largest first: powers of 4, since their rotations scale by powers of 2, without loss."""
GRIDS: Final = (16, 32)
"""Lengths of the runs of `GridFormat`."""
GROUPS: Final = (32, 64, 128)
"""Groups that `--quantize` offers; checkpoints come with others."""
_HELP: Final = f"q8 or q4, then g and a multiple of {STEP} (g32), then z for zero points; or q4grid16, q4grid32"

Size = TypeVar("Size", int, Dim)


def _blocks(size: Size, of: int) -> Size:
    """size / of, rounded up."""
    return (size + (of - 1)) // of


@dataclass(frozen=True)
class RowFormat:
    """Activations of 8 bits, as the weights that they are multiplied by ask for them. Their sums are stored by `group`
    values along `in` (0: of the whole row). A scale is that of the row, or, `by_group`, of each group."""

    group: int = 0
    by_group: bool = False

    def padded(self, in_: Size) -> Size:
        """Length of a stored row: whole groups, or a multiple of `STEP`."""
        unit = self.group or STEP
        return _blocks(in_, unit) * unit

    def groups(self, in_: Size) -> Size:
        """Groups of a row of `in_` values; the last one may be short."""
        return _blocks(in_, self.group) if self.group else in_ * 0 + 1  # of the type of in_


class WeightFormat(ABC):
    """One way to round and store a weight [out, in].

    As values of ops it is integers u8 [out, in], scales [out, groups] and, with `zeros`, zero points u8 [out, groups];
    what they stand for is in `ir/quant.py`. In the weight file it is panels of bytes (`kernels/layouts.py`).
    """

    bits: int
    """Of a value in the weight file."""
    group: int
    """Values along `in` that share a scale; 0: the whole row."""
    zeros: bool
    """Whether each group has a zero point of its own."""

    heads: ClassVar[tuple[str, ...]]
    """How `--quantize` may begin to name it: w4 of w4a8-g32."""
    words: ClassVar[str]
    """A pattern of what may follow: g32, asym."""

    @abstractmethod
    def __str__(self) -> str:
        """The name, which `parse_format` reads."""

    @classmethod
    @abstractmethod
    def parse(cls, name: str) -> Self | None:
        """The inverse of str(), None for a name of another class. Raises kind "unsupported" for sizes that do not
        exist."""

    @property
    @abstractmethod
    def option(self) -> tuple[str, str]:
        """How `--quantize` names it, before and after the activations: ("w4", "-g32-asym")."""

    @classmethod
    @abstractmethod
    def parse_option(cls, head: str, words: Sequence[str], activations: int) -> Self | None:
        """The format that `--quantize` names so, None where that is one of another class. Raises kind "option" for
        sizes that are not offered."""

    @property
    @abstractmethod
    def max_kl(self) -> float:
        """What a model may lose unless `--max-kl` says otherwise: mean KL divergence in nats. Some ten times what the
        bundled model loses: beyond it something is wrong besides rounding, or the model does not bear the format."""

    @property
    @abstractmethod
    def error(self) -> float:
        """What normally distributed weights lose, relative to their size, rounded up."""

    @property
    @abstractmethod
    def zero(self) -> int:
        """The integer that stands for 0 where there are no zero points, as ops have it."""

    @property
    @abstractmethod
    def rows(self) -> RowFormat | None:
        """The 8-bit activations that it can be multiplied by; None: only those of the model's own dtype."""

    @property
    def rotates(self) -> bool:
        """Whether rotation pays, where activations have 8 bits. Weights of 4 bits were seen to lose more by it."""
        return False

    @property
    def scale_dtype(self) -> str:
        return "f16" if self.group else "f32"

    @property
    def scale_bytes(self) -> int:
        return 2 if self.group else 4

    @property
    def header_bytes(self) -> int:
        """Scales and zero points of one group of a panel."""
        return PANEL * (self.scale_bytes + self.zeros)

    def padded(self, in_: Size) -> Size:
        """`in` rounded up to whole groups; rows of 8-bit activations have this length."""
        return RowFormat(self.group).padded(in_)

    def groups(self, in_: Size) -> Size:
        """Groups of a row of `in_` values; the last one may be short."""
        return RowFormat(self.group).groups(in_)

    @abstractmethod
    def group_bytes(self, in_: int) -> int:
        """Bytes of one group of a panel, header and values."""

    def panel_bytes(self, in_: int) -> int:
        """Bytes of one panel."""
        return self.groups(in_) * self.group_bytes(in_)

    def shape(self, out: int, in_: int) -> tuple[int, int]:
        """The shape of a packed [out, in] weight, in bytes."""
        return (-(-out // PANEL), self.panel_bytes(in_))

    @abstractmethod
    def row_bytes(self, in_: Dim) -> Dim:
        """Bytes of a row's values, without scales and zero points: what a cost counts."""


@dataclass(frozen=True)
class IntegerFormat(WeightFormat):
    """w = (stored - zero) * scale, where `stored` has `bits` bits, unsigned. `zero` is the middle of their range, or,
    with `zeros`, a number of its own for each group. Named q8 (a scale per row), q4g32 (one for 32 of a row), q4g128z.

    As bytes, a panel of 64 rows is, group by group: 64 scales (f32 where a group is the whole row, else f16), 64 zero
    points (u8, with `zeros`), then the values: quads of 4 along `in` for each of the 64 rows. At 4 bits the byte of a
    value also holds, in its high half, the value 4 further along `in`.
    """

    bits: int
    group: int = 0
    zeros: bool = False

    heads: ClassVar[tuple[str, ...]] = ("w8", "w4")
    words: ClassVar[str] = r"g\d+|asym"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group < 0 or self.group % STEP:
            raise XllmError(
                "unsupported",
                f"no weights of {self.bits} bits in groups of {self.group}",
                help=f"8 or 4 bits, in groups of a multiple of {STEP}, or of 0: the whole row",
            )

    def __str__(self) -> str:
        return f"q{self.bits}{f'g{self.group}' if self.group else ''}{'z' if self.zeros else ''}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        found = re.fullmatch(r"q([1-9]\d{0,5})(?:g([1-9]\d{0,8}))?(z?)", name)
        return cls(int(found[1]), int(found[2] or 0), bool(found[3])) if found else None

    @property
    def option(self) -> tuple[str, str]:
        return f"w{self.bits}", f"{f'-g{self.group}' if self.group else ''}{'-asym' if self.zeros else ''}"

    @classmethod
    def parse_option(cls, head: str, words: Sequence[str], activations: int) -> Self | None:
        if head not in cls.heads or not all(re.fullmatch(cls.words, word) for word in words):
            return None
        bits, zeros = int(head[1:]), "asym" in words
        given = [int(word[1:]) for word in words if word != "asym"]
        if given and given[0] not in GROUPS:
            raise XllmError(
                "option",
                f"groups of {given[0]}",
                help="g32, g64 or g128; without it 8 bits have a scale per row, w4a8 a grid for 32 values, w4a16 a "
                "scale",
            )
        if bits == 8 and zeros:
            raise XllmError(
                "option",
                "zero points are for weights of 4 bits",
                help="at 8 bits they gain next to nothing; leave out -asym",
            )
        return cls(bits, given[0] if given else 0 if bits == 8 else GROUPS[0], zeros)

    @property
    def max_kl(self) -> float:
        return 0.01 if self.bits == 8 else 0.1

    @property
    def error(self) -> float:
        if self.bits == 8:
            return 0.01
        return 0.12 if 0 < self.group <= 128 else 0.2  # 4 bits lose more the longer a group is

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def rows(self) -> RowFormat:
        """Whoever asks for groups of 8 bits wants precision: then rows have a scale for each group too."""
        return RowFormat(self.group, by_group=self.bits == 8 and self.group > 0)

    @property
    def rotates(self) -> bool:
        return self.bits == 8

    def group_bytes(self, in_: int) -> int:
        return self.header_bytes + PANEL * (self.group or self.padded(in_)) * self.bits // 8

    def row_bytes(self, in_: Dim) -> Dim:
        return _blocks(in_ * self.bits, 8)


@dataclass(frozen=True)
class GridFormat(WeightFormat):
    """A weight of 8 bits with a scale per row, of which every `grid` values along `in` (a run) are (n - point) * step
    from the middle: n has 4 bits, and the run a step of 1 .. 15 and a point of 0 .. 15. Named q4grid16, q4grid32.

    As ops have it, the integers are the bytes of 8 bits. In the weight file a panel is 64 scales, and then for each
    run the 64 bytes step + 16 * point, and the n as `IntegerFormat` has values of 4 bits. The 64 bytes are in the order
    in which shuffles within 16 bytes bring each to its column: of column 16 a + 4 b + c it is number 16 b + 4 a + c.
    """

    grid: int
    bits: int = field(default=4, init=False, repr=False)
    group: int = field(default=0, init=False, repr=False)
    zeros: bool = field(default=False, init=False, repr=False)

    heads: ClassVar[tuple[str, ...]] = ("w4",)
    words: ClassVar[str] = r"grid\d+"
    as_bytes: ClassVar[IntegerFormat] = IntegerFormat(8)
    """The format of what its values stand for, in which they are multiplied."""
    most: ClassVar[int] = 15
    """Of n, step and point."""

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise XllmError(
                "unsupported", f"no weights on grids of {self.grid}", help=f"of {' or '.join(map(str, GRIDS))} values"
            )

    def __str__(self) -> str:
        return f"q4grid{self.grid}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        found = re.fullmatch(r"q4grid([1-9]\d{0,8})", name)
        return cls(int(found[1])) if found else None

    @property
    def option(self) -> tuple[str, str]:
        return "w4", f"-grid{self.grid}"

    @classmethod
    def parse_option(cls, head: str, words: Sequence[str], activations: int) -> Self | None:
        """Also what 4 bits by activations of 8 are where nothing else is said: of 32."""
        given = [int(word.removeprefix("grid")) for word in words if word.startswith("grid")]
        if not given and (words or (head, activations) != ("w4", 8)):
            return None
        grid = given[0] if given else GRIDS[-1]
        if grid not in GRIDS or (head, activations) != ("w4", 8) or len(words) > len(given):
            raise XllmError(
                "option",
                f"grids of {grid}",
                help="grid16 or grid32, of w4a8, and without -asym: every grid has a zero point",
            )
        return cls(grid)

    @property
    def max_kl(self) -> float:
        return 0.1

    @property
    def error(self) -> float:
        return 0.12

    @property
    def zero(self) -> int:
        return self.as_bytes.zero

    @property
    def rows(self) -> RowFormat:
        return RowFormat()

    @property
    def run_bytes(self) -> int:
        """Bytes of one run of a panel, its steps and points first."""
        return PANEL * (1 + self.grid // 2)

    def runs(self, in_: int) -> int:
        """Runs of a row, of which the last may be half a one."""
        return -(-self.padded(in_) // self.grid)

    def group_bytes(self, in_: int) -> int:
        return self.header_bytes + PANEL * (self.runs(in_) + self.padded(in_) // 2)

    def row_bytes(self, in_: Dim) -> Dim:
        """A byte for each run too."""
        return _blocks(in_, 2) + _blocks(in_, self.grid)


FORMATS: Final[tuple[type[WeightFormat], ...]] = (GridFormat, IntegerFormat)
"""Every format there is. Of those that `--quantize` may mean, the first one is meant."""


@cache
def parse_format(name: str, kind: Kind = "unsupported") -> WeightFormat:
    """The format that is called `name`. Raises an error of `kind` where there is none."""
    try:
        for cls in FORMATS:
            if (found := cls.parse(name)) is not None and str(found) == name:
                return found
    except XllmError as error:
        raise XllmError(kind, f"weight format {name!r}: {error.message}", help=error.help) from None
    raise XllmError(kind, f"no weight format is called {name!r}", help=_HELP)


@dataclass(frozen=True)
class Layout:
    """How a weight lies in the weight file. By its name:

    row          as in the checkpoint, [out, in]
    panel        bf16 [ceil(out/64), ceil(in/2), 64, 2], f32 [ceil(out/64), in, 64]; padded with zeros
    q8, q4g32 .. panels of bytes, [ceil(out/64), bytes of a panel], as the weight format says
    glu, glu_q8  the same of gate and up rows interleaved 32 by 32, each padded to a multiple of 32: a panel holds 32
                 gate columns and the 32 up columns that belong to them

    A panel is read front to back by one stream, and pairs along `in` are what the bf16 dot instruction takes. All
    instruction set levels read the same bytes.
    """

    panels: bool
    glu: bool = False
    format: WeightFormat | None = None

    def __str__(self) -> str:
        if self.format is not None:
            return f"glu_{self.format}" if self.glu else str(self.format)
        return "glu" if self.glu else "panel" if self.panels else "row"

    @staticmethod
    def parse(name: str) -> Layout:
        """The inverse of str(). Raises kind "unsupported"."""
        if name in ("row", "panel", "glu"):
            return Layout(name != "row", name == "glu")
        return Layout(True, name.startswith("glu_"), parse_format(name.removeprefix("glu_")))

    def rows(self, out: int) -> int:
        """Rows that are packed of `out`."""
        return glu_rows(out // 2) if self.glu else out

    def shape(self, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        """The shape of the stored array of a weight of `shape` in `dtype`; of a quantized one it is bytes."""
        if not self.panels:
            return shape
        out, in_ = self.rows(shape[0]), shape[1]
        return panel_shape(out, in_, dtype) if self.format is None else self.format.shape(out, in_)

    def holds(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether a stored array may have this shape and dtype."""
        if not self.panels:
            return True
        if self.format is not None:
            return dtype == "u8" and len(shape) == 2
        if dtype == "bf16":
            return len(shape) == 4 and shape[2:] == (PANEL, 2)
        return dtype == "f32" and len(shape) == 3 and shape[2] == PANEL


def panel_shape(out: int, in_: int, dtype: str) -> tuple[int, ...]:
    """The shape of a packed [out, in_] weight; `dtype` is "bf16" or "f32"."""
    panels = -(-out // PANEL)
    if dtype == "bf16":
        return (panels, -(-in_ // 2), PANEL, 2)
    if dtype == "f32":
        return (panels, in_, PANEL)
    raise XllmError("unsupported", f"no panel layout for {dtype} weights")


def glu_rows(f: int) -> int:
    """Rows of the interleaved matrix for F = `f` gate columns."""
    return 2 * GLU_HALF * -(-f // GLU_HALF)
