"""Which kernel an op becomes: a registry keyed by (op, dtype, weight format). Owns the lookup; must not know a target.

A target fills a registry with choosers. A key names the op, the dtype it computes in and the format in which its weight
is stored ("" where it has none); a new weight format is a new key beside the old ones.
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
    """One kernel on some places: `args` has a Ref per pointer and a Dim per size, in the kernel's order."""

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
    """Choosers of one target. A chooser gets the target's selection state and the op, and adds calls to it."""

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
        """The chooser for `key`; an error that names the op where there is none."""
        found = self._choosers.get(key)
        if found is None:
            offered = [f"{k.dtype}{'/' + k.weight if k.weight else ''}" for k in self._choosers if k.op == key.op]
            known = f"{key.op} runs on {self.target} in {', '.join(offered)}" if offered else ""
            raise XllmError("unsupported", f"no {self.target} kernel for {key}", where=where(op), help=known)
        return found
