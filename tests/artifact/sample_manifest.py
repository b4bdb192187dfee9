"""A small sound artifact for tests: not runnable, but obeying every rule of the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xllm_compiler.artifact import FORMAT, DimRange, Limits, Manifest, Model, Target, Weight, Weights
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.step.inputs import step_inputs
from xllm_compiler.step.interface import Function, Program, State, TensorSpec


def sample(key: dict[str, Any] | None = None, isas: tuple[str, ...] = ("avx2", "avx512")) -> Manifest:
    sizes = {"heads": 2, "k": 32, "v": 32, "page": 16}
    return Manifest(
        format=FORMAT,
        id="",
        model=Model("Qwen3ForCausalLM", "tiny", 300, 64, 2, "bf16", 128, (2,), None, None),
        target=Target("cpu", isas, ("calls.json", *(f"cpu/{isa}.so" for isa in isas))),
        limits=Limits(4, 32, 8),
        dims={
            "N": DimRange(1, 32, "tokens in this step"),
            "B": DimRange(1, 4, "requests"),
            "S": DimRange(0, 8, "sampled rows"),
            "P": DimRange(1, 1 << 24, "pages"),
        },
        states={name: State("kv", "bf16", "tile16", sizes, "P", 4096) for name in ("kv0", "kv1")},
        functions={
            "step": Function(
                step_inputs(128, 16),
                (TensorSpec("logits", "f32", ("S", "300")),),
                ("kv0", "kv1"),
                (Program("xllm_fn_step_1", ("8 - N",), "128*N"), Program("xllm_fn_step", (), "256*N + 64")),
            )
        },
        weights=Weights(
            256,
            (Weight("a", "row", "bf16", (8, 8), 0, 128), Weight("b", "row", "bf16", (8, 8), 128, 128)),
        ),
        files={},
        key=key or {"option.dtype": "bfloat16", "checkpoint.config.json": "0" * 32},
    )


def fill(writer: ArtifactWriter, isas: tuple[str, ...] = ("avx2", "avx512"), text: str = "xir 1\n") -> None:
    """Write the files that the sample manifest needs."""
    writer.write_text("module.xir", text)
    writer.write_text("weights.bin", "w" * 256)
    writer.write_text("calls.json", "{}\n")
    for isa in isas:
        writer.write_text(f"cpu/{isa}.so", f"code for {isa}\n")


def write_sample(out: Path, key: dict[str, Any] | None = None, text: str = "xir 1\n") -> Manifest:
    with ArtifactWriter(out) as writer:
        fill(writer, text=text)
        return writer.commit(sample(key))
