"""`xllm-run`: interprets a function and tells what it returns. Owns the flags; arrays are evaluate.py's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_compiler.errors import XllmError
from xllm_compiler.step.interface import STEP
from xllm_compiler.tools.arguments import Arguments, check_sizes, parse_sizes, suggest, whole_number
from xllm_compiler.tools.console import run

if TYPE_CHECKING:
    from xllm_compiler.dims import Dim
    from xllm_compiler.ir.core import Func, Module
    from xllm_compiler.ir.semantics import Array
    from xllm_compiler.testing.inputs import Given

_EPILOG = """\
sizes that are not given are completed; without --inputs, arguments and parameters are made up from the seed.
keys of --inputs: names of arguments and parameters. keys of -o: 0, 1, .. in the order of the returns."""


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the tool and return its exit code: 0, 1 (ours), 2 (bad input, such as streams that are not synchronised)."""
    return run(lambda: _main(list(argv)))


def parser() -> Arguments:
    """All flags of xllm-run."""
    p = Arguments(
        "xllm-run",
        "Interpret a function of a module (.xir). One line per return: type, shape, least, mean and greatest element,\n"
        "and a digest that is equal for equal bits.",
        epilog=_EPILOG,
        usage="xllm-run FILE.xir|- [N=3 B=2 ..] [flags]",
    )
    p.add_argument("file", nargs="?", metavar="FILE.xir", help="the module, - for standard input")
    p.add_argument("sizes", nargs="*", metavar="N=3", help="sizes of the module's symbols")
    p.add_argument("--func", metavar="NAME", help="default: step, or the only function")
    p.add_argument("--seed", type=whole_number, default=0, help="of made-up arrays; default 0")
    p.add_argument("--precise", action="store_true", help="compute in f64 and never round")
    p.add_argument(
        "--ranks", type=whole_number, metavar="R", help="give every group R ranks; default: what the module says"
    )
    p.add_argument(
        "--orders", type=whole_number, metavar="K", help="also K random legal orders of the streams, bit for bit"
    )
    p.add_argument("--no-verify", action="store_true", help="run what does not verify, to see what goes wrong")
    p.add_argument("--inputs", type=Path, metavar="FILE.npz", help="arrays for all arguments, and for any parameters")
    p.add_argument("-o", "--output", type=Path, metavar="OUT.npz", help="write what is returned")
    return p


def _main(argv: list[str]) -> int:
    args = parser().read(argv, mixed=True)
    if args.file is None:
        raise XllmError("option", "no file is given", help="xllm-run FILE.xir, or - for standard input")
    sizes = parse_sizes(args.sizes, "xllm-run")
    if args.ranks == 0:
        raise XllmError("option", "--ranks 0: at least one rank has to run")
    from xllm_compiler.ir.groups import world_size
    from xllm_compiler.testing.edits import with_ranks
    from xllm_compiler.tools.evaluate import call, results_text, write_arrays
    from xllm_compiler.tools.files import read_module

    module = read_module(args.file, check=not args.no_verify)
    if args.ranks is not None and module.groups and args.ranks != world_size(module.groups):
        module = with_ranks(module, args.ranks)
    func = _func(module, args.func)
    check_sizes(module.scope, sizes, "xllm-run")
    if args.no_verify:
        _check_declared(func)
    if args.orders is not None and module.stage == "graph":
        raise XllmError(
            "option", "--orders: a module in stage graph has one order", help="assign streams first, in stage sched"
        )
    given = _given(module, func, args, sizes)
    ranks = call(func, given, args.precise)
    print(results_text(func, given.dims, ranks))
    if args.orders is not None:
        _check_orders(func, given, ranks, args)
    if args.output is not None:
        write_arrays(args.output, ranks)
    return 0


def _check_orders(func: Func, given: Given, sequential: Sequence[Sequence[Array]], args: Any) -> None:
    """Raises kind "ir" for the first drawn order that fails, or that returns other bits than the order of the text."""
    from xllm_compiler.interp.streams import run_interleaved_ranks
    from xllm_compiler.tools.values import digest

    for seed in range(args.seed, args.seed + args.orders):
        ranks = run_interleaved_ranks(
            func.module, func.name, given.inputs, given.params, given.dims, seed=seed, precise=args.precise
        )
        for rank, (wanted, got) in enumerate(zip(sequential, ranks, strict=True)):
            for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
                if digest(a) != digest(b):
                    where = f"@{func.name}, return {i}, rank {rank}, in the order drawn from seed {seed}"
                    raise XllmError("ir", "an order that the streams allow gives other bits", where=where)
    print(f"{args.orders} orders that the streams allow give the same bits")


def _func(module: Module, name: str | None) -> Func:
    known = list(module.funcs)
    if name is None:
        if STEP in known or len(known) == 1:
            return module.funcs[STEP if STEP in known else known[0]]
        raise XllmError("option", f"the module has {len(known)} functions", help="--func " + " | ".join(known))
    if name.removeprefix("@") not in known:
        help = suggest(name.removeprefix("@"), known, "its functions")
        raise XllmError("option", f"--func: the module has no function {name}", help=help)
    return module.funcs[name.removeprefix("@")]


def _check_declared(func: Func) -> None:
    """What even a module that does not verify must have to be run: a size for every symbol."""
    known = list(func.module.scope.symbols)
    for what, dim in _dims(func):
        for name in dim.symbols:
            if name not in known:
                help = suggest(name, known, "its sizes")
                raise XllmError("ir", f"the module declares no size {name}", where=f"@{func.name}, {what}", help=help)


def _dims(func: Func) -> Iterator[tuple[str, Dim]]:
    """Every size that the function names, and where."""
    from xllm_compiler.dims import Dim
    from xllm_compiler.ir.types import type_dims

    for value in (*func.args, *(r for op in func.ops for r in op.results)):
        yield from ((f"%{value.name}: {value.type}", dim) for dim in type_dims(value.type))
    for op in func.ops:
        for key, attr in op.attrs.items():
            for item in attr if isinstance(attr, tuple) else (attr,):
                if isinstance(item, Dim):
                    yield f"attribute {key} of {op.name}", item
    if func.arena is not None:
        yield "arena", func.arena


def _given(module: Module, func: Func, args: Any, sizes: dict[str, int]) -> Given:
    from xllm_compiler.testing.inputs import make, ranks_of
    from xllm_compiler.tools.evaluate import given_arrays, read_arrays

    ranks = args.ranks or ranks_of(module)
    if args.inputs is not None:
        return given_arrays(func, read_arrays(args.inputs), sizes, args.seed, ranks)
    given = make(func, sizes, args.seed)
    for _ in range(ranks - len(given.inputs)):  # no collective: every rank computes the same
        given.inputs.append(given.inputs[0])
        given.params.append(given.params[0])
    return given
