"""Runs functions with the reference meanings of their ops. Owns execution and freeing; op meanings are the ops'.

Floats of every op are computed in f32 and rounded once, to the type of the result (precise: f64, never rounded). Arrays
are dropped after their last use, so peak memory is that of the live values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from xllm_compiler.dims import DimScope
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.diag import IrError, blame
from xllm_compiler.ir.groups import check_world, rank_sizes, rank_symbols
from xllm_compiler.ir.ops import Collective
from xllm_compiler.ir.semantics import OUR_DTYPE, Array, EvalContext, array_shape, stored_dtype
from xllm_compiler.ir.types import FLOATS, State, Tensor
from xllm_compiler.step.interface import STEP

# Sees every value as it is stored, with its rank, and says what is stored instead: for recording and for perturbing.
Watch = Callable[[Value, int, Array], Array]


def run(
    module: Module,
    func: str = STEP,
    inputs: Mapping[str, Array] | None = None,
    params: Mapping[str, Array] | None = None,
    dims: Mapping[str, int] | None = None,
    precise: bool = False,
) -> list[Array]:
    """The returned arrays of one call.

    `inputs`: one array per argument, by name; a state is one array of all its rows (ir/semantics.py). Inputs are not
    changed. `params`: checkpoint tensors by name; a lazy mapping is asked for each one when it is reached. `dims`: the
    symbols' sizes; one that is an input's whole extent may be left out. Raises IrError when something does not fit.
    """
    return run_ranks(module, func, [inputs or {}], [params or {}], dims, precise)[0]


def run_ranks(
    module: Module,
    func: str,
    inputs: Sequence[Mapping[str, Array]],
    params: Sequence[Mapping[str, Array]],
    dims: Mapping[str, int] | None = None,
    precise: bool = False,
    watch: Watch | None = None,
) -> list[list[Array]]:
    """The same function on several ranks in lockstep, collectives included; `inputs` and `params` per rank.

    There are as many ranks as the module's groups need (`world_size`), or a multiple. Each has sizes of its own, its
    places in its groups among them. `watch` is called for every argument and every result that is used, in order.
    """
    f = module.func(func)
    ranks = contexts(f, inputs, params, dims or {}, precise)
    envs = [bind_arguments(f, ctx, given) for ctx, given in zip(ranks, inputs, strict=True)]
    if watch is not None:
        envs = [{v: watch(v, i, x) for v, x in env.items()} for i, env in enumerate(envs)]
    _execute(list(f.ops), ranks, envs, keep=f.returns, watch=watch)
    return [[env[v] for v in f.returns] for env in envs]


def contexts(
    func: Func,
    inputs: Sequence[Mapping[str, Array]],
    params: Sequence[Mapping[str, Array]],
    dims: Mapping[str, int],
    precise: bool,
) -> list[EvalContext]:
    """What each rank evaluates ops with; IrError unless there are as many ranks as the groups need, or a multiple."""
    if len(inputs) != len(params) or not inputs:
        raise IrError(f"{len(inputs)} ranks of inputs and {len(params)} of params")
    check_world(func.module.groups, len(inputs))
    return [
        EvalContext(p, bind_dims(func, given, dims, rank), precise)
        for rank, (given, p) in enumerate(zip(inputs, params, strict=True))
    ]


def run_value(
    value: Value, params: Mapping[str, Array], precise: bool = False, ranks: Mapping[str, int] | None = None
) -> Array:
    """The array of a weight expression, contiguous. Only what it needs is computed, and freed as early as possible.
    `ranks`: the rank dims that it depends on."""
    return run_values([value], params, precise, ranks)[0]


def run_values(
    values: Sequence[Value], params: Mapping[str, Array], precise: bool = False, ranks: Mapping[str, int] | None = None
) -> list[Array]:
    """The arrays of weight expressions of one function; what several need is computed once."""
    needed: dict[Op, None] = {}
    stack: list[Op] = []
    for value in values:
        if value.op is None:
            raise IrError(f"%{value.name} is an argument, not a weight expression")
        stack.append(value.op)
    func = stack[0].func
    while stack:
        op = stack.pop()
        if op in needed:
            continue
        needed[op] = None
        for v in op.operands:
            if v.op is None:
                name = values[0].name
                raise IrError(f"%{name} is not a weight expression: it depends on argument %{v.name}", op=op)
            stack.append(v.op)
    env: dict[Value, Array] = {}
    _execute(sorted(needed, key=func.ops.order), [EvalContext(params, ranks or {}, precise)], [env], keep=values)
    return [np.ascontiguousarray(env[v]) for v in values]


def bind_dims(func: Func, inputs: Mapping[str, Array], dims: Mapping[str, int], rank: int = 0) -> dict[str, int]:
    """All symbol sizes of a rank: those given, those read off its inputs, and its places in groups; checked against the
    module's scope."""
    groups = func.module.groups
    for symbol, group in rank_symbols(groups).items():
        if symbol in dims:
            raise IrError(
                f"{symbol} = {dims[symbol]} is given", help=f"it is each rank's place in @{group}; leave it out"
            )
    sizes = {**dims, **rank_sizes(groups, rank)}
    for arg in func.args:
        if arg.name not in inputs:
            raise IrError(f"no input for %{arg.name}: {arg.type}", where=f"@{func.name}")
        if isinstance(arg.type, Tensor):
            for d, n in zip(arg.type.shape, inputs[arg.name].shape, strict=False):
                if len(d.symbols) == 1 and str(d) == d.symbols[0]:
                    sizes.setdefault(d.symbols[0], n)
        elif isinstance(arg.type, State):
            blocks = arg.type.blocks
            if len(blocks.symbols) == 1 and str(blocks) == blocks.symbols[0] and inputs[arg.name].ndim:
                sizes.setdefault(blocks.symbols[0], inputs[arg.name].shape[0] // arg.type.block_rows)
    extra = [name for name in inputs if all(name != a.name for a in func.args)]
    if extra:
        raise IrError(f"@{func.name} has no argument {', '.join(extra)}")
    _check_scope(func.module.scope, sizes)
    return sizes


def _check_scope(scope: DimScope, sizes: Mapping[str, int]) -> None:
    for name, n in sizes.items():
        s = scope.symbols.get(name)
        if s is None:
            continue
        if (s.lo is not None and n < s.lo) or (s.hi is not None and n > s.hi) or n % s.multiple:
            step = "" if s.multiple == 1 else f", a multiple of {s.multiple}"
            raise IrError(f"{name} = {n} is outside [{s.lo}, {s.hi}]{step}")
    for a in scope.assumptions:
        if all(name in sizes for name in a.expr.symbols) and a.expr.evaluate(sizes) < 0:
            raise IrError(f"these sizes break the assumption {a.expr} >= 0", help=a.why)


def bind_arguments(func: Func, ctx: EvalContext, inputs: Mapping[str, Array]) -> dict[Value, Array]:
    """The arguments' arrays as this run stores them; checked against the types."""
    env: dict[Value, Array] = {}
    for arg in func.args:
        x = np.asarray(inputs[arg.name])
        want = array_shape(ctx, arg.type)
        if x.shape != want:
            raise IrError(f"input %{arg.name} has shape {list(x.shape)}, {arg.type} is {list(want)}")
        dtype = stored_dtype(arg.type)
        ours = OUR_DTYPE.get(x.dtype, str(x.dtype))
        if ours != dtype and not (ctx.precise and ours in FLOATS and dtype in FLOATS):
            raise IrError(f"input %{arg.name} is {ours}, wanted {dtype}")
        limits = func.ranges.get(arg)
        if limits is not None and x.size and not limits.lo <= x.min() <= x.max() <= limits.hi:
            raise IrError(f"input %{arg.name} has values from {x.min()} to {x.max()}, outside {limits}")
        env[arg] = ctx.store(x, arg.type)
    return env


def _execute(
    ops: Sequence[Op],
    ranks: Sequence[EvalContext],
    envs: Sequence[dict[Value, Array]],
    keep: Iterable[Value],
    watch: Watch | None = None,
) -> None:
    """Runs `ops` on every rank, leaving in `envs` what is in `keep`."""
    kept = set(keep)
    last = {v: op for op in ops for v in op.operands}
    with np.errstate(all="ignore"):  # inf and NaN are results like others
        for op in ops:
            made = _exchanged(op, ranks, envs) if isinstance(op, Collective) else None
            for i, (ctx, env) in enumerate(zip(ranks, envs, strict=True)):
                outs = (made[i],) if made is not None else call_op(op, ctx, env)
                for r, out in zip(op.results, outs, strict=True):
                    check_shape(op, r, out, ctx)
                    if r.has_uses or r in kept:
                        stored = ctx.store(out, r.type)
                        env[r] = stored if watch is None else watch(r, i, stored)
                del outs
                for v in op.operands:
                    if last[v] is op and v not in kept:
                        env.pop(v, None)


def check_shape(op: Op, result: Value, made: Array, ctx: EvalContext) -> None:
    """IrError unless the array that an op's meaning made has the size that the result's type says."""
    want = array_shape(ctx, result.type)
    if made.shape != want:
        raise blame(op, f"{op.name} made shape {list(made.shape)} for {result.type}, {list(want)}")


def call_op(op: Op, ctx: EvalContext, env: Mapping[Value, Array]) -> tuple[Array, ...]:
    """What `op` makes of its operands' arrays, one array per result, not yet rounded to the result types.

    Every op sees dense arrays, or the last bits of a sum would depend on how an array lies in memory: numpy adds up
    strided ones in another order. A planned program, whose buffers are dense, must give the same bits.
    """
    for result in op.results:
        array_shape(ctx, result.type)  # a result too large for any machine is not begun
    args: list[Array | tuple[Array, ...] | None] = []
    for field in op.SPEC.operands:
        values = tuple(_dense(env[v]) for v in op.field(field.name))
        args.append(values if field.arity == "many" else values[0] if values else None)
    try:
        out = op.interp(ctx, *args)
    except IrError as e:
        raise blame(op, e.message, e.help) from e
    return out if isinstance(out, tuple) else (out,)


def _dense(x: Array) -> Array:
    return x if x.flags.c_contiguous else x.copy(order="C")


def _exchanged(op: Collective, ranks: Sequence[EvalContext], envs: Sequence[dict[Value, Array]]) -> list[Array]:
    """What every rank gets from a collective, group by group."""
    group = op.func.module.groups[op.group]
    out: dict[int, Array] = {}
    for rank in range(len(ranks)):
        if rank not in out:
            members = group.members(rank)
            made = exchange(op, ranks[rank], [envs[m][op.x] for m in members])
            out.update(zip(members, made, strict=True))
    return [out[rank] for rank in range(len(ranks))]


def exchange(op: Collective, ctx: EvalContext, xs: Sequence[Array]) -> list[Array]:
    """What each rank of one group gets from a collective to which they bring `xs`; not yet rounded."""
    if len({x.shape for x in xs}) > 1:
        text = ", ".join(str(list(x.shape)) for x in xs)
        raise blame(op, f"the ranks of a group of @{op.group} bring shapes {text} to {op.name}: they must be equal")
    return op.ranks(ctx, [_dense(x) for x in xs])
