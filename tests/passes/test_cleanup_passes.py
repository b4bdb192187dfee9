"""fold: every identity by itself. What it leaves alone, dce and cse are in the folders beside."""

from __future__ import annotations

import pytest

from xllm_compiler.testing.xir import Case

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\n"


def func(body: str, returns: str = "f32[N, 8]", args: str = "%x: f32[N, 8]", more: str = "") -> Case:
    return Case.parse(f"{HEAD}{more}\nfunc @f({args}) -> ({returns}) {{\n{body}\n}}\n")


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
