"""`xllm-compile`: the command line of the compiler. Owns flags and what is printed; what is slow is imported late."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_compiler.errors import XllmError
from xllm_compiler.tools.arguments import Arguments, nearest
from xllm_compiler.tools.console import ConsoleProgress, debug_level, run, size, table
from xllm_compiler.tools.loading import add_load, load_given, load_words

if TYPE_CHECKING:
    from xllm_compiler.cache import CompileCache
    from xllm_compiler.driver import CompileReport
    from xllm_compiler.ir.rewrite import RewriteListener
    from xllm_compiler.options import CompileOptions
    from xllm_compiler.passes.instruments import Instrument
    from xllm_compiler.targets import Target

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

VERBS = {
    "show": "print what is in an artifact",
    "diff": "print how two artifacts differ",
    "explain": "tell which cache entry a compile would use, or why none",
    "verify": "check an artifact and run it against the reference interpreter",
}

_EPILOG = "other commands (each has --help):\n" + "\n".join(
    f"  xllm-compile {verb:<8} {what}" for verb, what in VERBS.items()
)


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the tool and return its exit code: 0, 1 (ours, or artifacts that differ), 2 (bad input)."""
    return run(lambda: _dispatch(list(argv)))


def entry_for_runtime() -> None:
    """The compiler as a server starts it: an error is one line of JSON on standard output instead of a text, so that
    the server can say it as its own. It ends with the server: whoever stops that wants the processor back."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def show(error: XllmError) -> None:
        told = {"kind": error.kind, "message": error.message, "where": error.where, "help": error.help}
        print(json.dumps({**told, "notes": getattr(error, "__notes__", [])}))

    argv = sys.argv[1:]
    sys.exit(run(lambda: _dispatch(argv), show))


def add_compile_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """The checkpoint and the flags that decide what is compiled, those of the target that `argv` names among them;
    shared by compile and explain. Raises kind "option" for a target that is not there."""
    from xllm_compiler.targets import DEFAULT

    target = _target_in(argv)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a Hugging Face directory, or a GGUF file")
    parser.add_argument(
        "--target",
        default=DEFAULT,
        metavar="NAME",
        help=f"what to compile for: {DEFAULT} (default) or an installed package's; with --help: its flags",
    )
    parser.add_argument("--dtype", help="float32 or bfloat16; default: bfloat16 when the weights are 16-bit")
    parser.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest request in tokens; default: the model's"
    )
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="most requests in a step; default 64")
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="most tokens in a step; default 2048")
    parser.add_argument(
        "--functions",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        metavar="NAMES",
        help="what the artifact does: step (chat and completions), embed (embeddings), or step,embed over one set of "
        "weights; default: step, for an embedding model embed, with step where it has a head",
    )
    parser.add_argument(
        "--quantize",
        metavar="FORM",
        help="int8: weights of 8 bits, a scale per row, by activations of 8 bits (w8a8). int4: weights of 4 bits, a "
        "grid for each 32 values, by activations of 8 (w4a8-grid32; int4-grid16 loses less). In general w4a8, w4a16, "
        "w8a8 or w8a16 (a16: activations as they are), then -g32, -g64 or -g128 (values that share a scale), then "
        "-asym (4 bits: with zero points), then -kv8 (keys and values are cached in 8 bits; kv8 alone quantizes "
        "nothing else). mixed: int4-grid16, and 8 bits for the weights where that saves most loss per byte, until "
        "--max-kl is kept. The loss is measured, and stored in the artifact",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="refuse a quantized model whose KL divergence from the unquantized one is larger; inf accepts any; "
        "default 0.01 for weights of 8 bits and for kv8, 0.1 for 4, 0.03 for mixed",
    )
    parser.add_argument("--pipeline", metavar="TEXT", help="passes to run; default: the target's preset, such as @cpu")
    add_load(parser)
    target.add_arguments(parser)
    parser.add_argument(
        "--name", help="the model's name for clients; default: the name of the checkpoint's directory or file"
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="default: XLLM_CACHE_DIR or ~/.cache/xllm-compiler"
    )


def _target_in(argv: Sequence[str]) -> type[Target]:
    """The target that a command line names: which flags there are depends on it."""
    from xllm_compiler.targets import DEFAULT, target_class

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--target", default=DEFAULT)
    try:
        return target_class(parser.parse_known_args(argv)[0].target)
    except argparse.ArgumentError:  # no name behind --target, which the whole parser says
        return target_class(DEFAULT)


def target_of(args: argparse.Namespace) -> Target:
    """The target that the flags name, with its own options."""
    from xllm_compiler.targets import target_class

    return target_class(args.target).of_arguments(args)


def options_of(args: argparse.Namespace) -> CompileOptions:
    """The options that the flags of `add_compile_arguments` ask for; registers the passes that --load names."""
    from xllm_compiler.options import CompileOptions

    load_given(args)
    return CompileOptions(
        target=target_of(args),
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        pipeline=args.pipeline,
        quantize=args.quantize,
        max_kl=args.max_kl,
        name=args.name,
        functions=args.functions,
    )


def cache_of(args: argparse.Namespace) -> CompileCache:
    """The cache that the flags or the environment name. Raises kind "option" when neither does and this user has no
    home directory."""
    from xllm_compiler.cache import CompileCache

    given = args.cache_dir or os.environ.get("XLLM_CACHE_DIR")
    if given:
        return CompileCache(Path(given))
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return CompileCache(Path(base).expanduser() / "xllm-compiler")
    except RuntimeError:
        raise XllmError(
            "option",
            f"there is no place for the cache: user {os.getuid()} has no home directory",
            help="name one with --cache-dir or XLLM_CACHE_DIR, or write the artifact somewhere with -o",
        ) from None


def _store_of(args: argparse.Namespace, target: Target) -> Path | None:
    """Where a target keeps what the next compile can use: with the cache. A compile with -o needs no home directory, so
    it may have none, unless the target needs the store. Raises kind "option"."""
    try:
        return cache_of(args).root
    except XllmError:
        if args.output is None or target.needs_store:
            raise
        return None


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in VERBS:
        return _verb(argv[0], argv[1:])
    if argv and not argv[0].startswith("-") and not Path(argv[0]).exists() and nearest(argv[0], list(VERBS)):
        help = f"did you mean {nearest(argv[0], list(VERBS))}?"
        raise XllmError("option", f"{argv[0]} is neither a checkpoint nor a command", help=help)
    parser = Arguments(
        "xllm-compile",
        "Compile a checkpoint, a Hugging Face directory or a GGUF file, into an artifact for xllm-serve.\n"
        "Without -o it goes into the cache, where an equal one is used again; its path is printed on standard output.",
        epilog=_EPILOG,
    )
    add_compile_arguments(parser, argv)
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write the artifact here, without the cache")
    parser.add_argument("--dump-ir", type=Path, metavar="DIR", help="write the IR before and after every pass")
    parser.add_argument("--report", type=Path, metavar="OUT.html", help="write what the passes did as one page")
    parser.add_argument("--timeline", type=Path, metavar="OUT.json", help="write the schedule as a Chrome trace")
    return _compile(parser.read(argv))


def _verb(verb: str, argv: list[str]) -> int:
    import importlib

    module = importlib.import_module(f"xllm_compiler.tools.{verb}")
    parser = Arguments(f"xllm-compile {verb}", module.__doc__ or "")
    module.add_arguments(parser, argv)
    return int(module.main(parser.read(argv)))


def _compile(args: argparse.Namespace) -> int:
    from xllm_compiler.driver import compile_checkpoint

    if args.output is not None and args.cache_dir is not None:
        raise XllmError("option", "-o and --cache-dir exclude each other", help="the cache is used when there is no -o")
    target = target_of(args)
    instruments, listeners = _watchers(args, target)
    report = compile_checkpoint(
        args.checkpoint,
        args.output,
        options_of(args),
        ConsoleProgress(),
        cache=None if args.output is not None else cache_of(args),
        store=_store_of(args, target),
        instruments=instruments,
        listeners=listeners,
    )
    if args.output is not None:
        print(report_text(report))
    else:
        print(report_text(report), file=sys.stderr)
        print(report.path)
    return 0


def _watchers(args: argparse.Namespace, target: Target) -> tuple[list[Instrument], list[RewriteListener]]:
    """What the flags and XLLM_DEBUG want to see of the passes."""
    from xllm_compiler.passes.instruments import DumpDir, Repro
    from xllm_compiler.tools.debug import debug_instruments

    wanted = {"--dump-ir": args.dump_ir, "--report": args.report, "--timeline": args.timeline}
    for flag, path in wanted.items():
        if path is not None and args.output is None:
            raise XllmError(
                "option",
                f"{flag} without -o: an artifact that the cache has is not compiled again",
                help="say with -o where the artifact goes; then it is compiled",
            )
        if path is not None and path != args.dump_ir and not path.parent.is_dir():
            raise XllmError("option", f"{flag}: there is no directory for {path}", where=str(path.parent))
    instruments: list[Instrument] = debug_instruments(debug_level(), sys.stderr)
    instruments.append(Repro(Path("xllm-repro.xir"), tuple(load_words(args))))
    listeners: list[RewriteListener] = []
    if args.dump_ir is not None:
        instruments.append(DumpDir(args.dump_ir))
    if args.report is not None:
        from xllm_compiler.report.page import ReportPage

        title = f"{args.name or args.checkpoint.resolve().name}, compiled for {target.name}"
        page = ReportPage(args.report, title, target.machine)
        instruments.append(page)
        listeners.append(page.tries)
    if args.timeline is not None:
        from xllm_compiler.report.timeline import TimelineFile

        instruments.append(TimelineFile(args.timeline, target.machine))
    return instruments, listeners


def report_text(report: CompileReport) -> str:
    """What a compile prints at its end: phases that add up, sizes, and memory formulas with values."""
    from xllm_compiler.quant_eval.report import report_text as loss_text
    from xllm_compiler.tools.describe import memory_text

    manifest = report.manifest
    loss = loss_text(report.path, report.manifest)
    if report.cached:
        head = f"from the cache: {report.path} in {report.seconds:.2f} s"
    else:
        rest = report.seconds - sum(seconds for _, seconds in report.phases)
        rows = [(name, f"{seconds:.2f}") for name, seconds in (*report.phases, ("other", rest))]
        head = f"phases, seconds\n{table([*rows, ('total', f'{report.seconds:.2f}')], right=(1,))}"
    total = sum(entry.bytes for entry in manifest.files.values())
    sizes = [(name, size(entry.bytes)) for name, entry in sorted(manifest.files.items())]
    model = manifest.model
    return "\n\n".join(
        [
            head,
            f"files\n{table([*sizes, ('total', size(total))], right=(1,))}",
            memory_text(manifest),
            *([] if loss is None else [loss]),
            f"{model.name}: {model.architecture}, {model.layers} layers, {model.dtype}, up to {model.max_model_len} "
            f"tokens\nartifact {manifest.id[:16]} at {report.path}",
        ]
    )


if __name__ == "__main__":  # how xllm-serve starts it
    entry_for_runtime()
