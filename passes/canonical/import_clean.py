"""import-clean: gives traced tensors the layout of the step function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compiler.dims import Dim
from xllm_compiler.ir import ops
from xllm_compiler.ir.clone import clone_op
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.rewrite import erase_dead
from xllm_compiler.ir.types import Tensor
from xllm_compiler.passes.base import Pass, PassContext
from xllm_compiler.passes.canonical.views import (
    ONE,
    View,
    conform,
    identity,
    in_order,
    match_groups,
    materialise,
    reshaped,
    squeezed,
)
from xllm_compiler.passes.registry import register_pass


@register_pass("import-clean")
@dataclass(frozen=True)
class ImportClean(Pass):
    """Drops the batch axis of size 1 that models are traced with, and the transposes around attention.

    before:  %a = t.reshape(%q, shape=[1, N, 4, 8]) : f32[1, N, 4, 8]      after:  %a = t.reshape(%q, shape=[N, 4, 8])
             %b = t.transpose(%a, perm=[0, 2, 1, 3]) : f32[1, 4, N, 8]             %y = t.mul(%a, %c) : f32[N, 4, 8]
             %y = t.mul(%b, %c) : f32[1, 4, N, 8]
             %z = t.transpose(%y, perm=[0, 2, 1, 3]) : f32[1, N, 4, 8]

    One walk: every tensor is rebuilt without unit axes and in the order in which its elements came, which is tokens
    first. Unit axes that a reduction keeps stay, so that the result still broadcasts.
    """

    def run(self, module: Any, ctx: PassContext) -> bool:
        before = structural_hash(module)
        for func in module.funcs.values():
            _Relayout(func).run()
            erase_dead(func)
        return structural_hash(module) != before


Handler = Callable[["_Relayout", Op, list[View]], View | None]


class _Relayout:
    """Rebuilds one function; `env` has the view of every tensor met so far."""

    def __init__(self, func: Func) -> None:
        self.func = func
        self.env: dict[Value, View] = {}
        self.b = Builder.at_end(func)

    def run(self) -> None:
        for arg in self.func.args:
            if isinstance(arg.type, Tensor):
                self.env[arg] = identity(arg)
        old = list(self.func.ops)
        replaced: list[Op] = []
        for op in old:
            self.b = Builder.before(op)
            if self._visit(op):
                replaced.append(op)
        self.b = Builder.at_end(self.func)
        returns = [materialise(self.b, self.env[v]) if v in self.env else v for v in self.func.returns]
        if list(self.func.returns) != returns:
            self.func.set_returns(returns, self.func.aliases, self.func.outputs)
        for op in reversed(replaced):
            op.erase()

    def _visit(self, op: Op) -> bool:
        """Finds or builds the views of an op's results; True when the op itself is no longer needed."""
        views = [self.env[v] for v in op.operands if v in self.env]
        handler = _handler(op)
        if handler is not None and len(views) == len(op.operands):
            view = handler(self, op, views)
            if view is not None:
                self.env[op.result] = view
                return True
        if all(v.plain for v in views) and all(self.env[v].value is v for v in op.operands if v in self.env):
            made, kept = op, True
        else:
            operands = [materialise(self.b, self.env[v]) if v in self.env else v for v in op.operands]
            made, kept = clone_op(op, self.b, operands), False
            for before, after in zip(op.results, made.results, strict=True):
                if before not in self.env and not isinstance(before.type, Tensor):
                    before.replace_all_uses_with(after)
        at = Builder.after(op) if kept else self.b
        for before, after in zip(op.results, made.results, strict=True):
            if isinstance(after.type, Tensor):
                view = identity(after)
                # A unit axis of a reduction is there to broadcast; any other came with the batch.
                self.env[before] = view if _handler(op) in (_reduce, _elementwise) else squeezed(at, view)
        return not kept

    # ---- helpers for handlers

    def rebuilt(self, op: Op, operands: Sequence[Value], **attrs: Any) -> Value:
        """The same kind of op over other operands, with some attributes replaced."""
        copy = dict(op.attrs)
        copy.update(attrs)
        made = type(op)(self.func, list(operands), op.segments, copy, op.loc, [r.name for r in op.results])
        self.b.insert(made)
        return made.result


def _handler(op: Op) -> Handler | None:
    found = _HANDLERS.get(type(op))
    if found is None and isinstance(op, ops.Elementwise):
        return _elementwise
    return found


def _unchanged(op: Op, views: Sequence[View], operands: Sequence[Value]) -> bool:
    return all(v.plain and v.value is o for v, o in zip(views, operands, strict=True)) and all(
        a is b for a, b in zip(op.operands, operands, strict=True)
    )


def _broadcast_order(views: Sequence[View], rank: int) -> list[int]:
    """Traced axes of a broadcast result that exist in the values, in the order of the largest operand's value."""
    there = {i + rank - len(v.axes) for v in views for i in v.present}
    main = max(views, key=lambda v: (sum(1 for i in v.present if v.shape[i] is not ONE), len(v.present)))
    order = [i + rank - len(main.axes) for i in main.present]
    for i in sorted(there - set(order)):
        insert_axis(order, i)
    return order


def insert_axis(order: list[int], new: int) -> None:
    """Puts a traced axis right after the nearest one before it, or in front of the nearest one after it."""
    before = [i for i in order if i < new]
    if before:
        order.insert(order.index(max(before)) + 1, new)
        return
    after = [i for i in order if i > new]
    order.insert(order.index(min(after)) if after else len(order), new)


def _elementwise(self: _Relayout, op: Op, views: list[View]) -> View | None:
    rank = op.result.tensor.rank
    order = _broadcast_order(views, rank)
    operands = []
    for view in views:
        wide = View(view.value, (None,) * (rank - len(view.axes)) + view.axes)
        mine = list(order)
        # Leading axes that this operand does not have need not be spelled out.
        while mine and wide.axes[mine[0]] is None:
            mine.pop(0)
        operands.append(conform(self.b, wide, mine))
    if _unchanged(op, views, operands) and order == list(range(rank)):
        return None
    return in_order(self.rebuilt(op, operands), order, rank)


def _reshape(self: _Relayout, op: Op, views: list[View]) -> View | None:
    view = squeezed(self.b, views[0])
    new = op.result.shape
    groups = match_groups(view.shape, new)
    order = view.present
    blocks: list[tuple[int, tuple[int, ...]]] = []  # first value axis, new axes
    for group in groups:
        places = [order.index(i) for i in group.old]
        if places and places != list(range(places[0], places[0] + len(places))):
            value = conform(self.b, view, sorted(order))
            return _in_old_order(self, value, new)
        blocks.append((places[0] if places else -1, group.new))
    blocks.sort(key=lambda block: block[0])
    placed = [i for _, block in blocks for i in block]
    value = reshaped(self.b, view.value, [new[i] for i in placed])
    return in_order(value, placed, len(new))


def _in_old_order(self: _Relayout, value: Value, new: Sequence[Dim]) -> View:
    """A reshape whose groups lie scattered in the value: put in order first."""
    placed = [i for i, d in enumerate(new) if d is not ONE]
    return in_order(reshaped(self.b, value, [new[i] for i in placed]), placed, len(new))


def _transpose(self: _Relayout, op: Op, views: list[View]) -> View | None:
    assert isinstance(op, ops.Transpose)
    return View(views[0].value, tuple(views[0].axes[p] for p in op.perm))


def _expand(self: _Relayout, op: Op, views: list[View]) -> View | None:
    (view,) = views
    target = op.result.shape
    offset = len(target) - len(view.axes)
    order = [i + offset for i in view.present]
    grown = [i for i, d in enumerate(target) if d is not ONE and (i < offset or view.shape[i - offset] is ONE)]
    for i in grown:
        if i not in order:
            insert_axis(order, i)
    if not grown:
        return in_order(view.value, order, len(target))
    spelled = [ONE if i < offset else view.shape[i - offset] for i in order]
    value = reshaped(self.b, view.value, spelled)
    made = self.b.create(ops.Expand, value, shape=[target[i] for i in order], hint=op.result.name)
    return in_order(made.result, order, len(target))


def _along(self: _Relayout, op: Op, views: list[View]) -> View | None:
    """Softmax, cumsum, slice, pad: one axis is worked along, all stay where they are."""
    (view,) = views
    axis = view.axes[op.attrs["axis"]]  # type: ignore[index]
    if axis is None or (view.plain and view.value is op.operands[0]):
        return None
    return View(self.rebuilt(op, [view.value], axis=axis), view.axes)


def _reduce(self: _Relayout, op: Op, views: list[View]) -> View | None:
    assert isinstance(op, ops.Reduce)
    (view,) = views
    if view.plain and view.value is op.x:
        return None
    axes = [a for i in op.axes if (a := view.axes[i]) is not None]
    if op.keep:
        value = self.rebuilt(op, [view.value], axes=tuple(axes)) if axes else view.value
        return View(value, view.axes)
    left = [i for i in view.present if i not in op.axes]
    value = self.rebuilt(op, [view.value], axes=tuple(axes)) if axes else view.value
    kept = [i for i in range(len(view.axes)) if i not in op.axes]
    return in_order(value, [kept.index(i) for i in left], len(kept))


def _concat(self: _Relayout, op: Op, views: list[View]) -> View | None:
    assert isinstance(op, ops.Concat)
    rank = op.result.tensor.rank
    order = _broadcast_order(views, rank)
    if op.axis not in order:
        insert_axis(order, op.axis)
    operands = [conform(self.b, view, order) for view in views]
    if _unchanged(op, views, operands):
        return None
    return in_order(self.rebuilt(op, operands, axis=order.index(op.axis)), order, rank)


def _along_last(self: _Relayout, op: Op, views: list[View]) -> View | None:
    """Linear and norms: the first operand's last axis is contracted; weights are taken as they are."""
    view, last = views[0], len(views[0].axes) - 1
    if any(not v.plain for v in views[1:]) or op.segments[0] != 1:
        return None
    if isinstance(op, ops.Linear) and op.residual is not None:
        return None
    order = [*(i for i in view.present if i != last), last]
    x = conform(self.b, view, order)
    operands = [x, *(v.value for v in views[1:])]
    if _unchanged(op, views, operands):
        return None
    return in_order(self.rebuilt(op, operands), order, last + 1)


def _embedding(self: _Relayout, op: Op, views: list[View]) -> View | None:
    ids, table = views
    if not table.plain or (ids.plain and ids.value is op.operands[0]):
        return None
    value = self.rebuilt(op, [ids.value, table.value])
    return View(value, (*ids.axes, ids.value.tensor.rank))


def _take(self: _Relayout, op: Op, views: list[View]) -> View | None:
    assert isinstance(op, ops.Take)
    x, idx = views
    axis = x.axes[op.axis]
    if axis is None or _unchanged(op, views, [x.value, idx.value]):
        return None
    value = self.rebuilt(op, [x.value, idx.value], axis=axis)
    extra = idx.value.tensor.rank

    def moved(a: int | None) -> int | None:
        return a if a is None or a < axis else a - 1 + extra

    inner = tuple(None if a is None else a + axis for a in idx.axes)
    before, after = x.axes[: op.axis], x.axes[op.axis + 1 :]
    return View(value, (*map(moved, before), *inner, *map(moved, after)))


def _matmul(self: _Relayout, op: Op, views: list[View]) -> View | None:
    """x @ w with a matrix on the right: like a linear. Everything else is done as it was traced."""
    x, w = views
    if len(w.axes) != 2 or None in w.axes:
        return None
    last = len(x.axes) - 1
    order = [*(i for i in x.present if i != last), last]
    if len(order) < 2:
        return None
    left, right = conform(self.b, x, order), conform(self.b, w, (0, 1))
    if _unchanged(op, views, [left, right]):
        return None
    return in_order(self.rebuilt(op, [left, right]), order, last + 1)


_HANDLERS: dict[type[Op], Handler] = {
    ops.Reshape: _reshape,
    ops.Transpose: _transpose,
    ops.Expand: _expand,
    ops.Softmax: _along,
    ops.CumSum: _along,
    ops.Slice: _along,
    ops.Pad: _along,
    ops.Reduce: _reduce,
    ops.Concat: _concat,
    ops.Linear: _along_last,
    ops.RmsNorm: _along_last,
    ops.LayerNorm: _along_last,
    ops.Embedding: _embedding,
    ops.Take: _take,
    ops.MatMul: _matmul,
}
