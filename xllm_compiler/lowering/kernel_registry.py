"""The registry of a target's choosers, the functions that choose a kernel for an op.

A key names the op, the dtype that it computes in, and the dtype of its weight ("" for an op without one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from xllm_compiler.dims import Dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Op
from xllm_compiler.lowering.storage import Ref, where

C = TypeVar("C")
Chooser = Callable[[C, Op], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a kernel. `args`: a Ref for each pointer and a Dim for each size, in the kernel's order."""

    kernel: Any
    args: tuple[Ref | Dim, ...]
    reads: tuple[Ref, ...]
    writes: tuple[Ref, ...]
    op: Op


@dataclass(frozen=True, slots=True)
class Key:
    """What a chooser is registered for."""

    op: str
    dtype: str
    weight: str = ""

    def __str__(self) -> str:
        return f"{self.op} in {self.dtype}" + (f" with {self.weight} weights" if self.weight else "")


class Registry(Generic[C]):
    """The choosers of one target. A chooser gets the state of the target's selection and an op, and adds calls to the
    state."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._choosers: dict[Key, Chooser[C]] = {}

    def register(self, keys: Sequence[Key]) -> Callable[[Chooser[C]], Chooser[C]]:
        """Decorator: the function chooses for all of `keys`."""

        def add(chooser: Chooser[C]) -> Chooser[C]:
            for key in keys:
                if key in self._choosers:
                    raise XllmError("internal", f"two choosers for {key} on {self.target}")
                self._choosers[key] = chooser
            return chooser

        return add

    def choose(self, key: Key, op: Op) -> Chooser[C]:
        """The chooser for `key`. Raises XllmError("unsupported"), which names the op, where there is none."""
        found = self._choosers.get(key)
        if found is None:
            offered = [f"{k.dtype}{'/' + k.weight if k.weight else ''}" for k in self._choosers if k.op == key.op]
            known = f"{key.op} runs on {self.target} in {', '.join(offered)}" if offered else ""
            raise XllmError("unsupported", f"no {self.target} kernel for {key}", where=where(op), help=known)
        return found
