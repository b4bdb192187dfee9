"""What every worker of `peers.py` speaks: JSON lines over stdin and stdout, standard library only.

A worker is started with one argument, a JSON object: {"model": path, "threads": n, "vocab": n, ...}. It loads, says
{"ready": true}, and answers until its stdin closes:

    {"op": "prefill", "length": n, "seed": s} -> {"seconds": s}
        from a prompt to its first token
    {"op": "decode", "batch": b, "prompt": n, "new": k, "seed": s} -> {"tokens": t, "seconds": s}
        while all b requests decode

Every answer has "peak_bytes", the most memory that was resident. A failure is {"error": text}; the process goes on.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from typing import Any, Protocol

Options = dict[str, Any]


class Peer(Protocol):
    """What a worker does with its library. Prompts are token ids; decoding is greedy and ignores the end token."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token, in a cache of its own."""

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        """About `new` tokens for every prompt; tokens made and seconds spent while all of them were decoding."""


def prompt(length: int, vocab: int, seed: int) -> list[int]:
    """Random token ids, fixed by the seed, the same for every peer; the first three ids are special ones."""
    # the length is part of the seed: no prompt is the beginning of another, which a prefix cache would answer
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(3, vocab) for _ in range(length)]


def peak_bytes() -> int:
    """The most memory that this process has had resident since it was executed (not what its parent had)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Steps:
    """Durations of decode steps, each of which made one token per request; the first two only warm things up."""

    SKIP = 2

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.seconds: list[float] = []
        self._last = 0.0

    def start(self) -> None:
        """The moment at which every request has its first token."""
        self._last = time.perf_counter()

    def mark(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def total(self) -> tuple[int, float]:
        """Tokens and seconds of the steps that count."""
        kept = self.seconds[self.SKIP :] or self.seconds
        return self.batch * len(kept), sum(kept)


def _answer(peer: Peer, request: dict[str, Any], vocab: int) -> dict[str, Any]:
    seed = int(request["seed"])
    if request["op"] == "prefill":
        return {"seconds": peer.prefill(prompt(int(request["length"]), vocab, seed))}
    prompts = [prompt(int(request["prompt"]), vocab, seed * 1000 + index) for index in range(int(request["batch"]))]
    tokens, seconds = peer.decode(prompts, int(request["new"]))
    return {"tokens": tokens, "seconds": seconds}


def serve(make: Any) -> None:
    """Load `make(options)`, then answer until stdin closes."""
    options: Options = json.loads(sys.argv[1])
    # libraries print to stdout now and then: keep the pipe for answers alone
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = make(options)
    print(json.dumps({"ready": True}), file=pipe)
    for line in sys.stdin:
        try:
            answer = _answer(peer, json.loads(line), int(options["vocab"]))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({**answer, "peak_bytes": peak_bytes()}), file=pipe)
    pipe.flush()
    # a library's own destructors may hang or crash; what was asked has been answered
    os._exit(0)


if __name__ == "__main__":
    sys.exit("this file is imported by the workers beside it")
