"""Bisecting: the first guilty pass run, the one rewrite in it, a way to see it again, whatever kind of wrong it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module, Op
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes import registry
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import parse_pipeline, run_pipeline
from xllm_compiler.passes.registry import load_passes, pass_class
from xllm_compiler.testing.bisector import Bisection, Finding, bisect
from xllm_compiler.testing.corpus import TRACED
from xllm_compiler.testing.failures import Failure
from xllm_compiler.testing.rewrites import place_of

PLANTED = str(Path(__file__).with_name("planted_passes.py"))
LINES = Path(PLANTED).read_text(encoding="utf-8").splitlines()

SUMS = """\
xir 1 stage=graph
dim N in [1, 8]
func @step(%x: f32[N, 2], %y: f32[N, 2]) -> (f32[N, 2]) {
  %a1 = t.add(%x, %y) : f32[N, 2]
  %a2 = t.add(%a1, %y) : f32[N, 2]
  %a3 = t.add(%a2, %y) : f32[N, 2]
  %a4 = t.add(%a3, %y) : f32[N, 2]
  %a5 = t.add(%a4, %y) : f32[N, 2]
  %a6 = t.add(%a5, %y) : f32[N, 2]
  return %a6
}
"""


@pytest.fixture(autouse=True, scope="module")
def planted() -> Iterator[None]:
    """The planted passes, known to nobody else afterwards."""
    names = load_passes(PLANTED)
    yield
    for name in names:
        sys.modules.pop(registry._registered.pop(name).__module__, None)


def traced(name: str) -> Module:
    return parse_module((TRACED / f"{name}.xir").read_text(encoding="utf-8"), f"{name}.xir")


def sums() -> Module:
    return parse_module(SUMS, "sums.xir")


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(LINES, 1) if text in line)


def found(module: Module, pipeline: str, **options: object) -> Finding:
    finding = bisect(module, pipeline, **options)  # type: ignore[arg-type]
    assert finding is not None
    return finding


def negs(module: Module) -> int:
    return sum(op.name == "t.neg" for f in module.funcs.values() for op in f.ops)


def test_one_wrong_rewrite_among_two_hundred_in_a_traced_model() -> None:
    finding = found(traced("qwen3"), "fold,shuffle,cse")
    assert (finding.run, finding.runs, finding.pass_text) == (2, 3, "shuffle")
    assert finding.rewrites > 200 and finding.notes == ()
    rewrite = finding.rewrite
    assert rewrite is not None and rewrite.rule == "shuffle/swap-operands"
    assert rewrite.place.endswith(f"planted_passes.py:{line_of('@rule(Add, Mul)')}")
    weight = "%model.layers.1.post_attention_layernorm.weight"
    assert rewrite.op.startswith("%mul_27 = t.mul(" + weight)
    [old] = [line for line in rewrite.before if line.startswith("> ")]
    [new] = [line for line in rewrite.after if line.startswith("> ")]
    assert old == f"> %mul_27 = t.mul({weight}, %mul_26) : f32[1, N, 64]"
    assert new == f"> %mul_27 = t.add(%mul_26, {weight}) : f32[1, N, 64]"
    assert len(rewrite.before) == len(rewrite.after) == 7
    assert "qwen3.xir:" in rewrite.loc.describe()
    assert finding.failure.signature == ("differs", "exact") and "@step does not compute" in finding.failure.text
    text = str(finding)
    assert text.startswith(f"guilty: shuffle, pass run 2 of 3, rewrite {finding.number} of {finding.rewrites}\n")
    for part in (rewrite.place, old, new, "does not compute what it did", "traced from"):
        assert part in text
    # The IR right before shows it again. It does not come first there: ops that wait for another rewrite stand before.
    assert f"  {rewrite.op}\n" in print_module(finding.repro.module)
    again = found(finding.repro.module, finding.repro.pipeline)
    assert 1 < again.number == finding.repro.fuel < finding.number
    assert again.rewrite is not None and again.rewrite.op.startswith(f"%mul_27 = t.mul({weight}, ")
    assert finding.whole.words() == ["--pass-limit", "2", "--fuel", str(finding.whole.fuel)]


def test_nothing_wrong_is_nothing_found() -> None:
    assert bisect(traced("qwen3"), "fold,cse,dce") is None
    assert bisect(sums(), "negate,cse", lambda m: negs(m) == 13) is None


def test_the_module_itself_stays_as_it_is() -> None:
    module = sums()
    found(module, "negate{wrong=3}")
    assert print_module(module) == print_module(sums())


@settings(max_examples=30, deadline=None)
@given(wrong=st.sets(st.integers(1, 6), min_size=1))
def test_a_wrong_rewrite_is_found_wherever_it_is(wrong: set[int]) -> None:
    """Each wrong one turns the sign of what is left: two of them may make up for each other, so badness comes and goes.
    What is named must be good just before and bad just after all the same."""
    finding = found(sums(), f"cse,negate{{wrong={'-'.join(map(str, sorted(wrong)))}}},dce")
    assert finding.run == 2 and finding.rewrite is not None and finding.rewrites == 6
    assert finding.number in wrong and not finding.notes
    assert finding.rewrite.op.startswith(f"%a{finding.number} = t.add(")
    assert finding.whole.fuel == finding.number


def test_the_first_of_several_guilty_runs() -> None:
    finding = found(traced("qwen3"), "cse,fix(fold,cse),lose-write,silent,stumble")
    assert finding.pass_text == "lose-write" and finding.run < finding.runs
    finding = found(traced("qwen3"), "stumble,lose-write")
    assert (finding.run, finding.runs, finding.failure.kind) == (1, 1, "raises")


def test_inside_a_fixed_point() -> None:
    finding = found(traced("qwen3"), "fix(cse,lose-write,dce)")
    assert (finding.run, finding.pass_text, finding.number) == (2, "lose-write", 1)
    assert finding.rewrite is not None and "kv.write(%kv0" in finding.rewrite.op
    # Nothing is left in the place of what it erased: its neighbours are shown, without a mark.
    assert finding.rewrite.after and not any(line.startswith("> ") for line in finding.rewrite.after)


def test_a_rule_that_raises() -> None:
    finding = found(traced("qwen3"), "cse,stumble", check="error")
    assert finding.failure.kind == "raises" and "KeyError: 'silu'" in finding.failure.text
    assert finding.rewrite is not None and finding.rewrite.rule == "stumble/stumble"
    assert finding.rewrite.op.startswith("%silu = t.silu(") and finding.rewrite.after == ()
    assert str(finding).splitlines()[0] == "guilty: stumble, pass run 2 of 2, rewrite 1 of 1, while making it"


def test_a_result_that_does_not_verify() -> None:
    finding = found(traced("qwen3"), "stale-type", check="verify")
    assert finding.failure.signature == ("verify", "stale-type", "V3")
    assert (finding.number, finding.rewrites) == (1, 2)
    assert finding.rewrite is not None and finding.rewrite.rule == "stale-type/silu"
    assert finding.rewrite.place.endswith(f"planted_passes.py:{line_of('ctx.allows(' + chr(34) + 'stale-type/silu')}")
    assert [line for line in finding.rewrite.after if line.startswith("> ")] == ["> %silu = t.silu(%linear_4) : f32[3]"]


def test_a_pass_that_does_not_ask_is_named_as_a_whole() -> None:
    finding = found(traced("gemma2"), "fold,silent,cse")
    assert (finding.run, finding.rewrite, finding.repro.fuel) == (2, None, None)
    assert finding.notes == (
        "silent does not ask before it rewrites (PassContext.allows), so no single rewrite can be named",
    )
    assert "\n-  %reduce = t.reduce(" in finding.diff and "kind=max" in finding.diff
    assert "what the pass changed:" in str(finding) and "more lines" in str(finding)


def test_a_false_claim_is_no_rewrite() -> None:
    finding = found(traced("qwen3"), "cse,liar")
    assert finding.failure.kind == "claim" and finding.rewrite is None and finding.notes == () and finding.diff == ""


def test_a_difference_that_builds_up_over_passes() -> None:
    def two_signs(before: Module, after: Module) -> Failure | None:
        return Failure(("told",), "two signs more") if negs(after) - negs(before) > 3 else None

    pipeline = parse_pipeline("negate{one=true},cse,negate{one=true},dce")
    finding = Bisection(sums(), pipeline, two_signs, "verify").run()
    assert finding is not None and (finding.run, finding.rewrite) == (3, None)
    assert finding.notes == (
        "negate{one=true} by itself is good on the IR before it: the difference has built up over several passes",
    )
    assert finding.repro is finding.whole and finding.repro.words() == ["--pass-limit", "3"]


def test_one_rewrite_less_may_be_wrong_in_another_way() -> None:
    """Fuel may stop a pass half-way, where it was never meant to stop; that is said."""

    def judge(before: Module, after: Module) -> Failure | None:
        if negs(after) == 6:
            return Failure(("told", "bad"), "six signs")
        return Failure(("told", "half"), "four signs") if negs(after) == 4 else None

    finding = Bisection(sums(), parse_pipeline("negate{wrong=1-2-3-4-5-6}"), judge, "verify").run()
    assert finding is not None and finding.number == 6
    finding = Bisection(sums(), parse_pipeline("negate{wrong=1-2-3-4-5-6}"), _six_after_five, "verify").run()
    assert finding is not None and finding.number == 6
    assert finding.notes == (
        "with one rewrite less something else is wrong, and this one may only have changed it: five signs",
    )


def _six_after_five(before: Module, after: Module) -> Failure | None:
    texts = {5: "five signs", 6: "six signs"}
    return Failure(("told", texts[negs(after)]), texts[negs(after)]) if negs(after) in texts else None


def test_what_depends_on_the_rewrites_before_it_is_shown_with_all_of_them() -> None:
    """The fourth is wrong because it is the fourth: from the IR right before, it would be the first."""
    finding = found(sums(), "negate{wrong=4}")
    assert (finding.number, finding.repro.fuel) == (4, 4)
    assert print_module(finding.repro.module) == print_module(sums())


def test_what_depends_on_nothing_before_it_is_shown_alone() -> None:
    """The fourth is wrong because of its op: from the IR right before, one rewrite shows it."""

    def fourth(module: Module) -> bool:
        ops = module.func().ops
        return any(op.name == "t.neg" and v.name == "a4" for op in ops for v in op.operands)

    finding = found(sums(), "cse,negate", is_bad=fourth)
    assert (finding.run, finding.number, finding.whole.fuel) == (2, 4, 4)
    assert finding.repro.words() == ["--fuel", "1"] and negs(finding.repro.module) == 6


def test_bad_before_any_pass_is_refused() -> None:
    with pytest.raises(XllmError, match="bad before any pass has run") as e:
        bisect(sums(), "negate,dce", lambda m: True)
    assert e.value.kind == "option"


def moody(*good: int) -> Callable[[Module], bool]:
    """Says "bad" of twelve signs, but not when it is asked for the n-th time."""
    count = 0

    def is_bad(module: Module) -> bool:
        nonlocal count
        count += 1
        return negs(module) == 12 and count not in good

    return is_bad


def test_a_test_that_changes_its_mind_is_told() -> None:
    # Asked of: the end, the start, run 1 (good, this time), run 2, and run 1 once more.
    with pytest.raises(
        XllmError, match="pass run 2 is bad, and without it the result is bad in one try and good in"
    ) as e:
        bisect(sums(), "negate,cse,dce", moody(3))
    assert e.value.kind == "internal"
    assert found(sums(), "negate", is_bad=moody()).notes == ()
    assert found(sums(), "negate", is_bad=moody(12)).notes == (
        "the whole pipeline with that fuel does not show it: passes behave differently when run again",
    )


def test_wrong_stages_and_passes_are_errors_of_whoever_asks() -> None:
    with pytest.raises(XllmError, match="needs stage buf"):
        bisect(sums(), "overlap")
    with pytest.raises(XllmError, match="did you mean 'negate'"):
        bisect(sums(), "negat")


def test_later_stages() -> None:
    module = traced("qwen3")
    run_pipeline("@cpu", module)
    finding = found(module, "overlap")
    assert finding.failure.signature == ("verify", "overlap", "V15")
    assert finding.rewrite is not None and finding.rewrite.op.startswith("%attend = kv.attend(")


def test_rules_of_our_own_passes_have_a_place() -> None:
    """Every rule that the preset tries is found where it is written, or where its pass asks for it."""

    class Seen:
        def __init__(self) -> None:
            self.rules: dict[str, None] = {}

        def allows(self, rule: str, op: Op) -> bool:
            self.rules[rule] = None
            return True

        def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op]) -> None: ...

    seen = Seen()
    run_pipeline("@cpu", traced("qwen3"), PassContext(listeners=[seen]))
    assert len(seen.rules) > 30
    for rule in seen.rules:
        name, _, what = rule.partition("/")
        file, _, line = place_of(pass_class(name), rule).rpartition(":")
        source = Path(file).read_text(encoding="utf-8").splitlines()
        near = "\n".join(source[int(line) - 1 : int(line) + 2])
        assert f"def {what.replace('-', '_')}(" in near.replace("def _", "def ") or f"/{what}" in near, (rule, near)
