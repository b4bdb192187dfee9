"""Dumps, printed diffs, history and repro files; fuel and explanations."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.instruments import History, PrintAfter, Repro, diff_text
from xllm_compiler.passes.listeners import Explain, Fuel
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.passes.registry import register_pass

TEXT = """xir 1 stage=graph
dim N in [1, 64]

func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
  %dead = t.exp(%x) : f32[N, 8]
  %one = t.const(value=1.0) : f32[]
  %a = t.mul(%x, %one) : f32[N, 8]
  %b = t.mul(%a, %one) : f32[N, 8]
  %y = t.add(%b, %x) : f32[N, 8]
  return %y
}
"""


def module() -> Module:
    return parse_module(TEXT, "t.xir")


@register_pass("test-needs-small")
@dataclass(frozen=True)
class NeedsSmall(FuncPass):
    """Fails on a function of more than two ops; before and after are the same."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        assert len(func.ops) > 2
        raise ValueError("too large")


def test_printing_what_changed() -> None:
    out = io.StringIO()
    run_pipeline("cse,dce", module(), instruments=[PrintAfter(out, diff=True)])
    head, *lines = out.getvalue().splitlines()
    assert head == "// ---- after 02 dce"
    assert [line for line in lines if line[0] in "+-"] == ["-  %dead = t.exp(%x) : f32[N, 8]"]


def test_printing_after_one_pass_and_after_all() -> None:
    one, every = io.StringIO(), io.StringIO()
    run_pipeline("cse,dce", module(), instruments=[PrintAfter(one, "cse"), PrintAfter(every, "all")])
    assert one.getvalue() == f"// ---- after 01 cse, no change\n{TEXT}"
    assert every.getvalue().startswith(one.getvalue() + "// ---- after 02 dce\n")


def test_a_diff_of_equal_texts_is_empty() -> None:
    assert diff_text(TEXT, TEXT) == ""


def test_history_keeps_the_texts_that_differ() -> None:
    history, m = History(), module()
    run_pipeline("cse,dce,fold", m, instruments=[history])
    assert [run and run.name for run, _ in history.texts] == [None, "dce", "fold"]
    assert history.texts[0][1] == TEXT and history.texts[-1][1] == print_module(m)


def test_a_repro_is_what_the_failing_pass_was_given(tmp_path: Path) -> None:
    path = tmp_path / "r.xir"
    with pytest.raises(XllmError, match="ValueError: too large") as e:
        run_pipeline("dce,test-needs-small", module(), instruments=[Repro(path, ("--load", "my pass.py"))])
    assert f"repro: xllm-opt {path} -p test-needs-small --load 'my pass.py'" in e.value.help
    first, rest = path.read_text().split("\n", 1)
    assert first == "// RUN: xllm-opt %s -p test-needs-small --load 'my pass.py'"
    assert "%dead" not in rest and "%b = t.mul" in rest
    with pytest.raises(XllmError, match="too large"):
        run_pipeline("test-needs-small", parse_module(path.read_text(), str(path)))


def test_a_repro_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(XllmError, match="too large") as e:
        run_pipeline("test-needs-small", module(), instruments=[Repro(tmp_path)])
    assert "no repro file" in e.value.help and "directory" in e.value.help


@pytest.mark.parametrize(("fuel", "left"), [(0, 3), (1, 2), (2, 1), (9, 1)])
def test_fuel_limits_single_rewrites(fuel: int, left: int) -> None:
    """fold has two multiplications by one to drop."""
    m, ctx, listener = module(), PassContext(), Fuel(fuel)
    ctx.listeners.append(listener)
    report = run_pipeline("fold", m, ctx)
    names = [op.name for op in m.func("f").ops]
    assert names.count("t.mul") + names.count("t.add") == left
    assert listener.spent == ctx.rewrites == report.runs[0].rewrites == min(fuel, 2)


def test_fuel_reaches_passes_that_ask_by_hand() -> None:
    m, ctx = module(), PassContext()
    ctx.listeners.append(Fuel(0))
    report = run_pipeline("dce,cse", m, ctx)
    assert [r.changed for r in report.runs] == [False, False] and print_module(m) == TEXT


def test_fuel_is_not_negative() -> None:
    with pytest.raises(XllmError, match="fuel is -1"):
        Fuel(-1)


def test_explaining_why_a_rule_fired_and_did_not() -> None:
    out, ctx = io.StringIO(), PassContext()
    explain = Explain("fold@%a", out)
    ctx.listeners.append(explain)
    run_pipeline("fold", module(), ctx)
    text = out.getvalue()
    assert explain.count > 0 and "fold/mul-one at %a = t.mul: fired" in text
    assert "fold.py:" in text and "_keep(op, op.a, rw)" in text and "op = <%a = t.mul(%x, %one)>" in text
    assert "%b" not in text.split("fold/mul-one at %a")[1].splitlines()[0]


def test_explaining_one_rule_that_does_not_fire() -> None:
    out, ctx = io.StringIO(), PassContext()
    ctx.listeners.append(Explain("fuse-glu/gated-product@b", out))
    run_pipeline("fuse-glu", module(), ctx)
    assert "fuse-glu/gated-product at %b = t.mul: did not fire" in out.getvalue()
    assert "continue" in out.getvalue() and "return False" in out.getvalue()
    assert "match.py" not in out.getvalue()  # helpers of the rule's own file only


def test_an_explanation_goes_into_the_helpers_of_the_rule() -> None:
    out, ctx = io.StringIO(), PassContext()
    ctx.listeners.append(Explain("fold/mul-one@b", out))
    run_pipeline("fold", module(), ctx)
    text = out.getvalue()
    assert "fold/mul-one at %b = t.mul: fired" in text
    assert text.count("fold.py:") >= 3 and "def _" not in text and "rw.replace(op," in text


def test_an_explanation_needs_a_value() -> None:
    for pattern in ("fold", "fold@", "@%"):
        with pytest.raises(XllmError, match="explains nothing"):
            Explain(pattern, io.StringIO())
