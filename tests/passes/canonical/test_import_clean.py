"""import-clean: the batch axis goes, transposes around attention go, nothing changes its meaning."""

from __future__ import annotations

import pytest

from xllm_compiler.dims import as_dim, sym
from xllm_compiler.passes.canonical.views import Group, match_groups
from xllm_compiler.testing.xir import Case

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\ndim B in [1, 8]\ndim S in [0, 8]\n"


def func(body: str, returns: str, args: str = "%x: f32[N, 32]") -> Case:
    return Case.parse(f"{HEAD}\nfunc @f({args}) -> ({returns}) {{\n{body}\n}}\n")


def test_a_table_for_all_heads_gets_one_head_axis() -> None:
    case = func(
        """  %h = t.reshape(%x, shape=[1, N, 4, 8]) : f32[1, N, 4, 8]
  %t = t.transpose(%h, perm=[0, 2, 1, 3]) : f32[1, 4, N, 8]
  %c = t.reshape(%cos, shape=[1, 1, N, 8]) : f32[1, 1, N, 8]
  %m = t.mul(%t, %c) : f32[1, 4, N, 8]
  %u = t.transpose(%m, perm=[0, 2, 1, 3]) : f32[1, N, 4, 8]
  %y = t.reshape(%u, shape=[N, 32]) : f32[N, 32]
  return %y""",
        "f32[N, 32]",
        "%x: f32[N, 32], %cos: f32[N, 8]",
    ).run("import-clean,fold")
    assert case.op_names() == ["t.reshape", "t.reshape", "t.mul", "t.reshape"]
    assert "f32[N, 1, 8]" in case.text and "f32[1," not in case.text
    case.check_same()


def test_pairs_are_stacked_beside_their_axis() -> None:
    case = func(
        """  %h = t.reshape(%x, shape=[1, N, 4, 8]) : f32[1, N, 4, 8]
  %t = t.transpose(%h, perm=[0, 2, 1, 3]) : f32[1, 4, N, 8]
  %a = t.slice(%t, axis=3, start=0, stop=8, step=2) : f32[1, 4, N, 4]
  %b = t.slice(%t, axis=3, start=1, stop=8, step=2) : f32[1, 4, N, 4]
  %a1 = t.reshape(%a, shape=[1, 4, N, 4, 1]) : f32[1, 4, N, 4, 1]
  %b1 = t.reshape(%b, shape=[1, 4, N, 4, 1]) : f32[1, 4, N, 4, 1]
  %s = t.concat(%b1, %a1, axis=4) : f32[1, 4, N, 4, 2]
  %f = t.reshape(%s, shape=[1, 4, N, 8]) : f32[1, 4, N, 8]
  %u = t.transpose(%f, perm=[0, 2, 1, 3]) : f32[1, N, 4, 8]
  %y = t.reshape(%u, shape=[N, 32]) : f32[N, 32]
  return %y""",
        "f32[N, 32]",
    ).run("import-clean,fold")
    assert "t.transpose" not in case.op_names()
    case.check_same()


def test_repeated_heads_follow_their_head() -> None:
    case = func(
        """  %h = t.reshape(%x, shape=[1, N, 4, 8]) : f32[1, N, 4, 8]
  %t = t.transpose(%h, perm=[0, 2, 1, 3]) : f32[1, 4, N, 8]
  %a = t.reshape(%t, shape=[1, 4, 1, N, 8]) : f32[1, 4, 1, N, 8]
  %e = t.expand(%a, shape=[1, 4, 3, N, 8]) : f32[1, 4, 3, N, 8]
  %r = t.reshape(%e, shape=[1, 12, N, 8]) : f32[1, 12, N, 8]
  %u = t.transpose(%r, perm=[0, 2, 1, 3]) : f32[1, N, 12, 8]
  %y = t.reshape(%u, shape=[N, 96]) : f32[N, 96]
  return %y""",
        "f32[N, 96]",
    ).run("import-clean,fold")
    assert "t.transpose" not in case.op_names() and "t.expand" in case.op_names()
    case.check_same()


def test_sampled_rows_weights_and_products() -> None:
    case = func(
        """  %b = t.reshape(%x, shape=[1, N, 32]) : f32[1, N, 32]
  %r = t.take(%b, %sel, axis=1) : f32[1, S, 32]
  %w = param(name="w") : f32[16, 32]
  %l = nn.linear(%r, %w) : f32[1, S, 16]
  %v = param(name="v") : f32[16, 5]
  %m = t.matmul(%l, %v) : f32[1, S, 5]
  %g = param(name="g") : f32[1, 1, 5]
  %p = t.add(%m, %g) : f32[1, S, 5]
  %s = t.softmax(%p, axis=2) : f32[1, S, 5]
  %y = t.reshape(%s, shape=[S, 5]) : f32[S, 5]
  return %y""",
        "f32[S, 5]",
        "%x: f32[N, 32], %sel: i32[S]",
    ).run("import-clean")
    assert case.op_names() == ["t.take", "nn.linear", "t.matmul", "t.reshape", "t.add", "t.softmax"]
    case.check_same()


def test_second_run_changes_nothing() -> None:
    case = func(
        """  %b = t.reshape(%x, shape=[1, N, 32]) : f32[1, N, 32]
  %m = t.reduce(%b, kind=sum, axes=[2], keep=true) : f32[1, N, 1]
  %g = param(name="g") : f32[1, 32]
  %s = t.mul(%m, %g) : f32[1, N, 32]
  %y = t.reshape(%s, shape=[N, 32]) : f32[N, 32]
  return %y""",
        "f32[N, 32]",
    ).run("import-clean")
    once = case.text
    assert case.run("import-clean").text == once


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ([1, "N", 32], [1, "N", 4, 8], [((1,), (1,)), ((2,), (2, 3))]),
        (["N", 4, 3, 8], ["N", 12, 8], [((0,), (0,)), ((1, 2), (1,)), ((3,), (2,))]),
        (["N", 6, 4], ["N", 4, 6], [((0,), (0,)), ((1, 2), (1, 2))]),
        ([4, "N", 8], [4, "N", 2, 4], [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
        ([4, "N"], ["N", 4], [((0, 1), (0, 1))]),
        (["N"], ["N", 1, 1], [((0,), (0,))]),
    ],
)
def test_reshape_groups(
    old: list[int | str], new: list[int | str], groups: list[tuple[tuple[int], tuple[int]]]
) -> None:
    def dims(shape: list[int | str]) -> list[object]:
        return [sym(d) if isinstance(d, str) else as_dim(d) for d in shape]

    assert match_groups(dims(old), dims(new)) == [Group(a, b) for a, b in groups]  # type: ignore[arg-type]
