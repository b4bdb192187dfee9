"""`xllm-compile show` and `diff`, and how every verb fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_manifest import fill, sample, write_sample

from xllm_compiler.artifact import read_manifest
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.tools import console
from xllm_compiler.tools.compile import main


def test_show_names_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_sample(tmp_path / "a")
    assert main(["show", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    for word in (
        manifest.id,
        "Qwen3ForCausalLM",
        "xllm_fn_step",
        "8 - N >= 0",
        "256*N + 64",
        "weights.bin",
        "option.dtype",
    ):
        assert word in text
    assert "8.1 KiB" in text  # the arena at its limit: 256*32 + 64 bytes
    assert main(["show", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "a" / "manifest.json").read_text())


def test_memory_example_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sample(tmp_path / "a")
    main(["show", str(tmp_path / "a")])
    fixed = 256 + 256 * 32 + 64 + 1200 * 8
    pages = ((1 << 30) - fixed) // 8192
    assert f"{pages} pages, {pages * 16} tokens, {pages // 8} requests of 128 tokens" in capsys.readouterr().out


def test_diff_of_equal_and_of_different(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "identical" in capsys.readouterr().out
    write_sample(tmp_path / "b", key={"option.dtype": "float32"}, text="xir 1\nmore\n")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    assert "~ option.dtype: 'bfloat16' -> 'float32'" in text
    assert "- checkpoint.config.json" in text
    assert "+more" in text and "~ module.xir" in text
    assert "weights.bin" not in text


def test_diff_finds_the_weight_whose_bytes_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sample(tmp_path / "a")
    with ArtifactWriter(tmp_path / "b") as writer:
        fill(writer)
        writer.write_text("weights.bin", "w" * 200 + "v" * 56)
        writer.commit(sample())
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    assert "~ b: other values" in text and "~ a:" not in text


@pytest.mark.parametrize(
    "argv",
    [
        ["show", "/nowhere"],
        ["diff", "/nowhere", "/nowhere"],
        ["verify", "/nowhere"],
        ["explain", "/nowhere"],
        ["/nowhere", "-o", "/tmp/never"],
        ["/nowhere", "-o", "/tmp/never", "--cache-dir", "/tmp/never"],
    ],
)
def test_errors_are_two_lines_and_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[-1].startswith(("  help:", "  at", "error["))
    assert any(line.startswith("error[") for line in printed.err.splitlines())
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("argv", "message", "help"),
    [
        ([], "the following arguments are required: CHECKPOINT", "xllm-compile --help tells what there is"),
        (["x", "--dumpir", "d"], "xllm-compile has no flag --dumpir", "did you mean --dump-ir?"),
        (["x", "--max-num-seqs", "many"], "argument --max-num-seqs: invalid int value: 'many'", "xllm-compile --help"),
        (["show"], "the following arguments are required: ARTIFACT", "xllm-compile show --help tells what there is"),
        (["show", "x", "--jsn"], "xllm-compile show has no flag --jsn", "did you mean --json?"),
        (["verfy", "x"], "verfy is neither a checkpoint nor a command", "did you mean verify?"),
    ],
)
def test_bad_usage_names_the_nearest(
    argv: list[str], message: str, help: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error[option]: {message}\n  help: {help}")


@pytest.mark.parametrize("argv", [["--help"], ["show", "--help"], ["verify", "--help"], ["--version"]])
def test_help_and_version(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "xllm-compile" in capsys.readouterr().out


def test_unexpected_exceptions_are_ours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise KeyError("surprise")

    assert console.run(broken) == 1
    text = capsys.readouterr().err
    assert text.startswith("error[internal]: KeyError: 'surprise'") and "Traceback" not in text
    monkeypatch.setenv("XLLM_DEBUG", "1")
    assert console.run(broken) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from xllm_compiler.tools.compile import main; main(['--help']);"
        "slow = {'torch', 'numpy', 'tvm', 'transformers', 'ml_dtypes'} & set(sys.modules); sys.exit(bool(slow))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    write_sample(tmp_path / "a")
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from xllm_compiler.tools.compile import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "show", str(tmp_path / "a")], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert "Traceback" not in done.stderr and done.returncode in (1, 120)


def test_show_refuses_a_damaged_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sample(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    path.write_text(path.read_text().replace('"hi": 32', '"hi": 33'))
    assert main(["show", str(tmp_path / "a")]) == 2
    assert "error[artifact]" in capsys.readouterr().err
    with pytest.raises(Exception, match="id"):
        read_manifest(tmp_path / "a")
