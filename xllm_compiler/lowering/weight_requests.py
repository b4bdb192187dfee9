"""Which weight expressions a step reads, and in which layout: `WeightTable`.

A weight expression depends on parameters and constants only. Two expressions with the same structure are one tensor. So
a tied embedding, or a constant that every layer repeats, is stored once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from xllm_compiler.analysis.weights import param_names
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Value


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """One tensor of the weight file: an expression, the layout in which kernels read it, and its stored dtype.

    A quantized weight is one tensor too. `value` is its stored integers; `rest` is its scales, and zero points if any.
    """

    value: Value
    name: str
    layout: str
    dtype: str
    rest: tuple[Value, ...] = ()


class WeightTable:
    """Requests in order of first use, one for each structure, layout and dtype."""

    def __init__(self) -> None:
        self.requests: list[WeightRequest] = []
        self._keys: dict[Value, str] = {}
        self._index: dict[tuple[str, str, str], int] = {}
        self._taken: set[str] = set()

    def request(self, value: Value, layout: str, dtype: str | None = None, rest: tuple[Value, ...] = ()) -> int:
        """The index of the request for `value` in `layout`, which is made if there is none yet."""
        stored = dtype or value.dtype
        key = ("\0".join(map(self.key, (value, *rest))), layout, stored)
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self.requests)
            name = self._unique_name(value, layout, stored)
            self.requests.append(WeightRequest(value, name, layout, stored, rest))
        return found

    def key(self, value: Value) -> str:
        """The structural identity of a weight expression."""
        found = self._keys.get(value)
        if found is None:
            found = self._keys[value] = self._hash(value)
        return found

    def _hash(self, value: Value) -> str:
        op = value.op
        assert op is not None
        attrs = [f"{k}={v!r}" for k, v in sorted(op.attrs.items()) if k != "at"]
        parts = [op.name, str(value.index), str(op.segments), *attrs, *(self.key(v) for v in op.operands)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def name(self, value: Value) -> str:
        """The checkpoint name of a parameter; for an expression its op, its parameters and the hash of its structure.

        It uses no value names, so an expression has the same name in a module that was printed and parsed."""
        names = list(dict.fromkeys(param_names(value)))
        assert value.op is not None
        if value.op.name == "param":
            return names[0]
        return f"{value.op.name}({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})#{self.key(value)[:8]}"

    def _unique_name(self, value: Value, layout: str, dtype: str) -> str:
        """The name of a stored tensor: its value's name, with layout and dtype if the same value is stored twice."""
        base = self.name(value)
        for name in (base, f"{base}:{layout}", f"{base}:{layout}:{dtype}"):
            if name not in self._taken:
                self._taken.add(name)
                return name
        raise XllmError("internal", f"two weight expressions are called {base}")
