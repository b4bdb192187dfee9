"""The prover against brute force over small boxes: a wrong yes or no is fatal, "don't know" is counted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.dims import DimScope, ceildiv, const, dmax, dmin, parse_dim, sym
from xllm_compiler.dims.expr import Dim
from xllm_compiler.errors import XllmError

NAMES = ("B", "N")
Tree = Any
N, B = sym("N"), sym("B")

leaves = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(-6, 12))
binary = st.sampled_from(["+", "-", "+", "-", "*", "//", "%", "ceildiv", "min", "max"])
trees: st.SearchStrategy[Tree] = st.recursive(leaves, lambda s: st.tuples(binary, s, s), max_leaves=7)
ranges = st.tuples(st.integers(-4, 8), st.integers(0, 9), st.sampled_from([1, 1, 1, 2, 3]))


def build(tree: Tree) -> Dim:
    if isinstance(tree, str):
        return sym(tree)
    if isinstance(tree, int):
        return const(tree)
    a, b = build(tree[1]), build(tree[2])
    made: dict[str, Callable[[], Dim]] = {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "//": lambda: a // b,
        "%": lambda: a % b,
        "ceildiv": lambda: ceildiv(a, b),
        "min": lambda: dmin(a, b),
        "max": lambda: dmax(a, b),
    }
    return made[tree[0]]()


def scope_of(box: list[tuple[int, int, int]], facts: list[Dim]) -> DimScope:
    scope = DimScope()
    for name, (lo, width, multiple) in zip(NAMES, box, strict=True):
        scope.declare(name, lo, lo + width, multiple)
    for fact in facts:
        scope.assume(fact)
    return scope


def values(dim: Dim, box: list[tuple[int, int, int]], facts: list[Dim]) -> list[int] | None:
    """dim at every admissible point; None where some value does not exist."""
    out = []
    for point in itertools.product(*[[v for v in range(lo, lo + w + 1) if v % m == 0] for lo, w, m in box]):
        env = dict(zip(NAMES, point, strict=True))
        try:
            if all(f.evaluate(env) >= 0 for f in facts):
                out.append(dim.evaluate(env))
        except XllmError:
            return None
    return out


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.lists(trees, min_size=2, max_size=5), st.lists(trees, min_size=1, max_size=2), st.tuples(ranges, ranges))
def test_answers_do_not_depend_on_what_was_asked_before(
    asked: list[Tree], fact_trees: list[Tree], box_: tuple[tuple[int, int, int], ...]
) -> None:
    """A plan is proved while it is made, and again in a process that has only read its text."""
    try:
        dims, facts = [build(tree) for tree in asked], [build(f) for f in fact_trees]
        after_others = scope_of(list(box_), facts)
        alone = [scope_of(list(box_), facts) for _ in dims]
        answers = [(after_others.prove(d), after_others.bounds(d)) for d in dims]
    except XllmError:
        return
    assert answers == [(scope.prove(d), scope.bounds(d)) for scope, d in zip(alone, dims, strict=True)]


tally = {"decided": 0, "could be decided": 0}


@settings(max_examples=700, deadline=None, derandomize=True)
@given(trees, st.lists(trees, max_size=2), st.tuples(ranges, ranges))
def test_never_wrong(tree: Tree, fact_trees: list[Tree], box_: tuple[tuple[int, int, int], ...]) -> None:
    box = list(box_)
    try:
        dim, facts = build(tree), [build(f) for f in fact_trees]
        scope = scope_of(box, facts)
    except XllmError:  # a zero divisor or an empty range
        return
    points = values(dim, box, facts)
    if not points:
        return
    truth = True if min(points) >= 0 else False if max(points) < 0 else None
    answer = scope.prove(dim)
    assert answer is None or answer is truth, (str(dim), list(map(str, facts)), box)
    if not dim.is_const and truth is not None:
        tally["could be decided"] += 1
        tally["decided"] += answer is not None
    equal = True if set(points) == {0} else False if 0 not in points else None
    got = scope.prove_eq(dim, 0)
    assert got is None or got is equal
    lo, hi = scope.bounds(dim)
    assert (lo is None or lo <= min(points)) and (hi is None or hi >= max(points))


def test_rarely_undecided() -> None:
    """Of random questions that have an answer, most get it. On the tally of the test above, which it runs if alone."""
    if not tally["could be decided"]:
        test_never_wrong()
    assert tally["decided"] / tally["could be decided"] > 0.9, tally


def serving_scope() -> DimScope:
    scope = DimScope()
    scope.declare("N", 1, 8192, why="tokens in this step")
    scope.declare("B", 1, 256, why="requests")
    scope.declare("S", 0, 512)
    scope.declare("P", 16, 1 << 24, multiple=16)
    scope.assume(N - B, why="each request has at least one token")
    return scope


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("N - N // 2", True),
        ("N - ceildiv(N, 2) - 1", None),  # false at N = 1: "the second micro-batch may be empty"
        ("N - B", True),
        ("B - N - 1", False),
        ("7*N - 7*B", True),
        ("B*N - B*B", True),
        ("ceildiv(N, 16) - ceildiv(B, 16)", True),
        ("16*ceildiv(N, 16) - N", True),
        ("N + 15 - 16*ceildiv(N, 16)", True),
        ("15 - N % 16", True),
        ("P - 16*(P // 16)", True),
        ("16*(P // 16) - P", True),  # P is a multiple of 16
        ("N - min(N, B)", True),
        ("max(N, B) - B", True),
        ("min(N, 8) - min(B, 8)", True),
        ("max(3*N, 2*S) - 3*B", True),
        ("64*ceildiv(6*N, 64) - 6*N", True),
        ("2048*N + 64*ceildiv(4*N, 64) - 2052*N", True),
        ("2048*N - 2047*N - 1", True),
        ("4096*N - 2048*B - 2048*N", True),
        ("S - N", None),
        ("Z", None),  # never declared
        ("Z - Z + 1", True),
    ],
)
def test_questions_that_planning_asks(text: str, answer: bool | None) -> None:
    assert serving_scope().prove(parse_dim(text)) is answer


def test_equality() -> None:
    scope = serving_scope()
    assert scope.prove_eq(dmin(N, B), B) is True
    assert scope.prove_eq(2 * N, 2 * B + 1) is False  # parity
    assert scope.prove_eq(N, B) is None
    assert scope.prove_eq(N + 1, B) is False
    assert scope.prove_le(B, N) is True
    assert scope.bounds(N - B) == (0, 8191)
    assert scope.undecided == 1


def test_more_facts_decide_more() -> None:
    scope = serving_scope()
    assert scope.prove(N - sym("S")) is None
    scope.assume(N - sym("S"), why="sampled rows are tokens")
    assert scope.prove(N - sym("S")) is True
    copy = scope.copy()
    copy.declare("Q", 0, 3)
    assert "Q" not in scope.symbols and copy.prove(N - sym("S")) is True


def test_contradicting_declarations_are_refused() -> None:
    scope = serving_scope()
    scope.declare("N", 1, 8192)
    with pytest.raises(XllmError, match="twice"):
        scope.declare("N", 1, 8191)
    with pytest.raises(XllmError, match="no multiple"):
        scope.declare("M", 17, 31, multiple=16)


def test_no_question_takes_long() -> None:
    """The budget holds for expressions made to be hard: many atoms, many facts."""
    scope = serving_scope()
    for i in range(8):
        scope.assume(sym(f"x{i}") - sym(f"x{(i + 1) % 8}") + N // (i + 2) - 1)
    hard = sum((ceildiv(sym(f"x{i}") * N, i + 3) - dmin(N, sym(f"x{i}")) for i in range(6)), const(0))
    begin = time.process_time()
    scope.prove(hard)
    assert time.process_time() - begin < 2.0
