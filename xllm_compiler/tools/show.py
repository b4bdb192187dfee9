"""`xllm-compile show ARTIFACT`: what is in an artifact. Reads the manifest, and what quantization lost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xllm_compiler.artifact import read_manifest
from xllm_compiler.quant_eval.report import report_text
from xllm_compiler.tools.console import table
from xllm_compiler.tools.describe import (
    files_text,
    functions_text,
    memory_text,
    pooling_text,
    states_text,
    weights_text,
)


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Flags of `show`."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--all-weights", action="store_true", help="one row per weight, without grouping like ones")
    parser.add_argument("--json", action="store_true", help="print the manifest as it is")


def main(args: argparse.Namespace) -> int:
    """Print the manifest. Raises kind "artifact" when it is not a sound one."""
    manifest = read_manifest(args.artifact)
    if args.json:
        sys.stdout.write(manifest.to_json())
        return 0
    model, limits = manifest.model, manifest.limits
    info = [
        ("artifact", f"{manifest.id}, format {manifest.format}"),
        ("model", f"{model.name}, {model.architecture}, {model.layers} layers, hidden {model.hidden_size}"),
        ("", f"{model.vocab_size} vocabulary items, {model.dtype}, up to {model.max_model_len} tokens"),
        ("tokens", f"eos {', '.join(map(str, model.eos_token_ids)) or 'none'}; bos {model.bos_token_id}"),
        *([] if model.pooling is None else [("embeddings", pooling_text(model.pooling))]),
        ("target", f"{manifest.target.kind}: {', '.join(manifest.target.levels)}"),
        (
            "limits",
            f"{limits.max_num_seqs} requests, {limits.max_num_batched_tokens} tokens, {limits.max_num_logits} rows",
        ),
    ]
    dims = [(name, f"{r.lo} to {r.hi}", r.why) for name, r in sorted(manifest.dims.items())]
    key = [(name, "absent" if value is None else str(value)) for name, value in sorted(manifest.key.items())]
    sections = [
        table(info),
        f"dims\n{table(dims)}",
        functions_text(manifest),
        states_text(manifest),
        memory_text(manifest),
        weights_text(manifest, args.all_weights),
        files_text(manifest),
        *([] if (loss := report_text(args.artifact, manifest)) is None else [loss]),
        f"key: what the compile read\n{table(key)}",
    ]
    print("\n\n".join(sections))
    return 0
