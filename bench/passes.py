"""The compiler's own speed against its budgets: parsing, the default pipeline, the prover, the laws, tool start-up.

    python bench/passes.py [--rounds 5] [--laws fuse-glu]

The graph is a Qwen3 of tiny width with as many layers as give 2,000 traced ops. Every figure is the median of the
rounds, but for the laws, which run once; a budget that is missed makes the exit code 1.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from xllm_compiler.dims import Dim
from xllm_compiler.dims.prove import Prover
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.trace import trace_checkpoint
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.testing import laws

OPS = 2000
LAYERS = 22
TOOLS = ("xllm-opt", "xllm-run", "xllm-reduce", "xllm-bisect", "xllm-trace", "xllm-new-pass", "xllm-compile")


def traced_text() -> str:
    """A traced model of at least OPS ops, as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        write_random_checkpoint("qwen3", path, settings={**TINY, "num_hidden_layers": LAYERS})
        limits = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 128, "max_num_logits": 64}
        return print_module(trace_checkpoint(Checkpoint.open(path), dtype="bf16", **limits).module)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def prover_times(text: str) -> list[float]:
    """Seconds of every question that the default pipeline and the verifier put to the prover."""
    times: list[float] = []
    original = Prover.nonnegative

    def timed(self: Prover, dim: Dim) -> bool | None:
        begin = time.perf_counter()
        answer = original(self, dim)
        times.append(time.perf_counter() - begin)
        return answer

    Prover.nonnegative = timed  # type: ignore[method-assign]
    try:
        run_pipeline("@cpu", parse_module(text))
    finally:
        Prover.nonnegative = original  # type: ignore[method-assign]
    return times


def law_seconds(name: str) -> float:
    """All laws on one pass, corpus loading included, in a process of its own."""
    code = (
        "import sys; from xllm_compiler.testing import laws\n"
        f"sys.exit('\\n'.join(r for n in laws.law_names() if (r := laws.check({name!r}, n))) or 0)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=False)
    if done.returncode:
        raise SystemExit(f"a law does not hold for {name}")
    return time.perf_counter() - begin


def start_seconds(tool: str, rounds: int) -> float:
    """A process that prints its help and exits."""
    command = [str(Path(sys.executable).with_name(tool)), "--help"]
    return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), rounds)


def main() -> int:
    """Measures, prints a table and returns 1 where a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--laws", default="fuse-glu", metavar="PASS", help="the pass whose laws are timed")
    args = parser.parse_args()
    assert laws.law_names(), "no laws"

    text = traced_text()
    module = parse_module(text)
    ops = len(module.func().ops)
    assert ops >= OPS, f"{ops} ops; raise LAYERS"
    copies: list[Module] = [parse_module(text) for _ in range(args.rounds)]
    proofs = prover_times(text)
    rows: list[tuple[str, float, float]] = [
        (f"parse {ops} ops", seconds(lambda: parse_module(text), args.rounds), 0.3),
        (f"print {ops} ops", seconds(lambda: print_module(module), args.rounds), 0.3),
        (f"verify {ops} ops", seconds(lambda: verify(module), args.rounds), 0.3),
        (f"pipeline @cpu on {ops} ops", seconds(lambda: run_pipeline("@cpu", copies.pop()), args.rounds), 5.0),
        (f"prove, median of {len(proofs)}", statistics.median(proofs), 50e-6),
        (f"all laws on {args.laws}", law_seconds(args.laws), 30.0),
        *((f"{tool} --help", start_seconds(tool, args.rounds), 0.4) for tool in TOOLS),
    ]
    for what, took, budget in rows:
        print(f"{what:<32} {_time(took):>10}  budget {_time(budget):>8}  {'' if took <= budget else 'MISSED'}".rstrip())
    return int(any(took > budget for _, took, budget in rows))


def _time(value: float) -> str:
    return f"{value * 1e6:.1f} us" if value < 1e-3 else f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
