"""A function as data for the page: ops with their text, layers, costs at given sizes. Owns what a layer is; no HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compiler.analysis.cost import Costs, Estimate, estimate
from xllm_compiler.analysis.machine import Machine
from xllm_compiler.ir.core import Func, Op
from xllm_compiler.ir.ops import Param
from xllm_compiler.ir.printer import Names, func_names, print_op
from xllm_compiler.report.sizes import Scenario

_NUMBERED = re.compile(r"((?:[^.]+\.)*?\d+)(?:\.|$)")  # up to the first number of a dotted path: model.layers.3
_NAME = re.compile(r"%[A-Za-z0-9_.'$]+")
_AT = re.compile(r"(, )?at=\[[^\]]*\]")


def layer_of(path: str) -> str:
    """The layer that a module path lies in: the path up to its first number, or all of it where there is none."""
    match = _NUMBERED.match(path)
    return match[1] if match else path


@dataclass(frozen=True, slots=True)
class Layer:
    """Ops of one layer, by index. `same_as`: the first layer with the same ops in the same order, or this one."""

    name: str
    ops: tuple[int, ...]
    same_as: int


def path_of(op: Op) -> str:
    """The module path that an op was traced from; of a parameter, what its name says."""
    return op.name_.rpartition(".")[0] if isinstance(op, Param) else op.loc.module_path


def layers_of(func: Func, costs: Costs) -> list[Layer]:
    """The layers of a function, in order of their first op that runs in a step; those without one come last."""
    runs: dict[str, list[int]] = {}
    fixed: dict[str, list[int]] = {}
    lines: dict[str, list[str]] = {}
    names = func_names(func)
    for i, op in enumerate(func.ops):
        layer = layer_of(path_of(op))
        if is_weight(op, costs):
            fixed.setdefault(layer, []).append(i)
        else:
            runs.setdefault(layer, []).append(i)
            lines.setdefault(layer, []).append(_AT.sub("", _NAME.sub("%", print_op(op, names))))
    first: dict[tuple[str, ...], int] = {}
    found = []
    for i, layer in enumerate(dict.fromkeys((*runs, *fixed))):
        signature = tuple(lines.get(layer, (layer,)))
        ops = sorted(runs.get(layer, []) + fixed.get(layer, []))
        found.append(Layer(layer, tuple(ops), first.setdefault(signature, i)))
    return found


def is_weight(op: Op, costs: Costs) -> bool:
    """Whether no step runs the op, because it is evaluated while compiling."""
    return bool(op.results) and all(r in costs.weights for r in op.results)


def graph_data(func: Func, costs: Costs, steps: Sequence[Scenario], machine: Machine) -> dict[str, Any]:
    """Everything the page shows of a function's ops."""
    names = func_names(func)
    layers = layers_of(func, costs)
    home = {i: n for n, layer in enumerate(layers) for i in layer.ops}
    return {
        "name": func.name,
        "args": [[names.of(a), str(a.type)] for a in func.args],
        "returns": [names.of(v) for v in func.returns],
        "arena": None if func.arena is None else str(func.arena),
        "layers": [{"name": x.name or "no module", "ops": list(x.ops), "same": x.same_as} for x in layers],
        "ops": [_op_data(op, names, costs, home[i]) for i, op in enumerate(func.ops)],
        "costs": [_cost_data(func, costs, step.dims, machine) for step in steps],
    }


def _op_data(op: Op, names: Names, costs: Costs, layer: int) -> dict[str, Any]:
    types = [str(r.type) for r in op.results]
    cost = costs.of[op]
    return {
        "op": op.name,
        "text": print_op(op, names).removesuffix(f" : {', '.join(types)}"),
        "types": types,
        "out": [names.of(r) for r in op.results],
        "in": list(dict.fromkeys(names.of(v) for v in op.operands)),
        "layer": layer,
        "weight": is_weight(op, costs),
        "source": op.loc.describe(),
        "lineage": list(op.loc.lineage),
        "formulas": [] if cost.free else [str(cost.bytes), str(cost.flops), str(cost.comm)],
    }


def _cost_data(func: Func, costs: Costs, dims: Mapping[str, int], machine: Machine) -> dict[str, Any]:
    """Columns over all ops: seconds, bytes, operations, what the time is spent on."""
    found: list[tuple[Estimate, int, int]] = []
    for op in func.ops:
        amounts = costs.of[op].at(dims)
        found.append((estimate(amounts, machine), amounts.bytes, amounts.flops))
    return {
        "us": [round(e.seconds * 1e6, 4) for e, _, _ in found],
        "bytes": [b for _, b, _ in found],
        "flops": [f for _, _, f in found],
        "limit": [e.limit for e, _, _ in found],
        "compute": [round(e.of_compute, 4) for e, _, _ in found],
        "memory": [round(e.of_memory, 4) for e, _, _ in found],
    }
