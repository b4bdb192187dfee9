"""Groups: who is in which, what is no mesh, and where the rank of one must not reach."""

from __future__ import annotations

import numpy as np
import pytest

from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.groups import RankGroup, rank_sizes, world_size
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify

KV = "kv<f32, heads=1, k=4, v=4, page=16>"


def test_members_are_the_axes_of_an_array() -> None:
    mesh = np.arange(24).reshape(3, 2, 4)  # @dp, @tp, @sp: the last one has neighbours
    sp, tp, dp, both = RankGroup(4), RankGroup(2, 4), RankGroup(3, 8), RankGroup(8)
    for (d, t, s), rank in np.ndenumerate(mesh):
        assert sp.members(rank) == tuple(mesh[d, t]) and sp.place(rank) == s
        assert tp.members(rank) == tuple(mesh[d, :, s]) and tp.place(rank) == t
        assert dp.members(rank) == tuple(mesh[:, t, s]) and dp.place(rank) == d
        assert both.members(rank) == tuple(mesh[d].reshape(-1))
    groups = {"sp": RankGroup(4, 1, "S"), "tp": tp, "dp": RankGroup(3, 8, "D")}
    assert world_size(groups) == 24 and world_size({}) == 1
    assert rank_sizes(groups, 21) == {"S": 1, "D": 2}


def test_text() -> None:
    text = "xir 1 stage=graph\ndim R in [0, 1]\ngroup @tp size=2 rank=R\ngroup @dp size=3 stride=2\n"
    module = parse_module(text)
    verify(module)
    assert module.groups == {"tp": RankGroup(2, 1, "R"), "dp": RankGroup(3, 2)}
    assert print_module(module) == text
    others = [text.replace(a, b) for a, b in ((" rank=R", ""), (" stride=2", ""), ("size=3", "size=4"))]
    assert len({structural_hash(parse_module(t)) for t in [text, *others]}) == 4


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ("group @a size=0", "a group of 0 ranks, 1 apart"),
        ("group @a size=2 stride=0", "a group of 2 ranks, 0 apart"),
        ("group @a size=2\ngroup @b size=3", "V9: groups @a and @b are no axes of one mesh: 2 ranks do not divide 3"),
        ("group @a size=4\ngroup @b size=2 stride=2\ngroup @c size=2 stride=3", "no axes of one mesh"),
        ("group @a size=1048577", "V9: the groups need 1048577 ranks"),
        ("group @a size=2 rank=R", "V21: R, the rank of @a, is not declared"),
        ("dim R in [0, 2]\ngroup @a size=2 rank=R", r"V21: R, the rank of @a, lies in \[0, 2\]"),
        ("dim R in [1, 1]\ngroup @a size=2 rank=R", r"V21: R, the rank of @a, lies in \[1, 1\]"),
        (
            "dim R in [0, 1]\ngroup @a size=2 rank=R\ngroup @b size=2 stride=2 rank=R",
            "V21: R is the rank of @a and of @b",
        ),
        ("dim R in [0, 1]\ngroup @a size=2 rank=R\nassume 3*R - 1 >= 0", "V21: assumption 3\\*R - 1 >= 0 depends on R"),
        (
            f"dim R in [0, 1]\ngroup @a size=2 rank=R\nfunc @f(%k: {KV}[R]) -> ({KV}[R] alias %k) {{ return %k }}",
            "V21: the type of %k depends on R, the rank of @a",
        ),
        (
            "dim R in [0, 1]\ngroup @a size=2 rank=R\nfunc @f(%x: f32[R]) -> (f32[R]) { return %x }",
            "V21: the type of %x depends on R, the rank of @a",
        ),
    ],
)
def test_refused(head: str, text: str) -> None:
    with pytest.raises(IrError, match=text) as e:
        verify(parse_module(f"xir 1 stage=graph\n{head}\n"))
    assert e.value.help


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group @a size=2\ngroup @a size=2", "group @a is declared twice"),
        ("group @a stride=2", "expected 'size'"),
        ("group @a size=2 rank=@b", "expected a symbol"),
    ],
)
def test_not_read(text: str, message: str) -> None:
    with pytest.raises(IrError, match=message):
        parse_module(f"xir 1 stage=graph\n{text}\n")
