"""What quantization loses, ours beside llama.cpp's: same weights, same tokens.

    python bench/peers.py --setup-only --peers llama.cpp     # once
    python bench/quality.py [--model bundled|CHECKPOINT] [--windows 48] [--forms int8,int4] [--json OUT.json]

The text of the bundled model is what it never saw (`models/corpus.py`), as training's own stream of tokens; that of
others is the compiler's held-out text. Mean KL divergence in nats and top-1 agreement are against each engine's own
bf16 on the same ids, and KL also against one reference for both, our f32: llama.cpp rounds no activations of its bf16
form to bf16, and ours does. Bits are those of all matrices with their scales and padding, per weight; the embedding,
which is the vocabulary projection too, counts once. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from xllm_compiler.artifact import read_manifest
from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.models.corpus import source_files
from xllm_compiler.models.train import token_stream
from xllm_compiler.options import CompileOptions
from xllm_compiler.quant_eval import text as held_out
from xllm_compiler.quant_eval.compare import compare, compare_on
from xllm_compiler.quant_eval.measure import served_logits
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.tools.console import table

HERE: Final = Path(__file__).resolve().parent
BUNDLED: Final = HERE.parent / "models" / "bundled"
LLAMA_PLACE: Final = HERE.parent / ".cache/peers/llama"
SEED: Final = 20260101  # of the order of documents, as in training's held-out loss
LOGITS_BYTES: Final = 1 << 30  # of one form; three are held
OURS: Final = {
    **{
        form: (form, None)
        for form in ("int8", "int8-kv8", "w8a8-g32", "w8a16", "int4", "int4-kv8", "int4-grid16", "int4-g32", "w4a16")
    },
    **{f"mixed, {limit}": ("mixed", limit) for limit in (0.002, 0.004, 0.006)},
}
LLAMA: Final = {name: name.split() for name in ("Q8_0", "--pure Q4_0", "Q4_0", "Q4_1", "Q4_K_M")}
"""llama-quantize's arguments. Without --pure it keeps the embedding at 8 bits."""

F32 = NDArray[np.float32]
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Row:
    """What one form lost; `kl` (against the same engine's bf16) and `kl_f32` in nats, `bits` per weight."""

    engine: str
    form: str
    kl: float
    kl_f32: float
    top1: float
    perplexity: float
    bits: float


def ids_of(artifact: Path, bundled: bool, windows: int, tokens: int) -> Ids:
    """Held-out text, [windows, tokens + 1]: the last id is only predicted."""
    if not bundled:
        found, what = held_out.windows(
            artifact / "tokenizer.json", read_manifest(artifact).model.vocab_size, tokens + 1
        )
        ids = [window.ids for window in found if len(window.ids) == tokens + 1][:windows]
        print(f"{len(ids)} windows of {what}")
        return np.stack(ids)
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    stream = token_stream(tokenizer, [file for file in source_files() if file.held_out], SEED)
    starts = np.arange(windows) * tokens
    return np.stack([stream[s : s + tokens + 1] for s in starts]).astype(np.int32)


def weights_of_matrices(model: Path) -> int:
    """How many weights the model's matrices have."""
    shapes = [entry.shape for entry in Checkpoint.open(model).tensors.values()]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) > 1)


def compiled(model: Path, out: Path, form: str | None, max_kl: float | None, dtype: str = "bfloat16") -> Path:
    """`out`, a new path each time: a loaded library is known by its path."""
    isa = machine_isas()[-1]
    options = CompileOptions(dtype=dtype, max_model_len=512, quantize=form, max_kl=max_kl, target=Cpu((isa,)))
    compile_checkpoint(model, out, options)
    return out


def ours(model: Path, out: Path, ids: Ids) -> tuple[F32, float]:
    """Logits of the compiled programs, and bits per weight."""
    manifest = read_manifest(out)
    # what is made of tracing's own constants, the tables of rotary positions, is no weight
    matrices = [t for t in manifest.weights.tensors if len(t.shape) > 1 and "(traced." not in t.name]
    size = sum(t.bytes for t in matrices)
    logits = served_logits(out, manifest, machine_isas()[-1], list(ids))
    return logits, 8 * size / weights_of_matrices(model)


def llama(model: Path, folder: Path, ids: Ids, vocab: int) -> Iterator[tuple[str, tuple[F32, float]]]:
    """The same of llama.cpp's own files; bf16 first."""
    if not (LLAMA_PLACE / "build/bin/llama-quantize").exists():
        raise SystemExit("llama.cpp is not set up: python bench/peers.py --setup-only --peers llama.cpp")
    python, vendored, whole = LLAMA_PLACE / "venv/bin/python", LLAMA_PLACE / "source/llama.cpp", folder / "bf16.gguf"
    quantize = LLAMA_PLACE / "build/bin/llama-quantize"
    if model.is_dir():
        _run(python, HERE / "peers/convert_llama.py", vendored, model, "--outtype", "bf16", "--outfile", whole)
    else:
        _run(quantize, "--allow-requantize", model, whole, "BF16")
    np.save(folder / "ids.npy", ids)
    for name, flags in {"bf16": (), **LLAMA}.items():
        file = folder / f"{name}.gguf"
        if flags:
            _run(quantize, *flags[:-1], whole, file, flags[-1])
        worker = HERE / "peers/workers/llama_logits.py"
        said = _run(python, worker, file, folder / "ids.npy", vocab, folder / "logits.npy")
        yield name, (np.load(folder / "logits.npy"), float(said))


def _run(*command: object) -> str:
    places = {"LLAMA_CPP_LIB_PATH": LLAMA_PLACE / "build/bin", "PYTHONPATH": LLAMA_PLACE / "source/llama.cpp/gguf-py"}
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def measure(model: Path, forms: dict[str, tuple[str, float | None]], windows: int, tokens: int) -> list[Row]:
    """All forms of both engines."""
    rows: list[Row] = []

    def tell(engine: str, forms: Iterable[tuple[str, tuple[F32, float]]]) -> None:
        plain: F32 | None = None
        for form, (logits, bits) in forms:
            plain = logits if plain is None else plain
            loss = compare(plain, logits)
            distance = compare_on(exact, logits, targets)
            rows.append(Row(engine, form, loss.kl, distance.loss.kl, loss.top1, distance.perplexity, bits))
            print(f"  {rows[-1]}", file=sys.stderr, flush=True)

    def our_forms() -> Iterator[tuple[str, tuple[F32, float]]]:
        for name, what in {"bf16": (None, None), **forms}.items():
            out = compiled(model, folder / f"ours {name}", *what)
            yield name, ours(model, out, inputs)
            shutil.rmtree(out)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        whole = compiled(model, folder / "exact", None, None, "float32")
        vocab = read_manifest(whole).model.vocab_size
        ids = ids_of(whole, model == BUNDLED, min(windows, LOGITS_BYTES // (4 * vocab * tokens)), tokens)
        inputs, targets = ids[:, :-1], ids[:, 1:].ravel()
        print(f"{targets.size} positions in windows of {tokens}")
        exact, _ = ours(model, whole, inputs)
        tell("ours", our_forms())
        tell("llama.cpp", llama(model, folder, inputs, vocab))
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="bundled, or a checkpoint: a directory or a GGUF file")
    parser.add_argument("--forms", help=f"of ours; default all of {', '.join(OURS)}")
    parser.add_argument("--windows", type=int, default=48, help="of --tokens each")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    args = parser.parse_args()
    model = BUNDLED if args.model == "bundled" else Path(args.model)
    if model != BUNDLED:
        args.tokens = min(args.tokens, held_out.WINDOW - 1)
    asked = OURS if args.forms is None else {form: OURS.get(form, (form, None)) for form in args.forms.split(",")}
    forms = {name: (form, math.inf if limit is None else limit) for name, (form, limit) in asked.items()}
    rows = measure(model, forms, args.windows, args.tokens)
    head = ("", "", "bits", "KL to bf16", "KL to f32", "top-1", "perplexity")
    body = [
        (
            *(row.engine, row.form, f"{row.bits:.2f}", f"{row.kl:.6f}", f"{row.kl_f32:.6f}"),
            *(f"{row.top1:.2%}", f"{row.perplexity:.4f}"),
        )
        for row in rows
    ]
    print(table([head, *body], right=(2, 3, 4, 5, 6)))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
