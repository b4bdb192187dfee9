"""Each law catches a pass that breaks it, blames only that one, and says so readably; a sound pass keeps all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.passes import registry
from xllm_compiler.passes.registry import load_passes, pass_class
from xllm_compiler.testing import laws
from xllm_compiler.testing.corpus import Entry, corpus
from xllm_compiler.testing.laws import Laboratory, spread
from xllm_compiler.testing.laws_child import load_spec
from xllm_compiler.testing.laws_inputs import SMALL, Workbench, points
from xllm_compiler.testing.laws_trial import Trial, source_of

LAWLESS = Path(__file__).parent / "faults" / "lawless.py"

MLP = """xir 1 stage=graph
dim N in [1, 64]

func @step(%x: f32[N, 8]) -> (f32[N, 8]) {
  %up.weight = param(name="up.weight") : f32[16, 8]
  %down.weight = param(name="down.weight") : f32[8, 16]
  %up = nn.linear(%x, %up.weight) : f32[N, 16]
  %gate = t.relu(%up) : f32[N, 16]
  %down = nn.linear(%gate, %down.weight) : f32[N, 8]
  %grown = t.exp(%down) : f32[N, 8]
  %sum = t.add(%x, %grown) : f32[N, 8]
  return %sum
}
"""
RANKS = """xir 1 stage=graph
dim N in [1, 64]
group @tp size=1

func @step(%x: f32[N, 8]) -> (f32[N, 8]) {
  %w = param(name="w") : f32[8, 8]
  %own = nn.linear(%x, %w) : f32[N, 8]
  %start = comm.all_reduce_start(%own, group=@tp, kind=max) : !future<f32[N, 8]>
  %whole = comm.wait(%start) : f32[N, 8]
  %y = t.relu(%whole) : f32[N, 8]
  return %y
}
"""
SOFTMAX = """xir 1 stage=graph
dim N in [1, 64]

func @step(%x: f32[N, 8]) -> (f32[N, 8]) {
  %p = t.softmax(%x) : f32[N, 8]
  %y = t.relu(%p) : f32[N, 8]
  return %y
}
"""
TEXTS = {"mlp": MLP, "ranks": RANKS, "softmax": SOFTMAX}


def entries() -> list[Entry]:
    return [Entry(name, "test", lambda text=text: text) for name, text in TEXTS.items()]  # type: ignore[misc]


@pytest.fixture(scope="module", autouse=True)
def lawless() -> Iterator[list[str]]:
    names = load_passes(str(LAWLESS))
    yield names
    for name in names:
        sys.modules.pop(registry._registered.pop(name).__module__, None)


@pytest.fixture(scope="module")
def laboratory(lawless: list[str]) -> Laboratory:
    return Laboratory(entries())


# pass -> what it breaks, the entry on which, and what the report says besides.
BREAKS = {
    "crashes": ("runs", "softmax", ["ZeroDivisionError: of nothing", "lawless.py:", "reduced to 1", "--check error"]),
    "claims-too-much": ("honest", "", ["run() returned True, and the module is what it was"]),
    "denies": ("honest", "", ["run() returned False, and the module is another one", "-  %", "t.relu(", "t.max("]),
    "hashes": ("deterministic", "", ["another PYTHONHASHSEED", "iteration over a set", "PYTHONHASHSEED=1 xllm-opt"]),
    "restless": ("idempotent", "mlp", ["a second run changes", "+  %", "t.neg(", "-p restless,restless"]),
    "narrows": ("signature", "", ["+assume N - 2 >= 0", "changes_signature: ClassVar[bool] = True", "--diff"]),
    "renames": ("signature", "", ["-  argument 0, %x: f32[N", "+  argument 0, %input: f32[N"]),
    "misspells": ("text", "", ["does not parse", "func @two words(", "| xllm-opt -"]),
    "rounds": (
        "rounding",
        "mlp",
        ["in the real dtypes: more rounding", "t.cast(", "> %", "made of %narrow, touched by rounds/to-bf16"],
    ),
    "loses-half": ("loss", "", ["in RMS, allowed ", "--check-equiv", "make the error of what is multiplied no larger"]),
    "lonely": ("ranks", "ranks", ["on rank 1 of 2", "in exact arithmetic", "--check-equiv"]),
    "drops-collective": ("collectives", "ranks", ["group @tp had 1 collectives and has 0"]),
    "mistaken": ("options", "", ["pass mistaken, sample '{depth=2}'", "has no option 'depth'"]),
    "idle": ("exercised", "", ["modules in stage graph were tried, none changed", "tests/passes/idle/fires.xir"]),
}


def test_every_law_is_shown_to_catch_something() -> None:
    caught = {law for law, _, _ in BREAKS.values()}
    elsewhere = {"meaning", "verifies", "interleavings"}  # test_planted_faults.py
    assert caught | elsewhere == set(laws.law_names())


@pytest.mark.parametrize("name", BREAKS)
def test_a_breach_is_caught_and_told(name: str, laboratory: Laboratory) -> None:
    law, where, says = BREAKS[name]
    results = laboratory.results(name)
    others = {"ranks"} if name == "drops-collective" else set()
    assert set(results.broken) == {law} | others, results.broken
    told = results.broken[law]
    assert f"on {where}, " in told or not where, told
    for text in says:
        assert text in told, told
    assert len(told.splitlines()) < 40
    assert "  help: " in told
    if law not in ("options", "exercised"):
        assert told.startswith(f"pass {name} breaks law `{law}`: "), told
        path = next(line for line in told.splitlines() if line.startswith("  input: ")).split()[1]
        assert f"xllm-opt {path} -p {name}" in told and f"--load {LAWLESS}" in told


def test_a_sound_pass_keeps_every_law(laboratory: Laboratory) -> None:
    results = laboratory.results("keeps")
    assert results.broken == {}
    assert results.changed >= 2 and results.tried > results.changed
    assert [where for where in results.refused if "softmax" in where] == list(results.refused)
    assert all("softmax is not for this pass" in said for said in results.refused.values())
    assert str(results).startswith(f"keeps: {results.changed} of {results.tried} modules changed, ")


def test_a_pass_that_says_what_it_loses_keeps_every_law(laboratory: Laboratory) -> None:
    results = laboratory.results("loses-little")
    assert results.broken == {} and results.changed >= 2


def test_the_functions_of_the_plugin(monkeypatch: pytest.MonkeyPatch, laboratory: Laboratory) -> None:
    monkeypatch.setattr(laws, "laboratory", lambda directories, preset: laboratory)
    assert laws.check("keeps", "meaning") is None
    told = laws.check("denies", "honest")
    assert told is not None and "run() returned False" in told
    with pytest.raises(XllmError, match="there is no law called 'meening'") as e:
        laws.check("keeps", "meening")
    assert "did you mean 'meaning'?" in e.value.help


def test_passes_in_the_preset_get_what_they_get_there() -> None:
    labels = [p.label for p in points(pass_class("fuse-qkv"))]
    assert labels == ["as it is", "before fuse-epilogue", "before fuse-qkv", "before assign-streams"]
    assert [p.label for p in points(pass_class("plan-memory"))] == ["before plan-memory"]
    assert [p.label for p in points(pass_class("keeps"))] == [
        "as it is",
        "before fuse-epilogue",
        "before assign-streams",
    ]


def test_sources_are_distinct_and_have_more_ranks_where_there_are_collectives() -> None:
    bench = Workbench(entries())
    sources = bench.sources(pass_class("keeps"))
    assert bench.sources(pass_class("keeps")) is sources and not bench.unreachable
    assert [str(s) for s in sources if s.name == "ranks"][:2] == ["ranks, as it is", "ranks, as it is, 2 ranks"]
    assert any("4 ranks" in s.point for s in sources) == any(
        s.point.startswith("before") for s in sources if s.name == "ranks"
    )
    assert [s.ops for s in sources] == sorted(s.ops for s in sources)


def test_where_a_new_process_finds_a_pass() -> None:
    assert load_spec(pass_class("fuse-glu")) == ""
    assert load_spec(pass_class("keeps")) == str(LAWLESS)


def test_a_choice_has_every_kind_of_doing_and_is_spread_over_sizes() -> None:
    def trial(n: int, relu: bool) -> Trial:
        negs = "".join(f"  %a{i + 1} = t.neg(%a{i}) : f32[N]\n" for i in range(n))
        text = f"xir 1 stage=graph\ndim N in [1, 8]\n\nfunc @f(%a0: f32[N]) -> (f32[N]) {{\n{negs}"
        last = f"  %y = t.relu(%a{n}) : f32[N]\n  return %y\n}}\n" if relu else f"  return %a{n}\n}}\n"
        from xllm_compiler.ir.parser import parse_module

        return Trial(pass_class("keeps")(), source_of(parse_module(text + last)))

    small = [trial(n, True) for n in range(3)]
    large = [trial(n, True) for n in range(SMALL, SMALL + 16)]
    trials = [*small, *large, trial(SMALL + 3, False)]
    chosen = spread(trials, 5)
    assert chosen[:3] == small and chosen[-1] is trials[-1] and len(chosen) == 3 + 5
    sizes = [t.source.ops for t in chosen[3:-1]]
    assert max(sizes) - min(sizes) >= 8
    assert spread(trials, 1000) == trials


def test_our_own_corpus_can_be_judged() -> None:
    results = Laboratory(corpus(random_graphs=4)[::12]).results("fuse-qkv")
    assert (results.broken, results.unjudged, results.unreachable) == ({}, {}, {})
    assert results.changed >= 4
