"""The evaluation phases of a compile: before the passes for `mixed`, after lowering for every form.

Refuses a model that loses more than the limit. `measure.py` measures, `mixed_precision.py` chooses weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from xllm_compiler.artifact import Manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.trace import Traced
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import parse_pipeline, run_pipeline
from xllm_compiler.passes.quantize.forms import MIXED, NARROW
from xllm_compiler.quant_eval import mixed_precision
from xllm_compiler.quant_eval.compare import Loss
from xllm_compiler.quant_eval.measure import Reference, whole_loss
from xllm_compiler.quant_eval.report import LayerError, LossReport
from xllm_compiler.targets import Target


class QuantizationEvaluator:
    """Keeps a copy of the traced module in its unquantized form for as long as the compile takes."""

    def __init__(
        self, form: str, limit: float | None, pipeline: str, target: Target, traced: Traced, tokenizer: Path
    ) -> None:
        """`form` and `limit` as `options.Resolved` has them, `pipeline` what makes the form on `target`, `tokenizer`
        where the model's tokenizer.json is if it has one."""
        module = clone_module(traced.module)
        run_pipeline(",".join(target.pipelines.before), module, PassContext(target.capabilities))
        self._target, self._form, self._limit, self._pipeline = target, form, limit, pipeline
        self._bench = Reference.of(
            module,
            traced.weights,
            tokenizer if tokenizer.is_file() else None,
            traced.info.vocab_size,
            traced.info.max_model_len,
        )

    def choose(self) -> str:
        """The pipeline to run: the one that was asked for, or the one that `mixed` chose."""
        if self._form == MIXED:
            assert self._limit is not None
            module = clone_module(self._bench.module)
            run_pipeline(",".join(NARROW.preparation), module, PassContext(self._target.capabilities))
            forms, _ = mixed_precision.choose(replace(self._bench, module=module), self._limit)
            self._pipeline = str(
                parse_pipeline(",".join(self._target.quantized(NARROW, mixed_precision.names_of(forms))))
            )
        return self._pipeline

    def report(self, folder: Path, manifest: Manifest, layers: tuple[LayerError, ...]) -> LossReport:
        """The loss of the artifact in `folder`, and `layers`, which calibration found. Raises kind "option" when it is
        over the limit."""
        total, kinds, level = whole_loss(self._bench, folder, manifest)
        if self._limit is not None and not total.kl <= self._limit:
            raise self._refusal(total)
        return LossReport(self._form, self._pipeline, self._bench.text, level, self._limit, total, kinds, layers)

    def _refusal(self, total: Loss) -> XllmError:
        return XllmError(
            "option",
            f"--quantize {self._form} loses {total.kl:.3g} nats, more than the limit of {self._limit:g} "
            f"({self._bench.text}; top-1 agreement {total.top1:.1%})",
            help="more bits, smaller groups or mixed lose less; --max-kl sets the limit, --max-kl inf accepts any",
        )
