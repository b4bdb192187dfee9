"""Whether two checkouts answer with the same bits: `python bench/same_bits.py BEFORE AFTER [--forms bf16 int8]`.

Each checkout compiles the bundled model with its own compiler and serves it with its own runtime: ragged prompts side
by side, prefilled in chunks and decoded. A form's digest covers every token and every log-probability, which depends
on the whole row of logits. Prints a line for each form; ends with 1 where one differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FORMS = {
    "bf16": [],
    "f32": ["--dtype", "float32"],
    "int8": ["--quantize", "int8"],
    "int4": ["--quantize", "int4"],
    "kv8": ["--quantize", "kv8"],
}
_SERVE = """
import hashlib, sys
from xllm_compiler.runtime.llm import LLM
from xllm_compiler.runtime.sampling_params import SamplingParams
prompts = [[(7 * i + 31 * n + 5) % 1000 + 1 for i in range(n)] for n in (1, 5, 16, 17, 40, 3, 150, 33)]
params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=5, prompt_logprobs=1)
with LLM(sys.argv[1], threads=2, max_num_batched_tokens=64, isa=sys.argv[2] or None) as llm:
    found = [(r.outputs[0].token_ids, repr(r.outputs[0].logprobs), repr(r.prompt_logprobs)) for r in
             llm.generate(prompts, params)]
print(hashlib.sha256(repr(found).encode()).hexdigest()[:16])
"""


def digest(root: Path, form: str, folder: Path, isa: str) -> str:
    """What a checkout answers in one form."""
    out = folder / f"{root.resolve().name}-{form}"
    env = {**os.environ, "PYTHONPATH": str(root.resolve())}
    levels = ["--isas", isa] if isa else []
    compile_ = [sys.executable, "-m", "xllm_compiler.tools.compile", str(root.resolve() / "models" / "bundled")]
    subprocess.run([*compile_, "-o", str(out), *levels, *FORMS[form]], env=env, cwd=folder, check=True, stdout=2)
    serve = [sys.executable, "-c", _SERVE, str(out), isa]
    return subprocess.run(serve, env=env, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> int:
    """Compare the two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--isa", default="", help="an instruction set level; default: the best of this machine")
    args = parser.parse_args()
    same = True
    with tempfile.TemporaryDirectory() as name:
        for form in args.forms:
            a, b = (digest(root, form, Path(name), args.isa) for root in (args.before, args.after))
            print(f"{form}: {a} {b} {'same' if a == b else 'DIFFERENT'}", flush=True)
            same &= a == b
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
