"""Stage sched: its text, and every invariant of streams with a module that breaks it and the op that is to blame."""

from __future__ import annotations

import pytest

from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Builder, Module, Op
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.opdef import op
from xllm_compiler.ir.ops import Neg, Record
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.types import Event, substitute_dims
from xllm_compiler.ir.verify import verify

KV = "kv<f32, heads=1, k=4, v=4, page=16>[P]"
GOOD = f"""xir 1 stage=sched
dim N in [1, 64]
dim B in [1, 8]
dim P in [1, 64]
group @tp size=2
group @dp size=2

func @step(
    %x: f32[N, 4],
    %pos: i32[N],
    %seq: i32[N],
    %start: i32[B + 1],
    %table: i32[B, 4],
    %kv0: {KV}
) -> (f32[N, 4], f32[N, 1, 4], {KV} alias %kv0) {{
  %w = param(name="w", stream=3) : f32[4, 4]
  %a = nn.linear(%x, %w, partial=@tp) : f32[N, 4] partial(@tp)
  %e = sched.record() : !event
  sched.wait(%e, stream=1)
  %f = comm.all_reduce_start(%a, group=@tp, stream=1) : !future<f32[N, 4]>
  %k = t.reshape(%x, shape=[N, 1, 4], stream=2) : f32[N, 1, 4]
  %y = kv.attend(%kv0, %k, %pos, %seq, %start, %table, scale=0.5, stream=2) : f32[N, 1, 4]
  %e2 = sched.record(stream=2) : !event
  sched.wait(%e2)
  %kv1 = kv.write(%kv0, %k, %k, %pos, %seq, %table) : {KV}
  %s = comm.wait(%f) : f32[N, 4]
  %e3 = sched.record() : !event
  sched.wait(%e3, stream=1)
  %g = comm.all_reduce_start(%s, group=@tp, stream=1) : !future<f32[N, 4]>
  %d = comm.all_reduce_start(%k, group=@dp, stream=2) : !future<f32[N, 1, 4]>
  %t = comm.wait(%g) : f32[N, 4]
  %u = comm.wait(%d, stream=1) : f32[N, 1, 4]
  %never = sched.record(stream=1) : !event
  return %t, %u, %kv1
}}
"""


def good() -> Module:
    return parse_module(GOOD, "good.xir")


def op_of(module: Module, name: str) -> Op:
    """The op whose first result is `name`."""
    return next(o for o in module.func().ops if o.results and o.results[0].name == name)


def wait_of(module: Module, event: str) -> Op:
    return next(o for o in module.func().ops if o.name == "sched.wait" and o.operands[0].name == event)


def test_text_is_a_fixed_point_and_copies_are_equal() -> None:
    module = good()
    verify(module)
    assert print_module(module) == GOOD
    copy = clone_module(module)
    assert print_module(copy) == GOOD and structural_hash(copy) == structural_hash(module)
    verify(copy)
    op_of(copy, "k").set_attr("stream", 5)
    assert structural_hash(copy) != structural_hash(module) and print_module(module) == GOOD


def test_stream_zero_is_not_stored() -> None:
    text = GOOD.replace("%e = sched.record()", "%e = sched.record(stream=0)")
    module = parse_module(text)
    assert print_module(module) == GOOD and structural_hash(module) == structural_hash(good())
    f = op_of(module, "f")
    assert f.stream == 1 and f.attrs["stream"] == 1
    f.set_attr("stream", 0)
    assert f.stream == 0 and "stream" not in f.attrs
    made = Builder.at_end(module.func()).create(Neg, module.func().arg("x"), stream=0)
    assert "stream" not in made.attrs


def test_order_of_common_attributes() -> None:
    text = (
        "xir 1 stage=buf\nfunc @f(%x: f32[4]) -> (f32[4]) arena(16) {\n"
        "  %a = t.reduce(%x, at=[0], kind=sum, axes=[0], keep=true) : f32[1]\n"
        "  %y = t.sub(%x, %a) : f32[4]\n  return %y\n}\n"
    )
    module = parse_module(text)
    module.func("f").ops[0].set_attr("stream", 2)
    assert "axes=[0], keep=true, stream=2, at=[0])" in print_module(module)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("!event", "!evnt", "expected `!future<...>` or `!event`"),
        ("sched.record(stream=2)", "sched.record(stream=-2)", "attribute stream=-2 is not allowed"),
        ("sched.record(stream=2)", "sched.record(stream=two)", "expected an integer"),
        ("sched.wait(%e2)", "sched.wait(%k)", "%k is f32\\[N, 1, 4\\], an event is needed here"),
        ("sched.wait(%e2)", "%q = sched.wait(%e2)", "sched.wait has 0 results, 1 are named"),
        ("sched.wait(%e2)", "sched.wait()", "operand e is missing"),
        ("comm.wait(%f)", "comm.wait(%e)", "%e is !event, a future is needed here"),
        ("t.reshape(%x,", "t.reshape(%e,", "%e is !event, a tensor is needed here"),
    ],
)
def test_errors_of_the_text(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(IrError, match=message):
        parse_module(GOOD.replace(old, new, 1))


def test_no_op_may_declare_a_common_attribute() -> None:
    with pytest.raises(IrError, match="declares stream, which every op may carry"):

        @op("test.streamed")
        class Streamed(Op):
            """Never declared."""

            stream_: int


def test_an_event_has_no_dims() -> None:
    assert substitute_dims(Event(), {}) == Event() and str(Event()) == "!event"


# The invariants.


def broken(old: str, new: str = "", stage: str = "sched") -> Module:
    assert old in GOOD, old
    return parse_module(GOOD.replace(old, new, 1).replace("stage=sched", f"stage={stage}"), "broken.xir")


def check(module: Module, number: str, blamed: Op | None, message: str, help: str = "") -> None:
    with pytest.raises(IrError, match=rf"^error\[ir\]: {number}: ") as e:
        verify(module)
    assert e.value.op is blamed, e.value
    assert message in e.value.message and help in e.value.help, e.value


def test_v3_a_stream_is_stored_in_one_form() -> None:
    for value, message in ((0, "is stored as 0"), (-1, "stream=-1 is not allowed"), (True, "wants int")):
        module = good()
        op_of(module, "a").attrs["stream"] = value
        check(module, "V3", op_of(module, "a"), message)


def test_v16_streams_and_events_wait_for_the_schedule() -> None:
    module = broken("", stage="graph")
    check(module, "V16", op_of(module, "w"), "param stands on stream 3 in stage graph", "assign-streams")
    module = parse_module(GOOD.replace(", stream=3", "").replace("stage=sched", "stage=graph"))
    check(module, "V16", op_of(module, "e"), "sched.record orders streams in stage graph", "assign-streams")


def test_v16_events_live_inside_a_function() -> None:
    module = good()
    module.func().add_arg("late", Event())
    check(module, "V16", None, "argument %late of @step is an event")
    module = good()
    func = module.func()
    func.set_returns([*func.returns, op_of(module, "never").result], func.aliases)
    check(module, "V16", op_of(module, "never"), "@step returns event %never")


def test_v17_a_read_on_another_stream() -> None:
    module = broken("  sched.wait(%e, stream=1)\n")
    message = "comm.all_reduce_start on stream 1 reads %a, which nn.linear on stream 0 may not have written yet"
    help = "record an event on stream 0 after nn.linear and wait for it on stream 1 before comm.all_reduce_start"
    check(module, "V17", op_of(module, "f"), message, help)


def test_v17_an_event_recorded_too_early() -> None:
    module = good()
    op_of(module, "e").move_before(op_of(module, "a"))
    check(module, "V17", op_of(module, "f"), "reads %a")


def test_v17_an_event_waited_for_too_late() -> None:
    module = good()
    wait_of(module, "e").move_before(op_of(module, "k"))
    check(module, "V17", op_of(module, "f"), "reads %a")


def test_v17_a_later_op_of_the_starts_stream_does_not_know_the_collective_is_done() -> None:
    module = broken("  sched.wait(%e3, stream=1)\n")
    check(module, "V17", op_of(module, "g"), "reads %s, which comm.wait on stream 0 may not have written yet")


def test_v18_a_write_on_another_stream_than_the_read() -> None:
    text = GOOD.replace("kv.write(%kv0, %k, %k,", "kv.write(%kv0, %x3, %x3,").replace("  sched.wait(%e2)\n", "")
    text = text.replace("  %w = param", "  %x3 = t.reshape(%x, shape=[N, 1, 4]) : f32[N, 1, 4]\n  %w = param")
    module = parse_module(text)
    message = "kv.write on stream 0 uses up state version %kv0, which kv.attend on stream 2 may still be reading"
    help = "record an event on stream 2 after kv.attend and wait for it on stream 0 before kv.write"
    check(module, "V18", op_of(module, "kv1"), message, help)


def test_v19_collectives_of_one_group_on_two_streams() -> None:
    module = broken("%d = comm.all_reduce_start(%k, group=@dp", "%d = comm.all_reduce_start(%k, group=@tp")
    message = (
        "comm.all_reduce_start of %d on stream 2 is not ordered after that of %g on stream 1: ranks could issue the "
        "collectives of @tp in different orders"
    )
    check(module, "V19", op_of(module, "d"), message, "start all collectives of a group on one stream")
    ordered = (
        "  %o = sched.record(stream=1) : !event\n  sched.wait(%o, stream=2)\n  %d = comm.all_reduce_start(%k, group=@tp"
    )
    verify(broken("  %d = comm.all_reduce_start(%k, group=@dp", ordered))


def test_events_may_be_waited_for_by_many_and_by_none() -> None:
    again = "  sched.wait(%e, stream=1)\n  sched.wait(%e, stream=1)\n  sched.wait(%e, stream=7)\n  sched.wait(%e)\n"
    verify(broken("  sched.wait(%e, stream=1)\n", again))


def test_v1_a_wait_before_its_record() -> None:
    module = good()
    wait = wait_of(module, "e")
    wait.move_before(op_of(module, "e"))
    check(module, "V1", wait, "defined later")


def test_weights_are_there_before_every_stream() -> None:
    module = good()
    assert op_of(module, "w").stream == 3  # and stream 0 reads it without an event
    first = module.func().ops.first
    assert first is not None
    Builder.before(first).create(Record, stream=9)
    verify(module)


# V15, several streams.


def planned(body: str, arena: str = "64*N") -> Module:
    return parse_module(
        "xir 1 stage=buf\ndim N in [1, 64]\ngroup @tp size=2\n"
        f"func @f(%x: f32[N, 4]) -> (f32[N, 4], f32[N, 4]) arena({arena}) {{\n{body}}}\n"
    )


CROSSING = """  %a = t.exp(%x, at=[0]) : f32[N, 4]
  %e = sched.record() : !event
  sched.wait(%e, stream=1)
  %b = t.neg(%a, stream=1) : f32[N, 4]
  %e1 = sched.record(stream=1) : !event
  sched.wait(%e1)
  %c = t.abs(%x, at=[0]) : f32[N, 4]
  %d = t.neg(%c) : f32[N, 4]
  return %b, %d
"""


def test_v15_a_place_is_free_when_the_other_stream_is_done_with_it() -> None:
    verify(planned(CROSSING))
    module = planned(CROSSING.replace("  sched.wait(%e1)\n", ""))
    func = module.func("f")
    blamed = next(o for o in func.ops if o.name == "t.abs")
    text = "%c at [0, +16*N) is not provably clear of %a at [0, +16*N), which t.neg on stream 1 may still be using"
    check(module, "V15", blamed, text, "order these ops with an event")
    verify(planned(CROSSING.replace("  sched.wait(%e1)\n", "").replace("t.abs(%x, at=[0])", "t.abs(%x, at=[16*N])")))


def test_v15_what_is_written_first_on_the_other_stream_may_not_come_back_too_early() -> None:
    """The list order alone says nothing: %c stands after all uses of %a, on a stream that never heard of them."""
    body = CROSSING.replace("  sched.wait(%e1)\n", "").replace("t.abs(%x, at=[0])", "t.abs(%x, at=[0], stream=1)")
    verify(planned(body.replace("%d = t.neg(%c)", "%d = t.neg(%c, stream=1)")))
    other = body.replace("t.abs(%x, at=[0], stream=1)", "t.abs(%x, at=[0], stream=2)")
    module = planned(other.replace("%d = t.neg(%c)", "%d = t.neg(%c, stream=2)"))
    check(module, "V15", next(o for o in module.func("f").ops if o.name == "t.abs"), "%c")


IN_FLIGHT = """  %a = t.exp(%x, at=[0]) : f32[N, 4]
  %f = comm.all_reduce_start(%a, group=@tp) : !future<f32[N, 4]>
  %c = t.abs(%x, at=[32*N]) : f32[N, 4]
  %d = t.neg(%c) : f32[N, 4]
  %s = comm.wait(%f, at=[16*N]) : f32[N, 4]
  %b = t.neg(%s) : f32[N, 4]
  return %b, %d
"""


@pytest.mark.parametrize("streams", ["one", "two"])
def test_v15_a_collective_in_flight_uses_its_operand_and_its_result(streams: str) -> None:
    body = IN_FLIGHT
    if streams == "two":
        body = body.replace("group=@tp", "group=@tp, stream=1")
        body = body.replace("  %f =", "  %e = sched.record() : !event\n  sched.wait(%e, stream=1)\n  %f =")
    verify(planned(body))
    for place in ("0", "16*N"):
        module = planned(body.replace("at=[32*N]", f"at=[{place}]"))
        check(module, "V15", next(o for o in module.func("f").ops if o.name == "t.abs"), "%c")
    module = planned(body.replace("at=[16*N]", "at=[0]"))
    check(module, "V15", next(o for o in module.func("f").ops if o.name == "comm.wait"), "%s at [0")
    after = body.replace("  %c = t.abs(%x, at=[32*N]) : f32[N, 4]\n  %d = t.neg(%c) : f32[N, 4]\n", "")
    after = after.replace("  return", "  %c = t.abs(%x, at=[0]) : f32[N, 4]\n  %d = t.neg(%c) : f32[N, 4]\n  return")
    verify(planned(after))  # the operand's bytes are free after the wait
