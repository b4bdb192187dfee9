"""The tensors that a traced step function names: checkpoint tensors and traced buffers, one at a time.

Owns the cast to the compiled dtype and the check for values that are not finite. Holds no checkpoint tensor longer
than the call that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Array, Checkpoint

_NUMPY = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Slot:
    """One tensor of the step function: its type, and where it comes from: a checkpoint tensor, a traced value, or what
    `read` makes of several checkpoint tensors, of which `key` is the name to blame."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    key: str = ""  # the checkpoint's name; "" for a traced value
    value: Array | None = None
    read: Callable[[], Array] | None = None


class WeightSource(Mapping[str, Array]):
    """Parameter name -> array, read and cast when asked for. `check_finite` makes a NaN or infinity an error."""

    def __init__(self, slots: Mapping[str, Slot], checkpoint: Checkpoint | None, check_finite: bool = True) -> None:
        self.slots = dict(sorted(slots.items()))
        self.checkpoint = checkpoint
        self.check_finite = check_finite

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def __contains__(self, name: object) -> bool:
        return name in self.slots

    def __getitem__(self, name: str) -> Array:
        """The tensor in its compiled dtype. XllmError("checkpoint") names file and tensor; KeyError if unknown."""
        slot = self.slots[name]
        dtype = _NUMPY[slot.dtype]
        if slot.value is not None:
            return slot.value
        if self.checkpoint is None:
            raise XllmError("checkpoint", f"tensor {name!r} has no value: the model was traced without a checkpoint")
        raw = self.checkpoint.read(slot.key) if slot.read is None else slot.read()
        out = raw.astype(dtype, copy=False)
        if self.check_finite and slot.dtype in ("f64", "f32", "bf16", "f16"):
            self._require_finite(slot, raw, out)
        return out

    def _require_finite(self, slot: Slot, raw: Array, out: Array) -> None:
        assert self.checkpoint is not None
        bad = first_not_finite(out)
        if bad is None:
            return
        at = tuple(int(i) for i in np.unravel_index(bad, out.shape)) if out.shape else ()
        before, after = raw.reshape(-1)[bad], out.reshape(-1)[bad]
        what = f"is {after}" if not np.isfinite(before) else f"is {before}, too large for {slot.dtype}"
        raise XllmError(
            "checkpoint",
            f"tensor {slot.key!r}: element {list(at)} {what}",
            where=f"{self.checkpoint.tensors[slot.key].file}: {slot.key}",
        )


def first_not_finite(x: Array, chunk: int = 1 << 22) -> int | None:
    """Flat index of the first NaN or infinity, None when there is none; needs memory for one chunk only."""
    flat = x.reshape(-1)
    for start in range(0, flat.size, chunk):
        part = flat[start : start + chunk]
        finite = np.isfinite(part.astype(np.float32) if part.dtype.itemsize == 2 else part)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def match(slot: Slot, checkpoint: Checkpoint) -> None:
    """Checks a slot's shape and kind against the checkpoint's header. XllmError("checkpoint") when they differ."""
    entry = checkpoint.tensors[slot.key]
    where = f"{entry.file}: {slot.key}"
    if entry.shape != slot.shape:
        raise XllmError(
            "checkpoint",
            f"tensor {slot.key!r} has shape {list(entry.shape)}, the model wants {list(slot.shape)}",
            where=where,
            help="config.json and the weights do not belong together",
        )
    if slot.dtype in ("f64", "f32", "bf16", "f16") and not entry.is_float:
        raise XllmError(
            "unsupported", f"tensor {slot.key!r} is stored as {entry.dtype}, floats are needed", where=where
        )
