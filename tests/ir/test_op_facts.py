"""What op classes say about themselves is true of their reference meaning, on random graphs, and the docs repeat it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from xllm_compiler.analysis.cost import Costs
from xllm_compiler.interp.run import call_op, run_ranks
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Module, Op, Value
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import OPS
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.ir.shapes import is_const_scalar
from xllm_compiler.ir.types import Future, Tensor
from xllm_compiler.testing.graphs import random_module
from xllm_compiler.testing.inputs import make, telling_sizes
from xllm_compiler.tools import op_table

ROOT = Path(__file__).resolve().parents[2]
Call = tuple[Op, EvalContext, dict[Value, Array]]


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Ops of random graphs, with the arrays that they get on rank 0 and what the sizes are."""
    return [call for seed in range(150) for call in _calls(seed)]


def _calls(seed: int) -> Iterator[Call]:
    module = random_module(random.Random(seed).randrange, 24)
    for func in module.funcs.values():
        sizes = telling_sizes(func)
        given = make(func, sizes[seed % len(sizes)], seed)
        env: dict[Value, Array] = {}

        def keep(v: Value, rank: int, x: Array, env: dict[Value, Array] = env) -> Array:
            if rank == 0:
                env[v] = x
            return x

        run_ranks(module, func.name, given.inputs, given.params, given.dims, watch=keep)
        ctx = EvalContext(given.params[0], given.dims)
        yield from ((op, ctx, env) for op in func.ops if all(v in env for v in op.operands))


def test_every_op_is_exported_under_its_own_name() -> None:
    for name, cls in OPS.items():
        if cls.__module__.startswith("xllm_compiler."):
            assert getattr(ops, cls.__name__) is cls, name


# ---------------------------------------------------------------------------------------------------------------- rows


def _row_groups(op: Op) -> dict[int, dict[int, int]]:
    """By axis of the results: the operands whose rows lie along it afterwards, and along which axis they do before."""
    groups: dict[int, dict[int, int]] = {}
    for i, v in enumerate(op.operands):
        ty = v.type.of if isinstance(v.type, Future) else v.type
        for axis in range(ty.rank if isinstance(ty, Tensor) else 0):
            place = op.rows.follow(op, i, axis)
            if not isinstance(place, str):
                groups.setdefault(place, {})[i] = axis
    return groups


def _copy_row(x: Array, axis: int, source: int, target: int) -> Array:
    x = np.array(x)
    np.moveaxis(x, axis, 0)[target] = np.moveaxis(x, axis, 0)[source]
    return x


def _call(op: Op, ctx: EvalContext, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """`call_op` with an array for each operand, for ops that read one value twice."""
    args: list[Array | tuple[Array, ...] | None] = []
    given = iter(arrays)
    for field, count in zip(op.SPEC.operands, op.segments, strict=True):
        values = tuple(next(given) for _ in range(count))
        args.append(values if field.arity == "many" else values[0] if values else None)
    if isinstance(op, ops.Collective):  # every rank of the group brings the same
        made = op.ranks(ctx, [arrays[0]] * op.func.module.groups[op.group].size)[0]
    else:
        made = op.interp(ctx, *args)
    return made if isinstance(made, tuple) else (made,)


def test_rows_are_treated_one_by_one_where_the_op_says_so(calls: list[Call]) -> None:
    """One row is overwritten with another: the results then hold the other's twice, and are the same elsewhere."""
    tried: set[str] = set()
    with np.errstate(all="ignore"):
        for op, ctx, env in calls:
            for place, axes in _row_groups(op).items():
                arrays = [env[v] for v in op.operands]
                count = next(arrays[i].shape[axis] for i, axis in axes.items())
                if count < 2:
                    continue
                before = _call(op, ctx, arrays)
                for i, axis in axes.items():
                    arrays[i] = _copy_row(arrays[i], axis, count - 1, 0)
                after = _call(op, ctx, arrays)
                for x, y in zip(before, after, strict=True):
                    want = _copy_row(np.asarray(x, np.float64), place, count - 1, 0)
                    np.testing.assert_allclose(np.asarray(y, np.float64), want, 1e-5, 1e-5, err_msg=f"{op} {place}")
                tried.add(op.name)
    known = {name for name, cls in OPS.items() if cls.__module__.startswith("xllm_compiler.")}
    leaves = {name for name in known if not OPS[name].SPEC.operands}
    through_state = {"kv.write", "kv.attend", "kv.append", "state.read", "state.write"}
    assert known - tried == leaves | through_state | {"sched.wait"}


def test_rows_from_nowhere_are_numbered_or_all_alike() -> None:
    b = Builder.at_end(Module().add_func("f"))
    one = b.create(ops.Const, value=1.0)
    wide = b.create(ops.Expand, one.result, shape=(4, 3))
    assert wide.rows.begin(wide, 0) is None
    for op in (
        b.create(ops.Iota, size=4),
        b.create(ops.Pad, wide.result, axis=0, lo=0, hi=1),
        b.create(ops.Slice, wide.result, axis=0, start=1, stop=2),
        b.create(ops.Concat, wide.result, wide.result, axis=0),
    ):
        assert "index in the step" in (op.rows.begin(op, 0) or ""), op


# --------------------------------------------------------------------------------------------------- noise, work, flags


def test_what_moves_values_needs_no_wider_type(calls: list[Call]) -> None:
    """In exact arithmetic the result is the same to the bit. Casts, caches and literals are rounded, and left out."""
    tried: set[str] = set()
    with np.errstate(all="ignore"):
        for op, ctx, env in calls:
            literal = op.name in ("t.pad", "t.clamp") or any(is_const_scalar(v) for v in op.operands)
            if op.noise is not Noise.MOVES or literal or op.name in ("t.cast", "kv.write"):
                continue
            exact = EvalContext(ctx.params, ctx.dims, precise=True)
            arrays = [env[v] for v in op.operands]
            got, want = _call(op, ctx, arrays), _call(op, exact, arrays)
            for r, x, y in zip(op.results, got, want, strict=True):
                np.testing.assert_array_equal(np.asarray(ctx.store(x, r.type), np.float64), np.asarray(y, np.float64))
            tried.add(op.name)
    assert len(tried) > 10, tried


def test_what_commutes_does_so_to_the_bit(calls: list[Call]) -> None:
    tried: set[str] = set()
    with np.errstate(all="ignore"):
        for op, ctx, env in calls:
            if op.SPEC.commutative:
                a, b = op.operands
                swapped = {**env, a: env[b], b: env[a]}
                np.testing.assert_array_equal(call_op(op, ctx, env)[0], call_op(op, ctx, swapped)[0])
                tried.add(op.name)
    assert tried == {name for name, cls in OPS.items() if cls.SPEC.commutative}


def test_what_runs_has_a_cost_and_what_copies_has_no_operations() -> None:
    for seed in range(40):
        module = random_module(random.Random(seed).randrange, 24)
        for func in module.funcs.values():
            costs = Costs(func)
            for op, cost in costs.of.items():
                known = bool(op.results) and all(r in costs.weights for r in op.results)
                assert cost.free == (op.work is Work.NONE or known), op
                if op.work is Work.COPY and not costs.weights.keys() & set(op.operands):
                    assert cost.flops.is_const and cost.flops.value == 0, op


# ---------------------------------------------------------------------------------------------------------------- docs


def test_the_docs_have_the_table_of_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert op_table.main([str(ROOT / "docs" / "ops.md"), "--check"]) == 0
    path = tmp_path / "ops.md"
    assert op_table.main([str(path)]) == 0
    path.write_text(path.read_text(encoding="utf-8").replace("`t.exp(x)`", "`t.exp(y)`"), encoding="utf-8")
    assert op_table.main([str(path), "--check"]) == 2
    assert "is not what the op classes say" in capsys.readouterr().err
