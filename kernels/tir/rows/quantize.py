"""`QuantizeRows`: quantizes activations to 8 bits, by row or by group, rotated or not.

scale = max |x| / 127 over the row, and stored = round(x / scale), to nearest, ties to even. It also stores the sums of
the stored values over each group of k, with which the zero points of weights are taken off. A row that holds NaN or
infinity gets the scale NaN, so that all that is computed from it is NaN. With a scale for each group, each group is
quantized like a row. Rows are shared out to members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import (
    Vectors,
    address,
    build_function,
    load,
    load_part,
    share,
    splat,
    stack_array,
    store,
)
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.rows.norms import each_vector
from xllm_compiler.weight_formats import LARGEST, ROTATIONS, RowFormat

Expr = Any
_MOST_BYTES = 1 << 20  # of a rotated row: it lies on the stack


@dataclass(frozen=True)
class QuantizeRows(Kernel):
    """x[rows, k] to q i8 [rows, padded k], scale f32 [rows], sum i32 [rows, groups]; `group`: that of the weights.
    `by_group`: scale is [rows, groups].

    `rotate`: 64 or 16, the length of the blocks of a row to which the orthonormal Walsh-Hadamard transform is applied
    first, in f32."""

    k: int
    dtype: str
    group: int = 0
    rotate: int = 0
    by_group: bool = False

    def __post_init__(self) -> None:
        require(self.k > 0 and self.dtype in ("bf16", "f32"), f"quantizing rows of {self.k} {self.dtype}", self)
        check_rotation(self, self.k, self.rotate)

    @property
    def form(self) -> RowFormat:
        return RowFormat(self.group, self.by_group)

    @property
    def args(self) -> tuple[Arg, ...]:
        padded, groups = self.form.padded(self.k), self.form.groups(self.k)
        return (
            Arg("x", self.dtype, f"rows, {self.k}"),
            Arg("q", "i8", f"rows, {padded}", written=True),
            Arg("scale", "f32", f"rows, {groups}" if self.by_group else "rows", written=True),
            Arg("sum", "i32", f"rows, {groups}", written=True),
            scalar("rows"),
            *MEMBER_ARGS,
        )

    def build(self, isa: Isa) -> Any:
        def body(x: Expr, q: Expr, scale: Expr, sum: Expr, rows: Expr, member: Expr, team: Expr) -> None:
            turned = stack_array(self.k, "float32") if self.rotate else None
            first, last = share(rows, member, team)
            with T.serial(first, last) as row:
                source = T.bind(T.Cast("int64", row) * self.k)
                if turned is None:
                    quantize_row(self.form, self.k, self.dtype, x, source, row, q, scale, sum)
                else:
                    rotate_row(self.rotate, self.k, self.dtype, x, source, turned)
                    quantize_row(self.form, self.k, "f32", turned, T.int64(0), row, q, scale, sum)

        return build_function(self, isa, body)


def check_rotation(kernel: Kernel, k: int, rotate: int) -> None:
    """Raises kind "unsupported" unless rows of `k` can be rotated in blocks of `rotate`, 0 for none."""
    fits = rotate in ROTATIONS and k % rotate == 0 and k * 4 <= _MOST_BYTES
    require(not rotate or fits, f"rotating blocks of {rotate} in rows of {k}", kernel)


def rotate_row(
    rotate: int, k: int, dtype: str, x: Expr, source: Expr, turned: Expr, target: Expr = 0, stored: str = "f32"
) -> None:
    """Emits: rotates the k elements of x at `source`, by blocks of `rotate`, to `turned` at `target`, which is of the
    dtype `stored`. Partners 1, 2, 4 and 8 apart are lanes of one vector."""
    with T.serial(0, k // rotate) as block:
        at = T.bind(block * rotate)
        offsets = range(0, rotate, LANES)
        values = [load(x, source + at + offset, dtype) for offset in offsets]
        values = [T.bind(T.call_pure_extern("float32x16", "xllm_rotate", value)) for value in values]
        apart = 1
        while apart < len(values):
            pairs = [(values[i & ~apart], values[i | apart], i & apart) for i in range(len(values))]
            values = [T.bind(a - b if second else a + b) for a, b, second in pairs]
            apart *= 2
        for offset, value in zip(offsets, values, strict=True):
            store(turned, target + at + offset, value * splat(rotate**-0.5), stored)


def quantize_row(
    form: RowFormat,
    k: int,
    dtype: str,
    x: Expr,
    source: Expr,
    row: Expr,
    q: Expr,
    scale: Expr,
    sum: Expr,
) -> None:
    """Emits row `row` of q, scale and sum, as in `QuantizeRows`, from the k elements of x at `source`."""
    padded, groups = form.padded(k), form.groups(k)
    length = form.group or padded
    target = T.bind(T.Cast("int64", row) * padded)

    def factor_of(start: Expr, count: int, index: Expr) -> Expr:
        """What `count` elements are multiplied by. Emits the store of their scale to scale[index]."""
        largest = largest_size(x, start, count, dtype)
        T.buffer_store(scale, largest * T.float32(1 / LARGEST), [index])
        return inverse_scale(largest)

    whole_row = None if form.by_group else factor_of(source, k, row)

    def quantize(group: Expr, valid: int) -> None:
        """Emits one group, of which the first `valid` values exist."""
        start = T.bind(group * length)
        factor = factor_of(source + start, valid, row * groups + group) if whole_row is None else whole_row
        total = Vectors(1, "int32")
        total[0] = T.broadcast(T.int32(0), LANES)

        def store(at: Expr, count: int) -> None:
            integers = T.broadcast(T.int32(0), LANES)
            if count > 0:
                integers = rounded(load_part(x, source + at, count, dtype) * splat(factor))
                total[0] = total[0] + integers
            store_integers(q, target + at, integers)

        with T.serial(0, valid // LANES) as i:
            store(T.bind(start + i * LANES), LANES)
        for at in range(valid // LANES * LANES, length, LANES):
            store(T.bind(start + at), max(0, min(valid - at, LANES)))
        whole = T.call_pure_extern("int32", "xllm_sum_i32", total[0])
        T.buffer_store(sum, whole, [row * groups + group])

    with T.serial(0, k // length) as group:
        quantize(group, length)
    if k % length:
        quantize(T.int32(k // length), k % length)


def rounded(value: Expr) -> Expr:
    """16 values as integers, to nearest, ties to even; NaN as 0."""
    return T.bind(T.call_pure_extern("int32x16", "xllm_round_i32", value))


def store_integers(buffer: Expr, index: Expr, value: Expr) -> None:
    """Emits the store of 16 integers as 8-bit ones."""
    T.evaluate(T.call_extern("int32", "xllm_store_i8", address(buffer, index), value))


def largest_size(x: Expr, source: Expr, count: int, dtype: str) -> Expr:
    """The largest |x| of `count` elements from `source` on; NaN if not all are finite."""
    top = Vectors(1, "int32")
    top[0] = T.broadcast(T.int32(0), LANES)

    def see(at: Expr, valid: int) -> None:
        bits = T.reinterpret("int32x16", load_part(x, source + at, valid, dtype))
        top[0] = T.max(top[0], T.bind(T.bitwise_and(bits, T.broadcast(T.int32(0x7FFFFFFF), LANES))))

    each_vector(count, see)
    return T.bind(T.call_pure_extern("float32", "xllm_largest_size", top[0]))


def inverse_scale(largest: Expr) -> Expr:
    """127 / largest, by which values are multiplied before they are rounded; 0 for a row of zeros or with NaN."""
    return T.bind(T.Select(largest > T.float32(0), T.float32(float(LARGEST)) / largest, T.float32(0)))
