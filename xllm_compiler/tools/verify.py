"""`xllm-compile verify ARTIFACT`: digests, then its programs against the reference interpreter on random requests. With
--checkpoint also against the model as it was traced, before any pass, and against transformers where that is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import STEP, Contents, Manifest, check_files, machine_isas, read_manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.tools.console import size
from xllm_compiler.tools.steps import Trial, make_trial

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Module

F32 = NDArray[np.float32]

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `verify`."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="the checkpoint that the artifact was made from")
    parser.add_argument("--isa", help="check this instruction set only; default: each that this machine has")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: as many as this process may use")
    parser.add_argument("--seed", type=int, default=0, help="of the random requests")


def main(args: argparse.Namespace) -> int:
    """Print one line per check; 0 when all are within tolerance, else 1. Raises XllmError for a damaged artifact."""
    manifest = read_manifest(args.artifact)
    check_files(args.artifact, manifest)
    total = sum(entry.bytes for entry in manifest.files.values())
    print(f"{len(manifest.files)} files, {size(total)}: digests match", flush=True)
    trial = make_trial(manifest, args.seed)
    count = sum(len(step.ids) for step in trial.steps)
    print(f"{len(trial.tokens)} requests, {count} tokens in {len(trial.steps)} steps", flush=True)
    threads = args.threads or len(os.sched_getaffinity(0))
    here = [isa for isa in machine_isas() if isa in manifest.target.isas and args.isa in (None, isa)]
    if not here:
        asked = args.isa or ", ".join(manifest.target.isas)
        raise XllmError("artifact", f"this machine cannot run {asked}", help=f"it has {', '.join(machine_isas())}")
    native = {isa: run_native(args.artifact, isa, trial, threads) for isa in here}
    good = True
    for reference, wanted in references(args.artifact, manifest, args.checkpoint, trial):
        for isa, got in native.items():
            outcome = compare(f"{isa} and {reference}", manifest.model.dtype, got, wanted)
            print(outcome, flush=True)
            good &= outcome.good
    return 0 if good else 1


def compare(name: str, dtype: str, got: list[F32], wanted: list[F32]) -> Outcome:
    """The logits of all steps of one runner against those of another."""
    difference = max(float(np.max(np.abs(g - w), initial=0.0)) for g, w in zip(got, wanted, strict=True))
    if not all(np.isfinite(g).all() for g in got):
        difference = float("nan")
    largest = max(float(np.max(np.abs(w), initial=0.0)) for w in wanted)
    return Outcome(name, difference, largest, TOLERANCE[dtype] * max(1.0, largest))


def run_native(path: Path, isa: str, trial: Trial, threads: int) -> list[F32]:
    """Logits of every step from the artifact's code for `isa`, run as the server runs it."""
    from xllm_compiler.runtime.cpu.executor import CpuExecutor
    from xllm_compiler.runtime.loader import load_artifact

    loaded = load_artifact(path, isa)
    loaded.wait_checked()
    executor = CpuExecutor(loaded.manifest, loaded.code, loaded.weights, pages=trial.pages, threads=threads)
    try:
        logits = []
        batch = executor.new_batch()
        for step in trial.steps:
            batch.n, batch.b, batch.s = len(step.ids), len(step.start) - 1, len(step.sel)
            for name, array in step.inputs().items():
                getattr(batch, name)[: len(array)] = array
            logits.append(executor.execute(batch).rows.copy())
        return logits
    finally:
        executor.close()


def references(
    path: Path, manifest: Manifest, checkpoint: Path | None, trial: Trial
) -> Iterator[tuple[str, list[F32]]]:
    """What the artifact is compared with: (name, logits of every step)."""
    from xllm_compiler.ir.parser import parse_module
    from xllm_compiler.tools.unpack import bind_weights

    try:
        text = (Contents(path, manifest) / STEP).read_text()
    except UnicodeDecodeError as error:
        raise XllmError("artifact", f"{STEP} is not UTF-8 text: {error.reason}", where=str(path / STEP)) from None
    module = parse_module(text, STEP)
    params = bind_weights(module, path, manifest)
    yield f"interpreter on {STEP}", run_interpreter(module, params, trial)
    if checkpoint is None:
        return
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        print("torch or transformers is not installed: nothing to compare the checkpoint with")
        return
    from xllm_compiler.frontend.checkpoint import Checkpoint
    from xllm_compiler.frontend.quantized_config import side_notes
    from xllm_compiler.frontend.trace import trace_checkpoint

    opened = Checkpoint.open(checkpoint)
    traced = trace_checkpoint(
        checkpoint,
        dtype=manifest.model.dtype,
        max_model_len=manifest.model.max_model_len,
        max_num_seqs=manifest.limits.max_num_seqs,
        max_num_batched_tokens=manifest.limits.max_num_batched_tokens,
        max_num_logits=manifest.limits.max_num_logits,
    )
    for note in (*opened.notes, *side_notes(opened), *traced.notes):
        print(f"note: {note}", flush=True)
    yield "interpreter on the traced model", run_interpreter(traced.module, traced.weights, trial)
    yield "transformers", run_transformers(checkpoint, manifest.model.dtype, trial)


def run_interpreter(module: Module, params: Mapping[str, NDArray[Any]], trial: Trial) -> list[F32]:
    """Logits of every step from the numpy meanings of the ops."""
    from xllm_compiler.interp import run
    from xllm_compiler.ir.semantics import state_zeros
    from xllm_compiler.ir.state import state_args

    caches = {arg.name: state_zeros(arg.kv, {"P": trial.pages}) for arg in state_args(module.func("step"))}
    logits = []
    for step in trial.steps:
        sizes = {"N": len(step.ids), "B": len(step.start) - 1, "S": len(step.sel), "P": trial.pages}
        results = run(module, "step", {**step.inputs(), **caches}, params, sizes)
        logits.append(results[0].astype(np.float32))
        caches = dict(zip(caches, results[1:], strict=False))  # then may come maxima of the logits
    return logits


def run_transformers(checkpoint: Path, dtype: str, trial: Trial) -> list[F32]:
    """The same rows of logits from the unmodified model, with dequantized weights if the checkpoint is quantized, each
    request alone and without a cache."""
    import torch
    from transformers.utils import logging

    from xllm_compiler.frontend.reference import load_reference

    logging.disable_progress_bar()
    model = load_reference(checkpoint, dtype, attention="sdpa")
    with torch.no_grad():
        whole = [
            model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0].float().numpy()
            for tokens in trial.tokens
        ]
    return [np.stack([whole[request][position] for request, position in step.rows]) for step in trial.steps]
