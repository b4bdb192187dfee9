"""`xllm-compile verify ARTIFACT`: digests, then its functions against the reference interpreter on random requests.
With --checkpoint also against the model as it was traced, before any pass, and against transformers where that is
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import MODULE, Contents, Manifest, check_files, read_manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.targets import choose_level, runtime_target
from xllm_compiler.step.interface import EMBED, HIDDEN, LOGITS, STEP
from xllm_compiler.tools.console import size
from xllm_compiler.tools.steps import Trial, make_trial

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Module

F32 = NDArray[np.float32]
Rows = dict[str, list[F32]]
"""Outputs by name: what each step of a trial gave."""

_OUTPUTS = {STEP: LOGITS, EMBED: HIDDEN}
"""Functions that a checkpoint's own model has too, and what it calls what they return."""

TOLERANCE = {"f32": 1e-4, "bf16": 4e-2}
"""Largest difference of a logit, as a share of the largest reference logit (of 1 when all are smaller). In bf16 both
sides round after every op, and a sum in another order may round to the next number, 2^-8 away, in each layer."""


@dataclass(frozen=True)
class Outcome:
    """One comparison: the largest difference, the largest reference value, and the difference that is allowed."""

    name: str
    difference: float
    largest: float
    allowed: float

    @property
    def good(self) -> bool:
        """NaN is never good."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        mark = "ok" if self.good else "BEYOND TOLERANCE"
        return (
            f"{self.name:<46} max |difference| {self.difference:.3g}, allowed {self.allowed:.3g} "
            f"(largest logit {self.largest:.3g})  {mark}"
        )


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Flags of `verify`."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="the checkpoint that the artifact was made from"
    )
    parser.add_argument("--level", help="check this level of its target only; default: each that this machine has")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as this process may use")
    parser.add_argument("--seed", type=int, default=0, help="of the random requests")


def main(args: argparse.Namespace) -> int:
    """Print one line per check; 0 when all are within tolerance, else 1. Raises XllmError for a damaged artifact."""
    manifest = read_manifest(args.artifact)
    check_files(args.artifact, manifest)
    total = sum(entry.bytes for entry in manifest.files.values())
    print(f"{len(manifest.files)} files, {size(total)}: digests match", flush=True)
    threads = args.threads or len(os.sched_getaffinity(0))
    target = runtime_target(manifest)
    here = target.levels(manifest) if args.level is None else [choose_level(target, manifest, args.level)]
    good = True
    for function in manifest.functions:
        trial = make_trial(manifest, args.seed, function)
        count = sum(step.sizes["N"] for step in trial.steps)
        print(f"@{function}: {len(trial.tokens)} requests, {count} tokens in {len(trial.steps)} steps", flush=True)
        native = {level: run_native(args.artifact, level, trial, threads) for level in here}
        for reference, outputs in references(args.artifact, manifest, args.checkpoint, trial):
            for level, got in native.items():
                for name, wanted in outputs.items():
                    outcome = compare(f"{level} and {reference}, {name}", manifest.model.dtype, got[name], wanted)
                    print(outcome, flush=True)
                    good &= outcome.good
    return 0 if good else 1


def compare(name: str, dtype: str, got: list[F32], wanted: list[F32]) -> Outcome:
    """An output of all steps of one runner against that of another."""
    difference = max(float(np.max(np.abs(g - w), initial=0.0)) for g, w in zip(got, wanted, strict=True))
    if not all(np.isfinite(g).all() for g in got):
        difference = float("nan")
    largest = max(float(np.max(np.abs(w), initial=0.0)) for w in wanted)
    return Outcome(name, difference, largest, TOLERANCE[dtype] * max(1.0, largest))


def run_native(path: Path, level: str, trial: Trial, threads: int) -> Rows:
    """Outputs of every step from the artifact's code for `level`, run as the server runs it."""
    from xllm_compiler.runtime.loader import load_artifact

    loaded = load_artifact(path, level)
    loaded.wait_checked()
    executor = loaded.code.executor(loaded.weights, pages=trial.pages, threads=threads)
    try:
        rows: Rows = {spec.name: [] for spec in loaded.manifest.functions[trial.function].outputs}
        batch = executor.new_batch(trial.function)
        for step in trial.steps:
            batch.fill(step.inputs, step.sizes)
            for name, array in executor.execute(batch).items():
                rows[name].append(_floats(array))
        return rows
    finally:
        executor.close()


def references(path: Path, manifest: Manifest, checkpoint: Path | None, trial: Trial) -> Iterator[tuple[str, Rows]]:
    """What the trial's function is compared with: (name, outputs of every step). The checkpoint tells of
    @step and @embed."""
    from xllm_compiler.ir.parser import parse_module
    from xllm_compiler.tools.unpack import bind_weights

    try:
        text = (Contents(path, manifest) / MODULE).read_text()
    except UnicodeDecodeError as error:
        raise XllmError("artifact", f"{MODULE} is not UTF-8 text: {error.reason}", where=str(path / MODULE)) from None
    module = parse_module(text, MODULE)
    params = bind_weights(module, path, manifest)
    yield f"interpreter on {MODULE}", run_interpreter(module, params, trial)
    if checkpoint is None or trial.function not in _OUTPUTS:
        return
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        print("torch or transformers is not installed: nothing to compare the checkpoint with")
        return
    from xllm_compiler.frontend.checkpoint import Checkpoint
    from xllm_compiler.frontend.quantized_config import side_notes
    from xllm_compiler.frontend.trace import trace_checkpoint

    opened = Checkpoint.open(checkpoint)
    traced = trace_checkpoint(
        opened,
        dtype=manifest.model.dtype,
        max_model_len=manifest.model.max_model_len,
        max_num_seqs=manifest.limits.max_num_seqs,
        max_num_batched_tokens=manifest.limits.max_num_batched_tokens,
        max_num_logits=manifest.limits.max_num_logits,
        functions=(trial.function,),
    )
    for note in (*opened.notes, *side_notes(opened), *traced.notes):
        print(f"note: {note}", flush=True)
    yield "interpreter on the traced model", run_interpreter(traced.module, traced.weights, trial)
    yield "transformers", {_OUTPUTS[trial.function]: run_transformers(checkpoint, manifest.model.dtype, trial)}


def run_interpreter(module: Module, params: Mapping[str, NDArray[Any]], trial: Trial) -> Rows:
    """Outputs of every step from the numpy meanings of the ops."""
    from xllm_compiler.analysis.interface import interface_of
    from xllm_compiler.interp import run
    from xllm_compiler.ir.semantics import state_zeros
    from xllm_compiler.ir.state import state_args

    func = module.func(trial.function)
    caches = {arg.name: state_zeros(arg.kv, {"P": trial.pages}) for arg in state_args(func)}
    names = [spec.name for spec in interface_of(func).outputs]
    rows: Rows = {name: [] for name in names}
    for step in trial.steps:
        results = run(module, func.name, {**step.inputs, **caches}, params, {**step.sizes, "P": trial.pages})
        caches = {func.aliases[i].name: result for i, result in enumerate(results) if i in func.aliases}
        outputs = [result for i, result in enumerate(results) if i not in func.aliases]
        for name, result in zip(names, outputs, strict=True):
            rows[name].append(result.astype(np.float32))
    return rows


def _floats(array: NDArray[Any]) -> F32:
    """A copy of an output's buffer in f32; 16-bit words are bf16."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array.astype(np.float32)


def run_transformers(checkpoint: Path, dtype: str, trial: Trial) -> list[F32]:
    """The same rows of logits or hidden states from the unmodified model, with dequantized weights if the checkpoint is
    quantized, each request alone and without a cache."""
    import torch
    from transformers.utils import logging

    from xllm_compiler.frontend.reference import load_reference

    logging.disable_progress_bar()
    head = trial.function == STEP
    model = load_reference(checkpoint, dtype, attention="sdpa", head=head)
    whole = []
    with torch.no_grad():
        for tokens in trial.tokens:
            result = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
            whole.append((result.logits if head else result.last_hidden_state)[0].float().numpy())
    return [np.stack([whole[request][position] for request, position in step.rows]) for step in trial.steps]
