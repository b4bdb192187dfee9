"""What a CPU kernel is: its arguments, and the `Kernel` that builds one private TensorIR function.

A kernel is a frozen dataclass. Its fields are everything that the code is specialised to, so two equal kernels are one
function, and `symbol` is derived from the fields. Its arguments are pointers, then sizes, and always at the end
`member` and `team`. A member computes only its share, and reads nothing that another member of the same call writes.
Every kernel accepts size 0 and any `team >= 1`, and gives the same bits for every team.

Activations are dense and row-major. No output may overlap an input, with two exceptions. `y` of a norm or of `Rope`,
and `sum` of `AddRmsNorm`, may be the memory of `x` or `res`. `y` of a linear layer may be the memory of `residual`.

How the lowering uses one:

    module = NativeModule(isa)                                  # native/module.py
    with module.entry("xllm_fn_step") as args, member, team:
        module.call(Linear(...), [pointers..., rows], member, team)
        module.barrier(pointer, team)
    module.write_shared(path)
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa

TILE_TOKENS = 16  # whose keys and values lie together in vectors; a KV block is one or more of them

FloatType = Literal["bf16", "f32"]


_TIR_TYPE = {
    "bf16": "uint16",
    "pair": "int32",
    "f32": "float32",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "i8": "int8",
}


@dataclass(frozen=True)
class Arg:
    """One argument. A pointer's `dtype` is what it points at: "bf16", "f32", "i32", "u8" (KV pages: raw bytes).

    A scalar (`pointer=False`) is an int32 passed by value. `shape` is text for listings, nothing computes with it.
    """

    name: str
    dtype: str
    shape: str = ""
    pointer: bool = True
    written: bool = False

    @property
    def tir_type(self) -> str:
        """The TensorIR element type; bf16 travels as its 16 bits, since TVM would legalise it away."""
        return _TIR_TYPE[self.dtype]

    def __str__(self) -> str:
        if not self.pointer:
            return f"{self.name}: {self.dtype}"
        return f"{'out ' if self.written else ''}{self.name}: {self.dtype}[{self.shape}]"


def scalar(name: str) -> Arg:
    """An int32 passed by value."""
    return Arg(name, "i32", pointer=False)


MEMBER_ARGS = (scalar("member"), scalar("team"))


class Kernel(ABC):
    """A specialised kernel. Subclasses are frozen dataclasses, one for each operation."""

    @property
    @abstractmethod
    def args(self) -> tuple[Arg, ...]:
        """Pointers, then int32 sizes, then member and team."""

    @abstractmethod
    def build(self, isa: Isa) -> Any:
        """The private TensorIR function (`tvm.tirx.PrimFunc`) for one instruction set level."""

    @property
    def int8_dots(self) -> bool:
        """Whether it multiplies bytes."""
        return False

    def level(self, isa: Isa) -> Isa:
        """The level that its code at `isa` is compiled for. A kernel that multiplies no bytes shares the code of the
        level without the 8-bit dot product."""
        return isa if self.int8_dots or not isa.without_int8_dot else ISAS[isa.without_int8_dot]

    @property
    def symbol(self) -> str:
        """A C identifier that two kernels share only when they are equal."""
        parts = [_snake(type(self).__name__)]
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            parts.append(_symbol_part(field.name, getattr(self, field.name)))
        return "_".join(part for part in parts if part)

    def describe(self) -> str:
        """One line for listings: the symbol and its arguments."""
        return f"{self.symbol}({', '.join(str(arg) for arg in self.args)})"


def require(condition: bool, message: str, kernel: object) -> None:
    """Raises XllmError("unsupported") unless `condition`, for a specialisation that has no code."""
    if not condition:
        raise XllmError("unsupported", message, where=type(kernel).__name__)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _symbol_part(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return name
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return name + re.sub(r"[^0-9a-z]", lambda match: {"-": "m", ".": "p", "+": ""}[match.group()], repr(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return "_".join(part for part in (_symbol_part(key, item) for key, item in fields) if part)
    raise XllmError("internal", f"{name}={value!r} cannot be part of a kernel's symbol")
