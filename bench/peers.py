"""Everybody on this machine in one interleaved run: ours, llama.cpp, OpenVINO, ONNX Runtime, vLLM, transformers.

    python bench/peers.py                                        all of it; broken off, the same command goes on
    python bench/peers.py --peers xllm,llama.cpp --formats int8 --rows decode-1,prefill-512 --rounds 5
    python bench/peers.py --setup-only                           install and convert, measure nothing
    python bench/peers.py --report-only --results FILE           print the table and draw the picture of a record

Sets up each peer in a virtual environment of its own, makes one random-weight checkpoint of Qwen3-0.6B's shape,
converts it for each, and measures in rounds, with the machine's limits in between. Prints a table, writes
bench/results/peers-<date>.json and the picture docs/peers.svg. A peer that cannot be installed, crashes, hangs or runs
out of memory costs its rows and is listed with the reason.
"""

from __future__ import annotations

import argparse
import compileall
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from peers.catalog import FORMATS, PEERS, Conversion, Peer, convert, ours
from peers.environments import Place, SetupError, set_up, versions
from peers.measure import Bench, Entry
from peers.picture import draw
from peers.report import markdown
from peers.shape import ROWS, Shape
from peers.store import Store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS = ("xllm_compiler", "passes", "runtime", "kernels", "models")


def choice(text: str | None, known: list[str], what: str) -> list[str]:
    """The names in a comma-separated list, or all."""
    names = known if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")
    return names


def make_checkpoint(folder: Path) -> dict[str, object]:
    """The random-weight checkpoint, made once; its config."""
    if not (folder / "config.json").exists():
        command = [sys.executable, "-m", "xllm_compiler.models.random_checkpoint", "qwen3"]
        subprocess.run([*command, "--preset", "qwen3-0.6b", "-o", str(folder)], check=True)
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def prepare(store: Store, peers: list[Peer], forms: list[str], options: argparse.Namespace) -> list[Entry]:
    """Install and convert; what cannot be is noted in the record."""
    entries = []
    flags = tuple(shlex.split(options.pip_flags))
    for peer in peers:
        store.data["how"][peer.name] = peer.how
        for form in forms:
            conversion = peer.formats[form]
            began = time.monotonic()
            try:
                if isinstance(conversion, str):
                    raise SetupError(conversion)
                entries.append(make_ready(store, peer, form, conversion, flags, options))
                store.absent(peer.name, form, None)
                told = "ready"
            except SetupError as error:
                told = str(error).replace(str(ROOT), ".").replace(str(Path.home()), "~")
                store.absent(peer.name, form, told)
            print(f"{peer.name:22} {form:6} {time.monotonic() - began:6.0f} s  {told}", flush=True)
    return entries


def make_ready(
    store: Store, peer: Peer, form: str, conversion: Conversion, flags: tuple[str, ...], options: argparse.Namespace
) -> Entry:
    """One peer in one format; raises SetupError."""
    cache: Path = options.work.resolve()
    name = conversion.environment or peer.environment
    if name is None:
        place = Place("xllm", cache / "xllm")
        place.folder.mkdir(parents=True, exist_ok=True)
        for package in OURS:  # as pip has done with what the others are made of
            compileall.compile_dir(ROOT / package, quiet=1)
    else:
        place = set_up(name, cache, flags)
        store.data["versions"].setdefault(peer.name, {}).update(versions(name, cache))
    store.data["labels"].setdefault(peer.name, {})[form] = conversion.label
    # our compiler changes between runs, their converters do not
    model = convert(place, conversion, options.checkpoint.resolve(), cache / "models", fresh=name is None)
    return Entry(peer, form, place, model, dict(conversion.options))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="comma-separated; default: all")
    parser.add_argument("--formats", help=f"of {','.join(FORMATS)}; default: all")
    parser.add_argument("--rows", help=f"of {','.join(row.name for row in ROWS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-minutes", type=float, default=24 * 60)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--setup-only", action="store_true")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--again", help="peers whose earlier samples are dropped first")
    parser.add_argument("--results", type=Path, help="default: bench/results/peers-<date>.json")
    parser.add_argument("--picture", type=Path, help="default: docs/peers.svg, or beside the results of a partial run")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/peers")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / ".cache/bench/qwen3-0.6b")
    parser.add_argument("--pip-flags", default="", help="more flags for every pip install, such as an index")
    parser.add_argument(
        "--xllm-flags",
        action="append",
        default=[],
        metavar="FORMAT=FLAGS",
        help="more flags for xllm-compile in a format, such as 'int4=--quantize int4'",
    )
    return parser.parse_args()


def main() -> None:
    """Set up, measure, report."""
    options = read_options()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by a signal"))
    more: dict[str, tuple[str, ...]] = {}
    for item in options.xllm_flags:
        form, _, text = item.partition("=")
        more[choice(form, list(FORMATS), "format")[0]] = tuple(shlex.split(text))
    known = {peer.name: peer for peer in (ours(more), *PEERS)}
    peers = [known[name] for name in choice(options.peers, list(known), "peer")]
    forms = choice(options.formats, list(FORMATS), "format")
    wanted = choice(options.rows, [row.name for row in ROWS], "row")
    results = options.results or HERE / f"results/peers-{datetime.date.today()}.json"
    store = Store(results)
    for name in choice(options.again, list(known), "peer") if options.again else ():
        store.forget(name)
    config = make_checkpoint(options.checkpoint)
    shape = Shape.of(config)
    if not options.report_only:
        store.data["threads"] = options.threads
        entries = prepare(store, peers, forms, options)
        if options.setup_only:
            return
        vocab = int(str(config["vocab_size"]))
        logs = options.work.resolve() / "logs"
        bench = Bench(
            store, logs, options.threads, vocab, options.budget_minutes * 60, lambda text: print(text, flush=True)
        )
        bench.run(entries, [row for row in ROWS if row.name in wanted], options.rounds)
    print(markdown(store, shape))
    whole = options.peers is None and options.formats is None and options.rows is None and not options.report_only
    picture = options.picture or (ROOT / "docs/peers.svg" if whole else results.with_suffix(".svg"))
    if store.data["limits"]:
        picture.write_text(draw(store, shape))
        print(f"record: {results}\npicture: {picture}")


if __name__ == "__main__":
    main()
