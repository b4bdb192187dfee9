"""Speed of two checkouts, called in turn: decode of 1, 8 and 32 requests, a prompt of 512 tokens, start to first token.

    python bench/before_after.py OTHER_CHECKOUT OTHER_ARTIFACT ARTIFACT [--rounds 5]

The artifacts are of one checkpoint, each compiled by its own checkout. A round asks a process of each, the one after
the other, and every second round in the other order; each process loads its artifact, answers, and prints its figures.
Prints the median of each side and of the rounds' ratios of time, this checkout / other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import json, sys, time
begin = time.perf_counter()
from xllm_compiler.runtime.llm import LLM, SamplingParams
found = {}
with LLM(sys.argv[1], threads=2, kv_cache_memory_bytes=1 << 29) as llm:
    def run(requests, tokens, length):
        prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 3 for j in range(length)]} for i in range(requests)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params)
        return time.perf_counter() - start
    run(1, 1, 8)
    found["start to first token"] = time.perf_counter() - begin
    for requests, tokens in ((1, 64), (8, 64), (32, 48)):
        run(requests, 2, 16)
        found[f"decode of {requests}"] = min(run(requests, tokens, 16) - run(requests, 1, 16) for _ in range(2))
    found["prompt of 512"] = min(run(1, 1, 512) for _ in range(3))
print(json.dumps(found))
"""


def ask(checkout: Path, artifact: Path) -> dict[str, float]:
    """Seconds by what was done."""
    command = [checkout / ".venv/bin/python", "-P", "-c", WORKER, artifact]
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=checkout, env=env, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("other_artifact", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sides = [(args.other.resolve(), args.other_artifact.resolve()), (ROOT, args.artifact.resolve())]
    rounds = []
    for number in range(args.rounds):
        order = (0, 1) if number % 2 else (1, 0)
        asked = {side: ask(*sides[side]) for side in order}
        rounds.append((asked[0], asked[1]))
    print(f"{'':22} {'other, ms':>10} {'this, ms':>10} {'this / other':>13}")
    for what in rounds[0][0]:
        before, after = (statistics.median(pair[side][what] for pair in rounds) for side in (0, 1))
        ratio = statistics.median(b[what] / a[what] for a, b in rounds)
        print(f"{what:22} {before * 1e3:10.1f} {after * 1e3:10.1f} {ratio:13.3f}")


if __name__ == "__main__":
    main()
