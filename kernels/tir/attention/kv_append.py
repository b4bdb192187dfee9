"""Kernels that write the KV cache: `KvAppend` (the fused form) and `KvWrite`.

The unit of work is one head of one token, so that a decode step of one token still gives every member work. A token
writes its own slot only: two tokens of one bf16 pair are two separate 2-byte stores. In a quantized cache each head of
a key or value is round(x / scale), to nearest, ties to even. Its scale is max |x| / 127, or NaN if not all x are
finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.attention.kv_address import TABLE_SIZES, KvLayout, Pages
from xllm_compiler.kernels.tir.attention.rope import check_rotary, rotate
from xllm_compiler.kernels.tir.codegen.builder import (
    Vectors,
    address,
    build_function,
    load_part,
    share,
    splat,
    store_part,
)
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, TILE_TOKENS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.rows.norms import each_vector, gain, inverse_root, square_sum
from xllm_compiler.kernels.tir.rows.quantize import inverse_scale, largest_size, rounded, store_integers
from xllm_compiler.weight_formats import LARGEST

Expr = Any
_TABLES = (Arg("pos", "i32", "rows"), Arg("seq", "i32", "rows"), Arg("table", "i32", "requests, width"))


@dataclass(frozen=True)
class KvWrite(Kernel):
    """Writes k[rows, heads, k_dim] and v[rows, heads, v_dim] at (seq, pos)."""

    kv: KvLayout

    @property
    def args(self) -> tuple[Arg, ...]:
        kv = self.kv
        k = Arg("k", kv.dtype, f"rows, {kv.heads}, {kv.k_dim}")
        v = Arg("v", kv.dtype, f"rows, {kv.heads}, {kv.v_dim}")
        return (Arg("kv", "u8", "pages", written=True), k, v, *_TABLES, scalar("rows"), *TABLE_SIZES, *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        layout = self.kv

        def body(**env: Expr) -> None:
            slots = _Slots(layout, env)
            first, last = share(env["rows"] * (2 * layout.heads), env["member"], env["team"])
            with T.serial(first, last) as unit:
                row = T.bind(T.truncdiv(unit, T.int32(2 * layout.heads)))
                head = T.bind(T.truncmod(unit, T.int32(2 * layout.heads)))
                with T.If(head < layout.heads):
                    with T.Then():
                        base = T.bind(T.Cast("int64", row * layout.heads + head) * layout.k_dim)
                        slots.write_key(env["k"], base, row, head)
                    with T.Else():
                        base = T.bind(T.Cast("int64", row * layout.heads + (head - layout.heads)) * layout.v_dim)
                        slots.write_value(env["v"], base, row, head - layout.heads)

        return build_function(self, isa, body)


@dataclass(frozen=True)
class KvAppend(Kernel):
    """Splits qkv[rows, (q_heads + heads) * k_dim + heads * v_dim] into q, k and v. Normalises each head of q (`q_norm`)
    and k (`k_norm`), rotates both by cos and sin (`rotary` > 0), and writes k and v to their slots and q to
    q[rows, q_heads, k_dim].

    Everything between qkv and what is written is f32, rounded once.
    """

    kv: KvLayout
    q_heads: int
    rotary: int = 0
    style: str = "half"
    q_norm: bool = False
    k_norm: bool = False
    eps: float = 1e-6
    offset: float = 0.0

    def __post_init__(self) -> None:
        require(self.q_heads % self.kv.heads == 0, f"{self.q_heads} query heads for {self.kv.heads} KV heads", self)
        if self.rotary:
            check_rotary(self.rotary, self.style, self.kv.k_dim, self)

    @property
    def _row(self) -> int:
        return (self.q_heads + self.kv.heads) * self.kv.k_dim + self.kv.heads * self.kv.v_dim

    @property
    def args(self) -> tuple[Arg, ...]:
        dtype, angles = self.kv.dtype, f"rows, {self.rotary // 2}"
        pointers = [Arg("kv", "u8", "pages", written=True), Arg("qkv", dtype, f"rows, {self._row}"), *_TABLES]
        if self.rotary:
            pointers += [Arg("cos", "f32", angles), Arg("sin", "f32", angles)]
        if self.q_norm:
            pointers.append(Arg("qw", dtype, f"{self.kv.k_dim}"))
        if self.k_norm:
            pointers.append(Arg("kw", dtype, f"{self.kv.k_dim}"))
        pointers.append(Arg("q", dtype, f"rows, {self.q_heads}, {self.kv.k_dim}", written=True))
        return (*pointers, scalar("rows"), *TABLE_SIZES, *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        layout, dim, dtype = self.kv, self.kv.k_dim, self.kv.dtype
        units = self.q_heads + 2 * layout.heads

        def body(**env: Expr) -> None:
            slots = _Slots(layout, env)
            work = T.alloc_buffer((dim + LANES,), "float32", scope="local")
            rounded = T.alloc_buffer((dim + LANES,), slots.tir_type, scope="local")

            def prepare(base: Expr, row: Expr, weight: Expr) -> None:
                """work = the head at `base`, normed and rotated."""
                if weight is not None:
                    factor = T.bind(
                        splat(inverse_root(square_sum(env["qkv"], base, dim, dtype) / T.float32(dim), self.eps))
                    )

                def read(at: Expr, valid: int) -> None:
                    value = load_part(env["qkv"], base + at, valid, dtype)
                    if weight is not None:
                        value = value * factor * gain(weight, at, valid, dtype, self.offset)
                    store_part(work, at, value, valid, "f32")

                each_vector(dim, read)
                if self.rotary:
                    rotate(
                        lambda i: work[i],
                        lambda i, value: T.buffer_store(work, value, [i]),
                        env["cos"], env["sin"], T.bind(row * (self.rotary // 2)), self.rotary, self.style,
                    )  # fmt: skip

            def write_work(target: Expr, base: Expr) -> None:
                each_vector(
                    dim,
                    lambda at, valid: store_part(target, base + at, load_part(work, at, valid, "f32"), valid, dtype),
                )

            first, last = share(env["rows"] * units, env["member"], env["team"])
            with T.serial(first, last) as unit:
                row = T.bind(T.truncdiv(unit, T.int32(units)))
                head = T.bind(T.truncmod(unit, T.int32(units)))
                start = T.bind(T.Cast("int64", row) * self._row)
                with T.If(head < self.q_heads), T.Then():
                    prepare(T.bind(start + head * dim), row, env.get("qw"))
                    write_work(env["q"], T.bind(T.Cast("int64", row * self.q_heads + head) * dim))
                with T.If(T.And(head >= self.q_heads, head < self.q_heads + layout.heads)), T.Then():
                    prepare(T.bind(start + head * dim), row, env.get("kw"))
                    if layout.quantized:  # one rounding, to 8 bits
                        slots.write_key(work, T.int64(0), row, head - self.q_heads, "f32")
                    else:
                        write_work(rounded, T.int64(0))
                        slots.write_key(rounded, T.int64(0), row, head - self.q_heads)
                with T.If(head >= self.q_heads + layout.heads), T.Then():
                    value_head = T.bind(head - (self.q_heads + layout.heads))
                    base = start + (self.q_heads + layout.heads) * dim + value_head * layout.v_dim
                    slots.write_value(env["qkv"], T.bind(base), row, value_head)

        return build_function(self, isa, body)


class _Slots:
    """Writes keys and values to the slots of tokens. `Pages` finds the slots."""

    def __init__(self, layout: KvLayout, env: dict[str, Expr]) -> None:
        self._layout = layout
        self._pages = Pages(layout, env["table"], env["width"], env["stride"])
        self._env = env
        self.tir_type = "float32" if layout.dtype == "f32" else "uint16"

    def _slot(self, row: Expr, head: Expr) -> tuple[Expr, Expr]:
        position = T.bind(self._env["pos"][row])
        page = self._pages.page(self._env["seq"][row], T.truncdiv(position, T.int32(TILE_TOKENS)), head)
        return page, T.bind(T.truncmod(position, T.int32(TILE_TOKENS)))

    def write_key(self, source: Expr, base: Expr, row: Expr, head: Expr, dtype: str = "") -> None:
        """Emits K of `row`'s slot = source[base : base + k_dim]. `dtype`: of the source; "": the model's type."""
        page, slot = self._slot(row, head)
        pages, layout = self._pages, self._layout
        if layout.quantized:
            scale = pages.key_scales(page) + slot * 4
            source, total = self._quantize(source, base, layout.k_dim, dtype, scale)
            base = T.int64(0)
            where = address(self._env["kv"], pages.key_sums(page) + slot * 4)
            T.evaluate(T.call_extern("int32", "xllm_put_pair", where, total))
        if layout.element_bytes == 4:
            with T.serial(0, layout.k_dim) as i:
                self._put(pages.k_element(page, slot, i), source[base + i])
            return
        many = 4 // layout.element_bytes  # of k lie side by side; all are this token's
        with T.serial(0, layout.k_steps) as i:
            four = T.call_extern("int32", "xllm_load_pair", address(source, base + i * many))
            where = address(self._env["kv"], pages.k_element(page, slot, i * many))
            T.evaluate(T.call_extern("int32", "xllm_put_pair", where, four))

    def write_value(self, source: Expr, base: Expr, row: Expr, head: Expr) -> None:
        """Emits V of `row`'s slot = source[base : base + v_dim]."""
        page, slot = self._slot(row, head)
        if self._layout.quantized:
            scale = self._pages.value_scales(page) + slot * 4
            source, _ = self._quantize(source, base, self._layout.v_dim, "", scale)
            base = T.int64(0)
        # In bf16 every other element is another token's, and another member may be writing it at the same time.
        spread = self._layout.v_dim // LANES * LANES if self._layout.element_bytes == 2 else 0
        if spread:
            with T.serial(0, spread // LANES) as i:
                where = address(self._env["kv"], self._pages.v_element(page, slot, i * LANES))
                T.evaluate(T.call_extern("int32", "xllm_spread_i16", where, address(source, base + i * LANES)))
        if spread < self._layout.v_dim:
            with T.serial(spread, self._layout.v_dim) as i:
                self._put(self._pages.v_element(page, slot, i), source[base + i])

    def _quantize(self, source: Expr, base: Expr, count: int, dtype: str, scale: Expr) -> tuple[Expr, Expr]:
        """Emits the rounding of `count` elements and the store of their scale. Returns their integers, followed by
        zeros, and the sum of the integers."""
        dtype = dtype or self._layout.dtype
        largest = largest_size(source, base, count, dtype)
        where = address(self._env["kv"], scale)
        T.evaluate(T.call_extern("int32", "xllm_put_f32", where, largest * T.float32(1 / LARGEST)))
        factor = T.bind(splat(inverse_scale(largest)))
        integers = T.alloc_buffer((count + LANES,), "int8", scope="local")
        total = Vectors(1, "int32")
        total[0] = T.broadcast(T.int32(0), LANES)

        def round_part(at: Expr, valid: int) -> None:
            value = rounded(load_part(source, base + at, valid, dtype) * factor)
            total[0] = total[0] + value
            store_integers(integers, at, value)

        each_vector(count, round_part)
        return integers, T.bind(T.call_pure_extern("int32", "xllm_sum_i32", total[0]))

    def _put(self, offset: Expr, value: Expr) -> None:
        where = address(self._env["kv"], offset)
        if self._layout.quantized:
            T.evaluate(T.call_extern("int32", "xllm_put_i8", where, value))
        elif self._layout.dtype == "f32":
            T.evaluate(T.call_extern("int32", "xllm_put_f32", where, value))
        else:
            T.evaluate(T.call_extern("int32", "xllm_put_i16", where, value))
