"""Types of IR values: tensors, states, futures and events. Owns type equality and text; must not know any op."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from xllm_compiler.dims import Dim, DimLike, as_dim
from xllm_compiler.ir.diag import IrError

DTYPE_BYTES: Final[dict[str, int]] = {
    "f64": 8,
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "i64": 8,
    "i32": 4,
    "i8": 1,
    "u8": 1,
    "bool": 1,
}
FLOATS: Final = frozenset({"f64", "f32", "bf16", "f16"})
INTS: Final = frozenset({"i64", "i32", "i8", "u8"})


def check_dtype(dtype: str) -> str:
    """`dtype` itself, or IrError when it is not one of ours."""
    if dtype not in DTYPE_BYTES:
        raise IrError(f"unknown dtype {dtype!r}", help="one of " + ", ".join(DTYPE_BYTES))
    return dtype


MAX_RANK: Final = 32
MAX_SIZE: Final = 2**63 - 1


def check_size(size: DimLike) -> Dim:
    """`size` as a Dim, or IrError where it is a number that no axis can have."""
    dim = as_dim(size)
    if dim.is_const and not 0 <= dim.value <= MAX_SIZE:
        raise IrError(f"an axis of {dim} elements", help=f"sizes lie between 0 and {MAX_SIZE}")
    return dim


@dataclass(frozen=True, slots=True, init=False)
class Tensor:
    """A dense array. `partial` names the group over which it still has to be summed: in f32 or f64, so that the sum is
    rounded once."""

    dtype: str
    shape: tuple[Dim, ...]
    partial: str | None

    def __init__(self, dtype: str, shape: Sequence[Dim | int], partial: str | None = None) -> None:
        object.__setattr__(self, "dtype", check_dtype(dtype))
        if len(shape) > MAX_RANK:
            raise IrError(f"a tensor of {len(shape)} axes", help=f"at most {MAX_RANK}")
        object.__setattr__(self, "shape", tuple(check_size(d) for d in shape))
        if partial is not None and dtype not in ("f32", "f64"):
            raise IrError(f"a partial sum over @{partial} in {dtype}", help="f32 or f64; round it once it is whole")
        object.__setattr__(self, "partial", partial)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def elements(self) -> Dim:
        """Number of elements as a Dim."""
        n = as_dim(1)
        for d in self.shape:
            n = n * d
        return n

    @property
    def nbytes(self) -> Dim:
        """Size of the dense row-major array in bytes, without padding."""
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def is_int(self) -> bool:
        return self.dtype in INTS

    def with_(self, *, dtype: str | None = None, shape: Sequence[Dim | int] | None = None) -> Tensor:
        """The same type with another dtype or shape; `partial` is kept."""
        return Tensor(dtype or self.dtype, self.shape if shape is None else shape, self.partial)

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(str(d) for d in self.shape)}]"
        return text if self.partial is None else f"{text} partial(@{self.partial})"


class State(ABC):
    """What outlives a call: `blocks` blocks of memory that functions read and write in place.

    A value of such a type is a version of the memory. An op that writes uses up one version and yields the next, so
    that the versions of an argument are one chain (ir/state.py); the last one is returned and aliases the argument
    (V5 to V7). In the interpreter a version is one array of `array_dtype` and `array_shape`; the rows of a block lie
    one behind the other.
    """

    __slots__ = ()
    dtype: str

    @property
    @abstractmethod
    def blocks(self) -> Dim:
        """How many blocks there are."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block."""

    @property
    @abstractmethod
    def block_rows(self) -> int:
        """Rows of the interpreter's array that are one block."""

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row of the interpreter's array."""

    @property
    @abstractmethod
    def array_dtype(self) -> str:
        """The dtype of the interpreter's array."""

    @property
    @abstractmethod
    def numbers(self) -> tuple[int, ...]:
        """The constant sizes that a block consists of."""

    @abstractmethod
    def resized(self, number: Callable[[int], int], dim: Callable[[Dim], Dim]) -> State:
        """The same type with `number` of each of `numbers` and `dim` of `blocks`."""

    @property
    def array_shape(self) -> tuple[Dim, ...]:
        """The shape of the interpreter's array: all rows of all blocks."""
        return (self.blocks * self.block_rows, *(as_dim(n) for n in self.row_shape))


@dataclass(frozen=True, slots=True, init=False)
class Kv(State):
    """The paged key/value cache of one layer: `pages` pages of `page` tokens, `heads` KV heads.

    dtype "i8": each head of a key or value is stored as 8-bit integers times an f32 scale. What the cache then holds
    are the numbers that these stand for; a write rounds floats of any dtype to them.
    """

    dtype: str
    heads: int
    k_dim: int
    v_dim: int
    page: int
    pages: Dim

    def __init__(self, dtype: str, heads: int, k_dim: int, v_dim: int, page: int, pages: Dim | int) -> None:
        object.__setattr__(self, "dtype", check_dtype(dtype))
        for name, size in (("heads", heads), ("k", k_dim), ("v", v_dim), ("page", page)):
            if not 1 <= size <= MAX_SIZE:
                raise IrError(f"a KV cache with {name}={size}", help=f"sizes lie between 1 and {MAX_SIZE}")
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "k_dim", k_dim)
        object.__setattr__(self, "v_dim", v_dim)
        object.__setattr__(self, "page", page)
        object.__setattr__(self, "pages", check_size(pages))

    @property
    def blocks(self) -> Dim:
        return self.pages

    @property
    def block_bytes(self) -> int:
        return self.page_bytes

    @property
    def block_rows(self) -> int:
        return self.page

    @property
    def row_shape(self) -> tuple[int, ...]:
        """A row is a token: the keys of all heads beside the values."""
        return (self.heads, self.k_dim + self.v_dim)

    @property
    def array_dtype(self) -> str:
        return "f32" if self.quantized else self.dtype  # the numbers that the integers stand for

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.heads, self.k_dim, self.v_dim)  # a page stays as long as it is

    def resized(self, number: Callable[[int], int], dim: Callable[[Dim], Dim]) -> Kv:
        heads, k_dim, v_dim = map(number, self.numbers)
        return self.with_(heads=heads, k_dim=k_dim, v_dim=v_dim, pages=dim(self.pages))

    def with_(
        self,
        *,
        dtype: str | None = None,
        heads: int | None = None,
        k_dim: int | None = None,
        v_dim: int | None = None,
        pages: Dim | None = None,
    ) -> Kv:
        """The same type but for what is given."""
        return Kv(
            self.dtype if dtype is None else dtype,
            self.heads if heads is None else heads,
            self.k_dim if k_dim is None else k_dim,
            self.v_dim if v_dim is None else v_dim,
            self.page,
            self.pages if pages is None else pages,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values of all heads."""
        return self.page * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, keys and values of all heads. Integers come with two scales and the sum of the key's, and
        keys in whole quads."""
        if self.quantized:
            return self.heads * (-(-self.k_dim // 4) * 4 + self.v_dim + 3 * DTYPE_BYTES["f32"])
        return self.heads * (self.k_dim + self.v_dim) * DTYPE_BYTES[self.dtype]

    @property
    def quantized(self) -> bool:
        return self.dtype == "i8"

    def __str__(self) -> str:
        return f"kv<{self.dtype}, heads={self.heads}, k={self.k_dim}, v={self.v_dim}, page={self.page}>[{self.pages}]"


@dataclass(frozen=True, slots=True, init=False)
class Cell(State):
    """`slots` slots, each a tensor of `shape`: what requests carry from step to step, such as a recurrent layer's state
    (f32, [heads, k, v]) or the last token (i32, []). A request's slot is chosen by who calls the function."""

    dtype: str
    shape: tuple[int, ...]
    slots: Dim

    def __init__(self, dtype: str, shape: Sequence[int], slots: Dim | int) -> None:
        object.__setattr__(self, "dtype", check_dtype(dtype))
        if len(shape) >= MAX_RANK:
            raise IrError(f"a cell of {len(shape)} axes", help=f"at most {MAX_RANK - 1}")
        for size in shape:
            if not 1 <= size <= MAX_SIZE:
                raise IrError(f"a cell with an axis of {size} elements", help=f"sizes lie between 1 and {MAX_SIZE}")
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "slots", check_size(slots))

    @property
    def blocks(self) -> Dim:
        return self.slots

    @property
    def block_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def block_rows(self) -> int:
        return 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def array_dtype(self) -> str:
        return self.dtype

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.shape

    def resized(self, number: Callable[[int], int], dim: Callable[[Dim], Dim]) -> Cell:
        return Cell(self.dtype, [number(n) for n in self.shape], dim(self.slots))

    def __str__(self) -> str:
        return f"cell<{self.dtype}, [{', '.join(map(str, self.shape))}]>[{self.slots}]"


@dataclass(frozen=True, slots=True)
class Future:
    """The promise of a collective; `comm.wait` turns it into `of`."""

    of: Tensor

    def __str__(self) -> str:
        return f"!future<{self.of}>"


@dataclass(frozen=True, slots=True)
class Event:
    """A point of a stream that other streams may wait for (`sched.record`, `sched.wait`); it has no data."""

    def __str__(self) -> str:
        return "!event"


Type = Tensor | State | Future | Event


def type_dims(ty: Type) -> tuple[Dim, ...]:
    """The Dims that stand in `ty`."""
    match ty:
        case Tensor():
            return ty.shape
        case State():
            return (ty.blocks,)
        case Future():
            return ty.of.shape
        case Event():
            return ()


def map_sizes(ty: Type, number: Callable[[int], int], dim: Callable[[Dim], Dim]) -> Type:
    """`ty` with `dim` of every Dim, and `number` of every constant size of a state."""
    match ty:
        case Tensor():
            return ty.with_(shape=[dim(d) for d in ty.shape])
        case State():
            return ty.resized(number, dim)
        case Future():
            inner = map_sizes(ty.of, number, dim)
            assert isinstance(inner, Tensor)
            return replace(ty, of=inner)
        case Event():
            return ty


def substitute_dims(ty: Type, env: dict[str, Dim]) -> Type:
    """`ty` with symbols replaced by Dims."""
    return map_sizes(ty, lambda n: n, lambda d: d.substitute(env))
