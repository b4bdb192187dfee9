"""Every numbered invariant has a module that breaks it; the error names the number and blames the right op."""

from collections.abc import Callable

import pytest

from xllm_compiler.dims import as_dim, sym
from xllm_compiler.ir.core import Builder, Func, Module, Op, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.loc import Loc
from xllm_compiler.ir.ops import AllReduceStart, KvAttend, KvWrite, Linear, Mul, Neg, Param, Reshape, Wait
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.types import Future, Tensor
from xllm_compiler.ir.verify import verify

KV = "kv<f32, heads=1, k=4, v=4, page=16>[P]"
GOOD = f"""xir 1 stage=graph
dim N in [1, 64]
dim B in [1, 8]
dim P in [1, 64]
group @tp size=2
func @step(%x: f32[N, 4], %pos: i32[N], %seq: i32[N], %start: i32[B + 1], %table: i32[B, 4], %kv0: {KV}, %kv9: {KV})
    -> (f32[N, 4], {KV} alias %kv0) {{
  %w = param(name="w") : f32[4, 4]
  %k = t.reshape(%x, shape=[N, 1, 4]) : f32[N, 1, 4]
  %kv1 = kv.write(%kv0, %k, %k, %pos, %seq, %table) : {KV}
  %a = kv.attend(%kv1, %k, %pos, %seq, %start, %table, scale=0.5) : f32[N, 1, 4]
  %kv2 = kv.write(%kv1, %k, %a, %pos, %seq, %table) : {KV}
  %o = nn.linear(%x, %w, partial=@tp) : f32[N, 4] partial(@tp)
  %o2 = t.add(%o, %o) : f32[N, 4] partial(@tp)
  %f = comm.all_reduce_start(%o2, group=@tp) : !future<f32[N, 4]>
  %s = comm.wait(%f) : f32[N, 4]
  %n = t.neg(%s) : f32[N, 4]
  return %n, %kv2
}}
"""


def build() -> tuple[Func, dict[str, Value]]:
    module = parse_module(GOOD, "good.xir")
    func = module.funcs["step"]
    values = {v.name: v for v in func.args}
    values |= {r.name: r for op in func.ops for r in op.results}
    return func, values


def test_the_good_module_verifies() -> None:
    verify(build()[0].module)


def op_of(v: Value) -> Op:
    assert v.op is not None
    return v.op


Breaker = Callable[[Func, dict[str, Value]], Op | None]


def use_before_def(f: Func, v: dict[str, Value]) -> Op:
    op_of(v["s"]).move_before(op_of(v["w"]))
    return op_of(v["s"])


def use_of_erased(f: Func, v: dict[str, Value]) -> Op:
    f.ops.unlink(op_of(v["s"]))
    return op_of(v["n"])


def return_of_erased(f: Func, v: dict[str, Value]) -> None:
    f.ops.unlink(op_of(v["n"]))


def foreign_operand(f: Func, v: dict[str, Value]) -> Op:
    other = f.module.add_func("other")
    y = other.add_arg("y", Tensor("f32", [sym("N"), 4]))
    op_of(v["n"]).set_operand(0, y)
    return op_of(v["n"])


def stale_use(f: Func, v: dict[str, Value]) -> Op:
    v["s"]._uses[(op_of(v["o"]), 0)] = None
    return op_of(v["s"])


def lost_use(f: Func, v: dict[str, Value]) -> None:
    v["x"]._uses.clear()


def wrong_owner(f: Func, v: dict[str, Value]) -> Op:
    neg = op_of(v["n"])
    v["n"].owner = op_of(v["s"])
    return neg


def stale_type(f: Func, v: dict[str, Value]) -> Op:
    v["n"].type = Tensor("f32", [4])
    return op_of(v["n"])


def bad_attr(f: Func, v: dict[str, Value]) -> Op:
    op_of(v["a"]).attrs["window"] = -1
    return op_of(v["a"])


def uncoerced_attr(f: Func, v: dict[str, Value]) -> Op:
    op_of(v["a"]).attrs["scale"] = 1
    return op_of(v["a"])


def missing_attr(f: Func, v: dict[str, Value]) -> Op:
    del op_of(v["a"]).attrs["scale"]
    return op_of(v["a"])


def unknown_attr(f: Func, v: dict[str, Value]) -> Op:
    op_of(v["n"]).attrs["colour"] = "red"
    return op_of(v["n"])


def undeclared_symbol(f: Func, v: dict[str, Value]) -> Op:
    return Builder.at_end(f).create(Param, name="q", type=Tensor("f32", [sym("Q")]))


def undeclared_in_argument(f: Func, v: dict[str, Value]) -> None:
    f.add_arg("late", Tensor("f32", [sym("Q")]))


def written_twice(f: Func, v: dict[str, Value]) -> Op:
    pos, seq, table = v["pos"], v["seq"], v["table"]
    return Builder.at_end(f).create(KvWrite, v["kv1"], v["k"], v["k"], pos, seq, table)


def written_and_returned(f: Func, v: dict[str, Value]) -> Op:
    f.set_returns([v["n"], v["kv1"]], {1: v["kv0"]})
    return op_of(v["kv2"])


def returned_twice(f: Func, v: dict[str, Value]) -> None:
    f.set_returns([v["kv2"], v["kv2"]], {0: v["kv0"]})


def read_after_write(f: Func, v: dict[str, Value]) -> Op:
    tokens = (v["pos"], v["seq"], v["start"], v["table"])
    return Builder.at_end(f).create(KvAttend, v["kv1"], v["k"], *tokens, scale=1.0)


def no_alias(f: Func, v: dict[str, Value]) -> None:
    f.set_returns([v["n"], v["kv2"]], {})


def wrong_alias(f: Func, v: dict[str, Value]) -> None:
    f.set_returns([v["n"], v["kv2"]], {1: v["kv9"]})


def double_alias(f: Func, v: dict[str, Value]) -> None:
    f.set_returns([v["kv2"], v["kv9"]], {0: v["kv0"], 1: v["kv0"]})


def tensor_alias(f: Func, v: dict[str, Value]) -> None:
    f.set_returns([v["n"], v["kv2"]], {0: v["x"], 1: v["kv0"]})


def never_waited(f: Func, v: dict[str, Value]) -> Op:
    return Builder.at_end(f).create(AllReduceStart, v["s"], group="tp")


def waited_twice(f: Func, v: dict[str, Value]) -> Op:
    Builder.at_end(f).create(Wait, v["f"])
    return op_of(v["f"])


def future_argument(f: Func, v: dict[str, Value]) -> None:
    f.add_arg("g", Future(Tensor("f32", [1])))


def lost_group(f: Func, v: dict[str, Value]) -> Op:
    del f.module.groups["tp"]
    return op_of(v["o"])


def no_mesh(f: Func, v: dict[str, Value]) -> None:
    f.module.groups["three"] = RankGroup(3)


def partial_returned(f: Func, v: dict[str, Value]) -> None:
    f.set_returns([v["o"], v["kv2"]], {1: v["kv0"]})


def partial_to_nonlinear(f: Func, v: dict[str, Value]) -> Op:
    neg = op_of(v["n"])
    # By hand: no creation or set_operand lets it happen.
    neg._operands[0] = v["o2"]
    del v["s"]._uses[(neg, 0)]
    v["o2"]._uses[(neg, 0)] = None
    return neg


def same_argument_names(f: Func, v: dict[str, Value]) -> None:
    f.args[1].name = "x"


def unnamed_argument(f: Func, v: dict[str, Value]) -> None:
    f.args[1].name = ""


def offset_in_graph(f: Func, v: dict[str, Value]) -> Op:
    op_of(v["n"]).set_attr("at", [0])
    return op_of(v["n"])


def arena_in_graph(f: Func, v: dict[str, Value]) -> None:
    f.arena = as_dim(64)


@pytest.mark.parametrize(
    ("number", "breaker"),
    [
        ("V1", use_before_def),
        ("V1", use_of_erased),
        ("V1", return_of_erased),
        ("V1", foreign_operand),
        ("V2", stale_use),
        ("V2", lost_use),
        ("V2", wrong_owner),
        ("V3", stale_type),
        ("V3", bad_attr),
        ("V3", uncoerced_attr),
        ("V3", missing_attr),
        ("V3", unknown_attr),
        ("V4", undeclared_symbol),
        ("V4", undeclared_in_argument),
        ("V5", written_twice),
        ("V5", written_and_returned),
        ("V5", returned_twice),
        ("V6", read_after_write),
        ("V7", no_alias),
        ("V7", wrong_alias),
        ("V7", double_alias),
        ("V7", tensor_alias),
        ("V8", never_waited),
        ("V8", waited_twice),
        ("V8", future_argument),
        ("V9", lost_group),
        ("V9", no_mesh),
        ("V10", partial_returned),
        ("V10", partial_to_nonlinear),
        ("V11", same_argument_names),
        ("V11", unnamed_argument),
        ("V12", offset_in_graph),
        ("V12", arena_in_graph),
    ],
)
def test_invariant(number: str, breaker: Breaker) -> None:
    func, values = build()
    blamed = breaker(func, values)
    with pytest.raises(IrError, match=rf"^error\[ir\]: {number}: ") as e:
        verify(func.module)
    if blamed is not None:
        assert e.value.op is blamed, e.value


def test_an_error_shows_a_window_and_the_origin() -> None:
    func, v = build()
    neg = op_of(v["n"])
    for _ in range(20):
        Builder.at_end(func).create(Mul, v["s"], v["s"])
    neg.loc = Loc("modeling_x.py", 268, "model.layers.3.mlp", ("fuse-a/one", "fuse-b/two"))
    v["n"].type = Tensor("f32", [1])
    with pytest.raises(IrError) as e:
        verify(func.module)
    lines = e.value.where.splitlines()
    shown = [line for line in lines if " = " in line]
    assert len(shown) == 11 and sum(line.startswith("    > %n = t.neg(%s)") for line in shown) == 1
    assert "  traced from model.layers.3.mlp (modeling_x.py:268)" in lines
    assert "  touched by fuse-a/one, fuse-b/two" in lines


# Stage buf.


def planned(*offsets: object, arena: object = 96 * sym("N")) -> Module:
    """x -> a -> b -> (a + b) -> returned, with a view of a in between."""
    module = Module("buf")
    n = module.scope.declare("N", 1, 64)
    func = module.add_func("f")
    x = func.add_arg("x", Tensor("f32", [n, 4]))
    b = Builder.at_end(func)
    w = b.create(Neg, b.create(Param, name="w", type=Tensor("f32", [4, 4])).result)  # a weight expression: no offset
    ats = iter(offsets)

    def at() -> dict[str, object]:
        o = next(ats)
        return {} if o is None else {"at": [o]}

    first = b.create(Linear, x, w.result, hint="first", **at())
    view = b.create(Reshape, first.result, shape=(4 * n,), hint="view", **at())
    second = b.create(Neg, first.result, hint="second", **at())
    third = b.create(Neg, second.result, hint="third", **at())
    back = b.create(Reshape, view.result, shape=(n, 4), hint="back", **at())
    func.set_returns([b.create(Mul, third.result, back.result, hint="out").result])
    func.arena = as_dim(arena)  # type: ignore[arg-type]
    return module


N16 = 16 * sym("N")


@pytest.mark.parametrize(
    "offsets",
    [
        (0, None, N16, 2 * N16, None),  # views without offsets are their operand's bytes
        (0, 0, N16, 2 * N16, 0),  # the same said aloud
        (2 * N16, None, 0, N16, None),
        (0, 3 * N16, N16, 2 * N16, 3 * N16),  # a view that is a copy: then `first` dies after `second`
        (0, 3 * N16, N16, 0, 3 * N16),  # so that `third` may take its place
    ],
)
def test_sound_plans(offsets: tuple[object, ...]) -> None:
    verify(planned(*offsets))


@pytest.mark.parametrize(
    ("number", "op_name", "offsets", "arena"),
    [
        ("V13", "first", (None, None, N16, 2 * N16, None), 96 * sym("N")),  # no offset
        ("V14", "first", (0, None, N16, 2 * N16, None), None),  # no arena
        ("V14", "first", (-16, None, N16, 2 * N16, None), 96 * sym("N")),  # before its start
        ("V14", "third", (0, None, N16, 2 * N16, None), 47 * sym("N")),  # past its end
        ("V14", "third", (0, None, N16, 2 * N16, None), 48 * sym("N") - 1),
        ("V15", "second", (0, None, N16 - 1, 2 * N16, None), 96 * sym("N")),  # one byte
        ("V15", "third", (0, None, N16, N16, None), 96 * sym("N")),  # in place over what it reads
        ("V15", "third", (0, None, N16, 0, None), 96 * sym("N")),  # over a buffer that a later view still reads
        ("V15", "back", (0, 3 * N16, N16, 2 * N16, 2 * N16), 96 * sym("N")),  # a copy over a live buffer
    ],
)
def test_unsound_plans(number: str, op_name: str, offsets: tuple[object, ...], arena: object) -> None:
    module = planned(*offsets, arena=0 if arena is None else arena)
    func = module.funcs["f"]
    if arena is None:
        func.arena = None
    with pytest.raises(IrError, match=rf"^error\[ir\]: {number}: ") as e:
        verify(module)
    assert e.value.op is not None and e.value.op.results[0].name == op_name


def test_disjointness_depends_on_the_declared_range() -> None:
    module = planned(0, None, 1024, 1024 + N16, None, arena=1024 + 32 * sym("N"))
    verify(module)  # 16*N <= 1024 holds for N in [1, 64]
    wider = print_module(module).replace("dim N in [1, 64]", "dim N in [1, 65]")
    with pytest.raises(IrError, match=r"^error\[ir\]: V15: %second") as e:
        verify(parse_module(wider))
    assert e.value.op is not None


def test_returned_tensors_take_no_offset() -> None:
    module = planned(0, None, N16, 2 * N16, None)
    last = module.funcs["f"].ops.last
    assert last is not None
    last.set_attr("at", [0])
    with pytest.raises(IrError, match=r"^error\[ir\]: V13: ") as e:
        verify(module)
    assert e.value.op is last
