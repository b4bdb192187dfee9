"""The arrays of one call, and the one writer that turns requests into them. Owns what the inputs of a step mean; must
not know the IR, executors, or how pages are handed out.

    batch = StepBatch(function, capacity)              # buffers, allocated once
    writer = StepWriter(batch)
    writer.begin()
    writer.add(tokens, position, pages, rows)          # some tokens of one request, and which of their rows are wanted
    writer.end()                                       # batch.sizes are set

Tokens of a request are consecutive, in rising position. `ids`, `pos`, `seq`: [N], a token, its position in its request
and the number of its request in this step. `start`: [B + 1], where each request's tokens begin. `table`: [B, T], the
page of each run of positions, -1 where none is mapped. `sel`: [S], the tokens whose outputs are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.errors import XllmError
from xllm_compiler.step.interface import Function, TensorSpec, ValueRange

Array = NDArray[Any]
I32 = NDArray[np.int32]

ARRAY_DTYPE: Final = {
    **{"f32": np.float32, "f16": np.float16, "f64": np.float64, "bf16": np.uint16},
    **{"i64": np.int64, "i32": np.int32, "i8": np.int8, "u8": np.uint8, "bool": np.bool_},
}
"""numpy's dtype of a buffer; bf16, which numpy lacks, as the 16 bits that it is stored in."""

UNMAPPED: Final = -1
WRITTEN: Final[Mapping[str, tuple[str, ...]]] = {
    "ids": ("N",),
    "pos": ("N",),
    "seq": ("N",),
    "start": ("B + 1",),
    "table": ("B", "*"),
    "sel": ("S",),
}
"""The inputs that a StepWriter can give, all of them i32, with their shapes; `*` is any fixed number."""


def step_inputs(max_model_len: int, page: int) -> tuple[TensorSpec, ...]:
    """All of them, for requests of at most `max_model_len` tokens in pages of `page` tokens."""
    width = str(-(-max_model_len // page))
    shapes = {name: tuple(width if dim == "*" else dim for dim in shape) for name, shape in WRITTEN.items()}
    ranges = {"pos": ValueRange(0, max_model_len - 1)}
    return tuple(TensorSpec(name, "i32", shape, ranges.get(name)) for name, shape in shapes.items())


def check_written(name: str, function: Function) -> None:
    """Raises kind "artifact" where function `name` has an input that no writer gives."""
    for spec in function.inputs:
        where = f"manifest.json: $.functions.{name}.inputs: {spec.name[:80]}"
        wanted = WRITTEN.get(spec.name)
        if wanted is None:
            raise XllmError(
                "artifact",
                f"@{name} has an input {spec.name!r}, which this runtime cannot give; it gives {', '.join(WRITTEN)}",
                where=where,
                help="serve the artifact with the version that made it",
            )
        fits = len(spec.shape) == len(wanted) and all(
            given == dim or (dim == "*" and given.isdecimal()) for given, dim in zip(spec.shape, wanted, strict=True)
        )
        if spec.dtype != "i32" or not fits:
            raise XllmError(
                "artifact",
                f"@{name} takes {spec.name} as {spec}, and a step is given i32[{', '.join(wanted)}]",
                where=where,
                help="serve the artifact with the version that made it",
            )


class StepBatch:
    """The inputs of one call of `function` in buffers that are allocated once and never move.

    `arrays`: a buffer for each input, of the shape that it has at `capacity`. Only `sizes` of them are meaningful. A
    first axis may be cut to a smaller size; the others are fixed.
    """

    __slots__ = ("_specs", "arrays", "capacity", "function", "sizes")

    def __init__(self, name: str, function: Function, capacity: Mapping[str, int]) -> None:
        """`capacity`: the largest size of every symbol that the inputs' shapes name. Raises XllmError("artifact") for
        an input with a size that is not fixed behind its first axis."""
        self.function = name
        self.capacity = dict(capacity)
        self.sizes: dict[str, int] = {}
        self._specs = function.inputs
        self.arrays: dict[str, Array] = {spec.name: _buffer(name, spec, capacity) for spec in function.inputs}

    def __getitem__(self, name: str) -> Array:
        """The whole buffer of an input."""
        return self.arrays[name]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def fill(self, inputs: Mapping[str, Array], sizes: Mapping[str, int]) -> None:
        """Take over the arrays of a call that was written for another batch of the same function."""
        for name, array in inputs.items():
            self.arrays[name][: len(array)] = array
        self.sizes = dict(sizes)

    def inputs(self) -> dict[str, Array]:
        """The arrays of a call of `sizes`: views, cut to their meaningful part."""
        return {
            spec.name: self.arrays[spec.name][: spec.dims()[0].evaluate(self.sizes)] if spec.shape else self[spec.name]
            for spec in self._specs
        }


def _buffer(function: str, spec: TensorSpec, capacity: Mapping[str, int]) -> Array:
    dims = spec.dims()
    if any(not dim.is_const for dim in dims[1:]):
        raise XllmError(
            "artifact",
            f"@{function} takes {spec.name} as {spec}: only its first axis may have a size that changes",
            help="serve the artifact with the version that made it",
        )
    shape = tuple(dim.evaluate(capacity) for dim in dims)
    return np.full(shape, UNMAPPED if spec.name == "table" else 0, ARRAY_DTYPE[spec.dtype])


class StepWriter:
    """Writes the requests of a step into a batch. Inputs that its function does not take are left out."""

    def __init__(self, batch: StepBatch) -> None:
        self.batch = batch
        n, b, s = (batch.capacity.get(name, 0) for name in ("N", "B", "S"))
        spare = {"ids": n, "pos": n, "seq": n, "start": b + 1, "sel": s}
        given = {name: batch.arrays.get(name, np.zeros(size, np.int32)) for name, size in spare.items()}
        self._ids, self._pos, self._seq, self._start, self._sel = given.values()
        self._table = batch.arrays.get("table")
        self._n = self._b = self._s = 0

    def begin(self) -> None:
        """Start a step without requests."""
        self._n = self._b = self._s = 0

    def add(self, tokens: Sequence[int] | I32, position: int, pages: I32, rows: Sequence[int]) -> None:
        """The next request: its `tokens` from `position` on, `pages` of its positions from 0 on, as wide as the table,
        and the `rows`, counted from its first token in this step, whose outputs are wanted."""
        n, b, count = self._n, self._b, len(tokens)
        if self._table is not None:
            self._table[b] = pages
        self._start[b] = n
        if count == 1:  # a decode: the most frequent case by far, and numbers are quicker than slices
            self._ids[n] = tokens[0]
            self._pos[n] = position
            self._seq[n] = b
            if rows:
                self._sel[self._s] = n
                self._s += 1
        else:
            end = n + count
            self._ids[n:end] = tokens
            self._pos[n:end] = range(position, position + count)
            self._seq[n:end] = b
            first, self._s = self._s, self._s + len(rows)
            self._sel[first : self._s] = [n + row for row in rows]
        self._n, self._b = n + count, b + 1

    def end(self) -> StepBatch:
        """The batch, with the sizes of what was added."""
        self._start[self._b] = self._n
        self.batch.sizes = {"N": self._n, "B": self._b, "S": self._s}
        return self.batch
