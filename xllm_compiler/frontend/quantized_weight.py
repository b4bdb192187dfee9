"""The weight of a layer that a checkpoint stores in integers, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from xllm_compiler.frontend.safetensors import Array, TensorEntry
from xllm_compiler.weight_formats import IntegerFormat


class StoredWeight(ABC):
    """A weight [out, in]. It keeps its integers where `why` is "": `format`, `values`, `scales` and `zeros` are then
    those of `quant.dequantize`. Otherwise `why` says why not, and `floats` is what becomes of it."""

    name: str
    """Of the weight, had it not been quantized."""
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def why(self) -> str:
        """Why it cannot stay in integers, "" where it can."""

    @property
    @abstractmethod
    def entries(self) -> Iterable[TensorEntry]:
        """The tensors that it is made of."""

    @abstractmethod
    def check(self) -> None:
        """All parts fit together; `shape` is that of the model, which was asked before. XllmError("checkpoint") names
        the tensor."""

    @property
    @abstractmethod
    def format(self) -> IntegerFormat:
        """The weight format that holds exactly what is stored."""

    @abstractmethod
    def values(self) -> Array:
        """Stored values, u8 [out, in]."""

    @abstractmethod
    def scales(self) -> Array:
        """Scales [out, groups], as f16 or f32: of a group or, in f32, of the row."""

    @abstractmethod
    def zeros(self) -> Array:
        """Zero points, u8 [out, groups]."""

    @abstractmethod
    def floats(self, dtype: str) -> Array:
        """The weight, dequantized in f32 and rounded once, to one of our dtypes."""
