"""`xllm-trace`: a checkpoint, or its config alone, as IR text. Owns the flags; torch is imported only to trace."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compiler.errors import XllmError
from xllm_compiler.tools.arguments import Arguments, whole_number
from xllm_compiler.tools.console import ConsoleProgress, debug_level, run
from xllm_compiler.tools.loading import add_load, load_given

if TYPE_CHECKING:
    from xllm_compiler.frontend.checkpoint import Checkpoint
    from xllm_compiler.frontend.trace import Traced
    from xllm_compiler.options import Resolved

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")

_EPILOG = """\
the text names the weights and holds none, so a config.json without weights will do.
xllm-trace CHECKPOINT | xllm-opt - -p @cpu"""


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the tool and return its exit code: 0, 1 (ours), 2 (bad input)."""
    return run(lambda: _main(list(argv)))


def parser() -> Arguments:
    """All flags of xllm-trace."""
    p = Arguments("xllm-trace", "Trace a checkpoint into IR text (.xir).", epilog=_EPILOG)
    p.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a Hugging Face directory, a GGUF file, or a config.json"
    )
    p.add_argument("-o", "--output", metavar="FILE.xir", help="default: standard output")
    p.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 when the weights are 16-bit")
    p.add_argument("--max-model-len", type=whole_number, metavar="N", help="longest request; default: the model's")
    p.add_argument("--max-num-seqs", type=whole_number, metavar="N", help="most requests in a step; default 64")
    p.add_argument(
        "--max-num-batched-tokens", type=whole_number, metavar="N", help="most tokens in a step; default 2048"
    )
    p.add_argument(
        "--max-num-logits", type=whole_number, metavar="N", help="most rows of logits; default as xllm-compile"
    )
    p.add_argument(
        "--pipeline", metavar="PIPELINE", default="", help="passes to run, such as import-clean; default none"
    )
    add_load(p)
    p.add_argument("--loc", action="store_true", help="print the model's source line of each op")
    return p


def _main(argv: list[str]) -> int:
    args = parser().read(argv)
    from xllm_compiler.passes.manager import parse_pipeline, run_pipeline
    from xllm_compiler.tools.files import write_text

    load_given(args)
    pipeline = parse_pipeline(args.pipeline)
    checkpoint, resolved, logits = _resolved(args)
    progress = ConsoleProgress()
    for note in resolved.notes:
        progress.note(note)
    traced = _trace(checkpoint, resolved, logits)
    for note in traced.notes:
        progress.note(note)
    if pipeline.items:
        from xllm_compiler.tools.debug import debug_instruments

        run_pipeline(pipeline, traced.module, instruments=debug_instruments(debug_level(), sys.stderr))
    from xllm_compiler.ir.printer import print_module

    write_text(args.output, print_module(traced.module, loc=args.loc))
    return 0


def _resolved(args: Any) -> tuple[Checkpoint, Resolved, int]:
    """The checkpoint, every limit with its value, and the rows of logits; all that can be refused without torch."""
    from xllm_compiler.options import CompileOptions, resolve

    checkpoint = _open(args.checkpoint)
    options = CompileOptions(
        dtype=args.dtype or _config_dtype(checkpoint),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        name="traced",
    )
    resolved = resolve(options, checkpoint)
    rows = resolved.max_num_logits if args.max_num_logits is None else args.max_num_logits
    if not 1 <= rows <= resolved.max_num_batched_tokens:
        raise XllmError(
            "option",
            f"--max-num-logits {rows} is out of range",
            help=f"give a whole number from 1 to {resolved.max_num_batched_tokens}, the most tokens in a step",
        )
    return checkpoint, resolved, rows


def _open(path: Path) -> Checkpoint:
    """The checkpoint, without tensors where there is only a config.json."""
    from xllm_compiler.frontend.checkpoint import Checkpoint

    if path.is_file() and path.name == "config.json":
        return Checkpoint.without_weights(path)
    if path.is_dir() and (path / "config.json").is_file() and not any(next(path.glob(p), None) for p in _WEIGHTS):
        return Checkpoint.without_weights(path / "config.json")
    return Checkpoint.open(path)


def _config_dtype(checkpoint: Checkpoint) -> str | None:
    """What a config without weights says of them; None where there are weights to look at."""
    if checkpoint.tensors:
        return None
    from xllm_compiler.options import text_config

    said = text_config(checkpoint.config)
    return "bfloat16" if said.get("dtype", said.get("torch_dtype")) in ("bfloat16", "float16") else "float32"


def _trace(checkpoint: Checkpoint, resolved: Resolved, logits: int) -> Traced:
    from importlib.util import find_spec

    missing = [module for module in ("torch", "transformers") if find_spec(module) is None]
    if missing:
        raise XllmError(
            "option",
            f"tracing needs {', '.join(missing)}, which this installation lacks",
            help="pip install 'xllm-compiler[compile]'",
        )
    from xllm_compiler.frontend.model import load_config
    from xllm_compiler.frontend.trace import trace_checkpoint

    return trace_checkpoint(
        checkpoint if checkpoint.tensors else load_config(checkpoint),
        dtype=resolved.dtype,
        max_model_len=resolved.max_model_len,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        max_num_logits=logits,
    )
