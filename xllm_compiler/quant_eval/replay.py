"""Runs a model in the interpreter beside variants of it in which some weights are quantized.

All variants run together, one op at a time. A weight is read once for all of them. A variant costs nothing before the
first op at which it differs. The last linear layer and what follows run one variant at a time, since logits are large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.analysis.interface import interface_of
from xllm_compiler.analysis.weights import unrounded, weight_exprs
from xllm_compiler.interp.run import call_op, run_value
from xllm_compiler.ir import quant
from xllm_compiler.ir.core import Module, Op, Value
from xllm_compiler.ir.ops import Embedding, Linear, LinearGlu
from xllm_compiler.ir.semantics import Array, EvalContext, state_zeros
from xllm_compiler.ir.types import Kv, State
from xllm_compiler.passes.quantize.forms import QuantForm
from xllm_compiler.passes.quantize.weights import rotation_of, tied_tables
from xllm_compiler.step.inputs import UNMAPPED, StepBatch, StepWriter
from xllm_compiler.step.interface import STEP
from xllm_compiler.weight_formats import RowFormat

Variant = Mapping[Value, QuantForm]
"""Weights of the module, each with the form in which the layers that read it compute."""


@dataclass
class _Run:
    """One variant in progress: the values that differ from the plain model's, and its form of each weight."""

    forms: Variant
    env: dict[Value, Array] = field(default_factory=dict)


class _Weights:
    """Weight expressions, plain and in the forms of variants; only those of one op are held at a time."""

    def __init__(self, params: Mapping[str, Array]) -> None:
        self._params = params
        self._held: dict[tuple[Value, QuantForm | None], Array] = {}

    def get(self, value: Value, form: QuantForm | None) -> Array:
        """The array of `value` as it is computed with: of the weights of layers and tables in f32, once for all that
        ask."""
        if (value, form) not in self._held:
            plain = self._held.get((value, None))
            if plain is None:
                rounded = any(isinstance(user, (Linear, LinearGlu, Embedding)) for user in value.users)
                plain = run_value(unrounded(value) if rounded else value, self._params)
                if rounded:
                    plain = plain.astype(np.float32)
                self._held[value, None] = plain
            if form is not None:
                block = rotation_of(value) if form.rotate else 0
                turned = quant.rotate(plain, block)
                self._held[value, form] = quant.rotate(_rounded_weight(turned, form), block)
        return self._held[value, form]

    def drop(self) -> None:
        """Forget all."""
        self._held.clear()


def replay(
    module: Module, params: Mapping[str, Array], ids: Sequence[NDArray[np.int32]], variants: Sequence[Variant]
) -> Iterator[NDArray[np.float32]]:
    """Logits [all tokens, vocab] of the module as it is, then of each variant; every array of `ids` is a request.

    `module`: stage graph, with the function @step. A table that was a layer's weight before rotate-stream has the form
    that the layer has. A layer whose weight is quantized to 8-bit activations rounds its input too; sums are in f32.
    Raises what reading `params` raises.
    """
    func = module.func(STEP)
    sizes, inputs = step_inputs(module, ids)
    ctx = EvalContext(params, sizes)
    fixed = weight_exprs(func)
    logits = func.returns[0]
    ops = [op for op in needed_ops(func.ops, logits) if not all(r in fixed for r in op.results)]
    last_layer = max((i for i, op in enumerate(ops) if isinstance(op, (Linear, LinearGlu))), default=0)
    weights = _Weights(params)
    tied = tied_tables(func)
    runs = [_Run({}, inputs)]
    for variant in variants:
        runs.append(_Run({**variant, **{table: variant[w] for table, w in tied.items() if w in variant}}))
    last = {v: i for i, op in enumerate(ops) for v in op.operands}
    with np.errstate(all="ignore"):
        for i, op in enumerate(ops[:last_layer]):
            for run in runs:
                _step(op, ctx, run, runs[0], weights)
            weights.drop()
            for v in op.operands:
                if last[v] == i:
                    for run in runs:
                        run.env.pop(v, None)
        for run in runs:
            late = _Run(run.forms, dict(run.env))
            base = late if run is runs[0] else runs[0]
            for op in ops[last_layer:]:
                _step(op, ctx, late, base, weights, whole=True)
            yield np.asarray(late.env[logits], np.float32)


def _step(op: Op, ctx: EvalContext, run: _Run, base: _Run, weights: _Weights, whole: bool = False) -> None:
    """Run one op of one variant. Without a differing operand it takes the plain result, unless `whole`."""
    changed = any(v in run.env or v in run.forms for v in op.operands)
    if run is not base and not changed and not whole:
        return
    env: dict[Value, Array] = {}
    for v in op.operands:
        if v in run.env:
            env[v] = run.env[v]
        elif v in base.env:
            env[v] = base.env[v]
        else:
            env[v] = weights.get(v, run.forms.get(v))
    if isinstance(op, (Linear, LinearGlu)):
        form = run.forms.get(op.w)
        if form is not None and form.activations == 8:
            env[op.x] = _rounded(env[op.x], form, rotation_of(op.w) if form.rotate else 0)
    for result, made in zip(op.results, call_op(op, ctx, env), strict=True):
        if result.has_uses:
            run.env[result] = ctx.store(made, result.type)


def _rounded_weight(w: Array, form: QuantForm) -> Array:
    """A weight as what its integers stand for, f32."""
    if form.weights is None:
        return w
    values, scales, *zeros = quant.quantize_weight(w, form.weights)
    return quant.dequantize_weight(values, scales, zeros[0] if zeros else None, form.weights, np.float32)


def _rounded(x: Array, form: QuantForm, block: int) -> Array:
    """A layer's input as what its rows of 8 bits stand for, f32; rounded where blocks are rotated."""
    rows = form.weights.rows if form.weights is not None else None
    turned = quant.rotate(x.astype(np.float32), block)
    stored, scale, _ = quant.quantize_rows(turned, rows if rows is not None and rows.by_group else RowFormat())
    parts = stored.reshape(*scale.shape, -1).astype(np.float32) * scale[..., None]
    return quant.rotate(np.ascontiguousarray(parts.reshape(stored.shape)[..., : x.shape[-1]]), block)


def needed_ops(ops: Any, result: Value) -> list[Op]:
    """The ops that `result` depends on, in order."""
    wanted = {result}
    out = []
    for op in reversed(list(ops)):
        if any(r in wanted for r in op.results):
            wanted.update(op.operands)
            out.append(op)
    return out[::-1]


def step_inputs(module: Module, ids: Sequence[NDArray[np.int32]]) -> tuple[dict[str, int], dict[Value, Array]]:
    """Sizes and arguments of one step that computes all requests whole and keeps every row."""
    func = module.func(STEP)
    caches = [a for a in func.args if isinstance(a.type, Kv)]
    page = caches[0].kv.page if caches else 1
    counts = [-(-len(each) // page) for each in ids]
    tokens = sum(map(len, ids))
    sizes = {"N": tokens, "B": len(ids), "S": tokens, "P": sum(counts)}
    writer = StepWriter(StepBatch(STEP, interface_of(func), sizes))
    width = func.arg("table").shape[1].value
    first = 0
    for each, count in zip(ids, counts, strict=True):
        pages = np.full(width, UNMAPPED, np.int32)
        pages[:count] = np.arange(first, first + count)
        writer.add(each, 0, pages, range(len(each)))
        first += count
    arrays = writer.end().inputs()
    return sizes, {a: state_zeros(a.type, sizes) if isinstance(a.type, State) else arrays[a.name] for a in func.args}
