"""Tensors seen through a layout: the bookkeeping of `import-clean`.

A traced tensor [1, H, N, D] is a view of a compact value [N, H, D]: every axis of the traced tensor is an axis of the
value, or (None) a unit axis that exists on paper only. Transposes and unit axes then cost nothing until an op really
needs an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.ir.core import Builder, Value
from xllm_compiler.ir.ops import Reshape, Transpose

ONE = as_dim(1)


@dataclass(frozen=True, slots=True)
class View:
    """`axes[i]` is the value's axis that is axis i of the traced tensor; every axis of the value occurs once."""

    value: Value
    axes: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the traced tensor."""
        return tuple(ONE if a is None else self.value.shape[a] for a in self.axes)

    @property
    def plain(self) -> bool:
        """Whether the value is the traced tensor itself."""
        return self.axes == tuple(range(len(self.axes)))

    @property
    def present(self) -> tuple[int, ...]:
        """The traced axes that the value has, in the value's order."""
        order = [(a, i) for i, a in enumerate(self.axes) if a is not None]
        return tuple(i for _, i in sorted(order))


def identity(value: Value) -> View:
    return View(value, tuple(range(value.tensor.rank)))


def transposed(b: Builder, value: Value, perm: Sequence[int]) -> Value:
    """`value` itself when there is nothing to move."""
    if list(perm) == list(range(len(perm))):
        return value
    return b.create(Transpose, value, perm=tuple(perm), hint=value.name).result


def reshaped(b: Builder, value: Value, shape: Sequence[Dim]) -> Value:
    """`value` itself when it has that shape."""
    if value.shape == tuple(shape):
        return value
    return b.create(Reshape, value, shape=tuple(shape), hint=value.name).result


def conform(b: Builder, view: View, order: Sequence[int]) -> Value:
    """A value whose axes are exactly the traced axes `order`, in that order; all that the view has must be in it."""
    have = [i for i in order if view.axes[i] is not None]
    value = transposed(b, view.value, [_axis(view, i) for i in have])
    return reshaped(b, value, [ONE if view.axes[i] is None else view.shape[i] for i in order])


def materialise(b: Builder, view: View) -> Value:
    """The traced tensor itself."""
    return conform(b, view, range(len(view.axes)))


def squeezed(b: Builder, view: View) -> View:
    """The same view without the value's unit axes."""
    keep = [i for i in view.present if view.shape[i] is not ONE]
    if len(keep) == view.value.tensor.rank:
        return view
    value = reshaped(b, view.value, [view.shape[i] for i in keep])
    return View(value, tuple(keep.index(i) if i in keep else None for i in range(len(view.axes))))


def in_order(value: Value, order: Sequence[int], rank: int) -> View:
    """The view of `value`, whose axes are the traced axes `order` of a traced tensor of that rank."""
    place = {i: a for a, i in enumerate(order)}
    return View(value, tuple(place.get(i) for i in range(rank)))


def _axis(view: View, i: int) -> int:
    axis = view.axes[i]
    assert axis is not None
    return axis


@dataclass(frozen=True, slots=True)
class Group:
    """Axes of the old shape whose elements are those of some axes of the new shape."""

    old: tuple[int, ...]
    new: tuple[int, ...]


def match_groups(old: Sequence[Dim], new: Sequence[Dim]) -> list[Group]:
    """The finest grouping under which a reshape from `old` to `new` acts on each group by itself.

    Unit axes belong to no group. Both shapes have the same number of elements.
    """
    left = [i for i, d in enumerate(old) if d is not ONE]
    right = [i for i, d in enumerate(new) if d is not ONE]
    groups: list[Group] = []
    i = j = 0
    while i < len(left) or j < len(right):
        a, b = i, j
        # One axis at least on each side; where one side is used up, the rest of the other joins the last group.
        p, q = ONE, ONE
        while True:
            if p is q and i > a and j > b:
                break
            if i >= len(left) and j >= len(right):
                break
            take_left = j >= len(right) or (i < len(left) and (i == a or (j > b and _grow_left(p, q))))
            if take_left:
                p, i = p * old[left[i]], i + 1
            else:
                q, j = q * new[right[j]], j + 1
        groups.append(Group(tuple(left[a:i]), tuple(right[b:j])))
    if len(groups) > 1 and (not groups[-1].old or not groups[-1].new):
        last = groups.pop()
        groups[-1] = Group(groups[-1].old + last.old, groups[-1].new + last.new)
    return groups


def _grow_left(p: Dim, q: Dim) -> bool:
    """Whether the left product has to grow to meet the right one: it lacks a symbol, or is the smaller number."""
    if set(p.symbols) != set(q.symbols):
        return set(p.symbols) < set(q.symbols)
    if p.is_const and q.is_const:
        return p.value < q.value
    env = {s: 2 for s in (*p.symbols, *q.symbols)}
    return p.evaluate(env) < q.evaluate(env)
