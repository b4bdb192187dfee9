"""A target from another package: it compiles, serves and is held to the laws; and what is said of broken ones.

The package is `interp_target/` beside this file. It is "installed" by what an installation leaves: a folder on Python's
path with its metadata, made from its pyproject.toml.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_compiler.artifact import Target, check_files, read_manifest
from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.driver import read_request
from xllm_compiler.errors import XllmError
from xllm_compiler.options import CompileOptions
from xllm_compiler.passes.manager import parse_pipeline
from xllm_compiler.passes.registry import pass_class
from xllm_compiler.plugins import TARGETS
from xllm_compiler.runtime.profile.profiler import Profiler
from xllm_compiler.runtime.targets import RUNTIME_TARGETS, runtime_target
from xllm_compiler.targets import target_class
from xllm_compiler.testing.corpus import corpus
from xllm_compiler.testing.laws import Laboratory
from xllm_compiler.testing.laws_inputs import points
from xllm_compiler.tools.compile import main

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).parent / "interp_target"
BUNDLED = ROOT / "models" / "bundled"
BIN = Path(sys.executable).parent
LIMITS = ("--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "2", "--max-num-batched-tokens", "32")
ASKED = {"model": "bundled", "prompt": "def read_lines(path):", "max_tokens": 8, "temperature": 0, "logprobs": 1}

Groups = dict[str, dict[str, str]]


def install(site: Path, name: str, version: str, groups: Groups) -> None:
    """The metadata of an installed distribution."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [[f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())] for group, entries in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(line for part in lines for line in part) + "\n")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Where Python finds the installed package."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["version"], project["entry-points"])
    return [str(site), str(PACKAGE)]


@pytest.fixture
def interp(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is installed for this process."""
    for path in paths:
        monkeypatch.syspath_prepend(path)


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of which each has a fault of its own."""
    compiler, runtime = TARGETS.group, RUNTIME_TARGETS.group
    (tmp_path / "faulty_target.py").write_text("raise OSError('the driver is too old')\n")
    (tmp_path / "no_target.py").write_text("class Thing: ...\n")
    gone = {compiler: {"gone": "faulty_target:Gone"}, runtime: {"gone": "faulty_target:Gone"}}
    install(tmp_path, "gone-target", "1.2", gone)
    install(tmp_path, "thing-target", "0.3", {compiler: {"thing": "no_target:Thing"}})
    for name in ("one", "two"):
        install(
            tmp_path, f"{name}-target", "1.0", {group: {"twice": "no_target:Thing"} for group in (compiler, runtime)}
        )
    monkeypatch.syspath_prepend(tmp_path)


def compiled(out: Path, *flags: str, path: str = "") -> Path:
    env = {**os.environ, "PYTHONPATH": path}
    command = [BIN / "xllm-compile", BUNDLED, "-o", out, *LIMITS, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return out


@contextmanager
def serving(artifact: Path, path: str = "") -> Iterator[str]:
    """The URL of a server of its own."""
    command = [BIN / "xllm-serve", artifact, "--port", "0", "--kv-cache-memory-bytes", "2MiB", "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as server:
        timer = threading.Timer(120, server.kill)
        timer.start()
        try:
            assert server.stdout is not None
            lines: list[str] = []
            for line in server.stdout:
                lines.append(line)
                if found := re.search(r"serving .* on (http://\S+)", line):
                    yield found[1]
                    break
            else:
                raise AssertionError("".join(lines))
        finally:
            timer.cancel()
            server.terminate()
            server.wait(30)


def answer(url: str) -> dict[str, Any]:
    body = json.dumps(ASKED).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        choice: dict[str, Any] = json.load(response)["choices"][0]
    return choice


def test_the_bundled_model_is_served_by_the_interpreter(paths: list[str], tmp_path: Path) -> None:
    """The commands that users run, with the package installed; the same greedy tokens as the CPU's."""
    path = os.pathsep.join(paths)
    artifact = compiled(tmp_path / "interp", "--target", "interp", "--align", "256", path=path)
    manifest = read_manifest(artifact)
    check_files(artifact, manifest)
    assert (manifest.target.kind, manifest.target.levels) == ("interp", ("numpy",))
    assert "interp/module.xir" in manifest.files and not any(name.endswith(".so") for name in manifest.files)
    assert all(tensor.offset % 256 == 0 for tensor in manifest.weights.tensors)
    assert manifest.key["option.target"] == "interp" and manifest.key["option.target.align"] == 256
    assert "source.target interp" in manifest.key, "another version of the package makes another artifact"
    with serving(artifact, path) as url:
        got = answer(url)
    with serving(compiled(tmp_path / "cpu", "--isas", machine_isas()[-1])) as url:
        wanted = answer(url)
    assert got["logprobs"]["tokens"] == wanted["logprobs"]["tokens"] and got["text"] == wanted["text"]
    assert len(got["logprobs"]["tokens"]) == 8
    assert got["logprobs"]["token_logprobs"] == pytest.approx(wanted["logprobs"]["token_logprobs"], abs=1e-4)
    assert got["logprobs"]["token_logprobs"] != wanted["logprobs"]["token_logprobs"], "it was not the same code"
    with pytest.raises(XllmError, match="for target interp, which nothing that is installed can run") as caught:
        runtime_target(manifest)
    assert caught.value.kind == "artifact" and "has cpu;" in caught.value.help


@pytest.mark.usefixtures("interp")
def test_laws_run_for_its_preset() -> None:
    laboratory = Laboratory(corpus(random_graphs=2)[::24], "@interp")
    results = laboratory.results("fold")
    assert (results.broken, results.unjudged, results.unreachable) == ({}, {}, {}) and results.changed
    places = [point.label for point in points(pass_class("fold"), "@interp")]
    assert places[-1] == "after @interp" and "before fuse-kv-append" in places


@pytest.mark.usefixtures("interp")
def test_its_options_are_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = target_class("interp")(align=128)  # type: ignore[call-arg]
    first = read_request(BUNDLED, CompileOptions(target)).factors
    assert first.values["option.target.align"] == 128 and "option.target.isas" not in first.values
    assert str(parse_pipeline("@interp")) == first.values["pipeline.text"]
    assert main(["--target", "interp", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--align BYTES" in text and "--isas" not in text
    for flags, says in (
        (["--target", "interp", "--align", "100"], "--align 100 is not"),
        (["--target", "interp", "--isas", "avx2"], "has no flag --isas"),
        (["--align", "64"], "has no flag --align"),
        (["--target", "interp", "--quantize", "int8"], "target interp has no quantized layers"),
    ):
        assert main([str(BUNDLED), "-o", str(tmp_path / "out"), *flags]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.usefixtures("interp", "others")
def test_what_is_broken_is_named_and_breaks_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, *says in (
        ("gone", "package gone-target 1.2 offers target gone", "OSError: the driver is too old"),
        ("thing", "package thing-target 0.3 offers target thing", "not a subclass of"),
        ("twice", "one-target 1.0, two-target 1.0"),
        ("tpu", "--target 'tpu' is not known", "installed: cpu, gone, interp, thing, twice"),
    ):
        assert main([str(BUNDLED), "-o", str(tmp_path / "out"), "--target", name]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error[option]") and all(part in text for part in says), text
    for preset in ("@cpu", "@interp"):
        assert parse_pipeline(preset).items
    with pytest.raises(XllmError, match="package gone-target"):
        parse_pipeline("@gone")
    assert read_request(BUNDLED, CompileOptions()).options.target.name == "cpu"


@pytest.mark.usefixtures("others")
def test_an_artifact_of_a_target_that_cannot_be_loaded() -> None:
    def of(kind: str) -> Any:
        return SimpleNamespace(target=Target(kind, ("any",), ()))

    with pytest.raises(XllmError, match=r"package gone-target 1\.2 offers runtime target gone, which cannot be loaded"):
        runtime_target(of("gone"))
    with pytest.raises(XllmError, match=r"several packages: one-target 1\.0, two-target 1\.0"):
        runtime_target(of("twice"))
    with pytest.raises(XllmError, match="target abacus, which nothing that is installed can run") as caught:
        runtime_target(of("abacus"))
    assert "has cpu, gone, twice;" in caught.value.help


def test_a_package_that_offers_one_of_our_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "better-cpu", "9.0", {TARGETS.group: {"cpu": "better:Cpu"}})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(XllmError, match=r"offered by several packages: better-cpu 9\.0, xllm-compiler"):
        read_request(BUNDLED, CompileOptions())


def test_a_target_without_time_stamps_is_not_profiled() -> None:
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(target=Target("interp", ("numpy",), ()), files={}))
    executor: Any = SimpleNamespace(pages=1, new_batch=list, execute=list, close=list)
    with pytest.raises(XllmError, match="steps of target interp cannot be profiled") as caught:
        Profiler(1, print).wrap(artifact, executor)
    assert caught.value.kind == "option"


def test_our_own_are_offered_as_others_are() -> None:
    """What is built in is what pyproject.toml says, by which other tools find it."""
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for plugins in (TARGETS, RUNTIME_TARGETS):
        assert offered[plugins.group] == plugins.builtin
