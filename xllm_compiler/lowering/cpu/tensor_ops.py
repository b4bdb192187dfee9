"""t.* ops on the CPU: translates each op, with the ops fused into it, to a description of a generic kernel.

kernels/tir/generic makes code of the descriptions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm_compiler.dims import Dim, as_dim, sym
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.semantics import NP_DTYPE
from xllm_compiler.kernels.tir.generic.kernels import Generic
from xllm_compiler.kernels.tir.generic.nodes import Attr, Body, GenericSpec, Matmul, Node, Pointwise, Reduce, Scan
from xllm_compiler.lowering.cpu.lowering_context import Selection
from xllm_compiler.lowering.fuse import MOVES, POINTWISE, is_literal
from xllm_compiler.lowering.storage import Ref, where

ZERO = as_dim(0)


class _Bodies:
    """Bodies that share one list of input buffers."""

    def __init__(self, s: Selection) -> None:
        self.s = s
        self.inputs: list[Ref] = []

    def build(self, value: Value, top: bool = False) -> Body:
        """The nodes of `value`. `top`: it is the result of the op being lowered, which is computed here even if it is
        not fused."""
        nodes: list[Node] = []
        known: dict[Value, int] = {}
        self._visit(value, top, nodes, known)
        return tuple(nodes)

    def read(self, value: Value, shape: tuple[Dim, ...] | None = None) -> Node:
        """A load of `value` from memory, with another shape if one is given."""
        place = self.s.ref(value)
        if place not in self.inputs:
            self.inputs.append(place)
        return Node("arg", value.dtype, value.shape if shape is None else shape, (), (self.inputs.index(place),))

    def _visit(self, value: Value, top: bool, nodes: list[Node], known: dict[Value, int]) -> int:
        found = known.get(value)
        if found is None:
            op = value.op
            if op is not None and (top or is_literal(value) or self.s.fusion.is_inlined(op)):
                node = self._compute(op, nodes, known)
            else:
                node = self.read(value)
            nodes.append(node)
            found = known[value] = len(nodes) - 1
        return found

    def _compute(self, op: Op, nodes: list[Node], known: dict[Value, int]) -> Node:
        result = op.result
        name = op.name.removeprefix("t.")
        args: list[int] = []
        for i, v in enumerate(op.operands):
            if name == "take" and i == 0:  # gathered from memory, so never computed in place
                nodes.append(self.read(v))
                args.append(len(nodes) - 1)
            else:
                args.append(self._visit(v, False, nodes, known))
        return Node(name, result.dtype, result.shape, tuple(args), self._attr(op))

    def _attr(self, op: Op) -> tuple[Attr, ...]:
        a = op.attrs
        match op.name:
            case "t.const":
                return (_literal(op),)
            case "t.clamp":
                return (_number(a["lo"]), _number(a["hi"]))
            case "t.gelu":
                return (bool(a["tanh"]),)
            case "t.transpose":
                perm = a["perm"]
                assert isinstance(perm, tuple)
                return (tuple(int(_number(p)) for p in perm),)
            case "t.slice":
                start = a["start"]
                assert isinstance(start, Dim)
                return (_axis(op), start, int(_number(a["step"])))
            case "t.take":
                return (_axis(op),)
        return ()


def _number(value: object) -> int | float:
    assert isinstance(value, (int, float)), value
    return value


def _axis(op: Op) -> int:
    return int(_number(op.attrs["axis"]))


def _literal(op: Op) -> int | float | bool:
    """A constant as its own dtype holds it."""
    value = np.asarray(op.attrs["value"], NP_DTYPE[op.result.dtype])
    result = value.astype(np.float64).item() if op.result.tensor.is_float else value.item()
    assert isinstance(result, (int, float, bool))
    return result


def _emit(s: Selection, op: Op, spec: GenericSpec, inputs: Sequence[Ref], out: Ref) -> None:
    kernel = Generic(spec)
    s.call(op, kernel, [*inputs, out, *(sym(name) for name in kernel.sizes)])


def copy_view(s: Selection, op: Op) -> None:
    """Lowers a view to a copy: the memory plan gave its result another place."""
    bodies = _Bodies(s)
    out = op.result
    body = (bodies.read(op.operands[0], out.shape),)
    _emit(s, op, Pointwise((body,), (ZERO,), 0, out.dtype, out.shape), bodies.inputs, s.ref(out))


def lower_tensor_op(s: Selection, op: Op) -> None:
    """Lowers one materialised t.* op and everything fused into it."""
    bodies = _Bodies(s)
    out = op.result
    spec: GenericSpec
    if op.name in POINTWISE | MOVES or is_literal(out):
        spec = Pointwise((bodies.build(out, top=True),), (ZERO,), 0, out.dtype, out.shape)
    elif op.name == "t.concat":
        segments = tuple(bodies.build(v) for v in op.operands)
        starts = [ZERO]
        for v in op.operands[:-1]:
            starts.append(starts[-1] + v.shape[_axis(op)])
        spec = Pointwise(segments, tuple(starts), _axis(op), out.dtype, out.shape)
    elif op.name == "t.pad":
        spec = _pad(op, bodies)
    elif op.name == "t.reduce":
        axes = op.attrs["axes"]
        assert isinstance(axes, tuple)
        if not axes:
            raise XllmError(
                "unsupported", "t.reduce over no axis", where=where(op), help="it is the identity: remove it"
            )
        spec = Reduce(
            str(op.attrs["kind"]), bodies.build(op.operands[0]), tuple(int(_number(a)) for a in axes), out.dtype
        )
    elif op.name in ("t.softmax", "t.cumsum"):
        x = bodies.read(op.operands[0])
        spec = Scan("softmax" if op.name == "t.softmax" else "cumsum", x.shape, _axis(op), x.dtype, out.dtype)
    elif op.name == "t.matmul":
        a, b = (s.ref(v) for v in op.operands)
        shapes = [v.shape for v in op.operands]
        _emit(s, op, Matmul(shapes[0], shapes[1], out.shape, out.dtype), [a, b], s.ref(out))
        return
    else:
        raise XllmError("unsupported", f"no CPU kernel for {op.name}", where=where(op))
    _emit(s, op, spec, bodies.inputs, s.ref(out))


def _pad(op: Op, bodies: _Bodies) -> Pointwise:
    """Padding is a concat of a constant, x and the constant again."""
    out, x = op.result, op.operands[0]
    axis = _axis(op)
    value = _number(op.attrs["value"])
    fill = Node("const", out.dtype, (), (), (value if out.tensor.is_float else int(value),))
    lo, hi = op.attrs["lo"], op.attrs["hi"]
    assert isinstance(lo, Dim) and isinstance(hi, Dim)

    def block(size: Dim) -> Body:
        shape = tuple(size if d == axis else n for d, n in enumerate(out.shape))
        return (fill, Node("expand", out.dtype, shape, (0,)))

    segments = (block(lo), bodies.build(x), block(hi))
    return Pointwise(segments, (ZERO, lo, lo + x.shape[axis]), axis, out.dtype, out.shape)
