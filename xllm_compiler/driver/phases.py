"""The phases of a compile between reading and lowering, as functions: what they take and return is all that they share.

`compile` calls them in order. What a phase does is its own package's; here is what it is given, and what becomes of its
result.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xllm_compiler.artifact import MODULE, Manifest
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.driver.key import COPIED, Request
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.ends import ends_of_text
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.rewrite import RewriteListener
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.instruments import Instrument
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.progress import Progress
from xllm_compiler.quant_eval.report import FILE as LOSS
from xllm_compiler.targets.base import check_capabilities

if TYPE_CHECKING:
    from xllm_compiler.calibration.calibrate import Calibrated
    from xllm_compiler.frontend.model import CheckpointInfo
    from xllm_compiler.frontend.tokenizer import ResolvedTokenizer
    from xllm_compiler.frontend.trace import Traced
    from xllm_compiler.quant_eval.evaluator import QuantizationEvaluator
    from xllm_compiler.quant_eval.report import LayerError


def load_compiler(request: Request) -> None:
    """Import what is slow. From here on the checkpoint, the passes and the compiler are part of the key. Raises kind
    "option" where a serving-only installation lacks what is needed."""
    target = request.options.target
    needed = ("torch", "transformers", *target.requires)
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    if missing:
        raise XllmError(
            "option",
            f"compiling needs {', '.join(missing)}, which this installation lacks",
            help="pip install 'xllm-compiler[compile]'",
        )
    import xllm_compiler.frontend.trace  # noqa: F401

    target.load()
    for group in ("checkpoint", "pipeline", "source", "version"):
        request.factors.read_group(group)


def write_tokenizer(checkpoint: Checkpoint, writer: ArtifactWriter, progress: Progress) -> ResolvedTokenizer | None:
    """The tokenizer and other files that servers want. A bad tokenizer is found here, before the long phases."""
    from xllm_compiler.frontend.gguf.tokenizer import resolve_gguf_tokenizer
    from xllm_compiler.frontend.tokenizer import resolve_tokenizer

    root = checkpoint.path
    if checkpoint.gguf is not None:
        for name, made in zip(COPIED, (checkpoint.config, checkpoint.generation), strict=True):
            writer.write_text(name, json.dumps(made, indent=2, sort_keys=True) + "\n")
        tokenizer = resolve_gguf_tokenizer(checkpoint.gguf)
    else:
        for name in COPIED:
            if (root / name).is_file():
                writer.copy(name, root / name)
        tokenizer = resolve_tokenizer(root)
    if tokenizer is None:
        progress.note("the checkpoint has no tokenizer; the artifact will take and give token ids only")
        return None
    writer.write_text("tokenizer.json", tokenizer.tokenizer)
    writer.write_text("tokenizer_config.json", tokenizer.config)
    for note in tokenizer.notes:
        progress.note(note)
    return tokenizer


def trace(request: Request, progress: Progress) -> Traced:
    """The checkpoint as a module in stage graph, with its weights."""
    from xllm_compiler.frontend.trace import trace_checkpoint

    options = request.options
    traced = trace_checkpoint(
        request.checkpoint,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_logits=options.max_num_logits,
        functions=options.functions,
    )
    for note in traced.notes:
        progress.note(note)
    return traced


def ends(
    checkpoint: Checkpoint, info: CheckpointInfo, tokenizer: ResolvedTokenizer | None, progress: Progress
) -> tuple[int, ...]:
    """The tokens that end a text."""
    vocab = info.vocab_size
    eos = None if tokenizer is None else tokenizer.eos
    found, notes = ends_of_text(checkpoint.generation, checkpoint.config, eos, vocab=vocab, default=info.eos_token_ids)
    if tokenizer is not None and tokenizer.size > vocab:
        notes.append(
            f"the tokenizer has {tokenizer.size} tokens, the model {vocab}: a request with one of the others is refused"
        )
    for note in notes:
        progress.note(note)
    return found


def evaluator(request: Request, traced: Traced, writer: ArtifactWriter) -> QuantizationEvaluator:
    """What chooses and judges the form of quantization that was asked for."""
    from xllm_compiler.quant_eval.evaluator import QuantizationEvaluator

    options = request.options
    assert options.quantize is not None
    tokenizer = writer.path / "tokenizer.json"
    return QuantizationEvaluator(options.quantize, options.max_kl, options.pipeline, options.target, traced, tokenizer)


def run_passes(
    request: Request,
    module: Module,
    pipeline: str,
    instruments: Sequence[Instrument],
    listeners: Sequence[RewriteListener],
) -> Module:
    """The module, changed in place by the passes of `pipeline`. Raises kind "unsupported" where they leave something
    that the target does not have."""
    target = request.options.target
    run_pipeline(pipeline, module, PassContext(target.capabilities, listeners=list(listeners)), instruments=instruments)
    check_capabilities(module, target)
    return module


def calibrate(module: Module, traced: Traced, writer: ArtifactWriter, progress: Progress) -> Calibrated:
    """The module, changed in place: its weights rounded for a text. Their values are files of the workspace."""
    from xllm_compiler.calibration.calibrate import calibrate

    tokenizer = writer.path / "tokenizer.json"
    made = calibrate(
        module,
        traced.weights,
        tokenizer if tokenizer.is_file() else None,
        traced.info.vocab_size,
        traced.info.max_model_len,
        writer.work,
    )
    if made.kept:
        progress.note(
            f"{len(made.kept)} weights are rounded without calibration, {made.kept[0]} among them: they are too large, "
            "or their inputs are not finite"
        )
    return made


def write_module(module: Module, writer: ArtifactWriter) -> None:
    """The text of the module that will be lowered."""
    from xllm_compiler.ir.printer import print_module

    writer.write_text(MODULE, print_module(module))


def evaluate(
    evaluator: QuantizationEvaluator, writer: ArtifactWriter, manifest: Manifest, layers: tuple[LayerError, ...]
) -> None:
    """What the form has lost, measured on what was lowered, and written; `layers`: what calibration found. Raises kind
    "option" where that is too much."""
    writer.write_text(LOSS, evaluator.report(writer.path, manifest, layers).to_json())
