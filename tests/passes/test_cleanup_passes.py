"""dce, cse and fold: what they do, what they leave alone, and that nothing changes its meaning."""

from __future__ import annotations

import pytest

from xllm_compiler.testing.xir import Case

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\n"


def func(body: str, returns: str = "f32[N, 8]", args: str = "%x: f32[N, 8]", more: str = "") -> Case:
    return Case.parse(f"{HEAD}{more}\nfunc @f({args}) -> ({returns}) {{\n{body}\n}}\n")


def test_dce_erases_dead_chains_and_params() -> None:
    case = func(
        """  %w = param(name="w") : f32[8]
  %dead = t.mul(%x, %w) : f32[N, 8]
  %deader = t.exp(%dead) : f32[N, 8]
  %y = t.neg(%x) : f32[N, 8]
  return %y"""
    ).run("dce")
    assert case.op_names() == ["t.neg"] and "param" not in case.text
    case.check_same()


def test_dce_keeps_effects_and_everything_used() -> None:
    case = func(
        """  %f = comm.all_reduce_start(%x, group=@tp) : !future<f32[N, 8]>
  %w = comm.wait(%f) : f32[N, 8]
  %y = t.neg(%x) : f32[N, 8]
  return %y""",
        more="group @tp size=1\n",
    ).run("dce")
    assert not case.changed


def test_cse_merges_equal_ops_and_commuted_ones() -> None:
    case = func(
        """  %w = param(name="w") : f32[8]
  %w_1 = param(name="w") : f32[8]
  %a = t.add(%x, %w) : f32[N, 8]
  %b = t.add(%w_1, %x) : f32[N, 8]
  %c = t.exp(%a) : f32[N, 8]
  %d = t.exp(%b) : f32[N, 8]
  %y = t.mul(%c, %d) : f32[N, 8]
  return %y"""
    ).run("cse")
    assert case.op_names() == ["t.add", "t.exp", "t.mul"] and case.text.count("param") == 1
    case.check_same()


def test_cse_tells_attributes_apart() -> None:
    case = func(
        """  %z = t.const(value=0.0) : f32[]
  %m = t.const(value=-0.0) : f32[]
  %a = t.softmax(%x, axis=1) : f32[N, 8]
  %b = t.softmax(%x, axis=0) : f32[N, 8]
  %c = t.sub(%x, %a) : f32[N, 8]
  %d = t.sub(%a, %x) : f32[N, 8]
  %e = t.div(%x, %z) : f32[N, 8]
  %g = t.div(%x, %m) : f32[N, 8]
  %u = t.add(%b, %c) : f32[N, 8]
  %v = t.add(%d, %e) : f32[N, 8]
  %t = t.add(%u, %v) : f32[N, 8]
  %y = t.add(%t, %g) : f32[N, 8]
  return %y"""
    ).run("cse")
    assert not case.changed


def test_cse_leaves_cache_writes_alone() -> None:
    case = Case.parse(
        """xir 1 stage=graph
dim N in [1, 64]
dim B in [1, 8]
dim P in [1, 64]

func @f(
    %k: f32[N, 1, 4],
    %pos: i32[N],
    %seq: i32[N],
    %table: i32[B, 4],
    %c: kv<f32, heads=1, k=4, v=4, page=16>[P]
) -> (kv<f32, heads=1, k=4, v=4, page=16>[P] alias %c) {
  %c1 = kv.write(%c, %k, %k, %pos, %seq, %table) : kv<f32, heads=1, k=4, v=4, page=16>[P]
  %c2 = kv.write(%c1, %k, %k, %pos, %seq, %table) : kv<f32, heads=1, k=4, v=4, page=16>[P]
  return %c2
}
"""
    ).run("cse")
    assert not case.changed


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("%c = t.const(value=1.0) : f32[]\n %y = t.mul(%x, %c) : f32[N, 8]", []),
        ("%c = t.const(value=1, dtype=i32) : i32[]\n %y = t.mul(%c, %x) : f32[N, 8]", []),
        ("%c = t.const(value=0.0) : f32[]\n %y = t.add(%c, %x) : f32[N, 8]", []),
        ("%c = t.const(value=0.0) : f32[]\n %y = t.sub(%x, %c) : f32[N, 8]", []),
        ("%c = t.const(value=1.0) : f32[]\n %y = t.div(%x, %c) : f32[N, 8]", []),
        ("%c = t.const(value=1.0) : f32[]\n %y = t.pow(%x, %c) : f32[N, 8]", []),
        ("%a = t.neg(%x) : f32[N, 8]\n %y = t.neg(%a) : f32[N, 8]", []),
        ("%y = t.cast(%x, dtype=f32) : f32[N, 8]", []),
        ("%a = t.cast(%x, dtype=f64) : f64[N, 8]\n %y = t.cast(%a, dtype=f32) : f32[N, 8]", []),
        (
            "%a = t.reshape(%x, shape=[N, 2, 4]) : f32[N, 2, 4]\n %b = t.reshape(%a, shape=[2*N, 4]) : f32[2*N, 4]\n"
            " %y = t.reshape(%b, shape=[N, 8]) : f32[N, 8]",
            [],
        ),
        (
            "%a = t.transpose(%x, perm=[1, 0]) : f32[8, N]\n %y = t.transpose(%a, perm=[1, 0]) : f32[N, 8]",
            [],
        ),
        (
            "%a = t.reshape(%x, shape=[1, N, 8]) : f32[1, N, 8]\n"
            " %b = t.transpose(%a, perm=[1, 0, 2]) : f32[N, 1, 8]\n %y = t.reshape(%b, shape=[N, 8]) : f32[N, 8]",
            [],
        ),
        ("%y = t.slice(%x, axis=1, start=0, stop=8) : f32[N, 8]", []),
        (
            "%a = t.slice(%x, axis=1, start=0, stop=3) : f32[N, 3]\n"
            " %b = t.slice(%x, axis=1, start=3, stop=8) : f32[N, 5]\n %y = t.concat(%a, %b, axis=1) : f32[N, 8]",
            [],
        ),
        (
            "%a = t.concat(%x, %x, axis=1) : f32[N, 16]\n %y = t.slice(%a, axis=1, start=8, stop=16) : f32[N, 8]",
            [],
        ),
        (
            "%a = t.concat(%x, %x, axis=1) : f32[N, 16]\n %b = t.slice(%a, axis=1, start=2, stop=14) : f32[N, 12]\n"
            " %y = t.slice(%b, axis=1, start=2, stop=10) : f32[N, 8]",
            ["t.concat", "t.slice"],
        ),
        ("%y = t.expand(%x, shape=[N, 8]) : f32[N, 8]", []),
        ("%y = t.pad(%x, axis=1, lo=0, hi=0) : f32[N, 8]", []),
        ("%y = t.concat(%x, axis=0) : f32[N, 8]", []),
        (
            "%a = t.const(value=3.0) : f32[]\n %b = t.const(value=-0.5) : f32[]\n %c = t.pow(%a, %b) : f32[]\n"
            " %d = t.exp(%c) : f32[]\n %y = t.mul(%x, %d) : f32[N, 8]",
            ["t.mul"],
        ),
    ],
)
def test_fold(body: str, left: list[str]) -> None:
    case = func(f"  {body}\n  return %y").run("fold")
    assert case.op_names() == left
    case.check_same()


@pytest.mark.parametrize(
    "body",
    [
        "%c = t.const(value=2.0) : f32[]\n %y = t.mul(%x, %c) : f32[N, 8]",
        "%c = t.const(value=0.0) : f32[]\n %y = t.sub(%c, %x) : f32[N, 8]",
        "%c = t.const(value=1.0) : f32[]\n %y = t.div(%c, %x) : f32[N, 8]",
        "%a = t.cast(%x, dtype=bf16) : bf16[N, 8]\n %y = t.cast(%a, dtype=f32) : f32[N, 8]",  # rounds
        "%a = t.slice(%x, axis=1, start=3, stop=8) : f32[N, 5]\n"
        " %b = t.slice(%x, axis=1, start=0, stop=3) : f32[N, 3]\n %y = t.concat(%a, %b, axis=1) : f32[N, 8]",
        "%a = t.concat(%x, %x, axis=1) : f32[N, 16]\n %y = t.slice(%a, axis=1, start=4, stop=12) : f32[N, 8]",
    ],
)
def test_fold_leaves_alone(body: str) -> None:
    assert not func(f"  {body}\n  return %y").run("fold").changed


def test_fold_keeps_a_broadcast_by_one() -> None:
    """x * 1 is not x where it changes the shape."""
    case = func(
        "  %c = t.const(value=1.0) : f32[]\n  %o = t.expand(%c, shape=[N, 8]) : f32[N, 8]\n"
        "  %y = t.mul(%s, %o) : f32[N, 8]\n  return %y",
        args="%x: f32[N, 8], %s: f32[1, 8]",
    ).run("fold")
    assert "t.mul" in case.op_names()
    case.check_same()
