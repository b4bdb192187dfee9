"""The figures of bench/RESULTS.md: a Qwen3-0.6B shape compiled, started and serving, beside eager transformers.

    python bench/serving.py [--rounds 5] [--work .cache/bench] [--json FILE]

Every round measures the machine's limits, us and transformers one after the other, so that noise falls on all alike;
medians and shares of the limit measured in the same run are printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from limits import Probe

HERE = Path(__file__).resolve().parent
DECODE_PROMPT, DECODE_NEW, PREFILL_PROMPT = 128, 33, 512


class Worker:
    """One backend in its own process."""

    def __init__(self, kind: str, path: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "workers.py"), kind, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a benchmark worker ended with status {self._process.wait()}")
        return json.loads(line)

    def ask(self, **request: int) -> dict[str, Any]:
        """Send one measurement and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Close the pipe and wait for the process to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def timed_run(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a child (of itself and its own children, whichever was larger)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def flops_per_token(config: dict[str, Any], context: float) -> float:
    """Multiply-adds counted twice: linears without the vocabulary, attention over `context` earlier tokens."""
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    linears = hidden * (heads + 2 * kv) * dim + heads * dim * hidden + 3 * hidden * inner
    return layers * (2 * linears + 4 * heads * dim * context)


def weight_bytes(config: dict[str, Any]) -> int:
    """bf16 bytes that a decode step must read: all matrices, the tied vocabulary once."""
    return int(flops_per_token(config, 0)) + 2 * config["vocab_size"] * config["hidden_size"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-transformers", action="store_true")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    work: Path = options.work
    checkpoint, artifact = work / "qwen3-0.6b", work / "qwen3-0.6b.xllm"
    if not (checkpoint / "config.json").exists():
        command = [sys.executable, "-m", "xllm_compiler.models.random_checkpoint", "qwen3"]
        subprocess.run([*command, "--preset", "qwen3-0.6b", "-o", str(checkpoint)], check=True)
    config = json.loads((checkpoint / "config.json").read_text())

    shutil.rmtree(artifact, ignore_errors=True)
    tool = [str(Path(sys.executable).with_name("xllm-compile")), str(checkpoint), "-o", str(artifact)]
    compile_s, compile_bytes = timed_run([*tool, "--dtype", "bfloat16", "--max-model-len", "4096"])
    print(f"cold compile {compile_s:.1f} s, peak {compile_bytes / 1e9:.2f} GB", flush=True)

    ask = [sys.executable, "-m", "xllm_compiler.runtime.ask", str(artifact), "Hello", "--max-tokens", "1"]
    starts = [timed_run(ask) for _ in range(5)]

    probe = Probe(threads)
    backends = {"xllm": Worker("xllm", artifact, threads)}
    if not options.skip_transformers:
        backends["transformers"] = Worker("transformers", checkpoint, threads)
    seen: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    overhead: list[float] = []

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    for index in range(options.rounds):
        note("read", probe.read_bandwidth())
        note("bf16", probe.arithmetic("bf16_dots"))
        for name, worker in backends.items():
            for batch in (1, 8):
                answer = worker.ask(prompt=DECODE_PROMPT, new=DECODE_NEW, batch=batch, seed=index)
                note(f"{name} decode {batch}", answer["decode_tokens"] / answer["decode_s"])
                if name == "xllm" and batch == 1:
                    outside = sum(s for phase, s in answer["step_seconds"].items() if phase != "execute")
                    overhead.append(outside / answer["steps"])
            answer = worker.ask(prompt=PREFILL_PROMPT, new=1, batch=1, seed=index)
            note(f"{name} prefill", PREFILL_PROMPT / answer["prefill_s"])
            peaks[name] = answer["peak_bytes"]
        note("read", probe.read_bandwidth())
        note("bf16", probe.arithmetic("bf16_dots"))
        print(f"round {index + 1}: " + ", ".join(f"{k} {v[-1]:.4g}" for k, v in seen.items()), flush=True)
    for worker in backends.values():
        worker.close()

    median = {name: statistics.median(values) for name, values in seen.items()}
    read, peak = median["read"], median["bf16"]
    decode_limit = read / weight_bytes(config)
    prefill_limit = peak / flops_per_token(config, PREFILL_PROMPT / 2)
    print(f"\n{datetime.date.today()}  `python bench/serving.py --rounds {options.rounds}`  {threads} threads")
    print(f"limits in this run: read {read / 1e9:.1f} GB/s, bf16 {peak / 1e9:.0f} GFLOP/s (medians)\n")
    print("| | " + " | ".join(backends) + " | ratio | limit | our share |")
    print("|---|" + "---|" * (len(backends) + 3))
    for label, key, limit in (
        ("decode, batch 1, tok/s", "decode 1", decode_limit),
        ("decode, batch 8, tok/s", "decode 8", 8 * decode_limit),
        (f"prefill of {PREFILL_PROMPT}, tok/s", "prefill", prefill_limit),
    ):
        ours = median[f"xllm {key}"]
        figures = [median[f"{name} {key}"] for name in backends]
        ratio = f"{ours / figures[1]:.2f}" if len(figures) > 1 else "-"
        cells = " | ".join(f"{figure:.1f}" for figure in figures)
        print(f"| {label} | {cells} | {ratio} | {limit:.1f} | {ours / limit:.0%} |")
    print(f"\ncold compile {compile_s:.1f} s, peak {compile_bytes / 1e9:.2f} GB")
    start_s = statistics.median(seconds for seconds, _ in starts)
    print(f"process start to first token and exit, page cache warm: {start_s:.2f} s")
    print(f"engine time outside the native call, batch 1: {statistics.median(overhead) * 1e6:.0f} us a step")
    print("peak memory while serving: " + ", ".join(f"{n} {b / 1e9:.2f} GB" for n, b in peaks.items()))
    if options.json:
        record = {
            "seen": seen,
            "compile_s": compile_s,
            "compile_bytes": compile_bytes,
            "starts": starts,
            "peaks": peaks,
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
