"""The driver alone, with stand-ins for tracing and lowering: phases, key, manifest, files, and what failure leaves."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from xllm_compiler.analysis.interface import interface_of
from xllm_compiler.artifact import CallTable, ProgramCalls, check_files, read_manifest
from xllm_compiler.artifact.cpu_isa import machine_name
from xllm_compiler.cache import CompileCache
from xllm_compiler.driver import compile_checkpoint, read_request
from xllm_compiler.driver.key import SOURCES, recorded
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.options import CompileOptions
from xllm_compiler.passes.instruments import DumpDir
from xllm_compiler.progress import Silent
from xllm_compiler.step.abi import symbol_of
from xllm_compiler.step.interface import Program
from xllm_compiler.targets.base import check_capabilities
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.tools.compile import report_text

ROOT = Path(__file__).resolve().parents[2]

STEP = """xir 1 stage=graph
dim N in [1, {tokens}]  // tokens
dim B in [1, {seqs}]  // requests
dim S in [0, {rows}]  // rows
dim P in [1, 16777216]  // pages

func @step(%ids: i32[N], %sel: i32[S]) -> (logits: f32[S, 8]) {{
  %w = param(name="w") : f32[8, 8]
  %h = nn.embedding(%ids, %w) : f32[N, 8]
  %logits = t.take(%h, %sel, axis=0) : f32[S, 8]
  return %logits
}}
"""


def trace(path: Path, **options: Any) -> SimpleNamespace:
    text = STEP.format(
        tokens=options["max_num_batched_tokens"], seqs=options["max_num_seqs"], rows=options["max_num_logits"]
    )
    info = SimpleNamespace(
        architecture="Toy", vocab_size=8, hidden_size=8, layers=1, eos_token_ids=(2,), bos_token_id=None, pooling=None
    )
    return SimpleNamespace(
        module=parse_module(text, "toy.xir"), info=info, weights={"w": np.ones((8, 8), np.float32)}, notes=()
    )


def lower(
    module: Any,
    weights: Any,
    out: Path,
    *,
    isas: tuple[str, ...],
    progress: Callable[[str, float], None],
    **others: Any,
) -> Any:
    (out / "cpu").mkdir()
    for isa in isas:
        (out / "cpu" / f"{isa}.so").write_bytes(b"\x7fELF " + isa.encode())
    weights["w"].tofile(out / "weights.bin")
    progress("weights", 1.0)
    return SimpleNamespace(
        functions={
            name: dataclasses.replace(interface_of(func), programs=(Program(symbol_of(name), (), "32*N"),))
            for name, func in module.funcs.items()
        },
        states={},
        calls=CallTable((), {"xllm_fn_step": ProgramCalls((), (), ())}),
        weights=(SimpleNamespace(name="w", layout="row", dtype="f32", shape=(8, 8), offset=0, bytes=256),),
        weight_bytes=256,
        isas=isas,
    )


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, attribute, function in (
        ("xllm_compiler.frontend.trace", "trace_checkpoint", trace),
        ("xllm_compiler.lowering.cpu.build", "lower_cpu", lower),
    ):
        module = ModuleType(name)
        setattr(module, attribute, function)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    safetensors.numpy.save_file({"w": np.ones((8, 8), np.float32)}, root / "model.safetensors")
    (root / "config.json").write_text('{"model_type": "toy", "max_position_embeddings": 64}')
    Tokenizer(WordLevel({"a": 0, "b": 1}, "a")).save(str(root / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json"):
        (root / name).write_text('{"of": "' + name + '"}')
    (root / "README.md").write_text("not copied")
    return root


OPTIONS = CompileOptions(pipeline="dce,cse", max_num_seqs=4, max_num_batched_tokens=32)


class Watch(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_manifest_files_and_key(checkpoint: Path, tmp_path: Path) -> None:
    report = compile_checkpoint(checkpoint, tmp_path / "out", OPTIONS)
    manifest = read_manifest(tmp_path / "out")
    check_files(tmp_path / "out", manifest)
    assert manifest == report.manifest
    assert sorted(manifest.files) == [
        "calls.json",
        "config.json",
        "cpu/amx.so",
        "cpu/avx2.so",
        "cpu/avx512.so",
        "cpu/avx512_bf16.so",
        "cpu/avx512_vnni.so",
        "cpu/avx_vnni.so",
        "generation_config.json",
        "module.xir",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights.bin",
    ]
    ours, theirs = (Tokenizer.from_file(str(root / "tokenizer.json")) for root in (tmp_path / "out", checkpoint))
    assert ours.get_vocab() == theirs.get_vocab() and ours.encode("a b").ids == theirs.encode("a b").ids
    assert (manifest.model.name, manifest.model.dtype, manifest.model.max_model_len) == ("model", "f32", 64)
    assert (manifest.dims["N"].hi, manifest.dims["B"].hi, manifest.dims["S"].hi) == (32, 4, 32)
    step = manifest.functions["step"]
    assert [spec.name for spec in step.inputs] == ["ids", "sel"] and step.outputs[0].name == "logits"
    request = read_request(checkpoint, OPTIONS)
    assert manifest.key == request.factors.values, "nothing that decides the result is left out of the key"
    parse_module((tmp_path / "out" / "module.xir").read_text(), "module.xir")
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_all_of_the_compiler_is_in_the_key() -> None:
    """A part that is new, or called otherwise, must say whether it can decide a byte of the result."""
    cannot = {
        "cache.py",
        "workspace.py",
        "plugins.py",
        "progress.py",
        "sources.py",
    }  # where things are and how they look
    cannot |= {"tools", "report", "testing", "runtime", "models"}
    parts = {path.name for path in (ROOT / "xllm_compiler").iterdir() if not path.name.startswith(("_", "py."))}
    assert parts == {*SOURCES, *cannot} and not cannot & {*SOURCES}


def test_reads_of_options_are_recorded() -> None:
    read: list[str] = []
    options = recorded(Cpu(("avx2",)), read.append)
    assert isinstance(options, Cpu) and options.isas == ("avx2",) and read == ["isas"]
    assert options.needs_store is False and read == ["isas", "tune"], "a method's reads count too"


def test_a_target_refuses_what_it_does_not_have() -> None:
    text = """xir 1 stage=graph
dim N in [1, 8]
group @tp size=2

func @step(%x: f32[N]) -> (f32[N]) {
  %f = comm.all_reduce_start(%x, group=@tp, kind=sum) : !future<f32[N]>
  %y = comm.wait(%f) : f32[N]
  return %y
}
"""
    with pytest.raises(XllmError, match=r"target cpu has no comm\.all_reduce_start") as caught:
        check_capabilities(parse_module(text, "t.xir"), Cpu())
    assert caught.value.kind == "unsupported"


def test_same_bytes_twice(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compile_checkpoint(checkpoint, tmp_path / name, OPTIONS)
    for path in (p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_phases_add_up(checkpoint: Path, tmp_path: Path) -> None:
    report = compile_checkpoint(checkpoint, tmp_path / "out", OPTIONS)
    assert [name for name, _ in report.phases] == ["read", "import", "tokenizer", "trace", "passes", "lower", "write"]
    covered = sum(seconds for _, seconds in report.phases)
    assert covered <= report.seconds and report.seconds - covered < 0.1 * report.seconds + 0.05
    text = report_text(report)
    assert "32*N" in text and "tokenizer.json" in text and "total" in text


def test_cache_is_used_and_told(checkpoint: Path, tmp_path: Path) -> None:
    cache = CompileCache(tmp_path / "cache")
    first = compile_checkpoint(checkpoint, None, OPTIONS, cache=cache)
    second = compile_checkpoint(checkpoint, None, OPTIONS, cache=cache)
    assert not first.cached and second.cached and first.path == second.path and second.manifest == first.manifest
    assert "from the cache" in report_text(second)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    third = compile_checkpoint(checkpoint, None, OPTIONS, cache=cache)
    assert not third.cached and third.path != first.path


def test_checkpoint_that_changes_meanwhile(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meddle(path: Path, **options: Any) -> Any:
        (checkpoint / "tokenizer.json").write_text("other")
        return trace(path, **options)

    monkeypatch.setattr(sys.modules["xllm_compiler.frontend.trace"], "trace_checkpoint", meddle)
    with pytest.raises(XllmError, match=r"tokenizer\.json changed") as caught:
        compile_checkpoint(checkpoint, tmp_path / "out", OPTIONS)
    assert caught.value.kind == "checkpoint"
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_no_tokenizer_is_told(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    watch = Watch()
    report = compile_checkpoint(checkpoint, tmp_path / "out", OPTIONS, watch)
    assert "tokenizer.json" not in report.manifest.files
    assert any("no tokenizer" in note for note in watch.notes)


def test_bad_tokenizer_is_found_before_the_long_phases(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(
        sys.modules["xllm_compiler.frontend.trace"], "trace_checkpoint", lambda *_, **__: pytest.fail("traced")
    )
    with pytest.raises(XllmError, match=r"tokenizer\.json cannot be read") as caught:
        compile_checkpoint(checkpoint, tmp_path / "out", OPTIONS)
    assert caught.value.kind == "checkpoint"
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_serving_installation(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "tvm") else find(name))
    with pytest.raises(XllmError, match="needs torch, tvm") as caught:
        compile_checkpoint(checkpoint, tmp_path / "out", OPTIONS)
    assert "xllm-compiler[compile]" in caught.value.help
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_dump(checkpoint: Path, tmp_path: Path) -> None:
    compile_checkpoint(checkpoint, tmp_path / "out", OPTIONS, instruments=[DumpDir(tmp_path / "ir")])
    assert sorted(os.listdir(tmp_path / "ir")) == ["00-input.xir", "01-dce.xir", "02-cse.xir", "passes.txt"]
    assert "dce" in (tmp_path / "ir" / "passes.txt").read_text()


def test_output_inside_the_checkpoint_is_refused(checkpoint: Path) -> None:
    before = sorted(os.listdir(checkpoint))
    with pytest.raises(XllmError, match="not an artifact"):
        compile_checkpoint(checkpoint, checkpoint, OPTIONS)
    assert sorted(os.listdir(checkpoint)) == before


def test_tuning_is_of_a_processor_and_needs_a_place(checkpoint: Path, tmp_path: Path) -> None:
    """The key names the processor; the choices are handed to the lowering, and only where they are asked for."""
    seen = []

    def watched(*args: Any, tiles: Any, **others: Any) -> Any:
        seen.append(tiles)
        return lower(*args, tiles=tiles, **others)

    options = dataclasses.replace(OPTIONS, target=Cpu(tune=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["xllm_compiler.lowering.cpu.build"], "lower_cpu", watched)
        compile_checkpoint(checkpoint, tmp_path / "plain", OPTIONS, store=tmp_path)
        report = compile_checkpoint(checkpoint, tmp_path / "tuned", options, store=tmp_path)
        with pytest.raises(XllmError, match="a place to remember"):
            compile_checkpoint(checkpoint, tmp_path / "out", options)
    assert report.manifest.key["option.target.tune"] == machine_name()
    assert seen[0] is None and seen[1].path == tmp_path / "tiles.json"
