"""The heads of functions in module.xir against the manifest: ranges, inputs, outputs, states and arenas are said in
both. Owns the reading of these lines; the module's meaning is the compiler's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from xllm_compiler.artifact.decode import bad, shown
from xllm_compiler.artifact.schema import MODULE, Manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.step.interface import KV, Function, State

_MOST: Final = 4 << 20  # bytes of a head; a line for each layer comes to some kilobytes
_DIM = re.compile(r"dim ([A-Za-z_]\w*) in \[(-?\d{1,18}), (-?\d{1,18})\]", re.ASCII)
_FUNC = re.compile(rb"^func @(\w{1,201})\(", re.MULTILINE)
_ARENA = re.compile(r"\) arena\((.*)\) \{\Z", re.DOTALL)
_KV = re.compile(
    r"kv<(f32|bf16|i8), heads=(\d{1,9}), k=(\d{1,9}), v=(\d{1,9}), page=(\d{1,9})>\[(\w{1,99})\]\Z", re.ASCII
)
_OPEN: Final = {"(": 1, "[": 1, "<": 1, ")": -1, "]": -1, ">": -1}


@dataclass(frozen=True, slots=True)
class _Head:
    """A function's signature: (name, type) of arguments and (name or "", type) of results, and its arena."""

    arguments: tuple[tuple[str, str], ...]
    results: tuple[tuple[str, str], ...]
    arena: str


def check_module(data: bytes, manifest: Manifest) -> None:
    """Raises kind "artifact" where module.xir, whose bytes are `data`, contradicts the manifest."""
    starts = list(_FUNC.finditer(data))
    names = [m[1].decode() for m in starts]
    if sorted(names) != sorted(manifest.functions):
        given = ", ".join(f"@{name}" for name in names[:8]) or "none"
        raise XllmError(
            "artifact",
            f"its functions are {shown(given)}, not those of the manifest",
            where=MODULE,
            help="compile the checkpoint again",
        )
    _check_ranges(data[: starts[0].start()], manifest)
    for name, match in zip(names, starts, strict=True):
        end = data.find(b" {\n", match.end(), match.end() + _MOST)
        head = _read(data[match.end() : end + 2].decode("utf-8", "replace")) if end >= 0 else None
        if head is None:
            raise bad(f"$.functions.{name}", f"{MODULE} has no head of this function")
        _check_function(name, manifest.functions[name], head, manifest)


def _read(text: str) -> _Head | None:
    """A head from behind the function's first parenthesis to its brace; None where it is none."""
    arguments, rest = _list(text)
    if not rest.startswith(" -> ("):
        return None
    results, rest = _list(rest[len(" -> (") :])
    arena = _ARENA.match(")" + rest)
    pairs = [tuple(item.removeprefix("%").split(": ", 1)) for item in arguments]
    if any(len(pair) != 2 for pair in pairs) or (arena is None and rest != " {"):
        return None
    return _Head(
        tuple((name, kind) for name, kind in pairs),
        tuple(map(_named, results)),
        "0" if arena is None else arena[1],
    )


def _named(item: str) -> tuple[str, str]:
    name, colon, kind = item.partition(": ")
    return (name, kind) if colon else ("", item)


def _list(text: str) -> tuple[list[str], str]:
    """The items up to the parenthesis that closes the list, and what follows it."""
    depth, start = 0, 0
    items: list[str] = []
    for i, char in enumerate(text):
        if depth == 0 and char in ",)":
            if item := text[start:i].strip():
                items.append(item)
            if char == ")":
                return items, text[i + 1 :]
            start = i + 1
        depth += _OPEN.get(char, 0)
    return items, ""


def _check_ranges(head: bytes, manifest: Manifest) -> None:
    lines = head[-_MOST:].decode("utf-8", "replace").split("\n")
    found = {m[1]: (int(m[2]), int(m[3])) for line in lines if (m := _DIM.match(line))}
    for name, wanted in manifest.dims.items():
        if found.get(name) != (wanted.lo, wanted.hi):
            raise bad(f"$.dims.{name}", f"{wanted.lo} to {wanted.hi} is not its range in {MODULE}")


def _check_function(name: str, function: Function, head: _Head, manifest: Manifest) -> None:
    where = f"$.functions.{name}"
    states = [(arg, kind) for arg, kind in head.arguments if kind.startswith("kv<")]
    inputs = [(arg, kind) for arg, kind in head.arguments if not kind.startswith("kv<")]
    if inputs != [(spec.name, str(spec)) for spec in function.inputs]:
        raise bad(f"{where}.inputs", f"they are not those of {MODULE}")
    results = [(out, kind) for out, kind in head.results if not kind.startswith("kv<")]
    outputs = [(out or f"out{i}", kind) for i, (out, kind) in enumerate(results)]
    if outputs != [(spec.name, str(spec)) for spec in function.outputs]:
        raise bad(f"{where}.outputs", f"they are not those of {MODULE}")
    if [arg for arg, _ in states] != list(function.states):
        raise bad(f"{where}.states", f"they are not those of {MODULE}")
    for arg, kind in states:
        if not _same_state(kind, manifest.states[arg]):
            raise bad(f"$.states.{arg}", f"it is not that of {MODULE}")
    if head.arena != function.programs[-1].arena:
        raise bad(f"{where}.programs", f"the arena of the last is not that of {MODULE}")


def _same_state(kind: str, state: State) -> bool:
    m = _KV.match(kind)
    if m is None or state.kind != KV:
        return False
    heads, k, v, page = map(int, m.groups()[1:5])
    return (state.dtype, state.sizes, state.blocks) == (m[1], {"heads": heads, "k": k, "v": v, "page": page}, m[6])
