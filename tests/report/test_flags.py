"""--report and --timeline of xllm-compile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xllm_compiler.tools.compile import main

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"


@pytest.mark.parametrize("flag", ["--report", "--timeline", "--dump-ir"])
def test_a_cached_artifact_has_nothing_to_watch(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(BUNDLED), flag, str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err == (
        f"error[option]: {flag} without -o: an artifact that the cache has is not compiled again\n"
        "  help: say with -o where the artifact goes; then it is compiled\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--report", "--timeline"])
def test_a_missing_directory_is_found_before_the_compile(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none" / "out"
    assert main([str(BUNDLED), "-o", str(tmp_path / "artifact"), flag, str(out)]) == 2
    assert f"error[option]: {flag}: there is no directory for {out}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_compile_writes_both(tmp_path: Path) -> None:
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    flags = ["--isas", "avx2", "--report", str(page), "--timeline", str(trace)]
    assert main([str(BUNDLED), "-o", str(tmp_path / "artifact"), *flags]) == 0
    data = json.loads(page.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])
    assert data["title"] == "bundled, compiled for cpu" and data["stage"] == "buf"
    assert [p["name"] for p in data["passes"]][-1] == "plan-memory" and data["rules"]
    func = data["funcs"][0]
    assert {op["op"] for op in func["ops"]} >= {"nn.linear_glu", "kv.append", "kv.attend"}
    bars = [e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e["ph"] == "X"]
    assert len(bars) == len(func["timeline"][0]["slots"])
    assert (tmp_path / "artifact" / "manifest.json").is_file()
