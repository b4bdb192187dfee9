"""Functions run by the interpreter on made-up or given arrays, for `xllm-run` and `xllm-opt --interp`. Owns where those
come from and how results are told; what ops mean is interp's, and sound inputs are testing/inputs.py's."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from xllm_compiler.dims import Dim
from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run_ranks
from xllm_compiler.ir.core import Func, Module
from xllm_compiler.ir.ops import Param
from xllm_compiler.ir.semantics import NP_DTYPE, OUR_DTYPE, Array
from xllm_compiler.ir.types import FLOATS, State, Tensor, Type
from xllm_compiler.testing.inputs import Given, make
from xllm_compiler.tools.arguments import check_sizes, suggest
from xllm_compiler.tools.values import describe_returns


def evaluate_all(module: Module, sizes: Mapping[str, int], seed: int) -> list[str]:
    """Every function on made-up inputs, as text."""
    texts = []
    for func in module.funcs.values():
        given = make(func, sizes, seed)
        texts.append(results_text(func, given.dims, call(func, given)))
    return texts


def call(func: Func, given: Given, precise: bool = False) -> list[list[Array]]:
    """The returned arrays of every rank."""
    return run_ranks(func.module, func.name, given.inputs, given.params, given.dims, precise)


def results_text(func: Func, dims: Mapping[str, int], ranks: Sequence[Sequence[Array]]) -> str:
    """A heading with all sizes, and per rank a line per return."""
    sizes = ", ".join(f"{name}={n}" for name, n in dims.items())
    head = f"@{func.name}" + (f" at {sizes}" if sizes else "")
    if len(ranks) == 1:
        return f"{head}\n{describe_returns(func, ranks[0])}"
    parts = [f"{head}, rank {i} of {len(ranks)}\n{describe_returns(func, arrays)}" for i, arrays in enumerate(ranks)]
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------------- given arrays


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file. Never unpickles."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise XllmError("io", f"{path} holds a single array", help="write it with numpy.savez(PATH, x=..., y=...)")
        with file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise XllmError("io", f"there is no file {path}") from None
    except XllmError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds about bytes that they cannot read
        raise XllmError("io", f"{path} is not a sound .npz file: {error}") from None


def write_arrays(path: Path, ranks: Sequence[Sequence[Array]]) -> None:
    """Returns by their index, `0`, `1`, ..; `rank1/0` where there are several ranks. bf16 is widened to f32, which
    keeps every value and which numpy alone can read."""
    arrays: dict[str, Array] = {}
    for rank, returns in enumerate(ranks):
        for i, array in enumerate(returns):
            wide = array.astype(np.float32) if array.dtype == NP_DTYPE["bf16"] else array
            arrays[str(i) if len(ranks) == 1 else f"rank{rank}/{i}"] = wide
    try:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise XllmError("io", f"cannot write {path}: {error.strerror}") from None


def given_arrays(func: Func, arrays: Mapping[str, Array], sizes: Mapping[str, int], seed: int, ranks: int) -> Given:
    """Inputs from a file: an array for every argument, called as it is (`%x` where a parameter has the same name), and
    for any parameters; `rank1/x` is for one rank only. Parameters that are not there are made up."""
    args = {arg.name: arg.type for arg in func.args}
    params: dict[str, Type] = {op.name_: op.result.type for op in func.ops if isinstance(op, Param)}
    _check_names(arrays, args, params)
    dims = _bind(func, arrays, dict(sizes))
    made = make(func, dims, seed)
    found_inputs, found_params = [], []
    for rank in range(ranks):
        inputs = {}
        for name, ty in args.items():
            array = _pick(arrays, rank, (f"%{name}", name))
            if array is None:
                help = "it has " + (", ".join(arrays) or "nothing")
                raise XllmError("option", f"--inputs has no array for argument %{name}: {ty}", help=help)
            inputs[name] = _convert(array, ty, f"%{name}")
        given = {name: _pick(arrays, rank, (name,)) for name in params}
        share = made.params[min(rank, len(made.params) - 1)]
        found_params.append({n: share[n] if a is None else _convert(a, params[n], n) for n, a in given.items()})
        found_inputs.append(inputs)
        absent = sum(array is None for array in given.values())
        if absent and rank == 0:
            print(
                f"note: {absent} of {len(params)} parameters are not in the file; made up from the seed",
                file=sys.stderr,
            )
    return replace(made, inputs=found_inputs, params=found_params)


def _pick(arrays: Mapping[str, Array], rank: int, names: Sequence[str]) -> Array | None:
    keys = [*(f"rank{rank}/{name}" for name in names), *names]
    return next((arrays[key] for key in keys if key in arrays), None)


def _check_names(arrays: Mapping[str, Array], args: Mapping[str, Type], params: Mapping[str, Type]) -> None:
    known = [*args, *params]
    for key in arrays:
        head, slash, tail = key.partition("/")
        name = tail if slash and head.startswith("rank") and head[4:].isdigit() else key
        if name not in known and name.removeprefix("%") not in args:
            help = suggest(name, known, "arguments and parameters")
            raise XllmError("option", f"--inputs: {key!r} is neither an argument nor a parameter", help=help)


def _bind(func: Func, arrays: Mapping[str, Array], sizes: dict[str, int]) -> dict[str, int]:
    """Sizes as given and as read off the arguments' shapes."""
    for arg in func.args:
        array = _pick(arrays, 0, (f"%{arg.name}", arg.name))
        if array is None:
            continue
        extents: list[tuple[Dim, int]] = []
        if isinstance(arg.type, Tensor):
            if array.ndim != arg.type.rank:
                raise XllmError(
                    "option", f"--inputs: %{arg.name} is {arg.type}, the array has shape {list(array.shape)}"
                )
            extents = list(zip(arg.type.shape, array.shape, strict=True))
        elif isinstance(arg.type, State) and array.ndim:
            extents = [(arg.type.blocks, array.shape[0] // arg.type.block_rows)]
        for dim, n in extents:
            name = str(dim)
            if dim.symbols == (name,) and sizes.setdefault(name, n) != n:
                raise XllmError(
                    "option",
                    f"--inputs: %{arg.name}: {arg.type} has shape {list(array.shape)}, but {name}={sizes[name]}",
                )
    check_sizes(func.module.scope, sizes, "--inputs")
    return sizes


def _convert(array: Array, ty: Type, name: str) -> Array:
    """`array` in the type's dtype. Floats are rounded; anything else must keep its value."""
    if not isinstance(ty, (Tensor, State)):
        raise XllmError("unsupported", f"--inputs: no array is a {ty}", where=name)
    dtype = ty.dtype
    wanted = NP_DTYPE[dtype]
    if array.dtype.kind == "V" and array.dtype.itemsize == wanted.itemsize:
        return array.view(wanted)  # numpy alone cannot tell what a bf16 array holds
    if array.dtype == wanted:
        return array
    if dtype in FLOATS and OUR_DTYPE.get(array.dtype) in FLOATS:
        return array.astype(wanted)
    if array.dtype.kind in "iub" and dtype not in FLOATS:
        cast = array.astype(wanted)
        if np.array_equal(cast, array):
            return cast
    raise XllmError("option", f"--inputs: {name} is {ty}, the array is {array.dtype}")
