"""assign-streams: collectives beside computing, with exactly the events needed; plan-memory with two streams."""

from __future__ import annotations

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\ngroup @tp size=2\ngroup @dp size=2\n\n"


def case(body: str, pipeline: str = "assign-streams", returns: str = "f32[N, 4]") -> tuple[Module, PassContext]:
    module = parse_module(f"{HEAD}func @step(%x: f32[N, 4]) -> ({returns}) {{\n{body}}}\n", "case.xir")
    report = run_pipeline(pipeline, module)
    return module, report.ctx


def body_of(module: Module) -> str:
    lines = print_module(module).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("func"))
    return "\n".join(line.split(" : ")[0].strip() for line in lines[start + 1 : -2])


LAYER = """  %a = t.exp(%x) : f32[N, 4]
  %f = comm.all_reduce_start(%a, group=@tp) : !future<f32[N, 4]>
  %s = comm.wait(%f) : f32[N, 4]
  %b = t.neg(%x) : f32[N, 4]
  %y = t.add(%s, %b) : f32[N, 4]
  return %y
"""


def test_one_collective_takes_one_event() -> None:
    module, ctx = case(LAYER)
    assert (
        body_of(module)
        == """%a = t.exp(%x)
%e = sched.record()
sched.wait(%e, stream=1)
%f = comm.all_reduce_start(%a, group=@tp, stream=1)
%s = comm.wait(%f)
%b = t.neg(%x)
%y = t.add(%s, %b)"""
    )
    assert ctx.stats["assign-streams"] == {"collectives": 1, "events": 1, "waits": 1}
    start = next(o for o in module.func().ops if o.name == "comm.all_reduce_start")
    assert start.loc.line == 8 and start.loc.lineage == ("assign-streams/stream",)
    assert next(o for o in module.func().ops if o.name == "sched.wait").loc.lineage == (
        "assign-streams/stream",
        "assign-streams/event",
    )


def test_moving_makes_room() -> None:
    body = LAYER.replace("  %f =", "  %m = t.abs(%x) : f32[N, 4]\n  %f =").replace("t.neg(%x)", "t.neg(%m)")
    module, ctx = case(body, "assign-streams{move=true}")
    assert (
        body_of(module)
        == """%a = t.exp(%x)
%e = sched.record()
sched.wait(%e, stream=1)
%f = comm.all_reduce_start(%a, group=@tp, stream=1)
%m = t.abs(%x)
%b = t.neg(%m)
%s = comm.wait(%f)
%y = t.add(%s, %b)"""
    )
    assert ctx.stats["assign-streams"]["moved"] == 2
    wait = next(o for o in module.func().ops if o.name == "comm.wait")
    assert wait.loc.lineage == ("assign-streams/wait-late",)


def test_moving_keeps_the_order_of_the_collectives() -> None:
    """%g could start before %f, whose operand comes later; ranks would still agree, but the program says otherwise."""
    body = """  %p = t.exp(%x) : f32[N, 4]
  %q = t.neg(%p) : f32[N, 4]
  %r = t.abs(%q) : f32[N, 4]
  %f = comm.all_reduce_start(%q, group=@tp) : !future<f32[N, 4]>
  %g = comm.all_reduce_start(%p, group=@dp) : !future<f32[N, 4]>
  %s = comm.wait(%f) : f32[N, 4]
  %t = comm.wait(%g) : f32[N, 4]
  %y = t.add(%s, %t) : f32[N, 4]
  return %y, %r
"""
    module, _ = case(body, "assign-streams{move=true}", "f32[N, 4], f32[N, 4]")
    assert (
        body_of(module)
        == """%p = t.exp(%x)
%q = t.neg(%p)
%e = sched.record()
sched.wait(%e, stream=1)
%f = comm.all_reduce_start(%q, group=@tp, stream=1)
%g = comm.all_reduce_start(%p, group=@dp, stream=1)
%r = t.abs(%q)
%s = comm.wait(%f)
%t = comm.wait(%g)
%y = t.add(%s, %t)"""
    )


def test_a_wait_that_is_only_returned_moves_to_the_end_and_an_early_start_to_the_front() -> None:
    body = """  %b = t.neg(%x) : f32[N, 4]
  %f = comm.all_reduce_start(%x, group=@tp) : !future<f32[N, 4]>
  %s = comm.wait(%f) : f32[N, 4]
  %c = t.abs(%b) : f32[N, 4]
  return %s, %c
"""
    module, _ = case(body, "assign-streams{move=true}", "f32[N, 4], f32[N, 4]")
    assert (
        body_of(module)
        == """%f = comm.all_reduce_start(%x, group=@tp, stream=1)
%b = t.neg(%x)
%c = t.abs(%b)
%s = comm.wait(%f)"""
    )


def test_an_event_serves_everything_before_it() -> None:
    """The second start reads what was made before the first one's event; the third reads the first one's result."""
    body = """  %a = t.exp(%x) : f32[N, 4]
  %b = t.neg(%a) : f32[N, 4]
  %f = comm.all_reduce_start(%b, group=@tp) : !future<f32[N, 4]>
  %g = comm.all_reduce_start(%a, group=@tp) : !future<f32[N, 4]>
  %s = comm.wait(%f) : f32[N, 4]
  %h = comm.all_reduce_start(%s, group=@tp) : !future<f32[N, 4]>
  %t = comm.wait(%g) : f32[N, 4]
  %u = comm.wait(%h) : f32[N, 4]
  %y = t.add(%t, %u) : f32[N, 4]
  return %y
"""
    module, ctx = case(body)
    assert body_of(module).count("sched.wait") == 2 and ctx.stats["assign-streams"]["events"] == 2
    assert "%s = comm.wait(%f)\n%e_1 = sched.record()\nsched.wait(%e_1, stream=1)\n%h" in body_of(module)


def test_arguments_and_weights_need_no_event() -> None:
    body = """  %w = param(name="w") : f32[4, 4]
  %f = comm.all_reduce_start(%w, group=@tp) : !future<f32[4, 4]>
  %s = comm.wait(%f) : f32[4, 4]
  %g = comm.all_reduce_start(%x, group=@tp) : !future<f32[N, 4]>
  %t = comm.wait(%g) : f32[N, 4]
  %y = nn.linear(%t, %s) : f32[N, 4]
  return %y
"""
    assert "sched." not in body_of(case(body)[0])


@pytest.mark.parametrize("pipeline", ["assign-streams", "assign-streams{move=true}", "assign-streams{comm=0}"])
def test_without_collectives_only_the_stage_changes(pipeline: str) -> None:
    body = "  %a = t.exp(%x) : f32[N, 4]\n  %b = t.neg(%a) : f32[N, 4]\n  return %b\n"
    module, ctx = case(body, pipeline)
    text = f"{HEAD}func @step(%x: f32[N, 4]) -> (f32[N, 4]) {{\n{body}}}\n".replace("graph", "sched")
    assert print_module(module) == text and ctx.stats == {}


def test_one_stream_has_no_events() -> None:
    module, _ = case(LAYER, "assign-streams{comm=0}")
    assert "sched." not in body_of(module) and "stream" not in body_of(module)


def test_a_negative_stream_is_refused() -> None:
    with pytest.raises(XllmError, match="option comm of pass assign-streams is a stream number, not -1"):
        case(LAYER, "assign-streams{comm=-1}")
