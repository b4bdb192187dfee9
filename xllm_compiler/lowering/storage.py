"""Where every value of a function lies in memory: arena, weights, inputs, states, outputs.

A place is a base and a byte range, whose offset and size are Dims. The module's DimScope tells whether two ranges may
overlap, and "don't know" counts as yes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.dims import Dim, DimScope, as_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.groups import rank_symbols
from xllm_compiler.ir.spec import dims_in
from xllm_compiler.ir.state import used_version
from xllm_compiler.ir.types import Kv, State, Tensor
from xllm_compiler.ir.verify_buf import arena_results

Space = Literal["arena", "weight", "input", "state", "output", "barrier"]
_WRITTEN: Final = ("arena", "state", "output", "barrier")
_LINE, _WORDS = 64, 8


@dataclass(frozen=True, slots=True)
class Ref:
    """A place: `nbytes` bytes at `offset` from the base of a space. `index`: the number of the weight request, input,
    state or output."""

    space: Space
    index: int
    offset: Dim
    nbytes: Dim


def where(op: Op) -> str:
    """The `where=` of an error about `op`: its source line, or the op itself."""
    return op.loc.describe() or repr(op)


class Storage:
    """The places of all values of `func` but the weights. Those get a place when a kernel is chosen that reads them.

    Inputs are the tensor arguments, states the other arguments, outputs the returned tensors; each is numbered in
    order.
    """

    def __init__(self, func: Func, scope: DimScope) -> None:
        self.func, self.scope = func, scope
        self.weights = set(weight_exprs(func))
        self.order = {op: i for i, op in enumerate(func.ops)}
        self.copies: list[Op] = []
        """Views whose bytes must be copied: the plan gave them a place of their own."""
        self.outputs: dict[Value, Ref] = {}
        """The returned tensors. Nothing else is ever put in their places."""
        self._refs: dict[Value, Ref] = {}
        self._stealing_kernels = 0
        self._place_arguments()
        self._place_outputs()
        self._written_as = self._views_of_outputs()
        for op in func.ops:
            if not all(r in self.weights for r in op.results):
                self._check_ranks(op)
                self._place_results(op)

    def ref(self, value: Value) -> Ref:
        """The place of a value that is not a weight."""
        found = self._refs.get(value)
        if found is None:
            raise XllmError("internal", f"%{value.name} has no place in memory", where=str(value))
        return found

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one KV block: its tokens in all KV states of the module, one state after the other."""
        args = (a for func in self.func.module.funcs.values() for a in func.args if isinstance(a.type, Kv))
        return sum({a.name: a.kv.page_bytes for a in args}.values())

    @property
    def barrier(self) -> Ref:
        """The barrier of kernels that wait for the team inside. All may use the same one, since all members call all
        kernels in one order."""
        return Ref("barrier", 0, as_dim(0), as_dim(_LINE))

    def work_queues(self) -> Ref:
        """The queues of a kernel with work stealing: one word in the cache line of each member, behind the barrier.

        Each member has `_WORDS` words, and kernels use them in rotation. A kernel counts as a writer of its word, so
        that a barrier is placed before the next kernel with the same word."""
        word, self._stealing_kernels = self._stealing_kernels % _WORDS, self._stealing_kernels + 1
        return Ref("barrier", 1 + word, as_dim(_LINE + 8 * word), as_dim(8))

    def has_place(self, value: Value) -> bool:
        return value in self._refs

    def overlap(self, a: Ref, b: Ref) -> bool:
        """Whether two places may share a byte."""
        if a.space != b.space or a.index != b.index or a.space not in _WRITTEN:
            return False
        if a.space == "state":
            return True
        apart = self.scope.prove_le(a.offset + a.nbytes, b.offset) or self.scope.prove_le(b.offset + b.nbytes, a.offset)
        return apart is not True

    def _place_arguments(self) -> None:
        inputs = states = 0
        for v in self.func.args:
            if isinstance(v.type, State):
                self._refs[v] = Ref("state", states, as_dim(0), v.type.blocks * v.type.block_bytes)
                states += 1
            elif isinstance(v.type, Tensor):
                self._refs[v] = Ref("input", inputs, as_dim(0), v.tensor.nbytes)
                inputs += 1
            else:
                raise XllmError("ir", f"@{self.func.name} has an argument that is no tensor and no state: {v}")

    def _place_outputs(self) -> None:
        for v in self.func.returns:
            if not isinstance(v.type, Tensor):
                continue
            if v.op is None or v in self.weights:
                raise XllmError("ir", f"@{self.func.name} returns %{v.name}, which it does not compute", where=str(v))
            if v in self.outputs:
                raise XllmError("ir", f"@{self.func.name} returns %{v.name} twice", where=str(v))
            self.outputs[v] = Ref("output", len(self.outputs), as_dim(0), v.tensor.nbytes)

    def _views_of_outputs(self) -> dict[Value, Ref]:
        """The outputs and, where one is a view with no other use, the computed value whose bytes it is."""
        found = dict(self.outputs)
        for output, ref in self.outputs.items():
            value = output
            while value.op is not None and value.op.SPEC.view:
                value = value.op.operands[0]
                if value.op is None or value in self.weights or not value.has_one_use:
                    break
                found[value] = ref
        return found

    def _check_ranks(self, op: Op) -> None:
        """Raises XllmError if a step would have to know its rank. All ranks run the same program."""
        ranks = rank_symbols(self.func.module.groups)
        for symbol in (s for d in dims_in(op.attrs.values()) for s in d.symbols if s in ranks):
            raise XllmError(
                "unsupported",
                f"{op.name} depends on {symbol}, the rank of @{ranks[symbol]}, and is no weight",
                where=where(op),
                help="only what is packed before the step may depend on a rank dim",
            )

    def _place_results(self, op: Op) -> None:
        offsets = self._offsets(op)
        for value in op.results:
            before = used_version(op) if isinstance(value.type, State) else None
            if before is not None:
                self._refs[value] = self._refs[before]
                continue
            if not isinstance(value.type, Tensor):
                raise XllmError("unsupported", f"{op.name} needs more than one CPU process", where=where(op))
            source = self._refs.get(op.operands[0]) if op.SPEC.view else None
            own = offsets.get(value)
            if value in self._written_as:
                own = self._written_as[value]
            elif source is not None and (own is None or source.space != "arena" or source.offset is own.offset):
                own = source
            if own is None:
                raise XllmError("internal", f"V13: %{value.name} has no place in the arena", where=where(op))
            self._refs[value] = own
            if op.SPEC.view and own is not source and own != source:
                self.copies.append(op)

    def _offsets(self, op: Op) -> dict[Value, Ref]:
        """The places that the attribute `at` gives: one offset for each result that lies in the arena."""
        at = op.attrs.get("at")
        if not isinstance(at, tuple):
            return {}
        needing = arena_results(op, self.weights)
        out: dict[Value, Ref] = {}
        for value, offset in zip(needing, at, strict=False):
            assert isinstance(offset, Dim)
            out[value] = Ref("arena", 0, offset, value.tensor.nbytes)
        return out
