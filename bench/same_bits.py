"""Whether two checkouts of this project answer with the same bits.

    python bench/same_bits.py PATH_TO_OTHER_CHECKOUT          # both with their own .venv
    python bench/same_bits.py --digests > digests.json        # this checkout alone, to compare later
    python bench/same_bits.py --against digests.json

Each checkout compiles the same checkpoints (the bundled model in five forms, six tiny families) for every instruction
set level of this machine. Each level then answers prompts of many lengths at once, in chunks of 7 tokens of which no
two steps cut alike, with log-probabilities of the 20 likeliest tokens at every position of prompt and answer. A digest
of all tokens and log-probabilities stands for the logits: each log-probability is made of a whole row of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMS = {
    "bf16": ["--dtype", "bfloat16"],
    "f32": ["--dtype", "float32"],
    "int8": ["--quantize", "int8", "--max-kl", "inf"],
    "int4": ["--quantize", "int4", "--max-kl", "inf"],
    "kv8": ["--quantize", "kv8", "--max-kl", "inf"],
}
FAMILIES = ("llama", "qwen3", "gemma3_text", "gemma2", "phi3", "gpt_neox")
LIMITS = ["--max-model-len", "256", "--max-num-seqs", "6", "--max-num-batched-tokens", "7"]

# What each checkout runs, with its own Python: names that have been public since the first release.
WORKER = """
import hashlib, inspect, json, struct, sys
from pathlib import Path
from xllm_compiler.artifact import read_manifest
from xllm_compiler.runtime.llm import LLM, SamplingParams

path, found = sys.argv[1], {}
target = read_manifest(Path(path)).target
there = target.levels if hasattr(target, "levels") else target.isas
isas = [isa for isa in sys.argv[2].split(",") if isa in there]  # a level that changes nothing for a model is left out
prompts = [[(31 * i + 7 * j) % 250 + 3 for j in range(n)] for i, n in enumerate((1, 2, 5, 17, 40, 90))]
option = "level" if "level" in inspect.signature(LLM).parameters else "isa"
for isa in isas:
    digest = hashlib.sha256()
    with LLM(path, **{option: isa}, threads=2, kv_cache_memory_bytes=1 << 26) as llm:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=20, prompt_logprobs=20)
        for result in llm.generate([{"prompt_token_ids": p} for p in prompts], params):
            rows = [row for row in result.prompt_logprobs if row is not None] + result.outputs[0].logprobs
            for row in rows:
                for token, said in row.items():
                    digest.update(struct.pack("<id", token, said.logprob))
    found[isa] = digest.hexdigest()
print(json.dumps(found))
"""


def run(checkout: Path, *args: str) -> str:
    """Standard output of a checkout's Python. Its errors go to ours."""
    env = {**os.environ, "PYTHONPATH": ""}
    python = checkout / ".venv/bin/python"
    done = subprocess.run([python, "-P", *args], cwd=checkout, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(args[:3])} failed with status {done.returncode}")
    return done.stdout


def checkpoints(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Name of a case -> checkpoint and options of the compile. Tiny families are written below `folder`."""
    cases = {f"bundled {form}": (ROOT / "models/bundled", options) for form, options in FORMS.items()}
    for family in FAMILIES:
        out = folder / family
        run(ROOT, "-m", "xllm_compiler.models.random_checkpoint", family, "-o", str(out))
        cases[family] = (out, ["--dtype", "bfloat16"])
    return cases


def digests(checkout: Path, cases: dict[str, tuple[Path, list[str]]], isas: list[str]) -> dict[str, dict[str, str]]:
    """Case -> instruction set level -> digest of its answers."""
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for name, (path, options) in cases.items():
            artifact = f"{work}/{name.replace(' ', '-')}"
            compile_ = ["-m", "xllm_compiler.tools.compile", str(path), "-o", artifact, "--isas", ",".join(isas)]
            run(checkout, *compile_, *LIMITS, *options)
            found[name] = json.loads(run(checkout, "-c", WORKER, artifact, ",".join(isas)))
            print(f"{checkout}: {name}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="another checkout, with a .venv")
    parser.add_argument("--digests", action="store_true", help="print this checkout's digests")
    parser.add_argument("--against", type=Path, help="digests that were printed before")
    parser.add_argument("--only", default="", help="comma-separated cases, such as 'bundled int8,llama'")
    args = parser.parse_args()
    from xllm_compiler.artifact.cpu_isa import machine_isas

    isas = list(machine_isas())
    with tempfile.TemporaryDirectory() as folder:
        cases = checkpoints(Path(folder))
        if args.only:
            cases = {name: cases[name] for name in args.only.split(",")}
        ours = digests(ROOT, cases, isas)
        if args.digests:
            print(json.dumps(ours, indent=1))
            return 0
        if args.against is not None:
            theirs = json.loads(args.against.read_text())
        elif args.other is not None:
            theirs = digests(args.other.resolve(), cases, isas)
        else:
            parser.error("name another checkout, --digests or --against")
    wrong = 0
    for name, levels in ours.items():
        for isa, digest in levels.items():
            same = theirs.get(name, {}).get(isa) == digest
            wrong += not same
            print(f"{'same' if same else 'OTHER'}  {name:16} {isa:12} {digest[:16]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
