"""Streams under random orders: sound schedules and plans give what list order gives. What is taken away from them is
noticed twice, by the verifier and by an interleaving, each without the other."""

from __future__ import annotations

import random

import pytest

from xllm_compiler.analysis.happens_before import HappensBefore, begun, done
from xllm_compiler.analysis.liveness import views_of
from xllm_compiler.dims import sym
from xllm_compiler.interp import run_interleaved_ranks, run_ranks
from xllm_compiler.ir import ops
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Builder, Module, Op, Value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.semantics import Array
from xllm_compiler.ir.types import Kv, Tensor
from xllm_compiler.ir.verify import verify
from xllm_compiler.ir.verify_sched import order_of
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.passes.memory.plan import Buffer, collect, neighbours
from xllm_compiler.passes.schedule.events import insert_events
from xllm_compiler.testing.inputs import make

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\ngroup @tp size=2\ngroup @dp size=2\n\n"


def case(body: str, pipeline: str = "assign-streams", returns: str = "f32[N, 4]") -> tuple[Module, PassContext]:
    module = parse_module(f"{HEAD}func @step(%x: f32[N, 4]) -> ({returns}) {{\n{body}}}\n", "case.xir")
    report = run_pipeline(pipeline, module)
    return module, report.ctx


def body_of(module: Module) -> str:
    lines = print_module(module).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("func"))
    return "\n".join(line.split(" : ")[0].strip() for line in lines[start + 1 : -2])


class Refuse:
    """A listener that forbids single rewrites, as a bisection does."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.seen = numbers, 0

    def allows(self, rule: str, op: Op) -> bool:
        self.seen += 1
        return self.seen - 1 not in self.numbers

    def tried(self, rule: str, op: Op, fired: bool, made: object) -> None:
        pass


@pytest.mark.parametrize("refused", range(9))
def test_what_is_left_when_a_single_step_is_forbidden_is_sound(refused: int) -> None:
    """Even a collective left on stream 0 keeps its place among those of its group, by events."""
    chain, v = "", "x"
    for i in range(3):
        chain += f"  %a{i} = t.tanh(%{v}) : f32[N, 4]\n  %b{i} = t.abs(%x) : f32[N, 4]\n"
        chain += f"  %f{i} = comm.all_reduce_start(%a{i}, group=@tp) : !future<f32[N, 4]>\n"
        chain += f"  %g{i} = comm.all_reduce_start(%b{i}, group=@tp) : !future<f32[N, 4]>\n"
        chain += f"  %s{i} = comm.wait(%f{i}) : f32[N, 4]\n  %t{i} = comm.wait(%g{i}) : f32[N, 4]\n"
        chain += f"  %y{i} = t.add(%s{i}, %t{i}) : f32[N, 4]\n"
        v = f"y{i}"
    module = parse_module(f"{HEAD}func @step(%x: f32[N, 4]) -> (f32[N, 4]) {{\n{chain}  return %{v}\n}}\n")
    listener = Refuse(refused)
    run_pipeline("assign-streams{move=true},plan-memory", module, PassContext(listeners=[listener]))
    assert listener.seen == 9
    check_orders(module, inputs_of(module), seeds=3)


# Plans that list order would get wrong.

ACROSS = """  %a = t.exp(%x) : f32[N, 4]
  %f = comm.all_reduce_start(%a, group=@tp) : !future<f32[N, 4]>
  %c = t.abs(%x) : f32[N, 4]
  %d = t.neg(%c) : f32[N, 4]
  %s = comm.wait(%f) : f32[N, 4]
  %y = t.add(%s, %d) : f32[N, 4]
  return %y
"""


@pytest.mark.parametrize("comm", [0, 1])
def test_what_a_collective_in_flight_reads_and_writes_is_not_given_away(comm: int) -> None:
    module, _ = case(ACROSS, f"assign-streams{{comm={comm}}},plan-memory")
    at = {o.results[0].name: o.attrs.get("at") for o in module.func().ops if o.results}
    assert len({at["a"], at["c"], at["d"], at["s"]}) == 4, at
    assert at["c"] is not None
    check_orders(module, inputs_of(module), seeds=5)


def test_a_place_is_taken_again_only_after_the_other_stream() -> None:
    """%b reads %a on stream 1; no event tells stream 0 when. List order would give %a's bytes to %c."""
    text = """xir 1 stage=sched
dim N in [1, 64]
func @step(%x: f32[N, 4]) -> (f32[N, 4], f32[N, 4]) {
  %a = t.exp(%x) : f32[N, 4]
  %e = sched.record() : !event
  sched.wait(%e, stream=1)
  %b = t.neg(%a, stream=1) : f32[N, 4]
EVENT  %c = t.abs(%x) : f32[N, 4]
  %d = t.neg(%c) : f32[N, 4]
  return %b, %d
}
"""
    apart = parse_module(text.replace("EVENT", ""))
    run_pipeline("plan-memory", apart)
    places = [o.attrs["at"] for o in apart.func().ops if "at" in o.attrs]
    assert len(set(places)) == 2
    ordered = "  %e1 = sched.record(stream=1) : !event\n  sched.wait(%e1)\n"
    together = parse_module(text.replace("EVENT", ordered))
    run_pipeline("plan-memory", together)
    assert len({o.attrs["at"] for o in together.func().ops if "at" in o.attrs}) == 1
    for module in (apart, together):
        check_orders(module, inputs_of(module), seeds=10)
    naive = clone_module(apart)
    next(o for o in naive.func().ops if o.name == "t.abs").set_attr("at", places[0])
    with pytest.raises(IrError, match="V15"):
        verify(naive)
    assert interleavings_catch(naive, inputs_of(naive))


# Random modules.


def inputs_of(module: Module) -> list[dict[str, Array]]:
    """Of a step of three tokens, per rank; what collectives combine differs."""
    return make(module.func(), {"N": 3}).inputs


def check_orders(module: Module, inputs: list[dict[str, Array]], seeds: int) -> None:
    params: list[dict[str, Array]] = [{}] * len(inputs)
    expected = run_ranks(module, "step", inputs, params)
    for seed in range(seeds):
        got = run_interleaved_ranks(module, "step", inputs, params, seed=seed)
        for a, b in zip(expected, got, strict=True):
            assert [v.tobytes() for v in a] == [v.tobytes() for v in b]


def interleavings_catch(module: Module, inputs: list[dict[str, Array]], seeds: int = 100) -> IrError | None:
    for seed in range(seeds):
        try:
            run_interleaved_ranks(module, "step", inputs, [{}] * len(inputs), seed=seed)
        except IrError as e:
            return e
    return None


_UNARY = (ops.Tanh, ops.Neg, ops.Abs, ops.Sigmoid)


def two_ranks(seed: int, size: int = 16) -> Module:
    """Dense in collectives: starts and waits at random places, on two groups; views; a cache; sizes 4*N and 8*N."""
    rng = random.Random(seed)
    module = Module()
    n, b_, p = (module.scope.declare(name, 1, hi) for name, hi in (("N", 64), ("B", 8), ("P", 64)))
    module.scope.assume(n - b_, why="every request has a token")
    module.groups |= {"tp": RankGroup(2), "dp": RankGroup(2)}
    func = module.add_func("step")
    i32 = {
        name: func.add_arg(name, Tensor("i32", [size])) for name, size in (("pos", n), ("seq", n), ("start", b_ + 1))
    }
    table = func.add_arg("table", Tensor("i32", [b_, 4]))
    first = kv = func.add_arg("kv", Kv("f32", 1, 4, 4, 4, p))
    values = [func.add_arg(name, Tensor("f32", [n, 4])) for name in ("x", "y")]
    b = Builder.at_end(func)
    pending: list[Value] = []
    for _ in range(size):
        v = values[-1 - rng.randrange(min(4, len(values)))]
        match rng.randrange(8):
            case 0 | 1:
                group = "tp" if rng.randrange(3) else "dp"
                pending.append(b.create(ops.AllReduceStart, v, group=group, kind=rng.choice(("sum", "max"))).result)
            case 2 if pending:
                values.append(b.create(ops.Wait, pending.pop(rng.randrange(len(pending)))).result)
            case 3:
                wide = b.create(ops.Concat, v, values[rng.randrange(len(values))], axis=1).result
                flat = b.create(ops.Reshape, wide, shape=(8 * n,)).result
                back = b.create(ops.Reshape, flat, shape=(n, 8)).result
                values.append(b.create(ops.Slice, back, axis=1, start=2, stop=6).result)
            case 4:
                k = b.create(ops.Reshape, v, shape=(n, 1, 4)).result
                kv = b.create(ops.KvWrite, kv, k, k, i32["pos"], i32["seq"], table).result
            case 5:
                q = b.create(ops.Reshape, v, shape=(n, 1, 4)).result
                y = b.create(ops.KvAttend, kv, q, i32["pos"], i32["seq"], i32["start"], table, scale=0.5).result
                values.append(b.create(ops.Reshape, y, shape=(n, 4)).result)
            case 6:
                values.append(b.create(ops.Add, v, values[rng.randrange(len(values))]).result)
            case _:
                values.append(b.create(_UNARY[rng.randrange(4)], v).result)
    values += [b.create(ops.Wait, f).result for f in pending]
    total = values[-1]
    for v in values[-4:-1]:
        total = b.create(ops.Add, total, v).result
    func.set_returns([total, kv], {1: first})
    verify(module)
    return module


def scatter(module: Module, seed: int) -> None:
    """Ops on three streams at random, with the events that this needs: more than assign-streams ever does."""
    rng = random.Random(seed)
    func = module.func()
    for op in func.ops:
        op.set_attr("stream", rng.randrange(3))
    insert_events(func, "test/events")
    module.stage = "sched"


@pytest.mark.parametrize("seed", range(25))
def test_random_modules_under_random_orders(seed: int) -> None:
    graph = two_ranks(seed)
    inputs = inputs_of(graph)
    params: list[dict[str, Array]] = [{}, {}]
    want = run_ranks(graph, "step", inputs, params)
    for how in ("assign-streams", "assign-streams{move=true}", "scatter"):
        module = clone_module(graph)
        if how == "scatter":
            scatter(module, seed)
            verify(module)
        else:
            run_pipeline(how, module)
        twin = clone_module(module)
        for stage in ("sched", "buf"):
            if stage == "buf":
                run_pipeline("plan-memory", module)
                run_pipeline("plan-memory", twin)
                assert print_module(module) == print_module(twin)
            for order in range(4):
                got = run_interleaved_ranks(module, "step", inputs, params, seed=order)
                for a, b in zip(want, got, strict=True):
                    assert [v.tobytes() for v in a] == [v.tobytes() for v in b], (how, stage, order)


@pytest.mark.parametrize("seed", range(12))
def test_the_analysis_and_the_verifier_agree_on_the_order(seed: int) -> None:
    module = two_ranks(seed)
    scatter(module, seed)
    func = module.func()
    order, before = order_of(func), HappensBefore(func)
    assert order is not None
    all_ops = list(func.ops)
    for i, a in enumerate(all_ops):
        assert before.before(a, func.ret) and not before.before(func.ret, a)
        for b in all_ops:
            assert before.before(a, b) == (a is not b and order.done(a, b)), (a, b)
            assert not (before.before(a, b) and before.before(b, a))
        if a.name == "comm.wait":
            assert done(begun(a)) is a and all_ops.index(begun(a)) < i


def test_weights_come_before_everything() -> None:
    module = parse_module(
        f"{HEAD}func @step(%x: f32[N, 4]) -> (f32[N, 4]) {{\n  %a = t.exp(%x) : f32[N, 4]\n"
        '  %w = param(name="w") : f32[4, 4]\n  %y = nn.linear(%a, %w) : f32[N, 4]\n  return %y\n}\n'
    )
    a, w, y = module.func().ops
    order = HappensBefore(module.func())
    assert order.before(w, a) and order.before(w, y) and order.before(a, y)
    assert not order.before(a, w) and not order.before(y, w) and order.streams == (0,)


@pytest.mark.parametrize("seed", range(8))
def test_every_event_is_needed(seed: int) -> None:
    """Without any single wait the verifier objects, and so does some interleaving, each on its own."""
    graph = two_ranks(seed)
    for how in ("assign-streams", "scatter"):
        module = clone_module(graph)
        if how == "scatter":
            scatter(module, seed)
        else:
            run_pipeline(how, module)
        waits = [i for i, op in enumerate(module.func().ops) if op.name == "sched.wait"]
        for i in waits:
            broken = clone_module(module)
            broken.func().ops[i].erase()
            with pytest.raises(IrError, match=r"V1[789]"):
                verify(broken)
            e = interleavings_catch(broken, inputs_of(broken))
            assert e is not None and e.op is not None, print_module(broken)


@pytest.mark.parametrize("seed", range(6))
def test_a_buffer_moved_onto_a_live_one_is_caught(seed: int) -> None:
    """Any two buffers that may be in use at once, put at one place."""
    module = two_ranks(seed)
    if seed % 2:
        scatter(module, seed)
        run_pipeline("plan-memory", module)
    else:
        run_pipeline("assign-streams{move=true},plan-memory", module)
    order = HappensBefore(module.func())
    buffers = collect(module.func(), order, align=64)
    index = {op: i for i, op in enumerate(module.func().ops)}
    pairs = [(i, j) for i, near in enumerate(neighbours(buffers, order)) for j in near if i < j]
    assert len(pairs) > 10
    for i, j in pairs[:: max(1, len(pairs) // 20)]:
        broken = clone_module(module)
        ops_now = list(broken.func().ops)
        moved, victim = (ops_now[index[op]].result for op in (owner(buffers[j]), owner(buffers[i])))
        for v in (moved, *views_of(moved)):
            assert v.op is not None and victim.op is not None
            if "at" in v.op.attrs:
                v.op.attrs["at"] = victim.op.attrs["at"]
        with pytest.raises(IrError, match=r"V1[45]"):
            verify(broken)
        assert interleavings_catch(broken, inputs_of(broken)) is not None, print_module(broken)


def owner(buffer: Buffer) -> Op:
    assert buffer.value.op is not None
    return buffer.value.op


def test_collectives_on_different_streams_are_caught() -> None:
    """Every collective in turn on another stream of its own, with all the data it needs."""
    caught = 0
    for seed in range(6):
        module = two_ranks(seed)
        run_pipeline("assign-streams", module)
        for i, op in enumerate(module.func().ops):
            if isinstance(op, ops.AllReduceStart):
                caught += moved_away_is_caught(module, i)
    assert caught >= 10


def moved_away_is_caught(module: Module, i: int) -> bool:
    """Whether it matters that the collective at position `i` runs on its own stream; both detectors agree on that."""
    broken = clone_module(module)
    start = broken.func().ops[i]
    start.set_attr("stream", 2)
    maker = start.operands[0].op
    if maker is not None:
        event = Builder.after(maker).create(ops.Record, stream=maker.stream)
        Builder.before(start).create(ops.WaitEvent, event.result, stream=2)
    try:
        verify(broken)
        sound = True
    except IrError as e:
        assert e.message.startswith("V19"), e
        sound = False
    shown = interleavings_catch(broken, inputs_of(broken), seeds=2 if sound else 100)
    assert (shown is None) == sound, print_module(broken)
    if shown is not None:
        assert "in different orders" in shown.message and shown.op is not None
    return not sound


def test_sizes_are_symbols() -> None:
    module = two_ranks(0)
    run_pipeline("assign-streams,plan-memory", module)
    arena = module.func().arena
    assert arena is not None and arena.symbols == sym("N").symbols
