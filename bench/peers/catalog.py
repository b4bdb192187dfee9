"""Who is measured: each peer, the formats it has, how a checkpoint becomes its own file, how its worker is started.

Owns the knowledge about peers that differs between them; must not measure. A format that a peer does not have is a text
that says why, and becomes a row that says so.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peers.environments import Place, SetupError

FORMATS = ("bf16", "int8", "int4")
WORKERS = Path(__file__).resolve().parent / "workers"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CONTEXT = 4096
"""The longest request that artifacts and caches are made for."""


@dataclass(frozen=True)
class Conversion:
    """How a checkpoint becomes a peer's own file. `make(place, checkpoint, out)` writes `out` or raises SetupError."""

    label: str
    """What the peer calls the format, with what is known about activations."""
    make: Callable[[Place, Path, Path], None] | None = None
    """None: the checkpoint is read as it is."""
    store: str = ""
    """Name of the converted file or folder, shared by peers with the same converter."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For the worker."""
    environment: str | None = None
    """Where this format runs, if not in the peer's own environment."""


@dataclass(frozen=True)
class Peer:
    """One row of a table. A peer without `environment` runs in this interpreter: ours."""

    name: str
    environment: str | None
    worker: str
    formats: Mapping[str, Conversion | str]
    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the worker; {threads} and {place} are filled in."""
    start_timeout: float = 300
    every: int = 1
    """It takes part in the first of so many rounds: more than 1 where each start costs minutes."""
    how: str = ""
    """How it batches, limits its threads and is timed, for the report."""
    cold_command: Callable[[Place | None, Path, int], list[str]] | None = None
    """A process that makes one token from a prompt of 128 and exits: its own start, where that beats its binding's."""


def _convert_llama(outtype: str, quantize: str | None = None) -> Callable[[Place, Path, Path], None]:
    """llama.cpp's own converter, then its quantizer."""

    def make(place: Place, checkpoint: Path, out: Path) -> None:
        whole = out.parent / "bf16.gguf"
        if quantize is None or not whole.exists():
            script = WORKERS.parent / "convert_llama.py"
            vendored = place.folder / "source/llama.cpp"
            place.run(place.python, script, vendored, checkpoint, "--outtype", outtype, "--outfile", whole, **OFFLINE)
        if quantize is not None:
            place.run(place.folder / "build/bin/llama-quantize", whole, out, quantize)

    return make


def _convert_openvino(weights: str, *extra: str) -> Callable[[Place, Path, Path], None]:
    def make(place: Place, checkpoint: Path, out: Path) -> None:
        tool = place.python.with_name("optimum-cli")
        flags = ("--task", "text-generation-with-past", "--weight-format", weights, *extra)
        place.run(tool, "export", "openvino", "--model", checkpoint, *flags, out, **OFFLINE)

    return make


def _convert_onnxruntime(precision: str) -> Callable[[Place, Path, Path], None]:
    def make(place: Place, checkpoint: Path, out: Path) -> None:
        # without prune_lm_head the logits of a whole prompt are computed
        place.run(
            *(place.python, "-m", "onnxruntime_genai.models.builder", "-m", checkpoint, "-o", out, "-p", precision),
            *("-e", "cpu", "-c", place.folder / "builder", "--extra_options", "prune_lm_head=true"),
            **OFFLINE,
        )

    return make


def _convert_compressed(bits: int) -> Callable[[Place, Path, Path], None]:
    def make(place: Place, checkpoint: Path, out: Path) -> None:
        script = WORKERS.parent / "convert_compressed.py"
        place.run(place.python, script, checkpoint, out, str(bits), **OFFLINE)

    return make


def _compile_ours(*flags: str) -> Callable[[Place, Path, Path], None]:
    def make(place: Place, checkpoint: Path, out: Path) -> None:
        tool = Path(sys.executable).with_name("xllm-compile")
        limits = ("--dtype", "bfloat16", "--max-model-len", str(CONTEXT))
        place.run(tool, checkpoint, "-o", out, *limits, *flags)

    return make


def ours(flags: Mapping[str, tuple[str, ...]]) -> Peer:
    """The artifacts of xllm-compile; `flags` are more flags of a format."""
    any_loss = ("--max-kl", "inf")  # of random weights it means nothing
    # the cache too, as OpenVINO does unless told otherwise; bench/quality.py says what each form loses
    quantize = {form: ("--quantize", f"{form}-kv8", *any_loss) for form in ("int8", "int4")} | {"bf16": ()}
    formats = {
        name: Conversion(" ".join(more) or "bf16", _compile_ours(*more), f"xllm/{name}")
        for name, more in ((n, (*quantize[n], *flags.get(n, ()))) for n in FORMATS)
    }
    how = "continuous batching; one thread per core (affinity); timed per token event; eos ignored"
    return Peer("xllm", None, "ours.py", formats, how=how)


def _completion(place: Place | None, model: Path, threads: int) -> list[str]:
    assert place is not None
    tool = str(place.folder / "build/bin/llama-completion")
    # unknown to every tokenizer's merges, so a byte each: 128 tokens
    prompt = "".join("~^|}"[i % 4] for i in range(128))
    return [
        *(tool, "-m", str(model), "-p", prompt, "-n", "1", "-t", str(threads), "-tb", str(threads), "-c", "512"),
        *("-no-cnv", "--no-warmup", "--temp", "0", "--no-perf", "--simple-io", "--ignore-eos"),
    ]


OPENVINO = {
    "bf16": Conversion("fp16 weights, bf16 arithmetic", _convert_openvino("fp16"), "openvino/fp16"),
    "int8": Conversion("int8 per channel, int8 activations", _convert_openvino("int8"), "openvino/int8"),
    "int4": Conversion(
        "int4 in groups of 128, vocabulary int8, int8 activations",
        _convert_openvino("int4", "--sym", "--group-size", "128", "--ratio", "1.0"),
        "openvino/int4",
    ),
}
TRANSFORMERS: dict[str, Conversion | str] = {
    "bf16": Conversion("bf16"),
    "int8": Conversion("torchao int8 weights and activations", options={"torchao": "int8"}, environment="torchao"),
    "int4": Conversion("torchao int4 weights in groups of 32", options={"torchao": "int4"}, environment="torchao"),
}
VLLM = {
    "bf16": Conversion("bf16"),
    "int8": Conversion("compressed-tensors W8A8", _convert_compressed(8), "compressed/w8a8"),
    "int4": Conversion("compressed-tensors W4A16, groups of 128", _convert_compressed(4), "compressed/w4a16"),
}
VLLM_SETTINGS = {
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "{cores}"},
    **{
        "LD_PRELOAD": "{place}/venv/lib/libiomp5.so",
        "VLLM_CACHE_ROOT": "{place}/cache",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    },
}
ONNX_BF16 = "no bf16 model for its CPU provider: the builder offers fp32, int8 and int4 there"

PEERS: tuple[Peer, ...] = (
    Peer(
        "llama.cpp",
        "llama",
        "llama.py",
        {
            "bf16": Conversion("BF16", _convert_llama("bf16"), "llama/bf16.gguf"),
            "int8": Conversion("Q8_0", _convert_llama("bf16", "Q8_0"), "llama/q8_0.gguf"),
            "int4": Conversion("Q4_0", _convert_llama("bf16", "Q4_0"), "llama/q4_0.gguf"),
        },
        # its default spins for 10 ms and more at a barrier while the other core is taken; this much bridges any gap
        {"LLAMA_CPP_LIB_PATH": "{place}/build/bin", "GOMP_SPINCOUNT": "10000"},
        how="its C API through its Python binding, all requests in one batch; n_threads = n_threads_batch; greedy; "
        "one line of its AMX kernels patched, which GCC would miscompile",
        cold_command=_completion,
    ),
    Peer(
        "openvino",
        "openvino",
        "openvino_static.py",
        OPENVINO,
        how="LLMPipeline (stateful, static batch); INFERENCE_NUM_THREADS; ignore_eos; its own per-token durations",
    ),
    Peer(
        "openvino-cb",
        "openvino",
        "openvino_batching.py",
        OPENVINO,
        how="ContinuousBatchingPipeline; INFERENCE_NUM_THREADS; ignore_eos; timed per step()",
    ),
    Peer(
        "onnxruntime",
        "onnxruntime",
        "onnxruntime_static.py",
        {
            "bf16": ONNX_BF16,
            "int8": Conversion("int8 blocks of 32, int8 activations", _convert_onnxruntime("int8"), "onnxruntime/int8"),
            "int4": Conversion("int4 blocks of 32, int8 activations", _convert_onnxruntime("int4"), "onnxruntime/int4"),
        },
        how="static batch; intra_op_num_threads; min_length keeps it going past eos; timed per generate_next_token()",
    ),
    Peer(
        "vllm",
        "vllm",
        "vllm_engine.py",
        VLLM,
        VLLM_SETTINGS,
        how="continuous batching, enforce_eager; OMP threads bound to the cores; ignore_eos; timed per step()",
    ),
    Peer(
        "vllm-compile",
        "vllm",
        "vllm_engine.py",
        {form: replace(conversion, options={"compile": True}) for form, conversion in VLLM.items()},
        VLLM_SETTINGS,
        start_timeout=900,
        every=3,
        how="continuous batching, its default compilation; OMP threads bound to the cores; ignore_eos; per step()",
    ),
    Peer(
        "transformers",
        "transformers",
        "transformers_eager.py",
        TRANSFORMERS,
        how="eager, dynamic cache, static batch; torch.set_num_threads; argmax of the last row",
    ),
    Peer(
        "transformers-compile",
        "transformers",
        "transformers_compile.py",
        TRANSFORMERS,
        {"TORCHINDUCTOR_CACHE_DIR": "{place}/inductor", "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"},
        start_timeout=900,
        every=3,
        how="torch.compile of the whole forward pass, static cache; torch.set_num_threads; argmax of the last row",
    ),
)


def convert(place: Place, conversion: Conversion, checkpoint: Path, models: Path, fresh: bool = False) -> Path:
    """The peer's own file of `checkpoint`, made now if it is not there; raises SetupError."""
    if conversion.make is None:
        return checkpoint
    out = models / conversion.store
    stamp = out.with_name(out.name + ".json")
    source = {"label": conversion.label, "config": (checkpoint / "config.json").read_text()}
    if stamp.exists() and out.exists() and not fresh and json.loads(stamp.read_text()) == source:
        return out
    stamp.unlink(missing_ok=True)
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    conversion.make(place, checkpoint, out)
    if not out.exists():
        raise SetupError(f"the converter ended well and left nothing at {out.name}")
    stamp.write_text(json.dumps(source))
    return out
