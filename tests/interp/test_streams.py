"""Random orders of streams: sound modules give what list order gives; what is wrong shows, at the op to blame."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from xllm_compiler.interp import run, run_interleaved, run_interleaved_ranks, run_ranks
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.semantics import Array
from xllm_compiler.ir.verify import verify

SEEDS = range(40)


def module(body: str, arena: str = "", returns: str = "f32[N, 4]", ranks: int = 1) -> Module:
    stage, planned = ("buf", f" arena({arena})") if arena else ("sched", "")
    return parse_module(
        f"xir 1 stage={stage}\ndim N in [1, 64]\ngroup @tp size={ranks}\n"
        f"func @step(%x: f32[N, 4]) -> ({returns}){planned} {{\n{body}}}\n",
        "streams.xir",
    )


def x(rank: int = 0) -> dict[str, Array]:
    return {"x": np.random.default_rng(rank).standard_normal((3, 4)).astype(np.float32)}


def caught(m: Module, ranks: int = 1, precise: bool = False) -> list[IrError]:
    """The errors of the seeds that show one."""
    out = []
    for seed in SEEDS:
        try:
            run_interleaved_ranks(m, "step", [x(r) for r in range(ranks)], [{}] * ranks, seed=seed, precise=precise)
        except IrError as e:
            out.append(e)
    return out


def same(m: Module, ranks: int = 1) -> None:
    inputs, params = [x(r) for r in range(ranks)], [{}] * ranks
    for precise in (False, True):
        want = run_ranks(m, "step", inputs, params, precise=precise)
        for seed in SEEDS:
            got = run_interleaved_ranks(m, "step", inputs, params, seed=seed, precise=precise)
            for a, b in zip(want, got, strict=True):
                assert [v.tobytes() for v in a] == [v.tobytes() for v in b]


TWO = """  %a = t.exp(%x) : f32[N, 4]
  %e = sched.record() : !event
  sched.wait(%e, stream=1)
  %b = t.neg(%a, stream=1) : f32[N, 4]
  %e1 = sched.record(stream=1) : !event
  %c = t.abs(%x) : f32[N, 4]
  sched.wait(%e1)
  %y = t.add(%b, %c) : f32[N, 4]
  return %y
"""
PLANNED = TWO.replace("t.exp(%x)", "t.exp(%x, at=[0])").replace("t.abs(%x)", "t.abs(%x, at=[32*N])")
PLANNED = PLANNED.replace("stream=1) : f32", "stream=1, at=[16*N]) : f32")


def test_sound_modules_give_what_list_order_gives() -> None:
    for m in (module(TWO), module(PLANNED, "48*N")):
        verify(m)
        same(m)
        assert run_interleaved(m, "step", x(), seed=1)[0].tobytes() == run(m, "step", x())[0].tobytes()


def test_the_order_is_a_function_of_the_seed() -> None:
    m = module(PLANNED.replace("  sched.wait(%e, stream=1)\n", ""), "48*N")
    assert [str(e) for e in caught(m)] == [str(e) for e in caught(m)]


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("stage", ["sched", "buf"])
def test_a_missing_wait_is_a_read_of_what_is_not_there(stage: str, precise: bool) -> None:
    body, arena = (TWO, "") if stage == "sched" else (PLANNED, "48*N")
    m = module(body.replace("  sched.wait(%e, stream=1)\n", ""), arena)
    errors = caught(m, precise=precise)
    assert 5 < len(errors) < 35, len(errors)
    for e in errors:
        assert e.op is not None and e.op.results[0].name == "b"
        assert "t.neg on stream 1 reads %a before t.exp on stream 0 has made it" in e.message
        assert ("it finds bytes that were never written" in e.message) == (stage == "buf")
        assert "order them: sched.record on stream 0 after t.exp, sched.wait on stream 1 before t.neg" in e.help


def test_the_error_shows_the_steps_that_led_to_it() -> None:
    m = module(PLANNED.replace("  sched.wait(%e, stream=1)\n", ""), "48*N")
    neg = next(o for o in m.func().ops if o.name == "t.neg")
    neg.loc = neg.loc.touched_by("some-pass/some-rule")
    e = caught(m)[0]
    lines = e.where.splitlines()
    assert any(line.startswith("    > %b = t.neg(%a, stream=1, at=[16*N])") for line in lines)
    assert "  touched by some-pass/some-rule" in lines
    steps = lines[lines.index("  the last steps of this order:") + 1 :]
    assert steps and steps[-1] == "    rank 0 stream 1  %b = t.neg(%a, stream=1, at=[16*N]) : f32[N, 4]"
    assert e.message.endswith(")") and "(rank 0, seed " in e.message


def test_freed_bytes_are_poison_again() -> None:
    """%c wants its bytes before anyone has written them: what is found are those of %a, who is done with them."""
    m = module(
        """  %a = t.exp(%x, at=[0]) : f32[N, 4]
  %b = t.neg(%a) : f32[N, 4]
  %c = t.abs(%x, at=[0]) : f32[N, 4]
  %d = t.neg(%c, stream=1) : f32[N, 4]
  return %b, %d
""",
        "16*N",
        "f32[N, 4], f32[N, 4]",
    )
    found = {e.message.partition("it finds ")[2].partition(" (rank")[0] for e in caught(m)}
    assert found == {"bytes that were never written", "the bytes of %a at [0, 48), freed", "the bytes of %a at [0, 48)"}


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("0", "t.abs on stream 0 writes %c at [0, 48) over %a at [0, 48), which t.neg on stream 1 has still to read"),
        (
            "16*N",
            "t.abs on stream 0 writes %c at [48, 96) over %b at [48, 96), which t.add on stream 0 has still to read",
        ),
        ("47*N", "t.abs writes %c at [141, 189), outside the arena of 144 bytes"),
    ],
)
def test_bytes_that_are_taken_too_early(place: str, text: str) -> None:
    for precise in (False, True):
        errors = caught(module(PLANNED.replace("at=[32*N]", f"at=[{place}]"), "48*N"), precise=precise)
        assert any(text in e.message for e in errors), [e.message for e in errors]


def test_no_op_writes_over_what_it_reads() -> None:
    body = "  %a = t.exp(%x, at=[0]) : f32[N, 4]\n  %b = t.neg(%a, at=[0]) : f32[N, 4]\n"
    errors = caught(module(body + "  %y = t.abs(%b) : f32[N, 4]\n  return %y\n", "16*N"))
    assert len(errors) == len(SEEDS) and "which t.neg itself reads" in errors[0].message


def test_views_are_their_operands_bytes() -> None:
    body = """  %a = t.exp(%x, at=[0]) : f32[N, 4]
  %v = t.reshape(%a, shape=[4*N]) : f32[4*N]
  %w = t.reshape(%v, shape=[2*N, 2], at=[0]) : f32[2*N, 2]
  %c = t.abs(%x, at=[16*N]) : f32[N, 4]
  %d = t.neg(%c) : f32[N, 4]
  %y = t.neg(%w) : f32[2*N, 2]
  return %y, %d
"""
    same(module(body, "32*N", "f32[2*N, 2], f32[N, 4]"))
    errors = caught(module(body.replace("at=[16*N]", "at=[0]"), "32*N", "f32[2*N, 2], f32[N, 4]"))
    assert len(errors) == len(SEEDS) and "over %a at [0, 48), which t.neg on stream 0 has" in errors[0].message


FLIGHT = """  %a = t.exp(%x, at=[0]) : f32[N, 4]
  %e = sched.record() : !event
  sched.wait(%e, stream=1)
  %f = comm.all_reduce_start(%a, group=@tp, stream=1) : !future<f32[N, 4]>
  %c = t.abs(%x, at=[32*N]) : f32[N, 4]
  %d = t.neg(%c) : f32[N, 4]
  %s = comm.wait(%f, at=[16*N]) : f32[N, 4]
  %b = t.neg(%s) : f32[N, 4]
  return %b, %d
"""
PAIR = "f32[N, 4], f32[N, 4]"


def test_collectives_in_flight() -> None:
    m = module(FLIGHT, "48*N", PAIR, ranks=2)
    verify(m)
    same(m, ranks=2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("at=[32*N]", "at=[0]"), "which comm.all_reduce_start on stream 1 reads until its comm.wait is done"),
        (("at=[32*N]", "at=[16*N]"), "over %s at [48, 96), which a collective in flight is to write"),
        (("at=[16*N]", "at=[0]"), "comm.all_reduce_start on stream 1 writes %s at [0, 48) over %a at [0, 48)"),
        (("%e, stream=1)", "%e, stream=2)"), "comm.all_reduce_start on stream 1 reads %a before t.exp on stream 0"),
        (("t.neg(%s)", "t.neg(%s, stream=4)"), "t.neg on stream 4 reads %s before comm.wait on stream 0 has made it"),
    ],
)
def test_what_a_collective_in_flight_shows(change: tuple[str, str], text: str) -> None:
    m = module(FLIGHT.replace(*change), "48*N", PAIR, ranks=2)
    errors = caught(m, ranks=2)
    assert len(errors) > 5 and any(text in e.message for e in errors), [e.message for e in errors]
    with pytest.raises(IrError, match=r"V1[57]"):
        verify(m)


def test_a_collective_stays_in_flight_for_as_long_as_it_may() -> None:
    """Bytes that are taken while it is in flight are found out even where the whole step lies in between."""
    filler = "".join(f"  %g{i} = t.neg(%x) : f32[N, 4]\n" for i in range(30))
    m = module(FLIGHT.replace("  %c =", filler + "  %c =").replace("at=[32*N]", "at=[0]"), "48*N", PAIR, ranks=2)
    assert len(caught(m, ranks=2)) > 3


SWAP = """  %a = t.exp(%x) : f32[N, 4]
  %f = comm.all_reduce_start(%x, group=@tp, stream=1) : !future<f32[N, 4]>
  %g = comm.all_reduce_start(%x, group=@tp, stream=2) : !future<f32[N, 4]>
  %s = comm.wait(%f) : f32[N, 4]
  %t = comm.wait(%g) : f32[N, 4]
  %y = t.add(%s, %t) : f32[N, 4]
  return %y
"""


def test_ranks_that_issue_collectives_in_different_orders() -> None:
    m = module(SWAP, ranks=2)
    with pytest.raises(IrError, match="V19"):
        verify(m)
    errors = caught(m, ranks=2)
    assert 5 < len(errors) < 35
    for e in errors:
        assert "ranks issue the collectives of @tp in different orders: number 1 is" in e.message
        assert "%f (stream 1) on rank" in e.message and "%g (stream 2) on rank" in e.message
        assert "one stream" in e.help and e.op is not None and e.op.name == "comm.all_reduce_start"
    same(module(SWAP.replace("stream=2", "stream=1"), ranks=2), ranks=2)


def test_a_deadlock_names_who_waits_for_what() -> None:
    m = module(TWO)
    ops = {(o.name, o.stream): o for o in m.func().ops}
    ops["sched.wait", 1].move_before(ops["t.neg", 1])
    ops["sched.wait", 0].move_before(ops["sched.record", 0])  # before its record: 0 waits for 1, and 1 for 0
    errors = caught(m)
    assert len(errors) == len(SEEDS)
    assert "deadlock" in errors[0].message
    assert "rank 0 stream 0: sched.wait for %e1, whose record on stream 1 has not run" in errors[0].message
    assert "rank 0 stream 1: sched.wait for %e, whose record on stream 0 has not run" in errors[0].message


def test_a_collective_that_one_rank_never_starts_is_a_deadlock() -> None:
    m = module(SWAP.replace("stream=2", "stream=1"), ranks=2)
    ops = list(m.func().ops)
    m.func().ops.unlink(ops[1])
    assert all("comm.wait for %f, which ranks [0, 1] have not started" in e.message for e in caught(m, ranks=2))


KV = "kv<f32, heads=1, k=4, v=4, page=16>[P]"


def test_kv_versions_across_streams() -> None:
    text = f"""xir 1 stage=sched
dim N in [1, 8]
dim B in [1, 8]
dim P in [1, 8]
func @step(%q: f32[N, 1, 4], %pos: i32[N], %seq: i32[N], %start: i32[B + 1], %table: i32[B, 1], %kv0: {KV}) -> (
    f32[N, 1, 4], {KV} alias %kv0) {{
  %y = kv.attend(%kv0, %q, %pos, %seq, %start, %table, scale=0.5, stream=1) : f32[N, 1, 4]
  %e = sched.record(stream=1) : !event
  sched.wait(%e)
  %kv1 = kv.write(%kv0, %q, %q, %pos, %seq, %table) : {KV}
  return %y, %kv1
}}
"""
    rng = np.random.default_rng(0)
    given: dict[str, Array] = {
        "q": rng.standard_normal((3, 1, 4)).astype(np.float32),
        "pos": np.arange(3, dtype=np.int32),
        "seq": np.zeros(3, np.int32),
        "start": np.array([0, 3], np.int32),
        "table": np.array([[1]], np.int32),
        "kv0": rng.standard_normal((32, 1, 8)).astype(np.float32),
    }
    m = parse_module(text)
    verify(m)
    want = run(m, "step", given)
    for seed in SEEDS:
        got = run_interleaved(m, "step", given, seed=seed)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(want, got, strict=True))
    m = parse_module(text.replace("  sched.wait(%e)\n", ""))
    with pytest.raises(IrError, match="V18"):
        verify(m)
    messages = []
    for seed in SEEDS:
        try:
            run_interleaved(m, "step", given, seed=seed)
        except IrError as e:
            messages.append(e.message)
    assert 5 < len(messages) < 35
    assert (
        "kv.attend on stream 1 reads state version %kv0 after kv.write on stream 0 has made %kv1 of it" in messages[0]
    )


def _stage(m: Module) -> None:
    m.stage = "graph"


def _pairs(m: Module) -> None:
    m.groups["tp"] = RankGroup(2)


@pytest.mark.parametrize(
    ("spoil", "ranks", "message"),
    [(_stage, 1, "stage graph has no streams"), (_pairs, 3, "the groups need 2 ranks, 3 are run")],
)
def test_what_cannot_be_run(spoil: Callable[[Module], None], ranks: int, message: str) -> None:
    m = module(SWAP)
    spoil(m)
    with pytest.raises(IrError, match=message):
        run_interleaved_ranks(m, "step", [x(r) for r in range(ranks)], [{}] * ranks, seed=0)
    with pytest.raises(IrError, match="1 ranks of inputs and 2 of params"):
        run_interleaved_ranks(module(SWAP), "step", [x()], [{}, {}], seed=0)
