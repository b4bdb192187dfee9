"""The weight file: layouts, sharing, alignment, and refusals that name the tensor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder
from xllm_compiler.ir.ops import Record
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.kernels.layouts import unpack_panels
from xllm_compiler.lowering.cpu.build import lower_cpu
from xllm_compiler.lowering.cpu.pack import plan_file, write_weights
from xllm_compiler.lowering.weight_requests import WeightTable
from xllm_compiler.passes.manager import run_pipeline

TEXT = """xir 1 stage=graph
dim N in [1, 512]  // "tokens"
func @step(%ids: i32[N]) -> (f32[N, 70]) {
  %w = param(name="emb") : bf16[70, 40]
  %a = param(name="a") : bf16[30, 40]
  %b = param(name="b") : bf16[20, 40]
  %ab = t.concat(%a, %b, axis=0) : bf16[50, 40]
  %a2 = param(name="a") : bf16[30, 40]
  %b2 = param(name="b") : bf16[20, 40]
  %again = t.concat(%a2, %b2, axis=0) : bf16[50, 40]
  %d = param(name="d") : bf16[40, 50]
  %s = param(name="s") : bf16[]
  %x = nn.embedding(%ids, %w) : bf16[N, 40]
  %y = nn.linear(%x, %ab) : bf16[N, 50]
  %z = nn.linear(%y, %d) : bf16[N, 40]
  %u = nn.linear(%z, %again) : bf16[N, 50]
  %v = nn.linear(%u, %d) : bf16[N, 40]
  %q = t.mul(%v, %s) : bf16[N, 40]
  %l = nn.linear(%q, %w) : bf16[N, 70]
  %out = t.cast(%l, dtype=f32) : f32[N, 70]
  return %out
}
"""


def _params() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shapes = {"emb": (70, 40), "a": (30, 40), "b": (20, 40), "d": (40, 50), "s": ()}
    return {k: np.asarray(rng.standard_normal(s)).astype(ml_dtypes.bfloat16) for k, s in shapes.items()}


def _lower(params: dict[str, Any], folder: Path) -> Any:
    module = parse_module(TEXT)
    run_pipeline("assign-streams,plan-memory", module)
    return lower_cpu(module, params, folder, isas=["avx2"])


def test_layouts_and_sharing(build: Any) -> None:
    params = _params()
    c = build(TEXT, params)
    tensors = {t.name: t for t in c.lowering.weights}
    assert sorted((t.layout, t.shape) for t in tensors.values()) == [
        ("panel", (1, 20, 64, 2)),  # a and b, once for both linears
        ("panel", (1, 25, 64, 2)),
        ("panel", (2, 20, 64, 2)),  # the embedding, tied
        ("row", ()),
    ]
    data = np.fromfile(c.folder / "weights.bin", np.uint8)
    assert len(data) == c.lowering.weight_bytes
    emb = tensors["emb"]
    raw = data[emb.offset : emb.offset + emb.bytes].view(ml_dtypes.bfloat16).reshape(emb.shape)
    np.testing.assert_array_equal(unpack_panels(raw, 70, 40), params["emb"])
    end = 0
    for t in c.lowering.weights:
        assert t.offset >= end and t.offset % 64 == 0
        end = t.offset + t.bytes
    inputs = {"ids": np.asarray([3, 69, 0], np.int32)}
    got, _ = c.step(inputs, {"N": 3}, c.lowering.isas[0])
    np.testing.assert_allclose(got, c.reference(inputs, {"N": 3}), rtol=0.03, atol=0.03 * np.abs(got).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_name_the_tensor(tmp_path: Path, bad: float) -> None:
    params = _params()
    params["b"][3, 4] = bad
    with pytest.raises(XllmError, match="tensor b holds NaN") as e:
        _lower(params, tmp_path)
    assert e.value.kind == "checkpoint" and e.value.exit_code == 2


def test_missing_tensor(tmp_path: Path) -> None:
    params = _params()
    del params["d"]
    with pytest.raises(XllmError, match="no tensor d") as e:
        _lower(params, tmp_path)
    assert e.value.kind == "checkpoint"


def test_weights_are_read_once_and_let_go(tmp_path: Path) -> None:
    """Never two of the checkpoint's tensors at once, but those of one expression."""

    class Lazy(dict[str, Any]):
        reads: list[str]

        def __getitem__(self, name: str) -> Any:
            self.reads.append(name)
            return super().__getitem__(name).copy()

    lazy = Lazy(_params())
    lazy.reads = []
    _lower(lazy, tmp_path)
    assert sorted(lazy.reads) == ["a", "b", "d", "emb", "s"]


def test_without_a_linker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(XllmError, match="cc") as e:
        _lower(_params(), tmp_path / "out")
    assert e.value.kind == "io" and "gcc" in e.value.help


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(XllmError) as e:
        _lower(_params(), tmp_path / "file")
    assert e.value.kind == "io"


def test_no_instruction_set() -> None:
    with pytest.raises(XllmError, match="avx1024") as e:
        lower_cpu(_planned(), {}, Path("nowhere"), isas=["avx1024"])
    assert e.value.kind == "option"


def _planned(passes: str = "") -> Any:
    module = parse_module(TEXT)
    run_pipeline(f"{passes}assign-streams,plan-memory", module)
    return module


def test_a_level_that_changes_nothing_is_left_out(tmp_path: Path) -> None:
    """Whoever asks for it alone gets it, and where bytes are multiplied it differs."""
    both, quantized = ("avx512", "avx512_vnni"), "quantize-weights,quantize-rows,cse,dce,"
    for name, module, isas, want in (
        ("plain", _planned(), both, both[:1]),
        ("alone", _planned(), both[1:], both[1:]),
        ("bytes", _planned(quantized), both, both),
    ):
        made = lower_cpu(module, _params(), tmp_path / name, isas=isas)
        assert made.isas == want
        assert sorted(made.files) == sorted(["weights.bin", *(f"cpu/{isa}.so" for isa in want)])
        assert {path.name for path in (tmp_path / name / "cpu").iterdir()} == {f"{isa}.so" for isa in want}


@pytest.mark.parametrize("how", ["stream", "event"])
def test_a_second_stream_is_refused(tmp_path: Path, how: str) -> None:
    module = _planned()
    first = next(op for op in module.func().ops if op.name.startswith("nn."))
    if how == "stream":
        first.set_attr("stream", 2)
    else:
        Builder.before(first).create(Record)
    wanted = f"{first.name} on stream 2: a CPU program" if how == "stream" else "sched.record: a CPU program"
    with pytest.raises(XllmError, match=wanted) as e:
        lower_cpu(module, {}, tmp_path)
    assert e.value.kind == "unsupported" and "assign-streams{comm=0}" in e.value.help


def test_an_op_without_a_kernel_is_named(tmp_path: Path) -> None:
    module = parse_module(TEXT.replace("bf16", "f16"))
    run_pipeline("assign-streams,plan-memory", module)
    with pytest.raises(XllmError, match=r"no cpu kernel for nn\.") as e:
        lower_cpu(module, {}, tmp_path)
    assert e.value.kind == "unsupported" and "f32" in e.value.help


def test_the_library_needs_nothing_but_libm(build: Any) -> None:
    import subprocess

    c = build(TEXT, _params())
    path = c.folder / "cpu" / f"{c.lowering.isas[0]}.so"
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "libm" in needed or "NEEDED" not in needed
    exported = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in exported.splitlines()}
    team = {f"xllm_team_{name}" for name in ("join", "run", "stop", "ticks")}
    assert names == {"xllm_fn_step", *team}


def test_a_rotated_weight_needs_rotated_rows(tmp_path: Path) -> None:
    """quantize-weights{rotate=true} without quantize-rows: no kernel turns a weight back while it is read."""
    text = """xir 1 stage=graph
dim N in [1, 512]
func @step(%ids: i32[N]) -> (bf16[N, 16]) {
  %e = param(name="e") : bf16[8, 64]
  %w = param(name="w") : bf16[16, 64]
  %x = nn.embedding(%ids, %e) : bf16[N, 64]
  %a = t.relu(%x) : bf16[N, 64]
  %y = nn.linear(%a, %w) : bf16[N, 16]
  return %y
}
"""
    module = parse_module(text)
    run_pipeline("quantize-weights{rotate=true},assign-streams,plan-memory", module)
    with pytest.raises(XllmError, match="rotated") as e:
        lower_cpu(module, {}, tmp_path, isas=["avx2"])
    assert e.value.kind == "unsupported" and "quantize-rows" in e.value.help


def test_the_file_is_written_in_whole_huge_pages(tmp_path: Path) -> None:
    """The system keeps what it gets that way in huge pages."""
    parts: list[int] = []

    class Recorded(io.FileIO):
        def write(self, data: Any) -> int:
            assert self.tell() % (1 << 21) == 0
            parts.append(len(data))
            return super().write(data)

    class RecordedPath(type(tmp_path)):  # type: ignore[misc]
        def open(self, mode: str = "r", buffering: int = -1) -> Any:  # type: ignore[override]
            return io.BufferedWriter(Recorded(str(self), mode), buffering)

    sizes = {"a": 700_001, "b": 3, "c": 900_000, "d": 524_288}
    names = "\n".join(f'  %{name} = param(name="{name}") : f32[{size}]' for name, size in sizes.items())
    module = parse_module(f"xir 1 stage=graph\nfunc @step() -> (f32[3]) {{\n{names}\n  return %b\n}}\n")
    table = WeightTable()
    for op in module.funcs["step"].ops:
        table.request(op.results[0], "row")
    params = {name: np.arange(size, dtype=np.float32) for name, size in sizes.items()}
    plan, size = plan_file(table)
    write_weights(table, plan, size, params, RecordedPath(tmp_path / "weights.bin"), lambda name, share: None)
    data = (tmp_path / "weights.bin").read_bytes()
    assert len(data) == size == sum(parts) and set(parts[:-1]) == {1 << 21}
    for tensor in plan:
        assert data[tensor.offset : tensor.offset + tensor.bytes] == params[tensor.name].tobytes()
