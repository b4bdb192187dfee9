"""A small sound artifact for tests: not runnable, but obeying every rule of the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xllm_compiler.artifact import (
    FORMAT,
    DimRange,
    KvLayer,
    KvPlan,
    Limits,
    Manifest,
    Memory,
    Model,
    Program,
    Target,
    TensorSpec,
    Weight,
    Weights,
)
from xllm_compiler.artifact.writer import ArtifactWriter


def sample(key: dict[str, Any] | None = None, isas: tuple[str, ...] = ("avx2", "avx512")) -> Manifest:
    return Manifest(
        format=FORMAT,
        id="",
        model=Model("Qwen3ForCausalLM", "tiny", 300, 64, 2, "bf16", 128, (2,), None),
        target=Target("cpu", 16, isas, ("calls.json", *(f"cpu/{isa}.so" for isa in isas))),
        limits=Limits(4, 32, 8),
        dims={
            "N": DimRange(1, 32, "tokens in this step"),
            "B": DimRange(1, 4, "requests"),
            "S": DimRange(0, 8, "sampled rows"),
            "P": DimRange(1, 1 << 24, "pages"),
        },
        inputs=(TensorSpec("ids", "i32", ("N",)), TensorSpec("start", "i32", ("B + 1",))),
        outputs=(TensorSpec("logits", "f32", ("S", "300")),),
        memory=Memory("256*N + 64", "1200*S", KvPlan(16, (KvLayer(4096, 2, 32, 32), KvLayer(4096, 2, 32, 32)))),
        weights=Weights(
            256,
            (Weight("a", "row", "bf16", (8, 8), 0, 128), Weight("b", "row", "bf16", (8, 8), 128, 128)),
        ),
        programs=(Program("decode", ("8 - N",), "xllm_step_decode"), Program("prefill", (), "xllm_step_prefill")),
        files={},
        key=key or {"option.dtype": "bfloat16", "checkpoint.config.json": "0" * 32},
    )


def fill(writer: ArtifactWriter, isas: tuple[str, ...] = ("avx2", "avx512"), text: str = "xir 1\n") -> None:
    """Write the files that the sample manifest needs."""
    writer.write_text("step.xir", text)
    writer.write_text("weights.bin", "w" * 256)
    writer.write_text("calls.json", "{}\n")
    for isa in isas:
        writer.write_text(f"cpu/{isa}.so", f"code for {isa}\n")


def write_sample(out: Path, key: dict[str, Any] | None = None, text: str = "xir 1\n") -> Manifest:
    with ArtifactWriter(out) as writer:
        fill(writer, text=text)
        return writer.commit(sample(key))
