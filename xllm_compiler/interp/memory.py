"""One rank's memory while streams run: an arena of real bytes with owners. Owns detection; must not choose an order.

Values with an offset live at it, in one array of bytes that starts as poison (0xFF: NaN in every float type, -1 in
integers). Every byte knows the buffer that owns it. A buffer owns its bytes from the moment it is written (the result
of a comm.wait from the moment its collective starts) until the last op that uses it is done; then they are poison
again. Values without an offset live beside the arena, as do all in a precise run, whose f64 would not fit the planned
bytes: then the arena has owners only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.ops import Collective
from xllm_compiler.ir.printer import func_names
from xllm_compiler.ir.semantics import NP_DTYPE, Array, EvalContext
from xllm_compiler.ir.state import first_version, state_args
from xllm_compiler.ir.types import State
from xllm_compiler.ir.verify_buf import arena_results, weight_values

POISON = 0xFF


@dataclass(eq=False, slots=True)
class Place:
    """Bytes begin..end of the arena for `value` and its views. `number` > 0 is unique in the function."""

    value: Value
    text: str
    offset: Dim
    begin: int
    end: int
    number: int
    users: dict[Op, None]

    def __str__(self) -> str:
        return f"{self.text} at [{self.begin}, {self.end})"


class Layout:
    """Where the values of a function live at given sizes; the same on every rank."""

    def __init__(self, func: Func, dims: Mapping[str, int]) -> None:
        self.func = func
        self.names = func_names(func)
        self.weights = weight_values(func)
        self.size = func.arena.evaluate(dims) if func.arena is not None else 0
        self.places: dict[Value, Place] = {}
        self.by_number: dict[int, Place] = {}
        if func.module.stage == "buf":
            for op in func.ops:
                self._place(op, dims)
        for v, place in self.places.items():
            place.users.update(dict.fromkeys(v.users))

    def _place(self, op: Op, dims: Mapping[str, int]) -> None:
        needing = arena_results(op, self.weights)
        at = op.attrs.get("at")
        offsets = list(at) if isinstance(at, tuple) else []
        base = self.places.get(op.operands[0]) if op.SPEC.view else None
        if op.SPEC.view and needing and not offsets:
            if base is not None:
                self.places[needing[0]] = base
            return
        if len(offsets) != len(needing):
            raise IrError(f"{op.name} has {len(offsets)} offsets for {len(needing)} results in the arena", op=op)
        for r, offset in zip(needing, offsets, strict=True):
            assert isinstance(offset, Dim)
            if base is not None and base.offset is offset:
                self.places[r] = base
                continue
            begin = offset.evaluate(dims)
            end = begin + r.tensor.nbytes.evaluate(dims)
            place = Place(r, self.names.of(r), offset, begin, end, len(self.by_number) + 1, {})
            self.places[r] = self.by_number[place.number] = place


class Memory:
    """Reads and writes of one rank. `fault` makes the error that shows an op and what led there."""

    def __init__(
        self,
        layout: Layout,
        ctx: EvalContext,
        given: Mapping[Value, Array],
        fault: Callable[[Op, str, str], IrError],
    ) -> None:
        self.layout, self.ctx, self.fault = layout, ctx, fault
        self.beside: dict[Value, Array] = dict(given)
        self.ready: set[Value] = set(given)
        self.finished: set[Op] = set()
        self.bytes = np.full(0 if ctx.precise else layout.size, POISON, np.uint8)
        self.owner = np.zeros(layout.size, np.int32)  # 0: never written; n: place n; -n: was place n's, freed
        self.version = {a: a for a in state_args(layout.func)}

    # What ops do.

    def read(self, op: Op, value: Value) -> Array:
        """The array of an operand of `op`."""
        place = self.layout.places.get(value)
        name = self.layout.names.of
        if value not in self.ready:
            found = f"; it finds {self._found(place)}" if place is not None else ""
            maker = value.op
            assert maker is not None, "arguments are always there"
            raise self.fault(
                op,
                f"{op.name} on stream {op.stream} reads {name(value)} before {maker.name} on stream {maker.stream} has "
                f"made it{found}",
                f"order them: sched.record on stream {maker.stream} after {maker.name}, sched.wait on stream "
                f"{op.stream} before {op.name}",
            )
        if isinstance(value.type, State):
            first = first_version(value)
            newest = self.version[first]
            if newest is not value and newest.op is not None:
                raise self.fault(
                    op,
                    f"{op.name} on stream {op.stream} reads state version {name(value)} after "
                    f"{newest.op.name} on stream {newest.op.stream} has made {name(newest)} of it",
                    f"order them: sched.record on stream {op.stream} after {op.name}, sched.wait on stream "
                    f"{newest.op.stream} before {newest.op.name}",
                )
        if place is None:
            return self.beside[value]
        if not np.all(self.owner[place.begin : place.end] == place.number):
            raise self.fault(
                op,
                f"{op.name} on stream {op.stream} reads {place} and finds {self._found(place)}",
                "the plan gives bytes away that are still in use",
            )
        if self.ctx.precise:
            return self.beside[place.value].reshape(self.ctx.shape(value.tensor))
        raw = self.bytes[place.begin : place.end].copy()
        return raw.view(NP_DTYPE[value.dtype]).reshape(self.ctx.shape(value.tensor))

    def claim(self, op: Op, value: Value) -> None:
        """`op` begins to write `value`: its bytes, if it has any in the arena, become its own, and poison."""
        place = self.layout.places.get(value)
        if place is None or place.value is not value:
            return
        if not 0 <= place.begin <= place.end <= self.layout.size:
            raise self.fault(op, f"{op.name} writes {place}, outside the arena of {self.layout.size} bytes", "")
        found = self.owner[place.begin : place.end]
        for number in np.unique(found[found > 0]).tolist():
            other = self.layout.by_number[number]
            if other is not place:
                raise self._clobbered(op, place, other)
        self._mark(place, place.number)

    def write(self, op: Op, value: Value, array: Array) -> None:
        """The bytes of a result that `op` has claimed; readers may not have them before `publish`."""
        place = self.layout.places.get(value)
        if place is None or (self.ctx.precise and place.value is value):
            self.beside[value] = array
        elif place.value is value:
            self.bytes[place.begin : place.end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def publish(self, value: Value) -> None:
        """`value` is there for everything that comes after this."""
        self.ready.add(value)
        if isinstance(value.type, State):
            self.version[first_version(value)] = value

    def finish(self, op: Op) -> None:
        """`op` is done with its operands and results: what nobody is going to use is poison again."""
        self.finished.add(op)
        for v in (*op.operands, *op.results):
            place = self.layout.places.get(v)
            if place is not None and self.owner_is(place) and all(user in self.finished for user in place.users):
                self._mark(place, -place.number)

    # What errors say.

    def owner_is(self, place: Place) -> bool:
        """Whether the bytes are claimed by `place`; an empty one always is."""
        return place.begin == place.end or int(self.owner[place.begin]) == place.number

    def _mark(self, place: Place, number: int) -> None:
        self.owner[place.begin : place.end] = number
        if not self.ctx.precise:
            self.bytes[place.begin : place.end] = POISON

    def _clobbered(self, op: Op, place: Place, other: Place) -> IrError:
        waiting = [user for user in other.users if user not in self.finished]
        if op in waiting:
            why = f"which {op.name} itself reads: no op writes over what it reads"
        elif other.value not in self.ready:
            why = "which a collective in flight is to write"
        elif waiting and isinstance(waiting[0], Collective):
            why = f"which {waiting[0].name} on stream {waiting[0].stream} reads until its comm.wait is done"
        else:
            why = f"which {waiting[0].name} on stream {waiting[0].stream} has still to read"
        return self.fault(
            op,
            f"{op.name} on stream {op.stream} writes {place} over {other}, {why}",
            "the plan gives bytes away that are still in use, or an event that would order these ops is missing",
        )

    def _found(self, place: Place | None) -> str:
        """In words, what the bytes of a place hold now."""
        if place is None or place.begin == place.end:
            return "nothing"
        owners = self.owner[place.begin : place.end]
        wrong = owners[owners != place.number]
        if not wrong.size:
            return "its own bytes, not yet written"
        number = int(wrong[0])
        if number == 0:
            return "bytes that were never written"
        other = self.layout.by_number[abs(number)]
        return f"the bytes of {other}" + (", freed" if number < 0 else "")
