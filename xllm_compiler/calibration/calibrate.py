"""Runs a quantized module on the calibration text, and rounds each layer's weight for the inputs that arrive there.

The module is run one op at a time, all tokens together: a weight is read once, and a value is dropped after its last
use. A layer goes on with its rounded weight, so that the layers after it see what was lost before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.analysis.weights import is_weight_expr, param_names, ranks_read, weight_exprs
from xllm_compiler.calibration.grids import group_length
from xllm_compiler.calibration.params import RoundedParams
from xllm_compiler.calibration.rounding import Feedback, round_rows
from xllm_compiler.calibration.text import calibration_ids
from xllm_compiler.interp.run import call_op, run_value, run_values
from xllm_compiler.ir import quant
from xllm_compiler.ir.core import Builder, Module, Op, Value
from xllm_compiler.ir.ops import (
    Dequantize,
    Embedding,
    Linear,
    LinearGlu,
    Param,
    QuantLinear,
    QuantLinearGlu,
    QuantWeight,
)
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.lowering.weight_requests import WeightTable
from xllm_compiler.quant_eval.replay import needed_ops, step_inputs
from xllm_compiler.quant_eval.report import LayerError
from xllm_compiler.step.interface import STEP
from xllm_compiler.weight_formats import parse_format

_TOKENS: Final = 4096
_LEAST: Final = 1024
_WORK: Final = 1 << 39  # multiplications that the text may cost in the layers: seconds on two cores
_PER_INPUT: Final = 4  # tokens for each input of the widest layer, beyond which more change little
_LARGEST: Final = 1 << 40  # multiplications that the rounding of one weight may cost
_ROWS: Final = 1 << 22  # weights that are rounded at once


@dataclass(frozen=True)
class Calibrated:
    """`params`: those of the module, with what was rounded. `layers`: what each weight lost. `kept`: names of weights
    that were left to plain rounding, as too large."""

    params: Mapping[str, Array]
    layers: tuple[LayerError, ...]
    kept: tuple[str, ...]


def calibrate(
    module: Module, params: Mapping[str, Array], tokenizer: Path | None, vocab: int, longest: int, folder: Path
) -> Calibrated:
    """Replace each `quant.weight` whose layer @step reaches by params of the module, in all of its functions.

    `tokenizer`: a tokenizer.json, None where there is none. The params' files go below `folder`. A weight that several
    layers read is rounded for the first. A module for several ranks stays as it is. Raises what reading `params`
    raises."""
    weights = [op for op in module.func(STEP).ops if isinstance(op, QuantWeight)]
    if not weights or module.groups:
        return Calibrated(params, (), ())
    ids = calibration_ids(tokenizer, vocab, longest, _tokens(weights))
    run = _Run(module, RoundedParams(params, folder))
    run.all(ids)
    return Calibrated(run.params, tuple(run.layers), tuple(run.kept))


def _tokens(weights: Sequence[QuantWeight]) -> int:
    """How many tokens the model affords, and needs."""
    sizes = [(op.w.shape[0].value, op.w.shape[1].value) for op in weights]
    affords = max(_LEAST, _WORK // max(1, sum(out * in_ for out, in_ in sizes)))
    return min(_TOKENS, affords, _PER_INPUT * max(in_ for _, in_ in sizes))


class _Run:
    """One run of @step. `params` and the module change as weights are rounded."""

    def __init__(self, module: Module, params: RoundedParams) -> None:
        self.module = module
        self.params = params
        self.layers: list[LayerError] = []
        self.kept: list[str] = []
        self._table = WeightTable()
        self._same: dict[str, list[QuantWeight]] = {}
        for func in module.funcs.values():
            for op in func.ops:
                if isinstance(op, QuantWeight):
                    self._same.setdefault(self._table.key(op.results[0]), []).append(op)

    def all(self, ids: Sequence[NDArray[np.int32]]) -> None:
        """Run it up to the last layer with a weight to round; each array of `ids` is a request."""
        func = self.module.func(STEP)
        sizes, env = step_inputs(self.module, ids)
        ctx = EvalContext(self.params, sizes)
        fixed = weight_exprs(func)
        ops = [op for op in needed_ops(func.ops, func.returns[0]) if not all(r in fixed for r in op.results)]
        last = {v: i for i, op in enumerate(ops) for v in op.operands}
        end = max((i for i, op in enumerate(ops) if _weight_of(op) is not None), default=-1)
        with np.errstate(all="ignore"):
            for i, op in enumerate(ops[: end + 1]):
                weight = _weight_of(op)
                if weight is not None:
                    self._round(weight, _inputs(op, weight, env))
                if i == end:
                    break
                for result, made in zip(op.results, self._outputs(op, ctx, env), strict=True):
                    if result.has_uses:
                        env[result] = ctx.store(made, result.type)
                for v in op.operands:
                    if last.get(v) == i:  # a param that replaced a weight is in no list, and not held
                        env.pop(v, None)
        for each in self.module.funcs.values():
            _drop_unused(each.ops)

    def _outputs(self, op: Op, ctx: EvalContext, env: Mapping[Value, Array]) -> tuple[Array, ...]:
        if isinstance(op, (QuantLinear, QuantLinearGlu)) and is_weight_expr(op.values):
            zeros = () if op.zeros is None else (op.zeros,)
            parts = run_values([op.values, op.scales, *zeros], self.params)
            format = parse_format(op.format)
            w = quant.dequantize_weight(parts[0], parts[1], parts[2] if zeros else None, format, np.float32)
            y = _rows(op, env) @ w.T
            bias = None if op.bias is None else self._value(op.bias, env)
            if isinstance(op, QuantLinearGlu):
                return (op.finish(ctx, y, bias),)
            return (op.finish(ctx, y, bias, None if op.residual is None else self._value(op.residual, env)),)
        if isinstance(op, Embedding) and (weight := _stored_in(op.w)) is not None:
            return (self._gather(weight, self._value(op.ids, env)),)
        return call_op(op, ctx, {v: self._value(v, env) for v in op.operands})

    def _gather(self, weight: QuantWeight, ids: Array) -> Array:
        """Rows of a weight that is to be rounded later, for the head: rounded plainly, and no others."""
        rows, format = run_value(weight.w, self.params)[ids.reshape(-1)], parse_format(weight.format)
        values, scales, *zeros = quant.quantize_weight(quant.rotate(rows.astype(np.float32), weight.rotate), format)
        back = quant.dequantize_weight(values, scales, zeros[0] if zeros else None, format, np.float32)
        return quant.rotate(back, weight.rotate).reshape(*ids.shape, -1)

    def _value(self, v: Value, env: Mapping[Value, Array]) -> Array:
        return env[v] if v in env else run_value(v, self.params)

    def _round(self, weight: QuantWeight, x: Array) -> None:
        """Round a weight for the inputs x f32 [tokens, in], which are rotated as it is."""
        out, in_ = (dim.value for dim in weight.w.shape)
        names = tuple(param_names(weight.w))
        if out * in_ * in_ > _LARGEST or ranks_read(weight.w):
            self.kept.append(names[0])
            return
        format = parse_format(weight.format)
        x = _alike(x)
        feedback = Feedback.of(x.T @ x, group_length(format, in_))
        if feedback is None:
            self.kept.append(names[0])
            return
        base = self._name(weight)
        called = [f"{base}{part}" for part in (":values", ":scales", ":zeros")][: len(weight.results)]
        w = run_value(weight.w, self.params)
        size = plain = loss = 0.0
        step = max(1, _ROWS // in_)
        with ExitStack() as stack:
            files = [
                stack.enter_context(self.params.create(name, r.tensor))
                for name, r in zip(called, weight.results, strict=True)
            ]
            for start in range(0, out, step):
                rows = quant.rotate(w[start : start + step].astype(np.float32), weight.rotate)
                made = round_rows(rows, format, feedback)
                for file, part in zip(files, made.parts, strict=True):
                    file.write(part.data)
                size, plain, loss = size + made.size, plain + made.plain, loss + made.loss
        self.layers.append(LayerError(names, str(format), plain / size if size else 0.0, loss / size if size else 0.0))
        for op in self._same.pop(self._table.key(weight.results[0])):
            for name, result in zip(called, op.results, strict=True):
                param = Builder.before(op, op.loc).create(Param, name=name, type=result.tensor, hint=result.name).result
                result.replace_all_uses_with(param)

    def _name(self, weight: QuantWeight) -> str:
        """What its params are called: after the weight, as those of a checkpoint that comes quantized are."""
        name = self._table.name(weight.w)
        return name if f"{name}:values" not in self.params else self._table.name(weight.results[0])


def _weight_of(op: Op) -> QuantWeight | None:
    """The weight that a layer is about to be computed with, where it is still to be rounded."""
    if isinstance(op, (QuantLinear, QuantLinearGlu)):
        return op.values.op if isinstance(op.values.op, QuantWeight) else None
    return _stored_in(op.w) if isinstance(op, (Linear, LinearGlu)) else None


def _stored_in(w: Value) -> QuantWeight | None:
    """What `w` is dequantized from, where that is still to be rounded."""
    made = w.op.values.op if isinstance(w.op, Dequantize) else None
    return made if isinstance(made, QuantWeight) else None


def _inputs(op: Op, weight: QuantWeight, env: Mapping[Value, Array]) -> Array:
    """What a layer multiplies its weight by, as the weight is rotated: f32 [tokens, in]."""
    if isinstance(op, (QuantLinear, QuantLinearGlu)):
        x = _rows(op, env)
    else:
        assert isinstance(op, (Linear, LinearGlu))
        x = quant.rotate(env[op.x].astype(np.float32), weight.rotate)
    return x.reshape(-1, x.shape[-1])


def _alike(x: Array) -> Array:
    """Inputs over their own RMS. What a token adds to the residual stream matters by its share of it, and the first
    token of a text may be a hundred times as large as others."""
    size = np.sqrt(np.mean(np.square(x), axis=1, keepdims=True))
    return np.divide(x, size, out=np.zeros_like(x), where=~(size <= np.finfo(np.float32).tiny))  # NaN stays


def _rows(op: QuantLinear | QuantLinearGlu, env: Mapping[Value, Array]) -> Array:
    """What a layer's rows of 8 bits stand for, f32 [.., in]."""
    form = parse_format(op.format).rows
    scale = env[op.scale]
    each = np.repeat(scale, form.group, axis=-1) if form is not None and form.by_group else scale[..., None]
    return np.ascontiguousarray((env[op.x].astype(np.float32) * each)[..., : op.values.shape[1].value])


def _drop_unused(ops: Iterable[Op]) -> None:
    """Remove what only the rounding of weights needed."""
    for op in reversed(list(ops)):
        if op.SPEC.pure and op.results and not any(result.has_uses for result in op.results):
            op.erase()
