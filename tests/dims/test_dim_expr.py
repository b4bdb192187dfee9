"""Dims against Python's own integers: random expression trees, evaluated both ways."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xllm_compiler.dims import UndecidedDim, as_dim, ceildiv, const, dmax, dmin, parse_dim, sym
from xllm_compiler.dims.expr import Dim
from xllm_compiler.errors import XllmError

NAMES = ("B", "N", "T_2")
Tree = Any

leaves = st.one_of(st.sampled_from(NAMES), st.integers(-20, 20), st.sampled_from([10**30, -(2**70), 1024]))
binary = st.sampled_from(["+", "-", "*", "//", "%", "ceildiv", "min", "max"])
trees: st.SearchStrategy[Tree] = st.recursive(leaves, lambda s: st.tuples(binary, s, s), max_leaves=9)
envs = st.fixed_dictionaries({name: st.integers(-9, 40) for name in NAMES})


def build(tree: Tree) -> Dim:
    if isinstance(tree, str):
        return sym(tree)
    if isinstance(tree, int):
        return as_dim(tree)
    op, a, b = tree[0], build(tree[1]), build(tree[2])
    match op:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "//":
            return a // b
        case "%":
            return a % b
    if op == "ceildiv":
        return ceildiv(a, b)
    return dmin(a, b) if op == "min" else dmax(a, b)


def brute(tree: Tree, env: dict[str, int]) -> int:
    """The meaning, from Python's integers alone; ZeroDivisionError where there is none."""
    if isinstance(tree, str):
        return env[tree]
    if isinstance(tree, int):
        return tree
    op, a, b = tree[0], brute(tree[1], env), brute(tree[2], env)
    match op:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "//":
            return a // b
        case "%":
            return a % b
        case "ceildiv":
            return -(-a // b)
    return min(a, b) if op == "min" else max(a, b)


@settings(max_examples=600, deadline=None)
@given(trees, envs)
def test_arithmetic_agrees_with_python(tree: Tree, env: dict[str, int]) -> None:
    try:
        expected = brute(tree, env)
    except ZeroDivisionError:
        assume(False)
    try:
        dim = build(tree)
    except XllmError as e:  # a constant zero divisor, in a tree that Python evaluates only by luck
        assert "// 0" in e.message or "% 0" in e.message
        return
    assert dim.evaluate(env) == expected
    assert dim.compile(NAMES)(*(env[n] for n in NAMES)) == expected
    assert dim.substitute(env).value == expected


@settings(max_examples=600, deadline=None)
@given(trees)
def test_text_is_a_fixpoint(tree: Tree) -> None:
    try:
        dim = build(tree)
    except XllmError:
        return
    assert parse_dim(str(dim)) is dim
    assert pickle.loads(pickle.dumps(dim)) is dim
    assert copy.deepcopy(dim) is dim


@settings(max_examples=200, deadline=None)
@given(trees, trees, trees)
def test_sums_and_products_are_canonical(a: Tree, b: Tree, c: Tree) -> None:
    try:
        x, y, z = build(a), build(b), build(c)
    except XllmError:
        return
    assert x + y is y + x and x * y is y * x
    assert (x + y) + z is x + (y + z)
    assert x * (y + z) is x * y + x * z
    assert x - x is const(0) and hash(x) == hash(parse_dim(str(x)))


@settings(max_examples=200, deadline=None)
@given(trees, st.sampled_from(NAMES), trees, envs)
def test_substitution_agrees_with_evaluation(tree: Tree, name: str, value: Tree, env: dict[str, int]) -> None:
    try:
        inner = brute(value, env)
        expected = brute(tree, {**env, name: inner})
        dim = build(tree).substitute({name: build(value)})
    except (ZeroDivisionError, XllmError):
        return
    assert dim.evaluate(env) == expected


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("1+N*4", "4*N + 1"),
        ("(N + 15) // 16", "ceildiv(N, 16)"),
        ("(32*N + 5) // 16", "2*N"),
        ("N // 4 // 4", "N // 16"),
        ("ceildiv(ceildiv(N, 4), 4)", "ceildiv(N, 16)"),
        ("6*N // 4", "(3*N) // 2"),
        ("(N + 16) % 16", "N % 16"),
        ("(4*N + 6) % 8", "4*((N + 1) % 2) + 2"),
        ("8 - N", "8 - N"),
        ("-B + N", "N - B"),
        ("min(8, N, N + 1)", "min(N, 8)"),
        ("max(min(N, B), min(B, N))", "min(B, N)"),
        ("N*N*2", "2*N*N"),
        ("-(N // 16)", "-(N // 16)"),
        ("-N // 16", "-ceildiv(N, 16)"),
        ("B*(N // 16)", "B*(N // 16)"),
        ("0*N", "0"),
    ],
)
def test_canonical_text(written: str, canonical: str) -> None:
    assert str(parse_dim(written)) == canonical


BAD_TEXT = [
    "",
    "N +",
    "4 N",
    "N ** 2",
    "foo(N)",
    "ceildiv(N)",
    "min()",
    "(N",
    "N)",
    "1.5",
    "N // 0",
    "N % 0",
    "N'",
    "é",
]
LONG_TEXT = ["-" * 500 + "N", "(" * 500 + "N" + ")" * 500, "9" * 5000, "N+" * 20000 + "N", "__import__('os')", "N.real"]


@pytest.mark.parametrize("text", [*BAD_TEXT, *LONG_TEXT])
def test_bad_text_is_refused_with_a_place(text: str) -> None:
    with pytest.raises(XllmError) as e:
        parse_dim(text)
    assert e.value.kind == "ir" and len(str(e.value)) < 600


def test_a_hostile_product_is_refused_not_computed() -> None:
    text = "*".join("(" + " + ".join(f"x{i}_{j}" for j in range(8)) + ")" for i in range(12))
    with pytest.raises(XllmError, match="terms"):
        parse_dim(text)


def test_a_dim_is_not_a_bool() -> None:
    n = sym("N")
    uses: list[Callable[[], object]] = [lambda: bool(n), lambda: n < 3, lambda: n <= 3, lambda: n > 3, lambda: n.value]
    uses += [lambda: n >= n, lambda: max(n, 3), lambda: sorted([n, n + 1])]
    for use in uses:
        with pytest.raises(UndecidedDim, match="N"):
            use()
    with pytest.raises(UndecidedDim):
        bool(const(1))  # not even a constant: code that works for constants only is a trap
    assert const(3) == 3 and hash(const(3)) == hash(3) and const(0) == 0
    assert n != 3 and n == sym("N") and const(3).value == 3 and n.symbols == ("N",)


def test_evaluation_names_what_is_missing() -> None:
    with pytest.raises(XllmError, match="B has no value"):
        sym("B").evaluate({"N": 1})
    with pytest.raises(XllmError, match="B"):
        (sym("B") + sym("N")).compile(("N",))
    with pytest.raises(XllmError, match="zero"):
        (sym("B") // sym("N")).evaluate({"N": 0, "B": 1})
    with pytest.raises(XllmError):
        as_dim(True)
    with pytest.raises(TypeError):
        sym("N") + 1.5  # type: ignore[operator]


def test_python_keywords_and_builtins_are_ordinary_names() -> None:
    d = parse_dim("lambda + 2*exec")
    assert d.compile(("exec", "lambda"))(5, 1) == 11
