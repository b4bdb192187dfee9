"""The ways in which a module can be made smaller, and what smaller means. Owns the order of cuts; must not try any.

A `Cut` splits a module into atoms (functions, returns, ops, arguments, attributes, ..) and says how to do without some
of them, as edits, the most promising first. Coarse cuts stand before fine ones in `CUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from xllm_compiler.ir.core import Module
from xllm_compiler.testing import cut_details, cut_ops
from xllm_compiler.testing.edits import Edit

A = TypeVar("A")


@dataclass(frozen=True)
class Cut(Generic[A]):
    """`atoms` in the order in which neighbours are likely to go together; `edits` to do without a run of them."""

    name: str
    atoms: Callable[[Module], list[A]]
    edits: Callable[[Module, Sequence[A]], Iterator[Edit]]
    together: bool = True  # False: atoms are alternatives, tried one by one


CUTS: Final[tuple[Cut[object], ...]] = tuple(
    cut  # type: ignore[misc]  # each cut has atoms of its own, which only its own `edits` ever sees
    for cut in (
        Cut("functions", cut_ops.functions, cut_ops.without_funcs),
        Cut("returns", cut_ops.returns, cut_ops.without_returns),
        Cut("ops", cut_ops.step_ops, cut_ops.without_ops),
        Cut("returns", cut_ops.returns, cut_ops.without_returns),
        Cut("weights", cut_ops.weight_ops, cut_ops.without_weights),
        Cut("shortcuts", cut_ops.shortcuts, cut_ops.take_shortcut, together=False),
        Cut("operands", cut_ops.spare_operands, cut_ops.omit),
        Cut("arguments", cut_ops.unused_args, cut_ops.without_args),
        Cut("twins", cut_ops.twin_args, cut_ops.take_shortcut),
        Cut("attributes", cut_details.attributes, cut_details.set_attributes),
        Cut("numbers", cut_details.shrunk_numbers, cut_details.shrink_number, together=False),
        Cut("arenas", cut_details.unused_arenas, cut_details.without_arenas),
        Cut("facts", cut_details.facts, cut_details.change_fact, together=False),
    )
)


def measure(module: Module) -> Iterator[int]:
    """How large a module is: numbers to be compared in this order, each computed when the ones before are equal."""
    funcs = module.funcs.values()
    yield len(funcs)
    yield sum(len(f.ops) for f in funcs)
    yield sum(len(f.returns) for f in funcs)
    yield sum(len(f.args) for f in funcs)
    ops = [op for f in funcs for op in f.ops]
    yield sum(len(op.operands) for op in ops)
    yield sum(not a.required and not a.is_default(op.attrs[a.name]) for op in ops for a in op.SPEC.attrs)
    yield sum(cut_details.number_cost(v) for op in ops for v in op.attrs.values())
    yield sum(cut_details.numbers(module))
    symbols = module.scope.symbols.values()
    yield sum(f.arena is not None for f in funcs)
    groups = module.groups.values()
    yield len(symbols) + len(module.scope.assumptions) + len(groups)
    yield sum(g.size + g.stride + bool(g.rank) for g in groups)
    yield sum(s.multiple for s in symbols)
    yield sum(64 if s.hi is None else s.hi.bit_length() for s in symbols)


def simpler(a: Module, b: Module) -> bool:
    """Whether `a` is smaller than `b` in the sense of `measure`."""
    return next((x < y for x, y in zip(measure(a), measure(b), strict=True) if x != y), False)
