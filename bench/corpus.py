"""Writes the traced modules of the corpus that every pass is held to: one tiny model of each supported family.

    python bench/corpus.py                           # traces all and replaces the files
    python bench/corpus.py --check                   # traces all and compares; exit code 1 where a file differs
    python bench/corpus.py --check --only llama,opt  # only the files that name these families

Supported is what bench/coverage.json calls equal. Families whose modules are the same share a file, which names them
all. Owns what is traced, and the form of the files; reading them is xllm_compiler.testing.corpus. Nothing is run, so
the models have no weights.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from xllm_compiler.frontend.trace import trace_checkpoint
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.printer import print_module
from xllm_compiler.models.families import settings_of
from xllm_compiler.models.random_checkpoint import random_config
from xllm_compiler.testing.corpus import TRACED, families_of, header

ROOT = Path(__file__).resolve().parent.parent
COVERAGE = ROOT / "bench" / "coverage.json"
# In bf16 too: each shows roundings and casts that the others do not (norms in f32, sinks, scaled rotary, soft caps).
BF16 = ("apertus", "diffllama", "gemma2", "gemma4_text", "gpt2", "granite_swa", "minicpm3", "qwen3")


def supported() -> list[str]:
    return [f for f, r in json.loads(COVERAGE.read_text()).items() if r["status"] == "equal"]


def trace(family: str, dtype: str) -> tuple[str, str]:
    """(structural hash, text) of the family's tiny model."""
    traced = trace_checkpoint(
        random_config(family, settings_of(family)),
        dtype=dtype,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        max_num_logits=64,
    )
    return structural_hash(traced.module), print_module(traced.module)


def files(wanted: Iterable[tuple[str, str]]) -> dict[str, str]:
    """File name -> content, for (family, dtype) pairs; equal modules under the first family's name."""
    found: dict[str, tuple[str, str, list[str]]] = {}
    for family, dtype in wanted:
        digest, text = trace(family, dtype)
        name = family if dtype == "f32" else f"{family}.{dtype}"
        found.setdefault(digest, (name, text, []))[2].append(family)
    return {f"{name}.xir": header(transformers.__version__, same) + text for name, text, same in found.values()}


def check(only: list[str]) -> int:
    """How many files differ from what is traced now."""
    stored = {p.name: p.read_text(encoding="utf-8") for p in sorted(TRACED.glob("*.xir"))}
    if only:
        # With all families of a file, or the file would seem to name some in vain.
        stored = {n: t for n, t in stored.items() if set(only) & set(families_of(t))}
        missing = set(only) - {f for t in stored.values() for f in families_of(t)}
        if missing:
            sys.exit(f"the corpus has no {', '.join(sorted(missing))}")
        traced = files(
            (f, "bf16" if n.endswith(".bf16.xir") else "f32") for n, t in stored.items() for f in families_of(t)
        )
    else:
        traced = files(everything())
    wrong = 0
    for name in sorted({*stored, *traced}):
        have, want = stored.get(name, ""), traced.get(name, "")
        if have != want:
            wrong += 1
            lines = difflib.unified_diff(
                have.splitlines(), want.splitlines(), f"{name} stored", f"{name} traced", "", "", 1
            )
            print("\n".join(list(lines)[:40]))
    print(f"{len(traced)} files traced, {wrong} differ from the corpus")
    return wrong


def everything() -> list[tuple[str, str]]:
    return [(f, "f32") for f in supported()] + [(f, "bf16") for f in BF16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--only", default="", help="with --check: comma-separated families")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    if args.check:
        return 1 if check([f for f in args.only.split(",") if f]) else 0
    if args.only:
        parser.error("--only goes with --check: writing traces everything")
    made = files(everything())
    TRACED.mkdir(exist_ok=True)
    for stale in sorted({p.name for p in TRACED.glob("*.xir")} - set(made)):
        (TRACED / stale).unlink()
    for name, text in made.items():
        (TRACED / name).write_text(text, encoding="utf-8")
    print(f"{len(made)} files, {sum(map(len, made.values())) >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
