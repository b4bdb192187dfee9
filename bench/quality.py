"""What quantization loses on the bundled model, ours beside llama.cpp's: same weights, same tokens.

    python bench/peers.py --setup-only --only llama.cpp     # once
    python bench/quality.py [--windows 48] [--json OUT.json]

The text is what the bundled model never saw (`models/corpus.py`), as training's own stream of tokens. Mean KL
divergence in nats and top-1 agreement are against each engine's own bf16 on the same ids, and KL also against one
reference for both, our f32: llama.cpp rounds no activations of its bf16 form to bf16, and ours does. Bits are those
of all matrices with their scales and padding, per weight; the embedding, which is the vocabulary projection too,
counts once. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from xllm_compiler.artifact import read_manifest
from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.models.corpus import source_files
from xllm_compiler.models.train import token_stream
from xllm_compiler.options import CompileOptions
from xllm_compiler.quant_eval.compare import compare
from xllm_compiler.quant_eval.measure import served_logits
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.tools.console import table

HERE: Final = Path(__file__).resolve().parent
BUNDLED: Final = HERE.parent / "models" / "bundled"
LLAMA_PLACE: Final = HERE.parent / ".cache/peers/llama"
SEED: Final = 20260101  # of the order of documents, as in training's held-out loss
VOCAB: Final = 4096
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


def ids_of(windows: int, tokens: int) -> Ids:
    """Consecutive windows of the held-out stream, [windows, tokens + 1]: the last id is only predicted."""
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    stream = token_stream(tokenizer, [file for file in source_files() if file.held_out], SEED)
    starts = np.arange(windows) * tokens
    return np.stack([stream[s : s + tokens + 1] for s in starts]).astype(np.int32)


def weights_of_matrices() -> int:
    """How many weights the bundled model's matrices have."""
    from safetensors import safe_open

    total = 0
    for file in BUNDLED.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            total += sum(int(np.prod(shape)) for shape in shapes if len(shape) > 1)
    return total


def ours(out: Path, form: str | None, max_kl: float | None, ids: Ids, dtype: str = "bfloat16") -> tuple[F32, float]:
    """Logits of the compiled programs, and bits per weight. `out` is a new path each time: a loaded library is known
    by its path."""
    isa = machine_isas()[-1]
    options = CompileOptions(dtype=dtype, max_model_len=512, quantize=form, max_kl=max_kl, target=Cpu((isa,)))
    compile_checkpoint(BUNDLED, out, options)
    manifest = read_manifest(out)
    # what is made of tracing's own constants, the tables of rotary positions, is no weight
    matrices = [t for t in manifest.weights.tensors if len(t.shape) > 1 and "(traced." not in t.name]
    size = sum(t.bytes for t in matrices)
    return served_logits(out, manifest, isa, list(ids)), 8 * size / weights_of_matrices()


def llama(folder: Path, ids: Ids) -> dict[str, tuple[F32, float]]:
    """The same of llama.cpp's own files; bf16 first."""
    if not (LLAMA_PLACE / "build/bin/llama-quantize").exists():
        raise SystemExit("llama.cpp is not set up: python bench/peers.py --setup-only --only llama.cpp")
    python, vendored, whole = LLAMA_PLACE / "venv/bin/python", LLAMA_PLACE / "source/llama.cpp", folder / "bf16.gguf"
    _run(python, HERE / "peers/convert_llama.py", vendored, BUNDLED, "--outtype", "bf16", "--outfile", whole)
    np.save(folder / "ids.npy", ids)
    found = {}
    for name, flags in {"bf16": (), **LLAMA}.items():
        file = folder / f"{name}.gguf"
        if flags:
            _run(LLAMA_PLACE / "build/bin/llama-quantize", *flags[:-1], whole, file, flags[-1])
        worker = HERE / "peers/workers/llama_logits.py"
        said = _run(python, worker, file, folder / "ids.npy", VOCAB, folder / "logits.npy")
        found[name] = (np.load(folder / "logits.npy"), float(said))
    return found


def _run(*command: object) -> str:
    places = {"LLAMA_CPP_LIB_PATH": LLAMA_PLACE / "build/bin", "PYTHONPATH": LLAMA_PLACE / "source/llama.cpp/gguf-py"}
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def perplexity(logits: F32, targets: Ids) -> float:
    """exp of the mean loss of the next token."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    losses = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(len(targets)), targets]
    return float(np.exp(losses.mean()))


def measure(ids: Ids) -> list[Row]:
    """All forms of both engines on ids [windows, tokens + 1]."""
    inputs, targets = ids[:, :-1], ids[:, 1:].ravel()
    rows: list[Row] = []

    def tell(engine: str, forms: Iterable[tuple[str, tuple[F32, float]]]) -> None:
        plain: F32 | None = None
        for form, (logits, bits) in forms:
            plain = logits if plain is None else plain
            loss = compare(plain, logits)
            distance = compare(exact, logits).kl
            rows.append(Row(engine, form, loss.kl, distance, loss.top1, perplexity(logits, targets), bits))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        exact, _ = ours(folder / "exact", None, None, inputs, "float32")
        forms = {"bf16": (None, None), **OURS}
        tell("ours", ((name, ours(folder / f"ours {name}", *what, inputs)) for name, what in forms.items()))
        tell("llama.cpp", llama(folder, inputs).items())
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=48, help="of --tokens each")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    args = parser.parse_args()
    rows = measure(ids_of(args.windows, args.tokens))
    print(f"{args.windows * args.tokens} positions in windows of {args.tokens}")
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
