"""What kernels are written with: 16-lane vectors, loads and stores of bf16 and f32, shares of work.

It wraps TVM's builder, so that a kernel reads as what it computes. All functions emit at the builder's current place,
or make expressions for it. A vector is a 16-lane f32 expression.

A product that is added to something is always written as `fma`. LLVM might fuse a separate product and sum at one tile
shape and not at another, and then the bits would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.ir import Call
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.isa.common import intrinsics
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa

Expr = Any  # a TVM expression, buffer or variable: TVM has no types that mypy can see
_LINE = 64  # bytes
_UNBOUNDED = 1 << 30  # a flat buffer's declared length, which nothing checks


def build_function(kernel: Kernel, isa: Isa, body: Callable[..., None]) -> Expr:
    """The private TensorIR function of `kernel`. `body` gets, by name, a flat buffer for each pointer and a variable
    for each scalar."""
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_name(kernel.symbol)
        values: dict[str, Expr] = {}
        for arg in kernel.args:
            values[arg.name] = T.arg(arg.name, T.handle(arg.tir_type) if arg.pointer else T.int32())
        for arg in kernel.args:
            if arg.pointer:
                values[arg.name] = T.decl_buffer((_UNBOUNDED,), arg.tir_type, data=values[arg.name])
        with T.attr("default", "pragma_import_llvm", intrinsics(isa)):
            body(**values)
    return builder.get()


def address(buffer: Expr, index: Expr) -> Expr:
    """The address of one element."""
    return T.address_of(buffer[index])


def splat(value: Expr) -> Expr:
    """A vector whose 16 lanes are all `value`, a number or a scalar expression."""
    return T.broadcast(T.float32(value) if isinstance(value, int | float) else value, LANES)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c, rounded once; scalars or vectors."""
    return tirx.call_llvm_pure_intrin(a.ty.dtype, "llvm.fma", a, b, c)


def load(buffer: Expr, index: Expr, dtype: str) -> Expr:
    """16 elements as f32."""
    return T.call_extern("float32x16", f"xllm_load_{dtype}", address(buffer, index))


def load_first(buffer: Expr, index: Expr, count: Expr, dtype: str) -> Expr:
    """The first `count` of 16 elements, as f32. The others are 0, and their memory is not read."""
    return T.call_extern("float32x16", f"xllm_load_first_{dtype}", address(buffer, index), count)


def store(buffer: Expr, index: Expr, value: Expr, dtype: str) -> None:
    """Writes 16 elements, rounded to `dtype`."""
    T.evaluate(T.call_extern("int32", f"xllm_store_{dtype}", address(buffer, index), value))


def store_first(buffer: Expr, index: Expr, value: Expr, count: Expr, dtype: str) -> None:
    """Writes the first `count` of 16 elements."""
    T.evaluate(T.call_extern("int32", f"xllm_store_first_{dtype}", address(buffer, index), value, count))


def load_part(buffer: Expr, index: Expr, count: int, dtype: str) -> Expr:
    """`load` for a count known at compile time, 1 to 16."""
    return load(buffer, index, dtype) if count >= LANES else load_first(buffer, index, T.int32(count), dtype)


def store_part(buffer: Expr, index: Expr, value: Expr, count: int, dtype: str) -> None:
    """`store` for a count known at compile time, 1 to 16."""
    if count >= LANES:
        store(buffer, index, value, dtype)
    elif count == 1:
        # LLVM 22 makes a masked store of one truncated lane (AVX512 without bf16) a store of the lane before it is
        # truncated: it writes four bytes where two are meant.
        T.evaluate(T.call_extern("int32", f"xllm_store_one_{dtype}", address(buffer, index), value))
    else:
        store_first(buffer, index, value, T.int32(count), dtype)


def halves(words: Expr) -> tuple[Expr, Expr]:
    """16 words of 32 bits hold 32 bf16 elements: the even and the odd ones, as f32."""
    even = T.shift_left(words, T.broadcast(T.int32(16), LANES))
    odd = T.bitwise_and(words, T.broadcast(T.int32(-65536), LANES))
    return T.reinterpret("float32x16", even), T.reinterpret("float32x16", odd)


def horizontal_sum(value: Expr) -> Expr:
    """The sum of 16 lanes, in a fixed order."""
    return T.call_pure_extern("float32", "xllm_sum", value)


def horizontal_max(value: Expr) -> Expr:
    """The largest of 16 lanes. If one lane is NaN, the result is any lane or NaN."""
    return T.call_pure_extern("float32", "xllm_max", value)


def keep_between(value: Expr, first: Expr, last: Expr, other: float) -> Expr:
    """Lanes first .. last-1 of `value`, and `other` in the rest. `first` and `last` may be outside 0 .. 16.

    An intrinsic, because TVM's simplifier takes seconds over a comparison of a ramp with a broadcast.
    """
    return T.call_pure_extern("float32x16", "xllm_keep_between", value, first, last, T.float32(other))


def address_of(buffer: Expr) -> Expr:
    """The address at which a buffer begins, as an int64."""
    return T.reinterpret("int64", T.address_of(buffer[0]))


def stack_array(count: int, dtype: str) -> Expr:
    """An array on the stack that begins at a cache line. LLVM aligns a stack slot to 16 bytes only, and a vector that
    crosses a line takes twice as long."""
    size = {"uint8": 1, "int8": 1, "uint16": 2, "float32": 4, "int32": 4, "int64": 8}[dtype]
    slot = T.alloc_buffer((count * size + _LINE,), "uint8", scope="local")
    begin = T.bind(T.bitwise_and(address_of(slot) + (_LINE - 1), T.int64(-_LINE)))
    data = T.bind(Call(T.reinterpret("handle", begin).op, [begin], ret_ty=T.handle(dtype).ty))
    return T.decl_buffer((count,), dtype, data=data)


class Vectors:
    """Mutable vectors that live in registers."""

    def __init__(self, count: int, dtype: str = "float32") -> None:
        # One stack slot each. LLVM would make one very long vector of a common slot, and split it at every use.
        self._slots = [T.alloc_buffer((LANES,), dtype, scope="local") for _ in range(count)]

    def __getitem__(self, index: int) -> Expr:
        return self._slots[index][T.ramp(0, 1, LANES)]

    def __setitem__(self, index: int, value: Expr) -> None:
        T.buffer_store(self._slots[index], value, [T.ramp(0, 1, LANES)])


class Scalars:
    """Mutable scalars that live in registers."""

    def __init__(self, count: int, dtype: str = "float32") -> None:
        self._slots = [T.alloc_buffer((1,), dtype, scope="local") for _ in range(count)]

    def __getitem__(self, index: int) -> Expr:
        return self._slots[index][0]

    def __setitem__(self, index: int, value: Expr) -> None:
        T.buffer_store(self._slots[index], value, [0])


def hold(value: Expr) -> Expr:
    """A variable with the value of a scalar or a vector. It goes through a stack slot, which LLVM removes.

    Without the slot TVM's analysers would follow the variable to its definition, in time exponential in the length of
    a chain of them. They do not follow memory."""
    dtype, _, lanes = str(value.ty).partition("x")
    slot = Vectors(1, dtype) if lanes else Scalars(1, dtype)
    slot[0] = value
    return T.bind(slot[0])


@contextmanager
def all_registers() -> Iterator[None]:
    """No value stays in a vector register across the beginning or the end of this block.

    For a register tile in a large kernel. Without it LLVM keeps constants and later values in registers during the
    tile's loop. Then one register is missing for the sums, and every step moves all of them."""
    T.evaluate(T.call_extern("int32", "xllm_forget_vectors"))
    yield
    T.evaluate(T.call_extern("int32", "xllm_forget_vectors"))


def share(total: Expr, member: Expr, team: Expr) -> tuple[Expr, Expr]:
    """[first, last) of `total` units for one member. Shares are contiguous and differ by one unit at most."""
    wide = T.Cast("int64", total)
    first = T.Cast("int32", T.truncdiv(wide * T.Cast("int64", member), T.Cast("int64", team)))
    last = T.Cast("int32", T.truncdiv(wide * T.Cast("int64", member + 1), T.Cast("int64", team)))
    return T.bind(first), T.bind(last)


def tile_width(isa: Isa, dtype: str, rows: int) -> int:
    """How many vectors wide a register tile of `rows` rows can be without spilling: 4, 2 or 1; 0 where none fits.

    Beside the accumulators it holds one step's vectors and one operand. Where no instruction multiplies bf16, pairs are
    unpacked, and it holds both halves.
    """
    each = LANES // isa.register_lanes
    halves = 2 if dtype == "bf16" and not isa.has_bf16_dot else 1
    for width in (4, 2, 1):
        if rows * width * each + width * each * halves + halves <= isa.vector_registers:
            return width
    return 0


def tile_rows(width: Callable[[int], int], most: int) -> int:
    """The number of rows, at most `most`, whose register tile has the most elements. `width(rows)`: its vectors."""
    return max(range(1, most + 1), key=lambda rows: (rows * width(rows), rows))


def tile_sizes(rows: Iterable[int], most: int) -> range:
    """The numbers of rows that tiles may have when each of `rows` is cut into equal parts of at most `most` rows."""
    return range(min(count // -(-count // most) for count in rows), most + 1)


def choose(value: Expr, cases: dict[int, Callable[[], None]]) -> None:
    """Emits `if value == key: case()` for each key."""
    for key, case in cases.items():
        with T.If(value == key), T.Then():
            case()
