"""Flags and sizes on command lines: what is accepted, and which words are proposed instead."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.dims import DimScope
from xllm_compiler.errors import XllmError
from xllm_compiler.tools.arguments import (
    Arguments,
    check_sizes,
    nearest,
    parse_size_lists,
    parse_sizes,
    size_combinations,
    suggest,
    whole_number,
)


def parser() -> Arguments:
    p = Arguments("tool", "Does something.")
    p.add_argument("file", nargs="?")
    p.add_argument("words", nargs="*")
    p.add_argument("-p", "--pipeline")
    p.add_argument("--remarks", nargs="?", const="")
    p.add_argument("--count", type=whole_number)
    return p


def test_a_flag_with_an_optional_value_does_not_swallow_the_file() -> None:
    args = parser().read(["--remarks", "a.xir"])
    assert (args.remarks, args.file) == ("", "a.xir")
    assert parser().read(["a.xir", "--remarks=x=y"]).remarks == "x=y"
    assert parser().read(["a.xir"]).remarks is None


def test_positional_words_may_stand_between_flags() -> None:
    args = parser().read(["a.xir", "N=1", "-p", "dce", "B=2"], mixed=True)
    assert (args.file, args.words, args.pipeline) == ("a.xir", ["N=1", "B=2"], "dce")


@pytest.mark.parametrize(
    ("argv", "message", "help"),
    [
        (["--pipelin", "x"], "tool has no flag --pipelin", "did you mean --pipeline?"),
        (["--piepline=x"], "tool has no flag --piepline", "did you mean --pipeline?"),
        (["--pipe", "x"], "tool has no flag --pipe", "did you mean --pipeline?"),  # no silent abbreviations
        (["-z"], "tool has no flag -z", "tool --help lists them"),
        (
            ["--count", "1e3"],
            "argument --count: '1e3' is not a whole number from 0 on",
            "tool --help tells what there is",
        ),
        (
            ["--count", "1_0"],
            "argument --count: '1_0' is not a whole number from 0 on",
            "tool --help tells what there is",
        ),
        (["-p"], "argument -p/--pipeline: expected one argument", "tool --help tells what there is"),
    ],
)
def test_refusals(argv: list[str], message: str, help: str) -> None:
    with pytest.raises(XllmError) as raised:
        parser().read(argv)
    assert (raised.value.kind, raised.value.message, raised.value.help) == ("option", message, help)


def test_what_follows_two_dashes_is_no_flag() -> None:
    assert parser().read(["--", "--remarks"]).file == "--remarks"
    assert parser().read(["-pdce"]).pipeline == "dce"
    assert parser().read(["-"]).file == "-"


def test_suggestions() -> None:
    assert nearest("fuse-gul", ["fuse-glu", "dce"]) == "fuse-glu" and nearest("zzz", ["dce"]) == ""
    assert suggest("zzz", ["dce", "cse"], "passes") == "passes: dce, cse"
    assert suggest("zzz", [], "passes") == "there are no passes"


@settings(max_examples=50)
@given(
    st.dictionaries(st.from_regex(r"[A-Z][a-z0-9_]{0,3}", fullmatch=True), st.lists(st.integers(0, 10**8), min_size=1))
)
def test_sizes_read_back(sizes: dict[str, list[int]]) -> None:
    for separator in (";", ",", " ", "; "):
        text = separator.join(f"{name}={','.join(map(str, values))}" for name, values in sizes.items())
        if sizes:
            assert parse_size_lists(text, "--flag") == {name: tuple(values) for name, values in sizes.items()}
    single = {name: values[0] for name, values in sizes.items()}
    assert parse_sizes([f"{name}={n}" for name, n in single.items()], "--flag") == single


@pytest.mark.parametrize("text", ["N", "N=", "=3", "N=x", "N=-1", "N=3,,B=2", "3", "N==3", "N=3;B", "N=1.5", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(XllmError) as raised:
        parse_size_lists(text, "--flag")
    assert raised.value.kind == "option" and "is not a size" in raised.value.message


def scope() -> DimScope:
    s = DimScope()
    n, b = s.declare("N", 1, 64), s.declare("B", 1, 8, why="requests")
    s.declare("E", 8, None, multiple=8)
    s.assume(n - b, why="every request has a token")
    return s


def test_combinations_leave_out_what_the_assumptions_forbid() -> None:
    found = size_combinations(scope(), {"N": (1, 7), "B": (1, 2)}, "--flag")
    assert found == [{"N": 1, "B": 1}, {"N": 7, "B": 1}, {"N": 7, "B": 2}]
    assert size_combinations(scope(), {}, "--flag") == [{}]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"N": (1, 2), "B": (2, 3)}, "--flag: N=1, B=2 breaks the assumption N - B >= 0 (every request has a token)"),
        ({"N": (65,)}, "--flag: N=65 is outside [1, 64]"),
        ({"E": (12,)}, "--flag: E=12 is outside [8, *] in multiples of 8"),
        ({"M": (1,)}, "--flag: the module has no size M"),
    ],
)
def test_a_size_that_fits_nowhere_is_an_error(lists: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(XllmError) as raised:
        size_combinations(scope(), lists, "--flag")
    assert raised.value.message == message


def test_a_size_out_of_range_is_told_with_its_meaning() -> None:
    with pytest.raises(XllmError) as raised:
        check_sizes(scope(), {"B": 0}, "--flag")
    assert raised.value.help == "requests"
