"""Copies of modules and functions. Owns copying; the copy shares nothing mutable with the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xllm_compiler.ir.core import Builder, Func, Module, Op, Value


def clone_op(op: Op, builder: Builder, operands: Sequence[Value]) -> Op:
    """A copy of `op` at the builder's place over other operands; types are inferred where those of operands differ."""
    same = all(new.type == old.type for new, old in zip(operands, op.operands, strict=True))
    types = [r.type for r in op.results] if same else None
    names = [r.name for r in op.results]
    copy = type(op)(builder.func, list(operands), op.segments, dict(op.attrs), op.loc, names, types)
    builder.insert(copy)
    return copy


def clone_ops(ops: Sequence[Op], builder: Builder, mapping: dict[Value, Value]) -> None:
    """Copies `ops` in order; `mapping` gives replacements of outside values and is extended by the results."""
    for op in ops:
        copy = clone_op(op, builder, [mapping.get(v, v) for v in op.operands])
        mapping.update(zip(op.results, copy.results, strict=True))


def clone_func(func: Func, module: Module, name: str | None = None) -> Func:
    """A copy of `func` in `module` (which must declare what it uses), under another name if told so."""
    copy = module.add_func(name or func.name)
    mapping: dict[Value, Value] = {a: copy.add_arg(a.name, a.type, func.ranges.get(a)) for a in func.args}
    clone_ops(list(func.ops), Builder.at_end(copy), mapping)
    copy.set_returns([mapping[v] for v in func.returns], _map_aliases(func, mapping), func.outputs)
    copy.arena = func.arena
    return copy


def _map_aliases(func: Func, mapping: Mapping[Value, Value]) -> dict[int, Value]:
    return {i: mapping[v] for i, v in func.aliases.items()}


def clone_module(module: Module) -> Module:
    """An independent copy with equal text and hash."""
    copy = Module(module.stage, module.scope.copy())
    copy.groups = dict(module.groups)
    for func in module.funcs.values():
        clone_func(func, copy)
    return copy
