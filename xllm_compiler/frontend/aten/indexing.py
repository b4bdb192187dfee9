"""Looking things up: embeddings and index tensors. Negative indices are not supported by the IR and must not occur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xllm_compiler.frontend.importer import Importer, Item, handles
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Value


@handles("aten.embedding.default")
def embedding(im: Importer, weight: Value, indices: Value, **_: Item) -> Value:
    return im.emit(ops.Embedding, indices, weight)


@handles("aten.index_select.default")
def index_select(im: Importer, x: Value, dim: int, index: Value) -> Value:
    return im.emit(ops.Take, x, index, axis=dim)


@handles("aten.index.Tensor")
def index(im: Importer, x: Value, indices: Sequence[Value | None]) -> Value:
    """x[:, :, i]: one integer index tensor, every other axis whole."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) != 1 or given[0][1].dtype == "bool":
        raise im.unsupported("indexing by several index tensors, or by a mask")
    axis, i = given[0]
    return im.emit(ops.Take, x, i, axis=axis)


@handles("aten.gather.default")
def gather(im: Importer, x: Value, dim: int, index: Value, sparse_grad: Any = False) -> Value:
    """Only where all other axes have size 1: there it is a plain look-up."""
    axis = dim % x.tensor.rank
    others = [d for v in (x, index) for i, d in enumerate(v.shape) if i != axis]
    if any(d != 1 for d in others):
        raise im.unsupported("gather along one of several axes")
    flat = im.emit(ops.Take, im.reshape(x, [x.shape[axis]]), im.reshape(index, [index.shape[axis]]), axis=0)
    return im.reshape(flat, index.shape)
