"""`xllm-bisect`: what it prints names the one rewrite, its commands show the failure again, bad input is one error."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest

from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.testing.corpus import TRACED
from xllm_compiler.tools.bisect import main
from xllm_compiler.tools.opt import main as opt
from xllm_compiler.tools.reduce import main as reduce

PLANTED = str(Path(__file__).parents[1] / "testing" / "planted_passes.py")
QWEN3 = str(TRACED / "qwen3.xir")
SMALL = "xir 1 stage=graph\nfunc @f(%x: f32[4]) -> (f32[4]) {\n  %y = t.add(%x, %x) : f32[4]\n  return %y\n}\n"

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.xir").write_text(SMALL)
    return tmp_path


def commands(out: str) -> list[list[str]]:
    """The argument lists of the xllm-opt commands that were printed."""
    return [shlex.split(line.partition("xllm-opt ")[2]) for line in out.splitlines() if "xllm-opt " in line]


def test_the_one_rewrite_and_how_to_see_it_again(here: Path, capsys: Capture) -> None:
    assert main([QWEN3, "-p", "fold,shuffle,cse", "--load", PLANTED, "-o", "repro.xir"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    head, _, rule, place, traced, *_ = out.splitlines()
    assert head.startswith("guilty: shuffle, pass run 2 of 3, rewrite ")
    assert rule.startswith(f"rule shuffle/swap-operands, {PLANTED}:")
    assert place.startswith("at %mul_27 = t.mul(%model.layers.1.post_attention_layernorm.weight, %mul_26)")
    assert traced.startswith("traced from ")
    assert out.count("\n    > ") == 2 and "allowed" in out
    whole, repro = commands(out)
    assert whole[:5] == [QWEN3, "-p", "fold,shuffle,cse", "--load", PLANTED] and repro[0] == "repro.xir"
    for words in (whole, repro):
        assert "--check-equiv=N=1,B=1" in words
        assert opt(words) == 1
        assert "@step does not compute what it did" in capsys.readouterr().err
    at = whole.index("--fuel") + 1
    assert opt([*whole[:at], str(int(whole[at]) - 1), *whole[at + 1 :]]) == 0, "one rewrite less is fine"
    run = (here / "repro.xir").read_text().splitlines()[0]
    assert run == "// RUN: xllm-opt %s " + shlex.join(repro[1:])


def test_a_raising_rule(here: Path, capsys: Capture) -> None:
    assert main([QWEN3, "-p", "cse,stumble", "--load", PLANTED, "--check", "error", "-o", "repro.xir"]) == 1
    out, _ = capsys.readouterr()
    assert out.startswith("guilty: stumble, pass run 2 of 2, rewrite 1 of 1, while making it\n\nrule stumble/stumble, ")
    assert "KeyError: 'silu'" in out
    for words in commands(out):
        assert "--no-verify-each" in words
        assert opt([*words, "--no-repro"]) == 1
        assert "KeyError: 'silu'" in capsys.readouterr().err


def test_a_pass_as_a_whole(here: Path, capsys: Capture) -> None:
    assert main([QWEN3, "-p", "silent", "--load", PLANTED]) == 1
    out, _ = capsys.readouterr()
    assert out.startswith("guilty: silent, pass run 1 of 1\n\nwhat the pass changed:\n    @@ ")
    assert "note: silent does not ask before it rewrites" in out
    [whole] = commands(out)
    assert "--fuel" not in whole and whole[-3:] == ["--pass-limit", "1", "--check-equiv=N=1,B=1"]


def test_a_preset_stays_a_word(here: Path, capsys: Capture) -> None:
    assert main([QWEN3, "-p", "@cpu,overlap", "--load", PLANTED, "--check", "verify", "-o", "repro.xir"]) == 1
    out, _ = capsys.readouterr()
    whole, repro = commands(out)
    assert out.startswith("guilty: overlap, pass run ") and "V15: %attend at [0, " in out
    assert whole[1:3] == ["-p", "@cpu,overlap"] and repro[1:3] == ["-p", "overlap"]
    assert (here / "repro.xir").read_text().splitlines()[2] == "xir 1 stage=buf"


def test_nothing_wrong(here: Path, capsys: Capture) -> None:
    assert main(["small.xir", "-p", "cse,dce", "-o", "repro.xir"]) == 0
    assert capsys.readouterr().out == "nothing is wrong: cse,dce does nothing that --check equiv finds bad\n"
    assert not (here / "repro.xir").exists()
    assert main(["small.xir", "-p", "cse,dce", "--test", "true"]) == 0
    assert capsys.readouterr().out == "nothing is wrong: cse,dce does nothing that --test true finds bad\n"


def test_a_command_decides(here: Path, capsys: Capture) -> None:
    """Bad is what has two hundred signs: the two of the hundredth pair are to blame."""
    argv = [QWEN3, "-p", "cse,shuffle,dce", "--load", PLANTED, "-o", "repro.xir"]
    assert main([*argv, "--test", "grep -q '%neg_199 ='", "--interesting-exit", "0"]) == 1
    out, _ = capsys.readouterr()
    assert "rule shuffle/negate-twice, " in out and "the test says that the module is bad" in out
    whole, repro = commands(out)
    assert opt([*repro, "-o", "after.xir"]) == 0 and opt([*whole, "-o", "whole.xir"]) == 0
    assert (here / "after.xir").read_text().count("t.neg") == (here / "whole.xir").read_text().count("t.neg") == 200
    run, then, *_ = (here / "repro.xir").read_text().splitlines()
    assert run == f"// RUN: xllm-opt %s {shlex.join(repro[1:])} -o %t"
    assert then == "// RUN: grep -q '%neg_199 =' %t"


@pytest.mark.slow
def test_a_large_traced_model_within_a_minute_of_computing(here: Path, capsys: Capture) -> None:
    """Twelve layers, over a thousand ops, over a thousand rewrites: both tools are done long before anyone gets up."""
    from xllm_compiler.frontend.trace import trace_checkpoint
    from xllm_compiler.models.random_checkpoint import TINY, random_config

    config = random_config("qwen3", {**TINY, "num_hidden_layers": 12, "hidden_size": 16, "vocab_size": 64})
    limits = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_num_logits": 8}
    (here / "model.xir").write_text(print_module(trace_checkpoint(config, dtype="f32", **limits).module, loc=True))
    begin = time.process_time()  # other tests share the machine
    assert main(["model.xir", "-p", "fold,cse,shuffle,dce", "--load", PLANTED]) == 1
    out, _ = capsys.readouterr()
    assert int(out.splitlines()[0].rpartition(" of ")[2]) > 900
    assert "\nat %mul_27 = t.mul(%model.layers.1.post_attention_layernorm.weight, %mul_26)" in out
    assert "\ntraced from model.layers.1.post_attention_layernorm (transformers/models/qwen3/modeling_qwen3.py:" in out
    assert reduce(["model.xir", "-p", "fold,cse,shuffle,dce", "--load", PLANTED]) == 0
    small = parse_module(capsys.readouterr().out)
    assert [op.name for op in small.func().ops] == ["param", "t.mul"]
    assert time.process_time() - begin < 60


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["small.xir"], "the following arguments are required: -p/--pipeline"),
        (["small.xir", "-p", "dcee"], "did you mean 'dce'?"),
        (["small.xir", "-p", "dce("], "unexpected '('"),
        (["small.xir", "-p", "dce", "--test", "false"], "the module is bad before any pass has run"),
        (["small.xir", "-p", "dce", "--test", "no-such-program"], "the command cannot be run: no-such-program"),
        (["small.xir", "-p", "dce", "--sizes", "Q=1"], "the module has no size Q"),
        (["small.xir", "-p", "dce", "-o", "no/such.xir"], "cannot write no/such.xir: there is no directory no"),
        (["smal.xir", "-p", "dce"], "there is no file smal.xir"),
        (["bad.xir", "-p", "dce"], "bad.xir:2:12"),
        (["small.xir", "-p", "dce", "--chek", "error"], "did you mean --check?"),
    ],
)
def test_bad_input_is_one_error(here: Path, capsys: Capture, argv: list[str], message: str) -> None:
    (here / "bad.xir").write_text("xir 1 stage=graph\nfunc @f(%x f32[4])\n")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error[") and err.count("error[") == 1 and message in err, err
