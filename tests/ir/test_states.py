"""Types of states: text, sizes, hash; what the verifier asks of every state; changing the type of one."""

from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_compiler.dims import as_dim, sym
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Module, Op, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.opdef import OPS, Operand, op
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.retype import retype_state
from xllm_compiler.ir.rows import ThroughState
from xllm_compiler.ir.state import chain_ops, first_version, latest_version, readers, writers
from xllm_compiler.ir.types import DTYPE_BYTES, Cell, Kv, State, Tensor, Type, map_sizes, substitute_dims, type_dims
from xllm_compiler.ir.verify import verify

HEAD = "xir 1 stage=graph\ndim B in [1, 8]\ndim N in [1, 64]\ndim P in [1, 64]\ndim Q in [1, 64]\nassume Q - B >= 0\n\n"

RECURRENT = (
    HEAD
    + """func @f(%x: f32[B, 4], %slot: i32[B], %c0: cell<f32, [4]>[Q], %other: cell<i32, []>[Q])
    -> (f32[B, 4], cell<f32, [4]>[Q] alias %c0) {
  %old = state.read(%c0, %slot) : f32[B, 4]
  %new = t.add(%old, %x) : f32[B, 4]
  %c1 = state.write(%c0, %new, %slot) : cell<f32, [4]>[Q]
  %y = state.read(%c1, %slot) : f32[B, 4]
  %c2 = state.write(%c1, %y, %slot) : cell<f32, [4]>[Q]
  return %y, %c2
}
"""
)

ATTENTION = (
    HEAD
    + """func @f(%q: f32[N, 2, 4], %k: f32[N, 2, 4], %pos: i32[N], %seq: i32[N], %start: i32[B + 1], %table: i32[B, 4],
    %kv0: kv<f32, heads=2, k=4, v=4, page=4>[P], %kv9: kv<f32, heads=2, k=4, v=4, page=4>[P])
    -> (kv<f32, heads=2, k=4, v=4, page=4>[P] alias %kv0, f32[N, 2, 4]) {
  %kv1 = kv.write(%kv0, %k, %k, %pos, %seq, %table) : kv<f32, heads=2, k=4, v=4, page=4>[P]
  %a = kv.attend(%kv1, %q, %pos, %seq, %start, %table, scale=0.5) : f32[N, 2, 4]
  %b = t.neg(%a) : f32[N, 2, 4]
  %kv2 = kv.write(%kv1, %b, %a, %pos, %seq, %table) : kv<f32, heads=2, k=4, v=4, page=4>[P]
  return %kv2, %b
}
"""
)


def values_of(module: Module) -> dict[str, Value]:
    func = module.func("f")
    return {v.name: v for v in (*func.args, *(r for each in func.ops for r in each.results))}


# --------------------------------------------------------------------------------------------------------------- types


@given(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(1, 40), max_size=4), st.integers(0, 9))
def test_a_cell_is_its_text(dtype: str, shape: list[int], more: int) -> None:
    cell = Cell(dtype, shape, sym("Q") + more)
    module = Module()
    module.scope.declare("Q", 1, 64)
    module.add_func("f").add_arg("c", cell)
    text = print_module(module)
    assert f"%c: cell<{dtype}, [{', '.join(map(str, shape))}]>[Q" in text
    back = parse_module(text)
    assert back.func("f").arg("c").type == cell and print_module(back) == text
    assert structural_hash(back) == structural_hash(module)


def test_what_a_cell_holds_is_in_the_hash() -> None:
    texts = [RECURRENT.replace("cell<i32, []>[Q]", other) for other in ("cell<i32, []>[Q]", "cell<i32, [1]>[Q]")]
    texts += [RECURRENT.replace("cell<i32, []>[Q]", other) for other in ("cell<u8, []>[Q]", "cell<i32, []>[B]")]
    assert len({structural_hash(parse_module(text)) for text in texts}) == 4


def test_sizes_of_states() -> None:
    cell, kv = Cell("bf16", [2, 3, 5], sym("Q")), Kv("bf16", 2, 64, 32, 16, sym("P"))
    assert cell.block_bytes == 60 and Cell("i32", [], 7).block_bytes == 4
    assert cell.array_shape == (sym("Q"), as_dim(2), as_dim(3), as_dim(5))
    assert kv.block_bytes == kv.page_bytes and kv.array_shape == (16 * sym("P"), as_dim(2), as_dim(96))
    assert (kv.array_dtype, kv.with_(dtype="i8").array_dtype, cell.array_dtype) == ("bf16", "f32", "bf16")
    assert type_dims(cell) == (sym("Q"),) and type_dims(kv) == (sym("P"),)
    assert substitute_dims(cell, {"Q": as_dim(4)}) == Cell("bf16", [2, 3, 5], 4)
    assert map_sizes(cell, lambda n: 2 * n, lambda d: d + 1) == Cell("bf16", [4, 6, 10], sym("Q") + 1)
    assert map_sizes(kv, lambda n: n // 2, lambda d: d) == Kv("bf16", 1, 32, 16, 16, sym("P"))
    assert not isinstance(Tensor("f32", [1]), State)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cell<f8, [4]>[Q]", "unknown dtype 'f8'"),
        ("cell<f32, [0]>[Q]", "a cell with an axis of 0 elements"),
        ("cell<f32, [B]>[Q]", "integer"),
        ("cell<f32, 4>[Q]", "expected '\\['"),
        ("cell<f32, [4]>[-1]", "an axis of -1 elements"),
        (f"cell<f32, [{', '.join(['1'] * 32)}]>[Q]", "a cell of 32 axes"),
    ],
)
def test_what_is_no_cell(text: str, message: str) -> None:
    with pytest.raises(IrError, match=message):
        parse_module(RECURRENT.replace("cell<i32, []>[Q]", text))


# ------------------------------------------------------------------------------------------------------------ versions


def test_walking_along_versions() -> None:
    v = values_of(parse_module(RECURRENT))
    assert first_version(v["c2"]) is v["c0"] and latest_version(v["c0"]) is v["c2"]
    assert [each.result.name for each in chain_ops(v["c0"])] == ["old", "c1", "y", "c2"]
    assert [each.result.name for each in readers(v["c1"])] == ["y"]
    assert [each.result.name for each in writers(v["c1"])] == ["c2"] and not writers(v["c2"])
    assert not chain_ops(v["other"]) and latest_version(v["other"]) is v["other"]


@pytest.fixture
def declare() -> Iterator[Callable[..., type[Op]]]:
    """Declares an op whose only result has the type `yields`, and forgets it after the test."""

    def make(yields: Sequence[Type], consumes: str) -> type[Op]:
        class Odd(Op):
            """y = x."""

            rows = ThroughState()
            noise = Noise.MOVES
            work = Work.NONE
            x: Operand

            def infer(self) -> tuple[Type, ...]:
                return tuple(yields)

            def interp(self, ctx: object, x: object) -> object:  # type: ignore[override]
                return x

        return op("test.odd", consumes=consumes)(Odd)

    yield make
    OPS.pop("test.odd", None)


@pytest.mark.parametrize(
    ("yields", "consumes", "used"),
    [
        ([Cell("f32", [4], sym("Q"))], "", "nothing"),  # a state out of nowhere
        ([Cell("f32", [2, 2], sym("Q"))], "x", "%c0: cell<f32, \\[4\\]>\\[Q\\]"),  # of another type
        ([Cell("f32", [4], sym("Q"))] * 2, "x", "%c0"),  # two chains from one version
    ],
)
def test_a_version_follows_one_of_its_type(
    yields: list[Type], consumes: str, used: str, declare: Callable[..., type[Op]]
) -> None:
    module = parse_module(HEAD + "func @f(%c0: cell<f32, [4]>[Q]) -> () {\n  return\n}\n")
    func = module.func("f")
    made = Builder.at_end(func).create(declare(yields, consumes), func.arg("c0"), hint="odd")
    with pytest.raises(IrError, match=f"V5: test.odd yields state version %odd and uses up {used}"):
        verify(module)
    assert made.attached


# -------------------------------------------------------------------------------------------------------------- retype


def in_bf16(each: Op, b: Builder, operands: Sequence[Value]) -> Op:
    """A read or a write of a cell of f32, over one of bf16."""
    cell, *rest = operands
    if isinstance(each, ops.StateRead):
        return b.create(ops.Cast, b.create(ops.StateRead, cell, *rest).result, dtype="f32", hint=each.result.name)
    assert isinstance(each, ops.StateWrite)
    return b.create(ops.StateWrite, cell, b.create(ops.Cast, rest[0], dtype="bf16").result, rest[1], hint="c")


def test_retype_a_cell() -> None:
    module = parse_module(RECURRENT)
    func = module.func("f")
    fresh = retype_state(func, func.arg("c0"), Cell("bf16", [4], sym("Q")), in_bf16)
    verify(module)
    assert func.arg("c0") is fresh and [a.name for a in func.args] == ["x", "slot", "c0", "other"]
    assert fresh.index == 2 and func.aliases == {1: fresh}
    assert [each.name for each in func.ops] == [
        *("state.read", "t.cast", "t.add", "t.cast", "state.write"),
        *("state.read", "t.cast", "t.cast", "state.write"),
    ]
    assert {v.type for v in values_of(module).values() if isinstance(v.type, State)} == {
        Cell("bf16", [4], sym("Q")),
        Cell("i32", [], sym("Q")),
    }


def test_retype_a_cache() -> None:
    module = parse_module(ATTENTION)
    func = module.func("f")
    arg = func.arg("kv0")
    retype_state(func, arg, arg.kv.with_(dtype="i8"))
    verify(module)
    quantized = {v.name for v in values_of(module).values() if isinstance(v.type, Kv) and v.type.quantized}
    assert quantized == {"kv0", "kv1", "kv2"}, "a chain changes as a whole, and alone"
    assert [each.name for each in func.ops] == ["kv.write", "kv.attend", "t.neg", "kv.write"]
    assert func.returns[0].kv.quantized and func.aliases == {0: func.arg("kv0")}


def heads_without_keys(each: Op, b: Builder, operands: Sequence[Value]) -> Op:
    """Leaves something behind before it fails."""
    b.create(ops.Neg, operands[1])
    return b.create(type(each), *operands, **each.attrs)


@pytest.mark.parametrize("remake", [None, heads_without_keys])
def test_a_retype_that_does_not_fit_changes_nothing(
    remake: Callable[[Op, Builder, Sequence[Value]], Op] | None,
) -> None:
    module = parse_module(ATTENTION)
    func = module.func("f")
    before = print_module(module)
    with pytest.raises(IrError, match=r"kv\.write: k"):
        retype_state(func, func.arg("kv0"), func.arg("kv0").kv.with_(heads=1), remake)
    assert print_module(module) == before
    verify(module)


def test_a_retype_that_changes_what_is_read_is_refused() -> None:
    module = parse_module(
        HEAD + "func @f(%slot: i32[B], %c: cell<f32, [4]>[Q]) -> (f32[B, 4]) {\n"
        "  %y = state.read(%c, %slot) : f32[B, 4]\n  return %y\n}\n"
    )
    func, before = module.func("f"), print_module(module)
    message = r"state.read yields bf16\[B, 4\] in place of %y: f32\[B, 4\]"
    with pytest.raises(IrError, match=message):
        retype_state(func, func.arg("c"), Cell("bf16", [4], sym("Q")))
    assert print_module(module) == before
    with pytest.raises(IrError, match=r"%slot: i32\[B\] is no state argument of @f"):
        retype_state(func, func.arg("slot"), Cell("bf16", [4], sym("Q")))
