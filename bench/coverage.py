"""Tries every causal-LM family of the installed transformers at tiny random size and writes docs/supported-models.md.

    python bench/coverage.py                    # families that bench/coverage.json does not know yet
    python bench/coverage.py --only llama,phi3  # these, again
    python bench/coverage.py --all              # everything again
    python bench/coverage.py --end-to-end       # through the CPU compiler and the offline LLM too

Every family runs in a process of its own with a time and a memory limit. First the model is traced, canonicalised and
run in the interpreter: four requests of different length, side by side, in ragged chunks, against transformers' eager
forward pass on the same weights. With --end-to-end the checkpoint is compiled for the CPU and greedy tokens are
compared with transformers'. Sizes are those of models/families.py. A family is "equal", "refused" (with the compiler's
own message), "wrong", "crash" or "untested" (transformers itself does not work at this size). The last three are bugs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.reference import load_reference, reference_logits, stepped_logits
from xllm_compiler.frontend.trace import Traced, trace_checkpoint
from xllm_compiler.models.families import settings_of
from xllm_compiler.models.random_checkpoint import random_config, write_random_checkpoint
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "bench" / "coverage.json"
TABLE = ROOT / "docs" / "supported-models.md"
PIPELINE = "import-clean,fold,cse,canonicalise,tabulate-positions,fix(fold,cse,dce)"
TIMEOUT_S = 240
MEMORY = 12 << 30
LENGTH = 64  # tokens; the longest prompt has 40
TOLERANCE = 1e-4


def limits() -> dict[str, Any]:
    return {
        "dtype": "f32",
        "max_model_len": LENGTH,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "max_num_logits": 64,
    }


def prompts_for(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, vocab, n).tolist() for n in (23, 1, 9, 40)]


def canonical(traced: Traced) -> None:
    """The passes that come before anything target-specific."""
    run_pipeline(PIPELINE, traced.module, PassContext())


def compare(ours: list[Any], theirs: list[Any]) -> tuple[float, float]:
    """(largest difference, largest logit) over all prompts and positions."""
    worst = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    return worst, max(float(np.abs(b).max()) for b in theirs)


def try_family(family: str, end_to_end: bool) -> dict[str, Any]:
    """The outcome of one family, as stored."""
    try:
        settings = settings_of(family)
        config = random_config(family, settings)
    except Exception as e:
        return {"status": "untested", "why": f"no tiny config: {short(e)}"}
    if config.get_text_config(decoder=True) is not config:
        return refusal_of(config, "not a plain decoder")  # before its vision tower is written to disk
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        try:
            write_random_checkpoint(family, path, settings=settings)
            model = load_reference(path)
            prompts = prompts_for(int(model.config.vocab_size))
            theirs = [reference_logits(model, p) for p in prompts]
        except Exception as e:
            return refusal_of(config, f"transformers fails at this size: {short(e)}")
        if not all(np.isfinite(t).all() for t in theirs):
            return {"status": "untested", "why": "transformers gives NaN at this size"}
        try:
            traced = trace_checkpoint(Checkpoint.open(path), **limits())
            canonical(traced)
        except XllmError as e:
            return refused(e)
        error, size = compare(stepped_logits(traced.module, dict(traced.weights), prompts), theirs)
        out: dict[str, Any] = {"error": float(f"{error:.1e}"), "logits": float(f"{size:.2g}")}
        if not error <= TOLERANCE * max(1.0, size):
            return {"status": "wrong", "why": f"logits differ by {error:.2g}", **out}
        if end_to_end:
            out.update(tokens_equal(path, model))
        return {"status": "wrong" if out.get("tokens") == "differ" else "equal", **out}


def refusal_of(config: Any, otherwise: str) -> dict[str, Any]:
    """What the compiler says about a config for which there is no reference to compare with."""
    try:
        trace_checkpoint(config, **limits())
    except XllmError as e:
        return refused(e)
    return {"status": "untested", "why": otherwise}


def tokens_equal(path: Path, model: Any) -> dict[str, Any]:
    """Greedy tokens of the compiled artifact against transformers': {"tokens": "equal"} or what went wrong."""
    from xllm_compiler.driver import compile_checkpoint
    from xllm_compiler.options import CompileOptions
    from xllm_compiler.runtime.llm import LLM, SamplingParams
    from xllm_compiler.targets.cpu import Cpu

    artifact = path.parent / "artifact"
    options = CompileOptions(dtype="float32", max_model_len=LENGTH, max_num_seqs=4, target=Cpu(("avx2",)))
    try:
        compile_checkpoint(path, artifact, options)
    except XllmError as e:
        return {"tokens": e.kind, "why": e.message}
    prompts = [p[:24] for p in prompts_for(int(model.config.vocab_size))]
    llm = LLM(str(artifact))
    wanted = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], wanted)
    for prompt, output in zip(prompts, outputs, strict=True):
        ours = list(output.outputs[0].token_ids)
        theirs = list(prompt)
        for _ in ours:
            theirs.append(int(reference_logits(model, theirs)[-1].argmax()))
        if ours != theirs[len(prompt) :]:
            return {"tokens": "differ", "why": f"{ours} instead of {theirs[len(prompt) :]}"}
    return {"tokens": "equal"}


def refused(e: XllmError) -> dict[str, Any]:
    status = "refused" if e.kind in ("unsupported", "option") else "crash"
    where = e.where if e.where and not e.where.startswith("/") else ""  # not the temporary folder
    return {"status": status, "why": e.message, **({"where": where} if where else {})}


def short(e: BaseException) -> str:
    return (type(e).__name__ + ": " + " ".join(str(e).split()))[:200]


def in_child(family: str, end_to_end: bool) -> dict[str, Any]:
    """`try_family` in a forked process with limits."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(TIMEOUT_S)
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            result = try_family(family, end_to_end)
        except BaseException as e:
            frame = traceback.extract_tb(e.__traceback__)[-1]
            result = {"status": "crash", "why": short(e), "where": f"{Path(frame.filename).name}:{frame.lineno}"}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    data = b""
    while chunk := os.read(read, 1 << 16):
        data += chunk
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if not data:
        return {"status": "crash", "why": f"the process ended with status {status} (time or memory)"}
    return dict(json.loads(data))


def load_state() -> dict[str, dict[str, Any]]:
    return dict(json.loads(STATE.read_text())) if STATE.exists() else {}


def save(state: Mapping[str, dict[str, Any]]) -> None:
    STATE.write_text(json.dumps(dict(sorted(state.items())), indent=1, sort_keys=True) + "\n")
    TABLE.write_text(table(state))


def table(state: Mapping[str, dict[str, Any]]) -> str:
    """docs/supported-models.md."""
    counts = {s: sum(1 for r in state.values() if r["status"] == s) for s in ("equal", "refused", "wrong", "crash")}
    lines = [
        "# Supported models",
        "",
        "Written by `python bench/coverage.py`; do not edit. Every causal-LM family of transformers "
        f"{transformers.__version__} at tiny random size in f32: four requests of different length, side by side and "
        "in ragged chunks, against transformers' eager forward pass. **equal** means: logits within 1e-4 at every "
        "position; *tokens too* means that greedy tokens of the compiled CPU artifact were equal as well. **refused** "
        "means: `xllm-compile` says so, with the message given here, instead of compiling something else.",
        "",
        "Checkpoints that come quantized: [quantization.md](quantization.md#checkpoints-that-come-quantized).",
        "",
        f"{counts['equal']} equal, {counts['refused']} refused, {counts['wrong']} wrong, {counts['crash']} crashed, "
        f"{len(state) - sum(counts.values())} untested, of {len(state)} families.",
        "",
        "| family | class | outcome | largest difference / why |",
        "|---|---|---|---|",
    ]
    for family, r in sorted(state.items(), key=lambda item: (item[1]["status"] != "equal", item[0])):
        what = r["status"] + (", tokens too" if r.get("tokens") == "equal" else "")
        if r["status"] == "equal":
            why = f"{r['error']:.0e} of {r['logits']:.2g}"
            if r.get("tokens", "equal") != "equal":
                why += f"; not compiled for the CPU: {r['why']}"
        else:
            why = r.get("why", "") + (f" ({r['where']})" if r.get("where") else "")
        lines.append(f"| {family} | {FAMILIES[family]} | {what} | {escape(why)} |")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")[:300]


def families(args: argparse.Namespace, state: Mapping[str, dict[str, Any]]) -> Iterable[str]:
    if args.only:
        unknown = [f for f in args.only.split(",") if f not in FAMILIES]
        if unknown:
            sys.exit(f"transformers has no causal-LM family {', '.join(unknown)}")
        return list(args.only.split(","))
    if args.status:
        return [f for f, r in state.items() if r["status"] in args.status.split(",")]
    return [f for f in FAMILIES if args.all or f not in state]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated families, run again even when known")
    parser.add_argument("--status", default="", help="run again what has one of these outcomes")
    parser.add_argument("--all", action="store_true", help="run everything again")
    parser.add_argument("--end-to-end", action="store_true", help="also compile for the CPU and compare greedy tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    state = load_state()
    for family in families(args, state):
        started = time.time()
        state[family] = in_child(family, args.end_to_end)
        save(state)
        r = state[family]
        print(
            f"{family:28} {r['status']:9} {time.time() - started:5.1f} s  {r.get('error', '')} {r.get('why', '')[:150]}"
        )
        sys.stdout.flush()
    bad = [f for f, r in state.items() if r["status"] in ("wrong", "crash")]
    equal = sum(1 for r in state.values() if r["status"] == "equal")
    print(f"{equal} equal; wrong or crashed: {', '.join(bad) or 'none'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
