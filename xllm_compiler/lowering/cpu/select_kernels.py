"""Chooses a kernel for every op of a step on the CPU. Weight formats are names here, which kernels parse."""

from __future__ import annotations

from typing import Final

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.types import Kv
from xllm_compiler.kernels.tir.attention.attend import Attend
from xllm_compiler.kernels.tir.attention.kv_address import KvLayout
from xllm_compiler.kernels.tir.attention.kv_append import KvAppend, KvWrite
from xllm_compiler.kernels.tir.attention.rope import Rope
from xllm_compiler.kernels.tir.codegen.kernel import TILE_TOKENS
from xllm_compiler.kernels.tir.linear.linear import Linear, LinearGlu
from xllm_compiler.kernels.tir.linear.reader import weight_only
from xllm_compiler.kernels.tir.linear.vocab import BlockMax, LinearBlockMax
from xllm_compiler.kernels.tir.rows.embedding import Embedding
from xllm_compiler.kernels.tir.rows.norm_rows import NormRows
from xllm_compiler.kernels.tir.rows.norms import AddRmsNorm, LayerNorm, RmsNorm
from xllm_compiler.kernels.tir.rows.quantize import QuantizeRows
from xllm_compiler.lowering.cpu.lowering_context import CPU, Selection, const_dim, rows
from xllm_compiler.lowering.cpu.tensor_ops import copy_view, lower_tensor_op
from xllm_compiler.lowering.fuse import Fusion
from xllm_compiler.lowering.kernel_registry import Key
from xllm_compiler.lowering.storage import Ref, Storage, where
from xllm_compiler.lowering.weight_requests import WeightTable
from xllm_compiler.weight_formats import PANEL

_FLOATS: Final = ("f32", "bf16")


def _keys(*ops: str, weight: bool = False) -> list[Key]:
    return [Key(op, t, t if weight else "") for op in ops for t in _FLOATS]


def _float(op: Op, name: str) -> float:
    value = op.attrs[name]
    assert isinstance(value, (int, float))
    return float(value)


def _int(op: Op, name: str) -> int:
    value = op.attrs[name]
    assert isinstance(value, int)
    return value


def _bool(op: Op, name: str) -> bool:
    value = op.attrs[name]
    assert isinstance(value, bool)
    return value


def _text(op: Op, name: str) -> str:
    value = op.attrs[name]
    assert isinstance(value, str)
    return value


def _one(op: Op, name: str) -> Value | None:
    values = op.field(name)
    return values[0] if values else None


def _operand(op: Op, name: str) -> Value:
    return op.field(name)[0]


# --------------------------------------------------------------------------------------------------------------- linear


def _packed(s: Selection, op: Op, layout: str) -> tuple[Value, Ref, str]:
    """The weight, its place, and the kernel's `weights`: "" for a weight that is stored in its own dtype.

    A quantized weight stays in its format, and the kernel widens it.
    """
    w = _operand(op, "w")
    if w not in s.storage.weights:
        raise XllmError(
            "unsupported", f"{op.name} with a weight that is computed in the step", where=where(op), help="use t.matmul"
        )
    if w.op is not None and w.op.name == "quant.dequantize":
        if _int(w.op, "rotate"):
            help = "quantize-rows, which rotates the other side too"
            raise XllmError("unsupported", f"{op.name} with a weight that is rotated", where=where(op), help=help)
        format = _text(w.op, "format")
        return w, _quantized(s, w.op, f"glu_{format}" if layout == "glu" else format), weight_only(format)
    return w, s.weight(w, layout), ""


@CPU.register(_keys("nn.linear", weight=True))
def _linear(s: Selection, op: Op) -> None:
    x, bias, residual = _operand(op, "x"), _one(op, "bias"), _one(op, "residual")
    w, packed, weights = _packed(s, op, "panel")
    out = _widened(s, op)
    n, k = (const_dim(d, op, "the weight's shape") for d in w.shape)
    kernel = Linear(
        k=k,
        n=n,
        dtype=x.dtype,
        out=out.dtype,
        bias=bias is not None,
        residual=residual is not None,
        act=_text(op, "act"),
        weights=weights,
    )
    args: list[Ref | Dim] = [s.ref(x), packed]
    args += [s.ref(v, x.dtype) for v in (bias, residual) if v is not None]
    _call_linear(s, op, kernel, [*args, s.ref(out)], out)


def _call_linear(s: Selection, op: Op, kernel: Linear, places: list[Ref | Dim], out: Value) -> None:
    """Calls a linear layer that writes `out`. Where `out` is returned with its block maxima, the same kernel finds
    them."""
    block_max = next((u for u in out.users if u.name == "nn.block_max" and u.result in s.storage.outputs), None)
    plain = kernel.out == "f32" and not kernel.residual and kernel.act == "none"
    if block_max is None or out not in s.storage.outputs or not plain:
        s.call_linear(op, kernel, places, rows(out))
        return
    _check_block(block_max)
    fused = LinearBlockMax(k=kernel.k, n=kernel.n, dtype=kernel.dtype, bias=kernel.bias, weights=kernel.weights)
    s.call_linear(op, fused, [*places, s.ref(block_max.result)], rows(out))
    s.done.add(block_max)


def _widened(s: Selection, op: Op) -> Value:
    """The value that a linear layer writes: its result, or the f32 output that its result is only cast to.

    The cast's result must be an output. Any other place may hold another value until the cast.
    """
    out = op.result
    if out.dtype == "bf16" and out.has_one_use:
        user = out.users[0]
        if user.name == "t.cast" and user.result in s.storage.outputs and user.result.dtype == "f32":
            s.done.add(user)
            return user.result
    return out


@CPU.register(_keys("nn.linear_glu", weight=True))
def _linear_glu(s: Selection, op: Op) -> None:
    x, bias = _operand(op, "x"), _one(op, "bias")
    w, packed, weights = _packed(s, op, "glu")
    n, k = (const_dim(d, op, "the weight's shape") for d in w.shape)
    kernel = LinearGlu(k=k, f=n // 2, dtype=x.dtype, bias=bias is not None, act=_text(op, "act"), weights=weights)
    args: list[Ref | Dim] = [s.ref(x), packed]
    args += [s.ref(v, x.dtype) for v in (bias,) if v is not None]
    s.call_linear(op, kernel, [*args, s.ref(op.result)], rows(x))


# ------------------------------------------------------------------------------------------------------------ quantized


def _quantized(s: Selection, op: Op, layout: str) -> Ref:
    values, scales, zeros = _operand(op, "values"), _operand(op, "scales"), _one(op, "zeros")
    for v in (values, scales, zeros):
        if v is not None and v not in s.storage.weights:
            raise XllmError("unsupported", f"{op.name} with a weight that is computed in the step", where=where(op))
    return s.quantized(values, scales, zeros, layout)


@CPU.register(_keys("quant.rows"))
def _quant_rows(s: Selection, op: Op) -> None:
    x = _operand(op, "x")
    k = const_dim(x.shape[-1], op, "the row length")
    kernel = QuantizeRows(k, x.dtype, _int(op, "group"), _int(op, "rotate"), _bool(op, "by_group"))
    s.call(op, kernel, [s.ref(x), *(s.ref(r) for r in op.results), rows(x)])


@CPU.register(_keys("quant.norm_rows"))
def _quant_norm_rows(s: Selection, op: Op) -> None:
    x, w, b = _operand(op, "x"), _one(op, "w"), _one(op, "b")
    kernel = NormRows(
        kind=_text(op, "kind"),
        n=const_dim(x.shape[-1], op, "the normalised axis"),
        dtype=x.dtype,
        eps=_float(op, "eps"),
        offset=_float(op, "offset"),
        weight=w is not None,
        bias=b is not None,
        group=_int(op, "group"),
        rotate=_int(op, "rotate"),
        by_group=_bool(op, "by_group"),
    )
    weights = [s.ref(v, x.dtype) for v in (w, b) if v is not None]
    s.call(op, kernel, [s.ref(x), *weights, *(s.ref(r) for r in op.results), rows(x)])


@CPU.register([Key("quant.linear", "i8")])
def _quant_linear(s: Selection, op: Op) -> None:
    bias, residual = _one(op, "bias"), _one(op, "residual")
    format, out = _text(op, "format"), _widened(s, op)
    n, k = (const_dim(d, op, "the weight's shape") for d in _operand(op, "values").shape)
    kernel = Linear(
        k=k,
        n=n,
        dtype=_text(op, "dtype"),
        out=out.dtype,
        bias=bias is not None,
        residual=residual is not None,
        act=_text(op, "act"),
        weights=format,
    )
    args: list[Ref | Dim] = [s.ref(_operand(op, name)) for name in ("x", "scale", "sums")]
    args.append(_quantized(s, op, format))
    args += [s.ref(v, kernel.dtype) for v in (bias, residual) if v is not None]
    _call_linear(s, op, kernel, [*args, s.ref(out)], out)


@CPU.register([Key("quant.linear_glu", "i8")])
def _quant_linear_glu(s: Selection, op: Op) -> None:
    x, bias, format = _operand(op, "x"), _one(op, "bias"), _text(op, "format")
    n, k = (const_dim(d, op, "the weight's shape") for d in _operand(op, "values").shape)
    dtype = _text(op, "dtype")
    kernel = LinearGlu(k=k, f=n // 2, dtype=dtype, bias=bias is not None, act=_text(op, "act"), weights=format)
    args: list[Ref | Dim] = [s.ref(_operand(op, name)) for name in ("x", "scale", "sums")]
    args.append(_quantized(s, op, f"glu_{format}"))
    args += [s.ref(v, dtype) for v in (bias,) if v is not None]
    s.call_linear(op, kernel, [*args, s.ref(op.result)], rows(x))


# ---------------------------------------------------------------------------------------------------- norms, embedding


@CPU.register(_keys("nn.rms_norm"))
def _rms_norm(s: Selection, op: Op) -> None:
    x, w = _operand(op, "x"), _one(op, "w")
    n = const_dim(x.shape[-1], op, "the normalised axis")
    kernel = RmsNorm(n=n, dtype=x.dtype, eps=_float(op, "eps"), offset=_float(op, "offset"), weight=w is not None)
    weights = [s.ref(w, x.dtype)] if w is not None else []
    s.call(op, kernel, [s.ref(x), *weights, s.ref(op.result), rows(x)])


@CPU.register(_keys("nn.add_rms_norm"))
def _add_rms_norm(s: Selection, op: Op) -> None:
    x = _operand(op, "x")
    n = const_dim(x.shape[-1], op, "the normalised axis")
    kernel = AddRmsNorm(n=n, dtype=x.dtype, eps=_float(op, "eps"), offset=_float(op, "offset"))
    y, total = op.results
    inputs = [s.ref(x), s.ref(_operand(op, "res")), s.ref(_operand(op, "w"), x.dtype)]
    s.call(op, kernel, [*inputs, s.ref(y), s.ref(total), rows(x)])


def _check_block(op: Op) -> None:
    if _int(op, "block") != PANEL:
        raise XllmError("unsupported", f"nn.block_max in blocks of {_int(op, 'block')}, not {PANEL}", where=where(op))


@CPU.register([Key("nn.block_max", "f32")])
def _block_max(s: Selection, op: Op) -> None:
    x = _operand(op, "x")
    _check_block(op)
    kernel = BlockMax(n=const_dim(x.shape[-1], op, "the row length"))
    s.call(op, kernel, [s.ref(x), s.ref(op.result), rows(x)])


@CPU.register(_keys("nn.layer_norm"))
def _layer_norm(s: Selection, op: Op) -> None:
    x, w, b = _operand(op, "x"), _one(op, "w"), _one(op, "b")
    n = const_dim(x.shape[-1], op, "the normalised axis")
    kernel = LayerNorm(n=n, dtype=x.dtype, eps=_float(op, "eps"), weight=w is not None, bias=b is not None)
    weights = [s.ref(v, x.dtype) for v in (w, b) if v is not None]
    s.call(op, kernel, [s.ref(x), *weights, s.ref(op.result), rows(x)])


@CPU.register(_keys("nn.embedding"))
def _embedding(s: Selection, op: Op) -> None:
    ids, w = _operand(op, "ids"), _operand(op, "w")
    dim = const_dim(w.shape[1], op, "the row length")
    count = rows(ids) * ids.shape[-1] if ids.shape else as_dim(1)
    if w.op is not None and w.op.name == "quant.dequantize" and w in s.storage.weights:
        format = _text(w.op, "format")
        kernel = Embedding(dim=dim, dtype=w.dtype, layout=format, rotate=_int(w.op, "rotate"))
        s.call(op, kernel, [s.ref(ids, "i32"), _quantized(s, w.op, format), s.ref(op.result), count])
        return
    # a table that a linear layer reads too is stored once, in the layout that the linear layer needs
    tied = w in s.storage.weights and s.weights.key(w) in s.panels
    table = s.weight(w, "panel") if tied else s.ref(w)
    kernel = Embedding(dim=dim, dtype=w.dtype, layout="panel" if tied else "row")
    s.call(op, kernel, [s.ref(ids, "i32"), table, s.ref(op.result), count])


# ---------------------------------------------------------------------------------------------- rotary, KV, attention


def _kv(op: Op) -> KvLayout:
    kv = _operand(op, "kv").kv
    dtype = op.operands[1].dtype  # q, k or qkv
    tiles, rest = divmod(kv.page, TILE_TOKENS)
    if rest:
        what = f"{op.name} in blocks of {kv.page} tokens; a CPU kernel has tiles of {TILE_TOKENS}"
        raise XllmError("unsupported", what, where=where(op))
    return KvLayout(dtype=dtype, heads=kv.heads, k_dim=kv.k_dim, v_dim=kv.v_dim, quantized=kv.quantized, tiles=tiles)


def _table_sizes(s: Selection, op: Op) -> list[Dim]:
    """The arguments `TABLE_SIZES`: blocks in a row of the table, bytes of a block over all layers."""
    block = s.storage.kv_block_bytes
    if block >= 1 << 31:
        raise XllmError("unsupported", f"a KV block of {block} bytes over all layers", where=where(op))
    return [_operand(op, "table").shape[1], as_dim(block)]


def _rotary(s: Selection, op: Op, n: Dim) -> tuple[int, list[Ref]]:
    """How many elements of a head are rotated, and the places of cos and sin; 0 and none without rotation."""
    cos, sin = _one(op, "cos"), _one(op, "sin")
    if cos is None or sin is None:
        return 0, []
    if cos.shape[0] is not n:
        raise XllmError("unsupported", f"{op.name}: cos has {cos.shape[0]} rows for {n} tokens", where=where(op))
    return 2 * const_dim(cos.shape[1], op, "the rotated part"), [s.ref(cos, "f32"), s.ref(sin, "f32")]


@CPU.register(_keys("nn.rope"))
def _rope(s: Selection, op: Op) -> None:
    x = _operand(op, "x")
    rotary, tables = _rotary(s, op, x.shape[0])
    heads, dim = (const_dim(d, op, "the head shape") for d in x.shape[1:])
    kernel = Rope(heads=heads, dim=dim, rotary=rotary, style=_style(op), dtype=x.dtype)
    s.call(op, kernel, [s.ref(x), *tables, s.ref(op.result), x.shape[0]])


def _style(op: Op) -> str:
    return _text(op, "style")


@CPU.register(_keys("kv.write"))
def _kv_write(s: Selection, op: Op) -> None:
    layout = _kv(op)
    places = [s.ref(_operand(op, name)) for name in ("kv", "k", "v", "pos", "seq", "table")]
    s.call(op, KvWrite(kv=layout), [*places, _operand(op, "k").shape[0], *_table_sizes(s, op)])


@CPU.register(_keys("kv.append"))
def _kv_append(s: Selection, op: Op) -> None:
    layout = _kv(op)
    n = _operand(op, "qkv").shape[0]
    qw, kw = _one(op, "qw"), _one(op, "kw")
    rotary, tables = _rotary(s, op, n)
    kernel = KvAppend(
        kv=layout,
        q_heads=_int(op, "q_heads"),
        rotary=rotary,
        style=_style(op),
        q_norm=qw is not None,
        k_norm=kw is not None,
        eps=_float(op, "eps"),
        offset=_float(op, "offset"),
    )
    places = [s.ref(_operand(op, name)) for name in ("kv", "qkv", "pos", "seq", "table")]
    places += [*tables, *(s.ref(w, layout.dtype) for w in (qw, kw) if w is not None)]
    s.call(op, kernel, [*places, s.ref(op.results[1]), n, *_table_sizes(s, op)])


@CPU.register(_keys("kv.attend"))
def _kv_attend(s: Selection, op: Op) -> None:
    layout = _kv(op)
    q, sinks = _operand(op, "q"), _one(op, "sinks")
    kernel = Attend(
        kv=layout,
        q_heads=const_dim(q.shape[1], op, "the number of heads"),
        scale=_float(op, "scale"),
        window=_int(op, "window"),
        softcap=_float(op, "softcap"),
        sinks=sinks is not None,
        divide=len(op.results) == 2,
    )
    places = [s.ref(_operand(op, name)) for name in ("kv", "q", "pos", "seq", "start", "table")]
    places += [s.ref(sinks, "f32")] if sinks is not None else []
    places += [s.ref(r) for r in op.results]
    room: list[Dim] = []
    if kernel.divide:
        places.append(s.storage.barrier)
        room = [op.results[1].tensor.elements]
    places.append(s.storage.work_queues())
    s.call(op, kernel, [*places, q.shape[0], _operand(op, "table").shape[0], *_table_sizes(s, op), *room])


# ------------------------------------------------------------------------------------------------------------- select


def _key(op: Op) -> Key:
    first = op.operands[0]
    dtype = op.operands[1].dtype if isinstance(first.type, Kv) else first.dtype
    if op.name == "nn.embedding":
        dtype = op.operands[1].dtype
    return Key(op.name, dtype, op.operands[1].dtype if op.name in ("nn.linear", "nn.linear_glu") else "")


def select(func: Func, weights: WeightTable) -> Selection:
    """The kernel calls of a planned step function, in order. Requests from `weights` every weight that it reads."""
    for op in func.ops:
        if op.stream or op.name.startswith("sched."):
            what = f"{op.name} on stream {op.stream}" if op.stream else op.name
            raise XllmError(
                "unsupported",
                f"{what}: a CPU program runs one stream, in list order, and has no events",
                where=where(op),
                help="assign-streams{comm=0} keeps everything on stream 0",
            )
    scope = func.module.scope
    storage = Storage(func, scope)
    fusion = Fusion(storage)
    s = Selection(func, storage, fusion, weights)
    for op in func.ops:
        if op in s.done or all(r in storage.weights for r in op.results):
            continue
        if op in storage.copies:
            copy_view(s, op)
        elif op.SPEC.view:
            continue
        elif op.name.startswith("t."):
            if fusion.is_materialised(op.result) and op.result.has_uses:
                lower_tensor_op(s, op)
        else:
            CPU.choose(_key(op), op)(s, op)
    s.set_next_weights()
    return s
