"""Diffs of passes: ops aligned, numbers in names ignored, equal layers folded."""

from __future__ import annotations

import random
import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from watched import Ran

from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.instruments import History
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.report.changes import changes
from xllm_compiler.report.graph import layer_of
from xllm_compiler.testing.graphs import random_module


def texts(before: str, after: str) -> list[str]:
    sections, _, _ = changes(before, after)
    return [f"{kind} {text.strip()}".rstrip() for s in sections for kind, text in s.lines]


def body(*lines: str) -> str:
    return "func @f(%x: f32[N]) -> (f32[N]) {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def test_layers() -> None:
    assert layer_of("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert layer_of("transformer.h.12") == "transformer.h.12"
    assert layer_of("model.experts.1.block.2") == "model.experts.1"
    assert layer_of("model.embed_tokens") == "model.embed_tokens" and layer_of("") == ""
    assert layer_of("h2o.norm") == "h2o.norm", "a name with a digit in it is no number"


def test_a_removed_op_is_one_line_though_all_later_numbers_shift() -> None:
    before = body("%a = t.neg(%x) : f32[N]", "%a_1 = t.neg(%a) : f32[N]", "%a_2 = t.abs(%a_1) : f32[N]", "return %a_2")
    after = body("%a = t.neg(%x) : f32[N]", "%a_1 = t.abs(%a) : f32[N]", "return %a_1")
    assert texts(before, after) == [
        "  %a = t.neg(%x) : f32[N]",
        "- %a_1 = t.neg(%a) : f32[N]",
        "- %a_2 = t.abs(%a_1) : f32[N]",
        "+ %a_1 = t.abs(%a) : f32[N]",
        "  return %a_1",
    ]


def test_an_operand_that_is_another_op_is_a_change() -> None:
    before = body("%a = t.neg(%x) : f32[N]", "%b = t.abs(%x) : f32[N]", "%c = t.exp(%a) : f32[N]", "return %c")
    after = body("%a = t.neg(%x) : f32[N]", "%b = t.abs(%x) : f32[N]", "%c = t.exp(%b) : f32[N]", "return %c")
    assert texts(before, after) == [
        "  %b = t.abs(%x) : f32[N]",
        "- %c = t.exp(%a) : f32[N]",
        "+ %c = t.exp(%b) : f32[N]",
        "  return %c",
    ]


def test_a_replaced_value_does_not_change_its_users() -> None:
    """The new op has the old one's name with another number."""
    before = body("%m_4 = t.neg(%x) : f32[N]", "%e = t.exp(%m_4) : f32[N]", "return %e")
    after = body("%m = t.abs(%x) : f32[N]", "%e = t.exp(%m) : f32[N]", "return %e")
    assert texts(before, after)[1:] == [
        "- %m_4 = t.neg(%x) : f32[N]",
        "+ %m = t.abs(%x) : f32[N]",
        "  %e = t.exp(%m) : f32[N]",
    ]


def test_renumbering_alone_is_no_change() -> None:
    before = body("%a_7 = t.neg(%x) : f32[N]", "%a_9 = t.abs(%a_7) : f32[N]", "return %a_9")
    assert changes(before, before.replace("_7", "").replace("_9", "_1")) == ([], 0, 0)


def test_an_added_offset_is_a_change_of_its_line() -> None:
    before = body("%a = t.neg(%x) : f32[N]", "return %a")
    after = body("%a = t.neg(%x, at=[64]) : f32[N]", "return %a")
    assert texts(before, after)[1:3] == ["- %a = t.neg(%x) : f32[N]", "+ %a = t.neg(%x, at=[64]) : f32[N]"]


def test_equal_layers_are_shown_once(ran: Ran) -> None:
    run, after = next((r, t) for r, t in ran.history.texts if r is not None and r.name == "fuse-qkv")
    before = ran.history.texts[run.index - 1][1]
    sections, gone, come = changes(before, after)
    assert [(s.layer, s.same) for s in sections] == [("model.layers.0", ["model.layers.1", "model.layers.2"])]
    made = [text for kind, text in sections[0].lines if kind == "+"]
    assert sum("nn.linear(" in line for line in made) == 1 and sum("t.slice(" in line for line in made) == 3
    assert gone == 3 * sum(kind == "-" for kind, _ in sections[0].lines) and come == 3 * len(made)
    assert not any("loc(" in text for text in made)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_applying_the_changes_gives_the_new_text(seed: int) -> None:
    """Nothing is lost: what went and came accounts for the difference of both texts, line for line, but for numbers."""
    module = random_module(random.Random(seed).randrange)
    history = History(loc=True)
    run_pipeline(
        "fold,cse,canonicalise,fuse-glu,fuse-qkv,fuse-epilogue,fuse-add-norm,dce", module, instruments=[history]
    )
    plain = [re.sub(r' loc\(".*\)$', "", text, flags=re.M) for _, text in history.texts]
    for before, after in pairwise(plain):
        _, gone, come = changes(before, after)
        assert len(after.splitlines()) - len(before.splitlines()) == come - gone
        assert changes(before, before) == ([], 0, 0)
        assert (gone, come) != (0, 0), "a run that changed the module changed its text"


def test_texts_with_quotes_and_brackets_in_locs() -> None:
    line = '%a = t.neg(%x) : f32[N] loc("we\\"ird) (.py":3, "model.layers.4.\\"x", "p/r")'
    before = f"func @f(%x: f32[N]) -> (f32[N]) {{\n  {line}\n}}\n"
    sections, _, _ = changes(before, before.replace("t.neg", "t.abs"))
    assert sections[0].layer == "model.layers.4" and ("+", "  %a = t.abs(%x) : f32[N]") in sections[0].lines


def test_history_of_a_parsed_module_reads_back(ran: Ran) -> None:
    """The texts that the diffs are made of are whole modules."""
    for _, text in ran.history.texts:
        assert print_module(parse_module(text, "h.xir"), loc=True) == text
