"""check_equal: sees what it must, forgives what rounding does, and says where it went wrong."""

from __future__ import annotations

import random

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.testing.corpus import entry
from xllm_compiler.testing.equiv import Reference, check_equal
from xllm_compiler.testing.graphs import random_module

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\n"
KV = "kv<f32, heads=1, k=4, v=4, page=4>[P]"
KV_HEAD = HEAD + "dim B in [1, 8]\ndim P in [1, 64]\nassume N - B >= 0\n"
KV_ARGS = f"%k: f32[N, 1, 4], %v: f32[N, 1, 4], %pos: i32[N], %seq: i32[N], %table: i32[B, 4], %kv: {KV}"

LARGE_ROWS = """  %i = t.iota(size=N) : i32[N]
  %f = t.cast(%i, dtype=f32) : f32[N]
  %e = t.exp(%f) : f32[N]
  %g = t.reshape(%e, shape=[N, 1]) : f32[N, 1]
"""


def func(body: str, returns: str = "f32[N, 8]", args: str = "%x: f32[N, 8]", head: str = HEAD) -> str:
    return f"{head}\nfunc @f({args}) -> ({returns}) {{\n{body}\n}}\n"


def both(before: str, after: str, **given: object) -> str | None:
    """The report of comparing two bodies, or None."""
    modules = [parse_module(func(text), f"{name}.xir") for name, text in (("before", before), ("after", after))]
    found = check_equal(*modules, **given)  # type: ignore[arg-type]
    return None if found is None else str(found)


SAME = {
    "another order of summing": (
        "  %a = t.exp(%x) : f32[N, 8]\n  %b = t.add(%x, %a) : f32[N, 8]\n  %y = t.add(%b, %b) : f32[N, 8]\n  return %y",
        "  %a = t.exp(%x) : f32[N, 8]\n  %b = t.add(%a, %a) : f32[N, 8]\n  %c = t.add(%x, %x) : f32[N, 8]\n"
        "  %y = t.add(%b, %c) : f32[N, 8]\n  return %y",
    ),
    "a chain that blows rounding up": (
        "  %a = t.mul(%x, %x) : f32[N, 8]\n  %b = t.mul(%a, %x) : f32[N, 8]\n  %e = t.exp(%b) : f32[N, 8]\n"
        "  %y = t.cos(%e) : f32[N, 8]\n  return %y",
        "  %a = t.mul(%x, %x) : f32[N, 8]\n  %b = t.mul(%x, %a) : f32[N, 8]\n  %h = t.const(value=0.5) : f32[]\n"
        "  %b2 = t.mul(%b, %h) : f32[N, 8]\n  %e2 = t.exp(%b2) : f32[N, 8]\n  %e = t.mul(%e2, %e2) : f32[N, 8]\n"
        "  %y = t.cos(%e) : f32[N, 8]\n  return %y",
    ),
    "a constant kept in its dtype": (
        "  %c = t.const(value=0.1) : f32[]\n  %y = t.mul(%x, %c) : f32[N, 8]\n  return %y",
        "  %c = t.const(value=0.10000000149011612) : f32[]\n  %y = t.mul(%x, %c) : f32[N, 8]\n  return %y",
    ),
    "infinities on both sides": (
        "  %l = t.log(%x) : f32[N, 8]\n  return %l",
        "  %l = t.log(%x) : f32[N, 8]\n  %a = t.abs(%l) : f32[N, 8]\n  %m = t.min(%a, %a) : f32[N, 8]\n  return %l",
    ),
}
DIFFERENT = {
    "a sign": ("  %y = t.sub(%x, %x) : f32[N, 8]\n  return %y", "  %y = t.add(%x, %x) : f32[N, 8]\n  return %y"),
    "a constant in its seventh digit": (
        "  %c = t.const(value=0.1) : f32[]\n  %y = t.mul(%x, %c) : f32[N, 8]\n  return %y",
        "  %c = t.const(value=0.1000003) : f32[]\n  %y = t.mul(%x, %c) : f32[N, 8]\n  return %y",
    ),
    "a constant that is exact in every dtype": (
        "  %c = t.const(value=0.5) : f32[]\n  %y = t.mul(%x, %c) : f32[N, 8]\n  return %y",
        "  %c = t.const(value=0.50000001) : f32[]\n  %y = t.mul(%x, %c) : f32[N, 8]\n  return %y",
    ),
    "an epsilon": (
        "  %y = nn.rms_norm(%x, eps=1e-05) : f32[N, 8]\n  return %y",
        "  %y = nn.rms_norm(%x, eps=1e-06) : f32[N, 8]\n  return %y",
    ),
    "NaN for a number": (
        "  %y = t.relu(%x) : f32[N, 8]\n  return %y",
        "  %l = t.sqrt(%x) : f32[N, 8]\n  %y = t.mul(%l, %l) : f32[N, 8]\n  return %y",
    ),
    "one row of many": (
        "  %y = t.exp(%x) : f32[N, 8]\n  return %y",
        "  %y = t.exp(%x) : f32[N, 8]\n  %i = t.iota(size=N) : i32[N]\n  %c = t.const(value=5, dtype=i32) : i32[]\n"
        "  %e = t.eq(%i, %c) : bool[N]\n  %r = t.reshape(%e, shape=[N, 1]) : bool[N, 1]\n"
        "  %z = t.where(%r, %x, %y) : f32[N, 8]\n  return %z",
    ),
    "a small row beside a large one": (
        LARGE_ROWS + "  %y = t.mul(%x, %g) : f32[N, 8]\n  return %y",
        LARGE_ROWS + "  %z = t.mul(%x, %g) : f32[N, 8]\n  %o = t.const(value=1e-08) : f32[]\n"
        "  %y = t.add(%z, %o) : f32[N, 8]\n  return %y",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_forgives_what_rounding_does(name: str) -> None:
    assert both(*SAME[name]) is None


@pytest.mark.parametrize("name", DIFFERENT)
def test_sees_wrong_algebra(name: str) -> None:
    told = both(*DIFFERENT[name])
    assert told is not None and "in exact arithmetic (f64): wrong algebra" in told


def test_the_report_names_the_first_value_that_differs() -> None:
    told = both(
        "  %a = t.exp(%x) : f32[N, 8]\n  %b = t.neg(%a) : f32[N, 8]\n  %y = t.abs(%b) : f32[N, 8]\n  return %y",
        "  %a = t.sin(%x) : f32[N, 8]\n  %b = t.neg(%a) : f32[N, 8]\n  %y = t.abs(%b) : f32[N, 8]\n  return %y",
        sizes=[{"N": 2}],
    )
    assert told is not None
    lines = told.splitlines()
    assert lines[0].startswith("@f does not compute what it did: return 0, %y: f32[N, 8], at N=2, in exact arithmetic")
    assert lines[1].startswith("  element [0, 0] was ") and "allowed " in lines[1]
    assert lines[2] == "  the first value that is not what its namesake was: %a"
    assert "    > %a = t.sin(%x) : f32[N, 8]" in lines
    assert lines[-1].startswith("  help: `xllm-bisect FILE -p PIPELINE`")


def test_rounding_is_judged_apart_from_algebra() -> None:
    exact = "  %a = t.exp(%x) : f32[N, 8]\n  return %a"
    rounded = (
        "  %a = t.exp(%x) : f32[N, 8]\n  %b = t.cast(%a, dtype=bf16) : bf16[N, 8]\n"
        "  %c = t.cast(%b, dtype=f32) : f32[N, 8]\n  return %c"
    )
    assert both(exact, rounded, typed=False) is None
    told = both(exact, rounded)
    assert told is not None and "in the real dtypes: more rounding than allowed" in told
    assert both(exact, rounded, ulps=2**17) is None


def test_integers_and_truth_values_are_exact() -> None:
    args = "%i: i32[N], %x: f32[N]"

    def module(body: str) -> str:
        return func(body, "i32[N], bool[N]", args)

    zero = "  %z = t.const(value=0, dtype=i32) : i32[]\n  %f = t.const(value=0.0) : f32[]\n"
    before = parse_module(
        module(zero + "  %p = t.gt(%x, %f) : bool[N]\n  %j = t.max(%i, %z) : i32[N]\n  return %j, %p")
    )
    same = parse_module(module(zero + "  %p = t.lt(%f, %x) : bool[N]\n  %j = t.relu(%i) : i32[N]\n  return %j, %p"))
    ints = parse_module(module(zero + "  %p = t.gt(%x, %f) : bool[N]\n  %j = t.abs(%i) : i32[N]\n  return %j, %p"))
    bools = parse_module(module(zero + "  %p = t.ge(%x, %f) : bool[N]\n  %j = t.max(%i, %z) : i32[N]\n  return %j, %p"))
    assert check_equal(before, same) is None
    found = check_equal(before, ints)
    assert found is not None and found.index == 0 and found.bound == 0.0
    found = check_equal(before, bools)  # they differ at 0.0 only, which made-up floats hold
    assert found is not None and found.index == 1


def test_a_lost_kv_write_is_seen() -> None:
    write = f"  %kv1 = kv.write(%kv, %k, %v, %pos, %seq, %table) : {KV}\n"
    half = "  %z = t.sub(%v, %v) : f32[N, 1, 4]\n"
    before = parse_module(func(write + "  return %kv1", f"{KV} alias %kv", KV_ARGS, KV_HEAD))
    lost = parse_module(func("  return %kv", f"{KV} alias %kv", KV_ARGS, KV_HEAD))
    zero = parse_module(
        func(half + write.replace("%k, %v,", "%k, %z,") + "  return %kv1", f"{KV} alias %kv", KV_ARGS, KV_HEAD)
    )
    assert check_equal(before, clone_module(before)) is None
    for broken in (lost, zero):
        found = check_equal(before, broken)
        assert found is not None and "return 0, %kv" in str(found) and found.precise


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_ranks_run_in_lockstep(kind: str) -> None:
    """Without the all-reduce one rank computes the same, two do not, also where the operand is no partial sum."""

    def module(ranks: int, reduced: bool) -> str:
        body = '  %w = param(name="w") : f32[8, 8]\n  %a = nn.linear(%x, %w) : f32[N, 8]\n'
        if reduced:
            body += f"  %s = comm.all_reduce_start(%a, group=@tp, kind={kind}) : !future<f32[N, 8]>\n"
            body += "  %r = comm.wait(%s) : f32[N, 8]\n  return %r"
        else:
            body += "  return %a"
        return func(body, head=HEAD + f"group @tp size={ranks}\n")

    for ranks in (1, 2, 4):
        before, after = (parse_module(module(ranks, r)) for r in (True, False))
        found = check_equal(before, after)
        assert (found is None) == (ranks == 1)
        assert found is None or f" of {ranks}, in exact" in str(found)


def test_the_share_of_another_rank_is_noticed() -> None:
    """Params are the same on all ranks, so that only the rank dim tells shares apart."""
    before = entry("written/decoder-tp2").module()
    text = print_module(before)
    assert check_equal(before, parse_module(text), [{"N": 5}]) is None
    for old, new in (
        ("start=8*R, stop=8*R + 8", "start=0, stop=8"),
        ("=12*R, stop=12*R + 12", "=12 - 12*R, stop=24 - 12*R"),
    ):
        found = check_equal(before, parse_module(text.replace(old, new, 1)), [{"N": 5}])
        assert found is not None and " of 2, in exact arithmetic" in found.message


def test_interfaces_that_cannot_be_compared_are_errors() -> None:
    before = parse_module(func("  %y = t.neg(%x) : f32[N, 8]\n  return %y", args="%x: f32[N, 8], %u: f32[N]"))
    fewer = parse_module(func("  %y = t.neg(%x) : f32[N, 8]\n  return %y"))
    assert check_equal(before, fewer) is None
    with pytest.raises(XllmError, match=r"%u: f32\[N\] is a new argument"):
        check_equal(fewer, before)
    with pytest.raises(XllmError, match=r"%x was f32\[N, 8\] and is f32\[N, 4\]"):
        check_equal(fewer, parse_module(func("  return %x", "f32[N, 4]", "%x: f32[N, 4]")))
    more = parse_module(func("  %y = t.neg(%x) : f32[N, 8]\n  return %y, %x", "f32[N, 8], f32[N, 8]"))
    assert check_equal(fewer, more) is None  # what came last is new, and the first is compared
    assert check_equal(fewer, parse_module(func("  return %x, %x", "f32[N, 8], f32[N, 8]"))) is not None
    with pytest.raises(XllmError, match=r"it returned \(f32\[N, 8\], f32\[N, 8\]\) and returns \(f32\[N, 8\]\)"):
        check_equal(more, fewer)
    gone = clone_module(fewer)
    del gone.funcs["f"]
    found = check_equal(fewer, gone)
    assert found is not None and found.message == "function @f is gone" and found.index == -1


def test_what_can_no_longer_be_run_is_a_mismatch() -> None:
    told = both(
        '  %w = param(name="w") : f32[8]\n  %y = t.mul(%x, %w) : f32[N, 8]\n  return %y',
        '  %w = param(name="v") : f32[8]\n  %y = t.mul(%x, %w) : f32[N, 8]\n  return %y',
    )
    assert told is not None and told.startswith("@f cannot be run any more at N=1: no parameter 'v' was given")


def test_sizes_of_both_modules_are_met() -> None:
    before = parse_module(func("  %y = t.neg(%x) : f32[N, 8]\n  return %y"))
    after = parse_module(
        func("  %y = t.neg(%x) : f32[N, 8]\n  return %y", head=HEAD + "dim M in [1, 8]\nassume N - M - 1 >= 0\n")
    )
    assert check_equal(before, after) is None
    with pytest.raises(XllmError, match=r"no sizes of a small box meet the assumption .*M.* >= 0"):
        check_equal(before, after, [{"N": 1}])


@pytest.mark.parametrize("seed", range(0, 24, 3))
def test_a_random_module_equals_itself(seed: int) -> None:
    module = random_module(random.Random(seed).randrange, size=16)
    reference = Reference(module, [{"N": 5}] if "N" in module.scope.symbols else [{}])
    assert reference.compare(clone_module(module)) is None


def test_one_reference_serves_many() -> None:
    before = parse_module(func("  %y = t.exp(%x) : f32[N, 8]\n  return %y"))
    reference = Reference(before)
    wrong = parse_module(func("  %y = t.neg(%x) : f32[N, 8]\n  return %y"))
    assert [reference.compare(m) is None for m in (before, wrong, clone_module(before))] == [True, False, True]
    assert reference.compare(wrong, modes=()) is None
    assert not reference.blind


def test_what_drowns_in_noise_is_said_to_be_blind() -> None:
    chaos = "  %a = t.exp(%x) : f32[N, 8]\n  %b = t.exp(%a) : f32[N, 8]\n  %y = t.cos(%b) : f32[N, 8]\n  return %y"
    scaled = "  %c = t.const(value=4.0) : f32[]\n  %x4 = t.mul(%x, %c) : f32[N, 8]\n  %p = t.abs(%x4) : f32[N, 8]\n"
    module = parse_module(func(scaled + chaos.replace("t.exp(%x)", "t.exp(%p)")))
    reference = Reference(module, [{"N": 3}])
    assert reference.compare(clone_module(module)) is None
    assert reference.blind == ["return 0 of @f at N=3", "return 0 of @f at N=3, typed"]
