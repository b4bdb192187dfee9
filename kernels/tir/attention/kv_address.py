"""Where a token's keys and values lie. Only this file knows: `kv_append` writes and `attend` reads through it.

The pool is an array of blocks. A block holds `tiles` times 16 tokens of all layers, so that one copy moves them. It is
`stride` bytes long, and `kv` points at the layer's own bytes of block 0. There one tile of 16 tokens follows the other.
`table[request, position // (16 * tiles)]` is the number of the block. A tile holds, head by head,

    bf16    K [k_dim/2, 16, 2]   then V [8, v_dim, 2]      pairs of k along the dot product; pairs of tokens for p @ v
    f32     K [k_dim, 16]        then V [16, v_dim]
    8 bits  K [k_dim/4, 16, 4]   then V [4, v_dim, 4]      integers, of either type: quads of k, quads of tokens; then
                                                           f32 scales of 16 keys, i32 sums of their integers, f32
                                                           scales of 16 values. k_dim is filled up to quads with zeros

so that one vector of K is 16 tokens of one k (or pair or quad of k), and one vector of V is 16 columns of one token (or
pair or quad).
`stride` is an argument, so models of any number of layers share a kernel. Contiguous virtual ranges in place of a table
would change `Pages.page` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.kernel import TILE_TOKENS, require, scalar

Expr = Any
TABLE_SIZES = (scalar("width"), scalar("stride"))
"""What is needed beside the table to find a slot: blocks in a row of the table, bytes of a block over all layers."""


@dataclass(frozen=True)
class KvLayout:
    """The KV cache of one layer: `heads` KV heads of k_dim and v_dim elements, both even.

    `quantized`: each head of a key or value is stored as 8-bit integers times a scale, made from values in `dtype`.
    `tiles`: how many tiles of 16 tokens a block has.
    """

    dtype: str
    heads: int
    k_dim: int
    v_dim: int
    quantized: bool = False
    tiles: int = 1

    def __post_init__(self) -> None:
        require(self.dtype in ("bf16", "f32"), f"KV cache in {self.dtype}", self)
        require(self.tiles > 0, f"{self.tiles} tiles in a block", self)
        require(self.heads > 0, f"{self.heads} KV heads", self)
        require(self.k_dim > 0 and self.k_dim % 2 == 0, f"KV head of k_dim {self.k_dim}, which must be even", self)
        require(self.v_dim > 0 and self.v_dim % 2 == 0, f"KV head of v_dim {self.v_dim}, which must be even", self)

    @property
    def element_bytes(self) -> int:
        if self.quantized:
            return 1
        return 2 if self.dtype == "bf16" else 4

    @property
    def k_bytes(self) -> int:
        """Bytes of the K of one head in one page."""
        return TILE_TOKENS * (4 * self.k_steps if self.quantized else self.k_dim * self.element_bytes)

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in one page: its K, its V, and what belongs to a quantized one."""
        return (
            self.k_bytes
            + TILE_TOKENS * self.v_dim * self.element_bytes
            + (3 * TILE_TOKENS * 4 if self.quantized else 0)
        )

    @property
    def tile_bytes(self) -> int:
        """Bytes of 16 tokens."""
        return self.heads * self.head_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of this layer in a block."""
        return self.tiles * self.tile_bytes

    @property
    def k_steps(self) -> int:
        """How many vectors the K of one page has: 16 tokens each, 64 bytes."""
        return -(-self.k_dim // (4 if self.quantized else 4 // self.element_bytes))

    @property
    def k_row_bytes(self) -> int:
        """Bytes of one vector of K: 16 tokens of one k (f32), pair of k (bf16) or quad (8 bits)."""
        return TILE_TOKENS * 4

    @property
    def v_row_bytes(self) -> int:
        """Bytes of one row of V: one token (f32), one pair (bf16) or quad (8 bits) of tokens."""
        return self.v_dim * 4

    @property
    def v_steps(self) -> int:
        """How many rows the V of one page has."""
        return TILE_TOKENS * self.element_bytes // 4


class Pages:
    """Addresses, as int64 byte offsets from a layer's bytes of block 0. `width`: blocks in a row of `table`."""

    def __init__(self, layout: KvLayout, table: Expr, width: Expr, stride: Expr) -> None:
        self.layout = layout
        self._table = table
        self._width = width
        self._stride = stride

    def page(self, request: Expr, number: Expr, head: Expr) -> Expr:
        """K of `head` in the tile of positions 16*number .. 16*number+15 of `request`; reads one table entry."""
        tiles = self.layout.tiles
        block = number if tiles == 1 else T.truncdiv(number, T.int32(tiles))
        at = T.Cast("int64", self._table[request * self._width + block]) * T.Cast("int64", self._stride)
        if tiles > 1:
            at = at + T.Cast("int64", T.truncmod(number, T.int32(tiles))) * self.layout.tile_bytes
        return T.bind(at + T.Cast("int64", head) * self.layout.head_bytes)

    def values(self, page: Expr) -> Expr:
        """V of the head whose K is at `page`."""
        return page + self.layout.k_bytes

    def key_scales(self, page: Expr) -> Expr:
        """The scales of the 16 keys of the head at `page` of a quantized cache."""
        return self.values(page) + TILE_TOKENS * self.layout.v_dim

    def key_sums(self, page: Expr) -> Expr:
        """The sums of the 16 keys' integers."""
        return self.key_scales(page) + TILE_TOKENS * 4

    def value_scales(self, page: Expr) -> Expr:
        """The scales of the 16 values."""
        return self.key_sums(page) + TILE_TOKENS * 4

    def k_element(self, page: Expr, slot: Expr, index: Expr) -> Expr:
        """Element `index` of the key in `slot`."""
        many = 4 // self.layout.element_bytes  # of k lie side by side
        return (
            page
            + T.truncdiv(index, T.int32(many)) * (TILE_TOKENS * 4)
            + slot * 4
            + T.truncmod(index, T.int32(many)) * self.layout.element_bytes
        )

    def v_element(self, page: Expr, slot: Expr, index: Expr) -> Expr:
        """Element `index` of the value in `slot`."""
        many = 4 // self.layout.element_bytes
        row = self.values(page) + (T.truncdiv(slot, T.int32(many)) * self.layout.v_dim + index) * 4
        return row + T.truncmod(slot, T.int32(many)) * self.layout.element_bytes
