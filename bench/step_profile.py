"""Where the time of a step goes, kernel by kernel, beside the limits of the machine measured in the same run.

    python bench/step_profile.py ARTIFACT [--rows prefill-512,decode-1,decode-8,decode-32] [--steps 20] [--json FILE]

`prefill-512` is one request of 512 tokens, from the start; `decode-8` eight requests of a token each, after `--context`
tokens. The steps run in the engine itself, so that the time between them is that of a server. The limits are measured
before and after, and the better reading is taken: a share that a disturbed reading flatters would help nobody.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limits import Probe

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.phases import Phases
from xllm_compiler.runtime.profile.profiler import Profiler
from xllm_compiler.runtime.profile.table import Peaks, Profile, Row, show
from xllm_compiler.runtime.request import Request
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.startup import EngineOptions, prepare_engine

ROWS = "prefill-512,decode-1,decode-8,decode-32"


def measure(artifact: Path, row: str, steps: int, context: int, threads: int) -> Profile:
    """The profile of one row, without shares."""
    kind, _, size = row.partition("-")
    if kind not in ("prefill", "decode") or not size.isdigit() or not int(size):
        raise XllmError("option", f"--rows: {row!r} is not prefill-TOKENS or decode-REQUESTS")
    count = int(size)
    told: list[str] = []
    profiler = Profiler(steps, told.append)
    started = prepare_engine(artifact, EngineOptions(threads=threads), Phases(), profiler)
    engine, model_info = started.engine, started.model_info
    draw = random.Random(row)

    def submit(length: int, new: int, name: str) -> None:
        ids = [draw.randrange(model_info.vocab_size) for _ in range(length)]
        engine.submit(Request(name, ids, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)), _ignore)

    def run() -> None:
        while engine.stats().running or engine.stats().waiting:
            engine.step()

    try:
        if kind == "prefill":
            _fits(row, "max_num_batched_tokens", count, model_info.max_num_batched_tokens)
            for i in range(steps + 2):  # one to warm up, one to end the last one's time on the host
                submit(count, 1, str(i))
                run()
        else:
            _fits(row, "max_num_seqs", count, model_info.max_num_seqs)
            # the first to be admitted must not be done before the last one's prompt and all recorded steps are
            waves = -(-count * context // model_info.max_num_batched_tokens) + 1
            for i in range(count):
                submit(context, steps + 3 + waves, str(i))
            run()
    finally:
        engine.stop()
    found = [p for p in profiler.found if p.kind == kind and p.sizes["b"] == (count if kind == "decode" else 1)]
    if len(found) != 1:
        raise XllmError("internal", f"{row} ran as {len(found)} kinds of steps", help="\n".join(told))
    return found[0]


def _ignore(event: object) -> None:
    """Nobody listens."""


def _fits(row: str, name: str, wanted: int, most: int) -> None:
    if wanted > most:
        raise XllmError("option", f"{row} is beyond the artifact's {name}, {most}")


def judged(profile: Profile, peaks: Peaks) -> Profile:
    """The same with shares of the peaks."""

    def row(r: Row) -> Row:
        if not r.seconds > 0:
            return r
        memory, compute = r.bytes / r.seconds / peaks.read_bytes, r.operations / r.seconds
        return dataclasses.replace(r, memory_share=memory, compute_share=compute / peaks.operations(r.arithmetic))

    return dataclasses.replace(profile, rows=tuple(row(r) for r in profile.rows))


def summary(profile: Profile, peaks: Peaks) -> str:
    """Which share of the limit the step reaches, and what is lost where."""
    whole = profile.native + profile.call
    least = sum(max(r.bytes / peaks.read_bytes, r.operations / peaks.operations(r.arithmetic)) for r in profile.rows)
    waited = sum(r.waiting for r in profile.rows)
    host = sum(profile.host.values())
    lost = [("barriers and imbalance", waited), ("start and call", profile.start + profile.call)]
    lost += [
        (
            r.kernel,
            r.seconds - r.waiting - max(r.bytes / peaks.read_bytes, r.operations / peaks.operations(r.arithmetic)),
        )
        for r in profile.rows
    ]
    worst = ", ".join(f"{name} {s * 1e3:.2f} ms" for name, s in sorted(lost, key=lambda pair: -pair[1])[:4] if s > 0)
    return (
        f"kernel by kernel the machine's limits leave {least * 1e3:.2f} ms: {100 * least / whole:.0f} % of the step, "
        f"{100 * least / (whole + host):.0f} % with the host's {host * 1e3:.2f} ms. Lost beyond them: {worst}"
    )


def _peaks(measure_one: Callable[[], Any], seen: Peaks | None) -> Peaks:
    limits = measure_one()
    found = Peaks(limits.read_bytes, limits.bf16_flops, limits.int8_ops, limits.f32_flops)
    if seen is None:
        return found
    fields = [f.name for f in dataclasses.fields(Peaks)]
    return Peaks(*(max(getattr(found, name), getattr(seen, name)) for name in fields))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--steps", type=int, default=20, help="recorded steps of each row; the quicker half counts")
    parser.add_argument("--context", type=int, default=128, help="tokens before a decode step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    probe = Probe(options.threads)
    peaks = _peaks(probe.measure, None)
    try:
        rows = {
            row: measure(options.artifact, row, options.steps, options.context, options.threads)
            for row in options.rows.split(",")
        }
    except XllmError as error:
        raise SystemExit(str(error)) from None
    peaks = _peaks(probe.measure, peaks)
    print(
        f"limits, {options.threads} threads: {peaks.read_bytes / 1e9:.1f} GB/s, bf16 {peaks.bf16 / 1e9:.0f}, "
        f"int8 {peaks.i8 / 1e9:.0f}, f32 {peaks.f32 / 1e9:.0f} GOP/s"
    )
    rows = {name: judged(profile, peaks) for name, profile in rows.items()}
    for name, profile in rows.items():
        print(f"\n{name}: {show(profile)}\n{summary(profile, peaks)}")
    if options.json is not None:
        data = {"limits": dataclasses.asdict(peaks), "rows": {name: p.to_json() for name, p in rows.items()}}
        options.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
