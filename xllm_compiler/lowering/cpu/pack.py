"""Writes the weight file: evaluates one weight expression at a time, packs it, and appends it.

Peak memory is about twice the largest tensor: the evaluated expression and its packed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from xllm_compiler.analysis.weights import param_names, ranks_read
from xllm_compiler.artifact.schema import HUGE_PAGE
from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run_value, run_values
from xllm_compiler.ir.semantics import NP_DTYPE
from xllm_compiler.ir.types import DTYPE_BYTES, FLOATS
from xllm_compiler.kernels.layouts import pack
from xllm_compiler.lowering.weight_requests import WeightRequest, WeightTable
from xllm_compiler.weight_formats import Layout

ALIGN: Final = 4096  # a page, so that a tensor can be mapped, advised or copied on its own
_SMALL: Final = 1 << 16  # smaller tensors share pages
_CHECK: Final = 1 << 22  # elements that are checked for NaN at once

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor of the weight file; `shape` is the packed one."""

    name: str
    layout: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def packed_shape(request: WeightRequest) -> tuple[int, ...]:
    """The shape of the stored array."""
    return Layout.parse(request.layout).shape(tuple(d.value for d in request.value.shape), request.dtype)


def plan_file(table: WeightTable) -> tuple[list[PackedTensor], int]:
    """Where every requested tensor lies in the file, and the file's size in bytes. Needs no weights."""
    out: list[PackedTensor] = []
    end = 0
    for request in table.requests:
        shape = packed_shape(request)
        size = int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[request.dtype]
        align = ALIGN if size >= _SMALL else 64
        offset = -(-end // align) * align
        out.append(PackedTensor(request.name, request.layout, request.dtype, shape, offset, size))
        end = offset + size
    return out, -(-end // ALIGN) * ALIGN


def write_weights(
    table: WeightTable,
    plan: Sequence[PackedTensor],
    size: int,
    params: Mapping[str, Array],
    path: Path,
    progress: Callable[[str, float], None],
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Writes the weight file of `plan`.

    `ranks`: the rank to write for, as its place in each group that weights depend on. The plan is the same for all
    ranks. Raises XllmError("checkpoint") for a missing or non-finite tensor, "option" for `ranks` that do not fit."""
    places = _rank_sizes(table, ranks or {})
    total = sum(t.bytes for t in plan) or 1
    done = 0
    try:
        with path.open("wb", buffering=HUGE_PAGE) as file:
            for request, tensor in zip(table.requests, plan, strict=True):
                progress(tensor.name, done / total)
                packed = _pack(request, params, places)
                if packed.shape != tensor.shape or packed.nbytes != tensor.bytes:
                    raise XllmError("internal", f"packed {packed.shape}, planned {tensor.shape}", where=tensor.name)
                _write(file, memoryview(bytes(tensor.offset - file.tell())))
                _write(file, packed.reshape(-1).view(np.uint8).data)
                done += tensor.bytes
                del packed
            _write(file, memoryview(bytes(size - file.tell())))
    except OSError as error:
        raise XllmError("io", f"cannot write weights: {error.strerror}", where=str(path)) from error
    progress("", 1.0)


def _write(file: BinaryIO, data: memoryview) -> None:
    """Writes `data` in parts, none of which crosses the end of one of `file`'s buffers of `HUGE_PAGE` bytes. So the
    system gets whole aligned blocks and keeps each in a huge page, which a reader of the file then maps."""
    at = 0
    while at < len(data):
        end = at + HUGE_PAGE - file.tell() % HUGE_PAGE
        file.write(data[at:end])
        at = end


def _rank_sizes(table: WeightTable, ranks: Mapping[str, int]) -> dict[str, int]:
    """The values of the rank dims on the rank whose places in its groups are `ranks`."""
    op = table.requests[0].value.op if table.requests else None
    groups = op.func.module.groups if op is not None else {}
    for name, place in ranks.items():
        if name not in groups:
            raise XllmError("option", f"no group @{name} to pack weights for", help="it has " + ", ".join(groups))
        if not 0 <= place < groups[name].size:
            raise XllmError("option", f"place {place} in group @{name}, which has {groups[name].size} ranks")
    for request in table.requests:
        for name in (n for value in (request.value, *request.rest) for n in ranks_read(value)):
            if name not in ranks:
                raise XllmError(
                    "option", f"a weight depends on the rank in @{name}, which is not given", where=request.name
                )
    return {groups[name].rank: place for name, place in ranks.items() if groups[name].rank}


def _pack(request: WeightRequest, params: Mapping[str, Array], places: Mapping[str, int]) -> Array:
    sources = list(dict.fromkeys(name for value in (request.value, *request.rest) for name in param_names(value)))
    missing = [name for name in sources if name not in params]
    if missing:
        raise XllmError("checkpoint", f"the checkpoint has no tensor {missing[0]}", where=request.name)
    if request.rest:
        return _pack_quantized(request, params, sources, places)
    shape = [d.value for d in request.value.shape]  # numpy makes a contiguous rank 0 a rank 1
    value = run_value(request.value, params, ranks=places).reshape(shape)
    if sources and request.value.dtype in FLOATS:
        _check_finite(value, request.name, sources, params)
    return pack(Layout.parse(request.layout), [value.astype(NP_DTYPE[request.dtype], copy=False)])


def _pack_quantized(
    request: WeightRequest, params: Mapping[str, Array], sources: Sequence[str], places: Mapping[str, int]
) -> Array:
    parts = run_values([request.value, *request.rest], params, ranks=places)
    for name in sources:
        if params[name].dtype.kind not in "iub":
            _check_finite(params[name], request.name, [name], params)
    return pack(Layout.parse(request.layout), parts)


def _check_finite(value: Array, name: str, sources: Sequence[str], params: Mapping[str, Array]) -> None:
    """Raises XllmError("checkpoint"), which names the tensor, if NaN or infinities come from the checkpoint."""
    if _finite(value):
        return
    for source in sources:
        if not _finite(params[source]):
            raise XllmError(
                "checkpoint",
                f"tensor {source} holds NaN or infinite values",
                where=name,
                help="the checkpoint is damaged or was saved from a diverged run; download or export it again",
            )
    raise XllmError(
        "checkpoint", f"computing {name} from {', '.join(sources)} gives NaN or infinite values", where=name
    )


def _finite(value: Array) -> bool:
    """Whether all elements are finite. They are checked in pieces, since bf16 is widened for it."""
    flat = value.reshape(-1)
    return all(
        bool(np.isfinite(flat[i : i + _CHECK].astype(np.float32)).all())
        if flat.dtype != np.float64
        else bool(np.isfinite(flat[i : i + _CHECK]).all())
        for i in range(0, flat.size, _CHECK)
    )
