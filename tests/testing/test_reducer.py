"""Delta debugging of modules: what is left is minimal, still fails in the same way, and the search is deterministic."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes import registry
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.passes.registry import load_passes
from xllm_compiler.testing.corpus import TRACED, entry
from xllm_compiler.testing.cuts import measure, simpler
from xllm_compiler.testing.edits import Edit, rebuild, with_ranks
from xllm_compiler.testing.failures import CommandCheck, PipelineCheck, message_class
from xllm_compiler.testing.graphs import random_module
from xllm_compiler.testing.reducer import Progress, Reduction, op_count, reduce_module

PLANTED = str(Path(__file__).with_name("planted_passes.py"))

LAYER = """\
xir 1 stage=graph
dim N in [1, 512]
dim B in [1, 64]
dim P in [1, 4096]
assume N - B >= 0  // a token each
group @tp size=2
func @other(%x: f32[N, 64]) -> (f32[N, 64]) {
  %y = t.tanh(%x) : f32[N, 64]
  return %y
}
func @step(
    %x: f32[N, 64], %pos: i32[N], %seq: i32[N], %start: i32[B + 1], %table: i32[B, 8],
    %kv0: kv<f32, heads=2, k=16, v=16, page=16>[P]
) -> (f32[N, 64], kv<f32, heads=2, k=16, v=16, page=16>[P] alias %kv0) {
  %wn = param(name="norm") : f32[64]
  %wq = param(name="q") : f32[64, 64]
  %wk = param(name="k") : f32[32, 64]
  %wv = param(name="v") : f32[32, 64]
  %wo = param(name="o") : f32[64, 64]
  %h = nn.rms_norm(%x, w=%wn, eps=1e-05) : f32[N, 64]
  %q = nn.linear(%h, %wq) : f32[N, 64]
  %k = nn.linear(%h, %wk) : f32[N, 32]
  %v = nn.linear(%h, %wv) : f32[N, 32]
  %qh = t.reshape(%q, shape=[N, 4, 16]) : f32[N, 4, 16]
  %kh = t.reshape(%k, shape=[N, 2, 16]) : f32[N, 2, 16]
  %vh = t.reshape(%v, shape=[N, 2, 16]) : f32[N, 2, 16]
  %kv1 = kv.write(%kv0, %kh, %vh, %pos, %seq, %table) : kv<f32, heads=2, k=16, v=16, page=16>[P]
  %a = kv.attend(%kv1, %qh, %pos, %seq, %start, %table, scale=0.25, window=128) : f32[N, 4, 16]
  %ah = t.reshape(%a, shape=[N, 64]) : f32[N, 64]
  %p = nn.linear(%ah, %wo, partial=@tp) : f32[N, 64] partial(@tp)
  %f = comm.all_reduce_start(%p, group=@tp) : !future<f32[N, 64]>
  %s = comm.wait(%f) : f32[N, 64]
  %y = t.add(%x, %s) : f32[N, 64]
  return %y, %kv1
}
"""


@pytest.fixture(autouse=True)
def planted() -> Iterator[None]:
    """The planted passes, known to nobody else afterwards."""
    names = load_passes(PLANTED)
    yield
    for name in names:
        sys.modules.pop(registry._registered.pop(name).__module__, None)


def layer() -> Module:
    return parse_module(LAYER, "layer.xir")


def traced(name: str) -> Module:
    return parse_module((TRACED / f"{name}.xir").read_text(encoding="utf-8"), name)


def names(module: Module) -> list[str]:
    return [op.name for f in module.funcs.values() for op in f.ops]


def has(*wanted: str) -> Callable[[Module], bool]:
    return lambda m: all(name in names(m) for name in wanted)


def reduced(module: Module, pipeline: str, **options: object) -> str:
    check = PipelineCheck(pipeline, **options)  # type: ignore[arg-type]
    found = check.find(module)
    assert found is not None
    return print_module(reduce_module(module, lambda m: check.shows(m, found)))


# ------------------------------------------------------------------------------------------------------------- minimal


def test_one_op_is_left_with_the_simplest_head() -> None:
    small = """\
xir 1 stage=graph
dim N in [1, 2]
dim B in [1, 2]
dim P in [1, 2]

func @step(
    %pos: i32[N],
    %seq: i32[N],
    %start: i32[B + 1],
    %table: i32[B, 1],
    %qh: f32[N, 1, 1],
    %kv1: kv<f32, heads=1, k=1, v=1, page=16>[P]
) -> (f32[N, 1, 1]) {
  %a = kv.attend(%kv1, %qh, %pos, %seq, %start, %table, scale=0.0) : f32[N, 1, 1]
  return %a
}
"""
    assert print_module(reduce_module(layer(), has("kv.attend"))) == small


def test_what_belongs_together_stays_together() -> None:
    assert names(reduce_module(layer(), has("comm.wait"))) == ["comm.all_reduce_start", "comm.wait"]
    assert names(reduce_module(layer(), lambda m: "%p = nn.linear" in print_module(m))) == ["nn.linear"]
    assert names(reduce_module(layer(), has("nn.rms_norm", "t.add"))) == ["nn.rms_norm", "t.add"]
    assert list(reduce_module(layer(), has("t.tanh")).funcs) == ["other"]
    assert list(reduce_module(layer(), lambda m: len(m.funcs) == 2).funcs) == ["other", "step"]


def test_a_chain_is_cut_to_what_the_failure_reads() -> None:
    """The norm has to reach the attention, by whatever way."""

    def reaches(module: Module) -> bool:
        seen, stack = set(), [op for f in module.funcs.values() for op in f.ops if op.name == "kv.attend"]
        while stack:
            op = stack.pop()
            seen.add(op.name)
            stack += [v.op for v in op.operands if v.op is not None]
        return "nn.rms_norm" in seen

    assert names(reduce_module(layer(), reaches)) == ["nn.rms_norm", "t.reshape", "kv.write", "kv.attend"]


def test_a_failure_about_dead_code_keeps_it() -> None:
    text = LAYER.replace("  return %y, %kv1", "  %dead = t.exp(%s) : f32[N, 64]\n  return %y, %kv1")
    module = parse_module(text, "t.xir")

    def dead(m: Module) -> bool:
        return any(op.name == "t.exp" and not op.result.has_uses for f in m.funcs.values() for op in f.ops)

    assert names(reduce_module(module, dead)) == ["t.exp"]


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_op_can_be_singled_out(seed: int) -> None:
    """Whatever op a failure is about, it is left alone, but for a start with its wait, and for constants that take the
    dtype of the other operand or have to be known."""
    module = random_module(random.Random(seed).randrange, size=20)
    text = print_module(module)
    for name in dict.fromkeys(names(module)):
        small = reduce_module(module, has(name))
        verify(small)
        left = [n for n in names(small) if n != "t.const" or name == "t.const"]
        start = left[0] if name == "comm.wait" else name
        assert left == ([start, "comm.wait"] if name.startswith("comm.") else [name])
    assert print_module(module) == text, "the module itself has changed"


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), pair=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_what_is_left_is_simpler_verifies_and_fails_and_a_second_time_nothing_goes(
    seed: int, pair: tuple[int, int]
) -> None:
    module = random_module(random.Random(seed).randrange, size=20)
    kinds = names(module)
    fails = has(kinds[pair[0] % len(kinds)], kinds[pair[1] % len(kinds)])
    small = reduce_module(module, fails)
    verify(small)
    assert fails(small) and not simpler(module, small)
    assert print_module(reduce_module(module, fails)) == print_module(small), "not deterministic"
    assert print_module(reduce_module(small, fails)) == print_module(small), "not a fixed point"
    assert structural_hash(parse_module(print_module(small))) == structural_hash(small)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_an_empty_edit_changes_nothing(seed: int) -> None:
    module = random_module(random.Random(seed).randrange, size=25)
    assert print_module(rebuild(module, Edit()), loc=True) == print_module(module, loc=True)


def test_groups_of_another_size() -> None:
    """Types follow; what fits its own sizes only is refused."""
    text = """xir 1 stage=graph
group @tp size=2
func @f(%x: f32[4, 6]) -> (f32[8, 6]) {
  %f = comm.all_gather_start(%x, group=@tp, axis=0) : !future<f32[8, 6]>
  %y = comm.wait(%f) : f32[8, 6]
  return %y
}
"""
    wide = text.replace("size=2", "size=4").replace("[8, 6]", "[16, 6]")
    assert print_module(with_ranks(parse_module(text), 4)) == print_module(parse_module(wide))
    cut = text.replace("all_gather_start(%x, group=@tp, axis=0)", "reduce_scatter_start(%x, group=@tp, axis=1)")
    with pytest.raises(XllmError, match="6 is not provably a multiple of 4"):
        with_ranks(parse_module(cut.replace("f32[8, 6]", "f32[4, 3]")), 4)
    for name in ("written/mesh", "written/decoder-tp2"):
        with pytest.raises(XllmError, match="the module is for group @tp as it is: size=2 rank="):
            with_ranks(entry(name).module(), 4)


def test_an_empty_edit_changes_nothing_in_stage_buf() -> None:
    module = traced("qwen3")
    run_pipeline("@cpu", module)
    assert module.stage == "buf"
    assert print_module(rebuild(module, Edit())) == print_module(module)


# ----------------------------------------------------------------------------------------------------------- contract


def test_a_module_that_does_not_fail_is_refused() -> None:
    with pytest.raises(XllmError, match="does not show the failure") as e:
        reduce_module(layer(), has("t.erf"))
    assert e.value.kind == "option"


def test_the_test_may_change_what_it_is_given() -> None:
    def fails(module: Module) -> bool:
        found = has("kv.attend")(module)
        run_pipeline("dce", module)
        for f in module.funcs.values():
            f.set_returns([])
        module.groups.clear()
        return found

    assert names(reduce_module(layer(), fails)) == ["kv.attend"]


def test_an_exception_of_the_test_ends_the_search_and_leaves_the_best_so_far() -> None:
    count = 0

    def fails(module: Module) -> bool:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return has("kv.attend")(module)

    reduction = Reduction(layer(), fails)
    with pytest.raises(KeyboardInterrupt):
        reduction.run()
    verify(reduction.best)
    assert has("kv.attend")(reduction.best) and op_count(reduction.best) < op_count(layer())


def test_a_time_limit_ends_the_search() -> None:
    reduction = Reduction(layer(), has("kv.attend"), time_limit=0.0)
    assert print_module(reduction.run()) == print_module(layer())
    assert reduction.timed_out and reduction.tried == 0


def test_progress_counts_candidates_and_ops() -> None:
    seen: list[Progress] = []
    small = reduce_module(layer(), has("kv.attend"), progress=seen.append)
    assert [p.tried for p in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].ops == op_count(small) == 1
    assert all(a.ops >= b.ops for a, b in itertools.pairwise(seen))
    assert seen[0].cut == "functions" and any(p.shrank and p.cut == "numbers" for p in seen)


def test_the_measure_tells_smaller_from_larger() -> None:
    same, fewer = layer(), layer()
    fewer.funcs.pop("other")
    assert not simpler(layer(), same) and simpler(fewer, same) and not simpler(same, fewer)
    assert list(measure(same))[:4] == [2, 20, 3, 7]


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_wrong_rewrite_among_two_hundred_in_a_traced_model() -> None:
    weight = "%model.layers.1.post_attention_layernorm.weight"
    lines = reduced(traced("qwen3"), "fold,shuffle,cse").splitlines()
    assert lines[3:] == [
        "func @step(%mul_26: f32[1, N, 1]) -> (f32[1, N, 1]) {",
        f'  {weight} = param(name="{weight[1:]}") : f32[1]',
        f"  %mul_27 = t.mul({weight}, %mul_26) : f32[1, N, 1]",
        "  return %mul_27",
        "}",
    ]


@pytest.mark.parametrize(
    ("model", "pipeline", "left"),
    [
        ("qwen3", "lose-write", ["kv.write"]),
        ("gemma3_text", "import-clean,fix(fold,cse),lose-write,dce", ["kv.write"]),
        ("qwen3", "cse,stale-type", ["t.silu"]),
        ("qwen3", "liar", ["kv.attend"]),
        ("gemma2", "fold,silent", ["t.reduce"]),
        ("qwen3.bf16", "round-off", ["nn.linear"]),
        ("qwen3", "stumble", ["kv.attend", "t.silu", "t.mul"]),  # without attention it would raise something else
    ],
)
def test_each_kind_of_failure_is_kept_and_nothing_else(model: str, pipeline: str, left: list[str]) -> None:
    small = parse_module(reduced(traced(model), pipeline))
    assert names(small) == left
    assert PipelineCheck(pipeline).find(small) is not None


def test_a_broken_memory_plan() -> None:
    module = traced("qwen3")
    run_pipeline("@cpu", module)
    text = reduced(module, "overlap", check="verify")
    assert [line.split(" = ")[1].split("(")[0] for line in text.splitlines() if " = " in line] == [
        "nn.embedding",
        "kv.attend",
        "t.reshape",
        "nn.linear",
    ]
    assert "at=[0]" in text and "arena(" in text
    kept = print_module(reduce_module(module, has("kv.attend"))).splitlines()
    assert kept[0] == "xir 1 stage=buf" and "arena(" not in kept[-4] and not any("dim S" in line for line in kept)


def test_a_dropped_event() -> None:
    module = layer()
    run_pipeline("assign-streams", module)
    small = parse_module(reduced(module, "drop-wait", check="verify"))
    assert "sched.wait" in names(small) and len(names(small)) <= 5


def test_meanings_are_compared_at_the_least_size_that_differs() -> None:
    check = PipelineCheck("lose-write", sizes=[{"N": 2}, {"N": 5}])
    found = check.find(traced("qwen3"))
    assert found is not None and found.sizes == {"N": 2} and found.signature == ("differs", "exact")
    again = check.again(traced("qwen3"), replace(found, sizes={"N": 5}))
    assert again is not None and again.sizes == {"N": 5}, "a candidate is only looked at where the failure was seen"


def test_what_is_not_a_pass_failure_is_raised() -> None:
    with pytest.raises(XllmError, match="there is no pass called 'lose-writes'"):
        PipelineCheck("lose-writes")
    with pytest.raises(XllmError, match="needs stage buf"):
        PipelineCheck("overlap").find(traced("qwen3"))


def test_checks_grow_stricter() -> None:
    model = traced("qwen3")
    kinds = {
        (pipeline, check): found and found.kind
        for pipeline in ("stumble", "liar", "stale-type", "lose-write", "cse")
        for check in ("error", "verify", "equiv")
        for found in [PipelineCheck(pipeline, check).find(model)]  # type: ignore[arg-type]
    }
    assert [kinds["stumble", c] for c in ("error", "verify", "equiv")] == ["raises"] * 3
    assert [kinds["liar", c] for c in ("error", "verify", "equiv")] == ["claim"] * 3
    assert [kinds["stale-type", c] for c in ("error", "verify")] == [None, "verify"]
    assert [kinds["lose-write", c] for c in ("error", "verify", "equiv")] == [None, None, "differs"]
    assert [kinds["cse", c] for c in ("error", "verify", "equiv")] == [None] * 3


def test_messages_are_compared_without_names_and_numbers() -> None:
    a = message_class("t.add of %x_1: f32[N, 64] and 'w7' at 1.5e-05")
    assert a == message_class("t.add of %model.y': bf16[2, N] and 'abc' at 3")
    assert a != message_class("t.mul of %x_1: f32[N, 64] and 'w7' at 1.5e-05")


# ------------------------------------------------------------------------------------------------------------ commands


def test_a_command_decides(tmp_path: Path) -> None:
    script = tmp_path / "look for attention.py"
    script.write_text("import sys; sys.exit(3 if 'kv.attend' in open(sys.argv[1]).read() else 0)\n")
    command = f"{sys.executable} '{script}' %s"
    assert CommandCheck(command)(layer())
    assert CommandCheck(f"{sys.executable} '{script}'", interesting=3)(layer()), "the path comes last"
    assert not CommandCheck(command, interesting=1)(layer())


def test_a_command_that_takes_too_long_is_no_failure() -> None:
    assert not CommandCheck(f"{sys.executable} -c 'import time; time.sleep(60)' %s", timeout=0.2)(layer())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-program-here %s", "the command cannot be run: no-such-program-here: No such file or directory"),
        ("", "the command is empty"),
        ("sh -c 'oops", "cannot be split into words: No closing quotation"),
    ],
)
def test_a_command_that_cannot_be_run_is_an_error(command: str, message: str) -> None:
    with pytest.raises(XllmError, match=message) as e:
        CommandCheck(command)(layer())
    assert e.value.kind == "option"
