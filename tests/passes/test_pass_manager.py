"""Pipeline text, the registry's help, and the checks around every pass."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Module, Stage
from xllm_compiler.ir.ops import Neg
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.passes.base import Pass, PassContext
from xllm_compiler.passes.instruments import DumpDir, Instrument
from xllm_compiler.passes.manager import PassRun, Pipeline, PipelineReport, parse_pipeline, run_pipeline
from xllm_compiler.passes.presets import all_presets
from xllm_compiler.passes.registry import BUILTIN, pass_class, register_pass

TEXT = """xir 1 stage=graph
dim N in [1, 64]

func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
  %dead = t.exp(%x) : f32[N, 8]
  %y = t.neg(%x) : f32[N, 8]
  return %y
}
"""


def module() -> Module:
    return parse_module(TEXT, "t.xir")


@register_pass("test-options")
@dataclass(frozen=True)
class WithOptions(Pass):
    """before and after are the same."""

    count: int = 2
    factor: float = 0.5
    deep: bool = False
    axis: str = "N"

    def run(self, module: Module, ctx: PassContext) -> bool:
        ctx.stat("runs", self.count)
        return False


@register_pass("test-liar")
@dataclass(frozen=True)
class Liar(Pass):
    """before and after are the same, or not."""

    act: bool = False
    claim: bool = False

    def run(self, module: Module, ctx: PassContext) -> bool:
        if self.act:
            next(iter(module.funcs.values())).ops[0].erase()
        return self.claim


@register_pass("test-breaker")
@dataclass(frozen=True)
class Breaker(Pass):
    """Leaves a module that does not verify, or fails, or never settles."""

    how: str = "order"

    def run(self, module: Module, ctx: PassContext) -> bool:
        func = next(iter(module.funcs.values()))
        match self.how:
            case "order":
                late = Builder.at_end(func).create(Neg, func.args[0])
                func.ops[0].set_operand(0, late.result)
            case "crash":
                raise RuntimeError("boom")
            case "grow":
                Builder.at_end(func).create(Neg, func.args[0])
            case "stage":
                module.stage = "sched"
            case "nothing said":
                return None  # type: ignore[return-value]
        return True


@register_pass("test-buf")
@dataclass(frozen=True)
class NeedsBuf(Pass):
    """Wants stage buf."""

    needs: ClassVar[Stage] = "buf"
    leaves: ClassVar[Stage] = "buf"

    def run(self, module: Module, ctx: PassContext) -> bool:
        return False


class Seen(Instrument):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def started(self, pipeline: Pipeline, module: Module) -> None:
        self.events.append(f"started {pipeline}")

    def before(self, index: int, p: Pass, module: Module) -> None:
        self.events.append(f"before {p.name}")

    def after(self, run: PassRun, module: Module) -> None:
        self.events.append(f"after {run.name}")

    def failed(self, index: int, p: Pass, module: Module, error: XllmError) -> None:
        self.events.append(f"failed {index} {p.name}: {error.message}")

    def finished(self, report: PipelineReport, module: Module) -> None:
        self.events.append("finished")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dce", "dce"),
        (" dce , cse ", "dce,cse"),
        ("fix(dce,cse),fold", "fix(dce,cse),fold"),
        ("fix( fix(dce) , cse )", "fix(fix(dce),cse)"),
        ("test-options{count=2}", "test-options"),
        ("test-options{ axis=B, count=-3 }", "test-options{count=-3,axis=B}"),
        ("test-options{deep=true,factor=1.25}", "test-options{factor=1.25,deep=true}"),
        ("", ""),
    ],
)
def test_text_round_trips(text: str, canonical: str) -> None:
    plan = parse_pipeline(text)
    assert str(plan) == canonical
    assert parse_pipeline(str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fuse-qvk", "did you mean 'fuse-qkv'"),
        ("dec", "did you mean 'dce'"),
        ("@cpx", "did you mean '@cpu'"),
        ("test-options{cuont=1}", "did you mean 'count'"),
        ("dce{n=1}", "it has no options"),
        ("test-options{count=many}", "is an integer, not 'many'"),
        ("test-options{deep=1}", "true or false"),
        ("test-options{count=1,count=2}", "twice"),
        ("test-options{count}", "has no value"),
        ("test-options{count=1", "not closed"),
        ("fix(dce", "not closed"),
        ("dce,", "expected a pass name"),
        ("dce cse", "unexpected 'c'"),
        ("dce)", "unexpected ')'"),
        ("{", "expected a pass name"),
    ],
)
def test_bad_text_is_refused(text: str, says: str) -> None:
    with pytest.raises(XllmError) as e:
        parse_pipeline(text)
    assert e.value.kind == "option" and says in str(e.value)


def test_a_run_reports_what_it_did(tmp_path: Path) -> None:
    seen = Seen()
    report = run_pipeline("fix(dce,cse),test-options", module(), instruments=[DumpDir(tmp_path), seen])
    assert [(r.text, r.changed) for r in report.runs] == [
        ("dce", True),
        ("cse", False),
        ("dce", False),
        ("cse", False),
        ("test-options", False),
    ]
    assert seen.events == [
        "started fix(dce,cse),test-options",
        *(f"{when} {r.text}" for r in report.runs for when in ("before", "after")),
        "finished",
    ]
    assert report.ctx.stats["dce"] == {"erased": 1}
    assert (report.runs[0].ops_before, report.runs[0].ops_after) == (2, 1)
    assert [r.stats for r in report.runs] == [{"erased": 1}, {}, {}, {}, {"runs": 2}]
    assert report.table().count("erased 1") == 1
    dumps = ["00-input.xir", "01-dce.xir", "02-cse.xir", "03-dce.xir", "04-cse.xir", "05-test-options.xir"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*dumps, "passes.txt"]
    assert (tmp_path / "00-input.xir").read_text() == TEXT and "dead" not in (tmp_path / "01-dce.xir").read_text()


def test_a_claim_is_checked() -> None:
    with pytest.raises(XllmError, match="denies it"):
        run_pipeline("test-liar{act=true}", module())
    with pytest.raises(XllmError, match="as it was"):
        run_pipeline("test-liar{claim=true}", module())
    run_pipeline("test-liar{act=true,claim=true}", module())


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        ("test-breaker", r"after pass test-breaker: V1"),
        ("test-breaker{how=crash}", "RuntimeError: boom"),
        ("test-breaker{how=nothing said}", r"run\(\) of pass test-breaker returned None"),
        ("test-breaker{how=stage}", "promised stage graph and left sched"),
        ("fix(test-breaker{how=grow})", "still changes the module after 8 rounds"),
    ],
)
def test_a_broken_pass_is_named(pipeline: str, says: str) -> None:
    with pytest.raises(XllmError, match=says) as e:
        run_pipeline(pipeline, module())
    assert e.value.kind == "internal"


def test_a_failure_reaches_the_instruments() -> None:
    seen = Seen()
    with pytest.raises(XllmError):
        run_pipeline("dce,test-breaker{how=crash}", module(), instruments=[seen])
    assert seen.events[-1] == "failed 2 test-breaker: pass test-breaker{how=crash} failed: RuntimeError: boom"


def test_a_limit_stops_after_so_many_runs() -> None:
    for limit, runs in ((0, []), (1, ["dce"]), (3, ["dce", "cse", "dce"]), (99, ["dce", "cse", "dce", "cse", "fold"])):
        seen = Seen()
        report = run_pipeline("fix(dce,cse),fold", module(), limit=limit, instruments=[seen])
        assert [r.name for r in report.runs] == runs and seen.events[-1] == "finished"


def test_verifying_can_be_left_out() -> None:
    run_pipeline("test-breaker", module(), verify_each=False)
    with pytest.raises(XllmError, match="denies it"):
        run_pipeline("test-liar{act=true}", module(), verify_each=False)


def test_stages_are_checked_before_anything_runs() -> None:
    m = module()
    with pytest.raises(XllmError, match="needs stage buf") as e:
        run_pipeline("dce,test-buf", m)
    assert e.value.kind == "option" and len(m.funcs["f"].ops) == 2
    with pytest.raises(XllmError, match="needs stage graph"):
        run_pipeline("assign-streams,plan-memory,dce", m)
    run_pipeline("assign-streams,plan-memory,test-buf", m)


def test_the_hash_follows_options_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = parse_pipeline("test-options"), parse_pipeline("test-options{count=3}")
    assert one.hash() == parse_pipeline("test-options{count=2}").hash() != two.hash()
    copy = tmp_path / "changed.py"
    copy.write_text(Path(str(sys.modules[WithOptions.__module__].__file__)).read_text() + "# changed\n")
    before = one.hash()
    monkeypatch.setattr(sys.modules[WithOptions.__module__], "__file__", str(copy))
    assert one.hash() != before


def test_the_hash_covers_what_a_pass_takes_from_its_neighbours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = parse_pipeline("fuse-glu")
    before = plan.hash()
    helper = tmp_path / "match.py"
    helper.write_text("# another helper\n")
    monkeypatch.setattr(sys.modules["xllm_compiler.passes.fusion.match"], "__file__", str(helper))
    assert plan.hash() != before


def test_every_builtin_is_where_the_registry_says() -> None:
    for name in BUILTIN:
        cls = pass_class(name)
        assert cls.name == name and "before" in (cls.__doc__ or ""), f"{name} shows no before and after"
    for preset in all_presets()[0]:
        plan = parse_pipeline(f"@{preset}")
        assert parse_pipeline(str(plan)) == plan


def test_names_are_checked() -> None:
    with pytest.raises(XllmError, match="kebab-case"):
        register_pass("Fuse_Norm")
    with pytest.raises(XllmError, match="is registered by"):
        register_pass("dce")(WithOptions)


def test_passes_do_not_load_torch_or_each_other() -> None:
    code = (
        "import sys; from xllm_compiler.passes.manager import parse_pipeline; "
        "assert not any(m.startswith('xllm_compiler.passes.') and m.endswith('.dce') for m in sys.modules); "
        "parse_pipeline('dce,fuse-qkv,plan-memory'); assert 'torch' not in sys.modules; "
        "assert 'xllm_compiler.passes.cleanup.cse' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
