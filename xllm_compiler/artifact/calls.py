"""calls.json: which kernels a program calls, in order, and what each costs. Owns the file's form and its reading.

Only a profile needs it, so it is no part of the manifest, which every start reads. Layers mostly call the same kernels,
so each is written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xllm_compiler.artifact.contents import Contents
from xllm_compiler.artifact.decode import decode, encode
from xllm_compiler.artifact.schema import CALLS, Manifest, canonical_json
from xllm_compiler.artifact.strict_json import parse_json
from xllm_compiler.dims import Dim, parse_dim
from xllm_compiler.errors import XllmError

ARITHMETIC = ("bf16", "i8", "f32")
"""What a kernel's operations are done in: which of a machine's peaks they are to be compared with."""

CONTEXT = "context"
"""The symbol, beside those of sizes, of the tokens that each request had before the step."""

COSTS = ("read", "written", "weights", "kv_read", "kv_written", "operations")


@dataclass(frozen=True, slots=True)
class KernelCost:
    """One kernel and its cost as dim texts over the sizes and CONTEXT: bytes of activations `read` and `written`, of
    `weights`, of the KV cache, and `operations`. `ops`: the IR ops that it computes, the last one names it."""

    symbol: str
    ops: tuple[str, ...]
    arithmetic: str
    read: str
    written: str
    weights: str
    kv_read: str
    kv_written: str
    operations: str


@dataclass(frozen=True, slots=True)
class ProgramCalls:
    """The calls of one program: for each the index of its kernel, the layer and source line that its op comes from (""
    when not known), and 1 where the team meets at a barrier before it, else 0."""

    kernels: tuple[int, ...]
    sources: tuple[str, ...]
    barriers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CallTable:
    """The whole file; `programs` by symbol."""

    kernels: tuple[KernelCost, ...]
    programs: dict[str, ProgramCalls]

    def to_json(self) -> str:
        """Canonical text, as for the manifest."""
        return canonical_json(encode(self))

    def validate(self, manifest: Manifest) -> None:
        """Raises kind "artifact" where the table does not fit itself or its manifest."""
        known = {program.symbol for function in manifest.functions.values() for program in function.programs}
        if set(self.programs) != known:
            raise _bad(f"its programs are {', '.join(sorted(self.programs))}, not those of the manifest")
        for name, calls in self.programs.items():
            if not len(calls.kernels) == len(calls.sources) == len(calls.barriers):
                raise _bad(f"the lists of program {name} differ in length")
            if any(not 0 <= index < len(self.kernels) for index in calls.kernels):
                raise _bad(f"program {name} calls a kernel that is not listed")
            if any(flag not in (0, 1) for flag in calls.barriers):
                raise _bad(f"program {name}: a barrier is there or not, 1 or 0")
        for kernel in self.kernels:
            if kernel.arithmetic not in ARITHMETIC:
                raise _bad(f"{kernel.symbol} computes in {kernel.arithmetic!r}")
            for field in COSTS:
                unknown = set(cost_dim(getattr(kernel, field), kernel.symbol).symbols) - {*manifest.dims, CONTEXT}
                if unknown:
                    raise _bad(f"the cost of {kernel.symbol} uses {', '.join(sorted(unknown))}")


def read_calls(directory: Path, manifest: Manifest) -> CallTable:
    """The checked table of the artifact at `directory`. Raises kinds "artifact" and "io"."""
    table = decode(CallTable, parse_json((Contents(directory, manifest) / CALLS).read_bytes(), CALLS))
    table.validate(manifest)
    return table


def cost_dim(text: str, where: str) -> Dim:
    """A cost's formula. Raises kind "artifact"."""
    try:
        return parse_dim(text)
    except (XllmError, ValueError) as error:
        raise _bad(f"the cost of {where}: {text!r} is not a dim: {error}") from None


def _bad(message: str) -> XllmError:
    return XllmError("artifact", f"{CALLS}: {message}", help="the artifact is damaged; compile the checkpoint again")
