"""rotate-stream: the residual stream is rotated, so that no direction of it is much larger than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from xllm_compiler.analysis.weights import param_names, unrounded
from xllm_compiler.ir.core import Builder, Func, Module, Op, Value
from xllm_compiler.ir.ops import Add, AddRmsNorm, Cast, Embedding, LayerNorm, Linear, MatMul, Reshape, RmsNorm, Rotate
from xllm_compiler.passes.base import Pass, PassContext
from xllm_compiler.passes.quantize.stream import Layer, Norm, Stream, streams_of
from xllm_compiler.passes.registry import register_pass

T = TypeVar("T", bound=Op)
_RULE = "rotate-stream/rotate"


@register_pass("rotate-stream")
@dataclass(frozen=True)
class RotateStream(Pass):
    """Multiplies the residual stream by one orthogonal matrix, in the weights of all that writes to it and reads it.

    before:  %x = nn.embedding(%ids, %table)     : bf16[N, 64]
             %n = nn.rms_norm(%x, w=%g, eps=1e-06)
             %y = nn.linear(%n, %w)
    after:   %t = quant.rotate(%table, axis=1)   : f32[384, 64]
             %v = quant.rotate(%w, scale=%g, axis=1) : f32[96, 64]
             %x = nn.embedding(%ids, bf16 of %t) : bf16[N, 64]
             %n = nn.rms_norm(%x, eps=1e-06)
             %y = nn.linear(%n, bf16 of %v)

    A few directions of a stream are far larger than the others, and their step would be that of a whole row of 8 bits.
    Norms lose their weights, which go into the layers that read them. Layer norms become RMS norms: whatever writes to
    the stream writes without its mean. The step computes what it did, with other weights.

    All functions are rotated, since they share weights, or none. A remark names the op that stands in the way. A table
    that is looked up in and multiplied by too becomes two.
    """

    ulps: ClassVar[int] = 24  # every weight is rounded anew, in its own dtype

    def run(self, module: Module, ctx: PassContext) -> bool:
        found = {func: streams_of(func) for func in module.funcs.values()}
        streams = [stream for each in found.values() for stream in each]
        if not streams or any(stream.rotated for stream in streams):
            return False
        if any(stream.obstacles for stream in streams):
            for stream in streams:
                _explain(stream, ctx)
            return False
        first = next(iter(streams[0].values)).op
        assert first is not None
        if not ctx.allows(_RULE, first):
            return False
        made: list[Op] = []
        for func, each in found.items():
            for stream in each:
                made += _Rotation(func, stream, ctx).run()
        ctx.tried(_RULE, first, True, [op for op in made if op.attached])
        return True


def _explain(stream: Stream, ctx: PassContext) -> None:
    if stream.obstacles:
        op, why = stream.obstacles[0]
        more = len({op for op, _ in stream.obstacles}) - 1
        others = f" ({more} more ops stand in the way)" if more else ""
        ctx.remark(op, f"the residual stream is not rotated: this op {why}{others}")


class _Rotation:
    """Rotates one stream of a function."""

    def __init__(self, func: Func, stream: Stream, ctx: PassContext) -> None:
        self._func, self._stream, self._ctx = func, stream, ctx
        self._made: list[Op] = []
        self._known: dict[tuple[object, ...], Value] = {}
        self._b = Builder.at_end(func)

    def run(self) -> list[Op]:
        """The ops that it made."""
        stream = self._stream
        tables: dict[Value, dict[Value, None]] = {}
        for op in list(self._func.ops):
            if op not in stream.writers and op not in stream.layers:
                continue
            self._b = Builder.before(op, op.loc.touched_by(_RULE))
            if isinstance(op, Layer):
                before, after = op.w, self._layer(op)
            elif isinstance(op, Embedding):
                before, after = op.w, self._written(op.w, 1)
                op.set_operand(1, after)
            else:
                for index, v in enumerate(op.operands):
                    if v not in stream.values:
                        op.set_operand(index, self._written(v, v.tensor.rank - 1))
                continue
            tables.setdefault(before, {})[after] = None
            self._ctx.stat("weights")
        for norm in stream.norms:
            self._norm(norm)
        for before, several in tables.items():
            if len(several) > 1:
                more = before.tensor.nbytes.value * (len(several) - 1)
                name = ", ".join(param_names(before))
                self._ctx.remark(
                    before.op,
                    f"{name} is read before the norm and behind it, by ops that need it rotated differently: it "
                    f"becomes {len(several)} weights, {more} bytes more in {before.dtype}",
                )
        self._ctx.stat("streams")
        return self._made

    def _layer(self, op: Layer) -> Value:
        """Puts a layer on rotated weights in place of `op`, and returns its weight."""
        w, bias = op.w, op.bias
        if op in self._stream.layers:
            norm = self._stream.layers[op]
            if isinstance(norm, LayerNorm) and norm.b is not None:
                bias = self._shifted(w, norm.b, bias)
            offset = 0.0 if norm is None or isinstance(norm, LayerNorm) else norm.offset
            scale = None if norm is None else norm.w
            w = self._rotated(w, 1, scale, offset if scale is not None else 0.0)
        if op in self._stream.writers:
            w = self._written(w, 0)
            bias = None if bias is None else self._written(bias, 0)
        if isinstance(op, Linear):
            made: Layer = self._create(Linear, op.x, w, bias, op.residual, act=op.act, hint=op.result.name)
        else:
            made = self._create(type(op), op.x, w, bias, act=op.act, hint=op.result.name)
        op.result.replace_all_uses_with(made.result)
        op.erase()
        return w

    def _shifted(self, w: Value, b: Value, bias: Value | None) -> Value:
        """The bias of a layer whose input lost the summand `b`: w @ b, and what the layer had."""
        wide = "f64" if w.dtype == "f64" else "f32"
        column = self._create(Reshape, self._cast(b, wide), shape=(*b.shape, 1)).result
        product = self._create(MatMul, self._cast(w, wide), column).result
        moved = self._create(Reshape, product, shape=(w.shape[0],)).result
        total = moved if bias is None else self._create(Add, moved, self._cast(bias, wide)).result
        return self._cast(total, w.dtype)

    def _written(self, w: Value, axis: int) -> Value:
        return self._rotated(w, axis, centre=self._stream.centred)

    def _rotated(
        self, w: Value, axis: int, scale: Value | None = None, offset: float = 0.0, centre: bool = False
    ) -> Value:
        """`w` rotated along `axis`, in its dtype: rounded once, and once for all that ask for it."""
        key = (w, axis, scale, offset, centre)
        if key not in self._known:
            source = unrounded(w)
            made = self._create(Rotate, source, scale, axis=axis, offset=offset, centre=centre, hint=w.name).result
            self._known[key] = self._cast(made, w.dtype)
        return self._known[key]

    def _norm(self, norm: Norm) -> None:
        """Puts an RMS norm without weight in place of `norm`."""
        self._b = Builder.before(norm, norm.loc.touched_by(_RULE))
        x = norm.x
        if isinstance(norm, AddRmsNorm):
            x = self._create(Add, norm.x, norm.res, hint=norm.results[1].name).result
            norm.results[1].replace_all_uses_with(x)
        made = self._create(RmsNorm, x, eps=norm.eps, hint=norm.results[0].name).result
        norm.results[0].replace_all_uses_with(made)
        norm.erase()
        self._ctx.stat("norms")

    def _cast(self, v: Value, dtype: str) -> Value:
        return v if v.dtype == dtype else self._create(Cast, v, dtype=dtype, hint=v.name).result

    def _create(self, cls: type[T], *operands: Value | None, **fields: Any) -> T:
        made = self._b.create(cls, *operands, **fields)
        self._made.append(made)
        return made
