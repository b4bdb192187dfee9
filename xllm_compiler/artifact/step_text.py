"""The head of step.xir against the manifest: ranges, inputs, KV layers and the arena are said in both. Owns the reading
of these lines; the module's meaning is the compiler's.
"""

from __future__ import annotations

import re
from typing import Final

from xllm_compiler.artifact.decode import bad
from xllm_compiler.artifact.rules import kv_page_bytes
from xllm_compiler.artifact.schema import STEP, Manifest
from xllm_compiler.errors import XllmError

_MOST: Final = 4 << 20  # bytes of a head; a line for each layer comes to some kilobytes
_DIM = re.compile(r"dim ([A-Za-z_]\w*) in \[(-?\d{1,18}), (-?\d{1,18})\]", re.ASCII)
_KV = re.compile(r"%\S+: kv<(f32|bf16|i8), heads=(\d{1,9}), k=(\d{1,9}), v=(\d{1,9}), page=(\d{1,9})>\[P\]\Z", re.ASCII)


def check_step(data: bytes, manifest: Manifest) -> None:
    """Raises kind "artifact" where the head of step.xir, whose bytes are `data`, contradicts the manifest."""
    try:
        lines = data[:_MOST].decode("utf-8", "ignore").split("\n")
        start = lines.index("func @step(")
        end = next(i for i in range(start, len(lines)) if lines[i].startswith(") -> ("))
    except (ValueError, StopIteration):
        raise XllmError("artifact", "there is no @step", where=STEP, help="compile the checkpoint again") from None
    _check_ranges(lines[:start], manifest)
    given = [line.strip().removesuffix(",") for line in lines[start + 1 : end]]
    kv = [line for line in given if ": kv<" in line]
    inputs = [f"%{spec.name}: {spec.dtype}[{', '.join(spec.shape)}]" for spec in manifest.inputs]
    if [line for line in given if line not in kv] != inputs:
        raise bad("$.inputs", f"they are not those of {STEP}")
    _check_layers(kv, manifest)
    arena = f" arena({manifest.memory.arena}) {{"
    if not lines[end].endswith(arena if " arena(" in lines[end] or manifest.memory.arena != "0" else " {"):
        raise bad("$.memory.arena", f"it is not the arena of {STEP}")


def _check_ranges(head: list[str], manifest: Manifest) -> None:
    found = {m[1]: (int(m[2]), int(m[3])) for line in head if (m := _DIM.match(line))}
    for name, wanted in manifest.dims.items():
        if found.get(name) != (wanted.lo, wanted.hi):
            raise bad(f"$.dims.{name}", f"{wanted.lo} to {wanted.hi} is not its range in {STEP}")


def _check_layers(lines: list[str], manifest: Manifest) -> None:
    kv = manifest.memory.kv
    if len(lines) != len(kv.layers):
        raise bad("$.memory.kv.layers", f"{len(kv.layers)} of them, and {STEP} has {len(lines)}")
    for i, (line, layer) in enumerate(zip(lines, kv.layers, strict=True)):
        m = _KV.match(line)
        heads, k, v, page = map(int, m.groups()[1:]) if m else (0, 0, 0, 0)
        size = kv_page_bytes(m[1], heads, k, v, page) if m else 0
        if (layer.heads, layer.k, layer.v, kv.page_tokens, layer.page_bytes) != (heads, k, v, page, size):
            raise bad(f"$.memory.kv.layers[{i}]", f"it is not that of {STEP}")
