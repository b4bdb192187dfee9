"""An op class that says all that is asked for is known everywhere; one that says less is refused at its declaration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from xllm_compiler.analysis.cost import Costs
from xllm_compiler.analysis.kernel_cost import kernel_cost
from xllm_compiler.dims import sym
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.rows import check_rows
from xllm_compiler.interp import run
from xllm_compiler.ir.core import Builder, Module, Op
from xllm_compiler.ir.cost import Amounts, Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import OPS, Operand, op
from xllm_compiler.ir.ops import Exp, Take
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.rows import LastAxis
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.ir.types import Tensor, Type
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.testing.equiv import check_equal
from xllm_compiler.testing.noise import noise


class Centre(Op):
    """y = x - mean x, over the last axis, times `by`."""

    rows = LastAxis()
    noise = Noise.ROUNDS
    work = Work.LIGHT
    x: Operand
    by: float = 1.0

    def infer(self) -> tuple[Type, ...]:
        return (self.x.tensor,)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=3 * self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        return np.asarray((up - up.mean(axis=-1, keepdims=True)) * up.dtype.type(self.by))


FIELDS = {name: value for name, value in vars(Centre).items() if name not in ("__dict__", "__weakref__")}


@pytest.fixture
def declare() -> Iterator[Callable[..., type[Op]]]:
    """Declares ops called test.*, and forgets them afterwards: other tests ask for all there are."""

    def make(name: str, fields: dict[str, Any], **flags: Any) -> type[Op]:
        return op(name, **flags)(type("Made", (Op,), dict(fields)))

    yield make
    for name in [name for name in OPS if name.startswith("test.")]:
        del OPS[name]


@pytest.mark.parametrize("fact", ["__doc__", "rows", "noise", "work", "infer", "cost", "interp"])
def test_a_missing_fact_is_an_error_that_names_op_and_fact(fact: str, declare: Callable[..., type[Op]]) -> None:
    fields = {name: value for name, value in FIELDS.items() if name != fact}
    with pytest.raises(IrError, match=f"op test.centre says no {'equation' if fact == '__doc__' else fact}") as e:
        declare("test.centre", fields)
    assert e.value.where.endswith("test_new_op.Made") and e.value.help
    assert "test.centre" not in OPS
    declare("test.centre", FIELDS)


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"rows": "row by row"}, {}, "says no rows"),
        ({"noise": True}, {}, "says no noise"),
        ({}, {"view": True}, "is a view with work light"),
        ({}, {"gathers": "table"}, "gathers table, which is none of its operands"),
        ({}, {"consumes": "kv"}, "consumes kv, which is none of its operands"),
        ({"__annotations__": {"rows": "Operand"}}, {}, "declares rows, which every op has"),
        ({"__annotations__": {"result": "Operand"}}, {}, "declares result, which every op has"),
        ({"__annotations__": {"x": "Operand", "FN": "ClassVar[Any]"}}, {}, "says no FN"),
        ({"__annotations__": {"x": "OptOperand", "y": "Operand"}}, {}, "has operand y after optional"),
    ],
)
def test_a_wrong_declaration_is_refused(
    changes: dict[str, Any], flags: dict[str, Any], message: str, declare: Callable[..., type[Op]]
) -> None:
    with pytest.raises(IrError, match=f"op test.centre {message}"):
        declare("test.centre", FIELDS | {"__module__": "xllm_compiler.ir.opdef"} | changes, **flags)


def test_nothing_runs_so_nothing_costs(declare: Callable[..., type[Op]]) -> None:
    free = {name: value for name, value in FIELDS.items() if name != "cost"} | {"work": Work.NONE}
    module = _module(declare("test.mark", free))
    assert all(cost.free for op, cost in Costs(module.func()).of.items() if op.name == "test.mark")


def test_a_name_is_given_once(declare: Callable[..., type[Op]]) -> None:
    with pytest.raises(IrError, match=r"op t\.exp is already declared by Exp"):
        declare("t.exp", FIELDS)
    assert OPS["t.exp"] is Exp


# ------------------------------------------------------------------------------------------ an op from outside the tree


def _module(cls: type[Op]) -> Module:
    """y = take(f(exp(f(x))), sel), rows [N, 6]."""
    module = Module()
    module.scope.declare("N", 1, 64)
    module.scope.declare("S", 0, 8)
    func = module.add_func("step")
    x, sel = func.add_arg("x", Tensor("bf16", (sym("N"), 6))), func.add_arg("sel", Tensor("i32", (sym("S"),)))
    b = Builder.at_end(func)
    first = b.create(cls, x, by=2.0)
    second = b.create(cls, b.create(Exp, first.result).result)
    func.set_returns([b.create(Take, second.result, sel, axis=0).result])
    return module


def test_an_op_from_outside_goes_through_everything_above_the_lowering(declare: Callable[..., type[Op]]) -> None:
    cls = declare("test.centre", FIELDS)
    module = _module(cls)
    verify(module)
    text = print_module(module)
    assert "test.centre(%x, by=2.0) : bf16[N, 6]" in text
    assert print_module(parse_module(text, "again.xir")) == text
    # Meaning.
    rng = np.random.default_rng(0)
    x, sel = rng.standard_normal((5, 6)), np.array([4, 0], np.int32)
    inputs = {"x": x, "sel": sel}
    (got,) = run(module, inputs=inputs, precise=True)
    y = np.exp(2 * (x - x.mean(1, keepdims=True)))
    np.testing.assert_allclose(got, (y - y.mean(1, keepdims=True))[sel], 1e-12)
    # Rows.
    func = module.func()
    check_rows(func)
    # Cost.
    costs = Costs(func)
    first, *_ = func.ops
    assert costs.of[first].at({"N": 5, "S": 2}) == Amounts(read=60, written=60, flops=90, free=False)
    assert kernel_cost(costs, list(func.ops)).at({"N": 5, "S": 2}).flops == 2 * 90 + 30
    assert costs.seconds({"N": 5, "S": 2}, Cpu.machine) > 0
    # Noise: its results are rounded, those of the take are not.
    moved = noise(rng)
    ones = np.full((5, 6), 1.1)
    assert not np.array_equal(moved(first.results[0], 0, ones), ones)
    assert np.array_equal(moved(func.returns[0], 0, ones), ones)
    # Passes: cse, canonicalise with its rows, and the plan.
    before = parse_module(text, "before.xir")
    run_pipeline("@cpu", module)
    names = [op.name for op in func.ops]
    assert names == ["t.take", "test.centre", "t.exp", "test.centre"]
    assert check_equal(before, module, [{"N": 1, "S": 1}, {"N": 7, "S": 3}]) is None


def test_an_op_that_mixes_tokens_is_refused_by_what_it_says(declare: Callable[..., type[Op]]) -> None:
    class Mixed(LastAxis):
        def follow(self, op: Any, operand: int, axis: int) -> int | str:
            return "averages over neighbours"

    module = _module(declare("test.centre", FIELDS | {"rows": Mixed()}))
    with pytest.raises(XllmError, match=r"test\.centre averages over neighbours; outside of attention"):
        check_rows(module.func())
    run_pipeline("canonicalise", module)
    assert [op.name for op in module.func().ops][-1] == "t.take"
