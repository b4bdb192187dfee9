"""The keys of a GGUF file's architecture, read by kind.

Every such key is either read or known to say nothing of what is computed. Another one is refused, since it may make a
model of its own.
"""

from __future__ import annotations

import math
from typing import Any, Final

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.files import damaged
from xllm_compiler.frontend.gguf.file import ARCHITECTURE, GgufFile

_UNUSED: Final = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_used_count")
_NEUTRAL: Final[dict[str, Any]] = {
    "expert_count": 0,
    "attention.causal": True,
    "nextn_predict_layers": 0,
    "rope.scale_linear": 1.0,
    "attention.scale": 0.0,
}
"""Keys that may be there with the value that changes nothing."""


class Keys:
    """The keys of one architecture, with the kind of value that each must have. Remembers which were read."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.prefix = f"{file.metadata[ARCHITECTURE]}."
        self.read: set[str] = set()

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 on, also where it is listed for each layer, if all are equal. 0 is as if it were not
        there."""
        value = self._value(key)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if value is None or (value == 0 and default is not None):
            if default is None:
                raise damaged(f"{self.prefix}{key} is missing", self.file.path)
            return default
        if type(value) is not int or value < 1:
            raise self._strange(key, value, "no whole number from 1 on")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key)
        if value is None:
            if default is None:
                raise damaged(f"{self.prefix}{key} is missing", self.file.path)
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._strange(key, value, "no number")
        return float(value)

    def text(self, key: str) -> str:
        """A text, "" where there is none."""
        value = self._value(key)
        if value is not None and not isinstance(value, str):
            raise self._strange(key, value, "no text")
        return value or ""

    def has(self, key: str) -> bool:
        return f"{self.prefix}{key}" in self.file.metadata

    def finish(self) -> None:
        """Raises XllmError("unsupported") for a key that nobody has read."""
        for key, value in self.file.metadata.items():
            name = key.removeprefix(self.prefix)
            if not key.startswith(self.prefix) or name in self.read or name in _UNUSED:
                continue
            if name in _NEUTRAL and value == _NEUTRAL[name]:
                continue
            what = "a mixture of experts is not supported yet" if name == "expert_count" else ""
            raise XllmError(
                "unsupported",
                f"{key} is {str(value)[:40]}: {what or 'what that does to the model is not known here'}",
                where=str(self.file.path),
                help="take the model's Hugging Face form",
            )

    def _value(self, key: str) -> Any:
        self.read.add(key)
        return self.file.metadata.get(self.prefix + key)

    def _strange(self, key: str, value: object, what: str) -> XllmError:
        return damaged(f"{self.prefix}{key} is {str(value)[:80]}, {what}", self.file.path)
