"""Use-lists, op order and creation: what mutation must keep right."""

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Func, Module, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.ops import Add, AddRmsNorm, Concat, Linear, Neg, Param, RmsNorm
from xllm_compiler.ir.spec import format_float
from xllm_compiler.ir.types import Kv, Tensor
from xllm_compiler.ir.verify import verify


def chain(count: int) -> tuple[Func, Value]:
    module = Module()
    n = module.scope.declare("N", 1, 64)
    func = module.add_func("f")
    x = func.add_arg("x", Tensor("f32", [n, 8]))
    b = Builder.at_end(func)
    v = x
    for _ in range(count):
        v = b.create(Neg, v).result
    func.set_returns([v])
    return func, x


def test_iteration_survives_erasing_and_inserting() -> None:
    func, x = chain(6)
    seen = []
    for op in func.ops:
        seen.append(op)
        if len(seen) == 2:  # erase the current op, its predecessor and both successors' neighbour
            nxt = op.next
            assert nxt is not None
            nxt.result.replace_all_uses_with(x)
            nxt.erase()
            op.erase()
            Builder.at_end(func).create(Neg, x)
    assert len(seen) == 6  # 6 - the erased next + the appended one
    assert all(op.attached for op in func.ops)
    assert len(func.ops) == len(list(func.ops)) == len(list(reversed(func.ops))) == 5


def test_iteration_goes_on_past_what_was_erased_after_the_current_op() -> None:
    func, x = chain(5)
    func.set_returns([x])
    first, second, third, fourth, fifth = func.ops
    seen = []
    for op in func.ops:
        seen.append(op)
        if op is first:  # backwards, so that the erased op's own neighbour is erased after it
            for dead in (fifth, fourth):
                dead.erase()
            second.result.replace_all_uses_with(x)
            first.result.replace_all_uses_with(x)
            first.erase()
            second.erase()
    assert seen == [first, third] and list(func.ops) == [third]
    verify(func.module)


def test_insertion_order_and_is_before() -> None:
    func, x = chain(3)
    first, second, third = func.ops
    before = Builder.before(second)
    a, b = before.create(Neg, x), before.create(Neg, x)
    c = Builder.after(third).create(Neg, x)
    d = Builder.at_start(func).create(Neg, x)
    assert list(func.ops) == [d, first, a, b, second, third, c]
    assert a.is_before(second) and not c.is_before(d) and d.is_before(first)
    c.move_before(d)
    assert func.ops.first is c and c.is_before(d)
    verify(func.module)


def test_use_lists_follow_every_change() -> None:
    func, x = chain(0)
    b = Builder.at_end(func)
    a = b.create(Add, x, x)
    n = b.create(Neg, a.result)
    func.set_returns([n.result, x])
    assert x.uses == [(a, 0), (a, 1), (func.ret, 1)] and x.users == [a, func.ret]
    a.result.replace_all_uses_with(x)
    assert not a.result.has_uses and n.operands == (x,)
    with pytest.raises(IrError, match="is used by return"):
        n.erase()
    a.erase()
    assert x.uses == [(func.ret, 1), (n, 0)]
    verify(func.module)


def test_operands_keep_their_type() -> None:
    func, x = chain(1)
    y = func.add_arg("y", Tensor("bf16", [8]))
    with pytest.raises(IrError, match=r"is f32\[N, 8\]; %y is bf16\[8\]"):
        func.ops[0].set_operand(0, y)
    with pytest.raises(IrError):
        x.replace_all_uses_with(y)


def test_create_sorts_operands_and_attributes() -> None:
    module = Module()
    module.groups["tp"] = RankGroup(2)
    func = module.add_func("f")
    x, w, bias = (func.add_arg(n, Tensor("f32", s)) for n, s in (("x", [4, 8]), ("w", [16, 8]), ("b", [16])))
    b = Builder.at_end(func)
    op = b.create(Linear, x, w, act="gelu", bias=bias)
    assert (op.x, op.w, op.bias, op.residual) == (x, w, bias, None)
    assert (op.act, op.partial) == ("gelu", "") and op.result.type == Tensor("f32", [4, 16])
    assert b.create(Linear, x, w, None, op.result).residual is op.result
    assert b.create(Concat, x, x, axis=-2).axis == 0
    assert b.create(Concat, xs=[x, x, x], axis=0).xs == (x, x, x)
    norm = b.create(AddRmsNorm, x, x, func.add_arg("g", Tensor("f32", [8])), eps=1)
    assert norm.eps == 1.0 and isinstance(norm.eps, float) and [r.name for r in norm.results] == ["add_rms_norm", "sum"]
    assert b.create(Param, name="a.b", type=Tensor("f32", [1])).name_ == "a.b"


@pytest.mark.parametrize(
    ("operands", "fields", "message"),
    [
        (1, {"eps": 1e-5, "scale": 2}, "has no scale"),
        (1, {}, "attribute eps is missing"),
        (0, {"eps": 1e-5}, "operand x is missing"),
        (3, {"eps": 1e-5}, "1 operands too many"),
        (1, {"eps": "small"}, "attribute eps wants float"),
        (1, {"eps": True}, "attribute eps wants float"),
        (1, {"eps": 1e-5, "w": 3}, "operand w is not a Value"),
    ],
)
def test_create_refuses(operands: int, fields: dict[str, object], message: str) -> None:
    func, x = chain(0)
    with pytest.raises(IrError, match=message):
        Builder.at_end(func).create(RmsNorm, *[x] * operands, **fields)


def test_errors_name_the_op_its_operands_and_their_origin() -> None:
    from xllm_compiler.ir.loc import Loc

    func, x = chain(0)
    w = func.add_arg("w", Tensor("f32", [4, 9]))
    loc = Loc("modeling.py", 12, "model.layers.3.mlp", ("fuse-qkv/concat",))
    with pytest.raises(XllmError) as e:
        Builder.at_end(func).create(Linear, x, w, loc=loc)
    text = str(e.value)
    assert e.value.kind == "ir" and e.value.exit_code == 2
    for part in ("8 is not provably 9", "%x: f32[N, 8]", "model.layers.3.mlp (modeling.py:12)", "fuse-qkv/concat"):
        assert part in text


def test_changing_an_attribute_may_not_change_the_type() -> None:
    func, x = chain(0)
    op = Builder.at_end(func).create(Concat, x, x, axis=0)
    with pytest.raises(IrError, match="would change the result type"):
        op.set_attr("axis", 1)
    assert op.axis == 0
    verify(func.module)


def test_type_facts() -> None:
    kv = Kv("bf16", 2, 64, 32, 16, 10)
    assert kv.page_bytes == 2 * 16 * 96 * 2 and str(kv) == "kv<bf16, heads=2, k=64, v=32, page=16>[10]"
    assert Tensor("f32", [2, 3]).nbytes.value == 24
    with pytest.raises(IrError, match="unknown dtype 'f8'"):
        Tensor("f8", [1])
    assert [format_float(v) for v in (1.0, 1e-05, float("inf"), -float("inf"))] == ["1.0", "1e-05", "inf", "-inf"]
