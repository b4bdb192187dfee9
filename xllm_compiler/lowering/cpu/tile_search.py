"""`TileChoices`: the register tiles of linear layers, chosen by measurement, and the file that stores the choices.

The best number of rows of a tile depends on the processor: on its loads in flight, and on what spilled sums cost. No
choice changes a bit of an answer, so the fastest of a few candidates is taken. All candidates run in alternation, on as
many threads as there are cores, at several numbers of rows, and the best round of each counts. The kernels' own rule
stays unless another candidate is clearly faster.

A choice for a processor and a version of the kernels is kept, so that two compiles make the same bytes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.codegen.work_stealing import WORDS, WORK_QUEUES
from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.linear.linear import (
    NEXT,
    NEXT_BYTES,
    NEXT_PANELS,
    Linear,
    LinearGlu,
    tile_height,
)
from xllm_compiler.kernels.tir.linear.vocab import LinearBlockMax
from xllm_compiler.kernels.tir.native.module import NativeModule
from xllm_compiler.kernels.tir.native.objects import KernelObjects
from xllm_compiler.kernels.tir.native.standalone import Team, aligned, call_with
from xllm_compiler.weight_formats import PANEL

CANDIDATES: Final = (4, 6, 8, 12, 16)
_ROWS: Final = (8, 32, 128)
_ROUNDS: Final = 5
_GAIN: Final = 0.97  # of the time of the kernels' own rule: below this a candidate is clearly faster
_MOST_OPERATIONS: Final = 4e9  # of one call
_COLD_BYTES: Final = 48 << 20  # of weights, read in rotation so that they come from memory
_FILL: Final = 0x3C  # as f32, f16 or bf16, these bytes are numbers of common size


class TileChoices:
    """The choices for one processor and one version of the kernels, in a JSON file that other processes write too."""

    def __init__(self, path: Path, machine: str) -> None:
        """`machine` names the processor and the version of the kernels."""
        self.path, self._machine = path, machine

    def known(self, isa: Isa) -> dict[str, int | None]:
        """The chosen `most_rows` by the symbol of the kernel without one. Empty if the file cannot be read."""
        return self._read().get(self._machine, {}).get(isa.name, {})

    def _read(self) -> dict[str, dict[str, dict[str, int | None]]]:
        """All choices of the file, by machine, level and symbol. Entries of another form are left out."""
        try:
            found = json.loads(self.path.read_text())
            return {
                machine: {
                    isa: {symbol: rows for symbol, rows in chosen.items() if rows is None or type(rows) is int}
                    for isa, chosen in levels.items()
                }
                for machine, levels in found.items()
            }
        except (OSError, ValueError, AttributeError):
            return {}

    def add(self, isa: Isa, chosen: dict[str, int | None]) -> dict[str, int | None]:
        """Stores choices, and returns all of them. A choice that another process made first wins. Raises
        XllmError("io")."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                everything = self._read()
                merged = {**chosen, **everything.get(self._machine, {}).get(isa.name, {})}
                everything.setdefault(self._machine, {})[isa.name] = merged
                draft = self.path.with_suffix(".tmp")
                draft.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
                draft.replace(self.path)
        except OSError as error:
            raise XllmError("io", f"cannot keep the chosen tiles: {error.strerror}", where=str(self.path)) from None
        return merged

    def apply(
        self, kernels: Iterable[Kernel], isa: Isa, objects: KernelObjects, progress: Callable[[str, float], None]
    ) -> dict[Kernel, Kernel]:
        """For every linear layer of `kernels`, the same layer with its chosen tile. Missing choices are searched for
        now. AMX tiles have one size, so a level with AMX has no choice. Raises XllmError("io")."""
        layers = [k for k in dict.fromkeys(kernels) if isinstance(k, Linear | LinearGlu | LinearBlockMax)]
        if isa.has_amx or not layers:
            return {}
        known = self.known(isa)
        new = [layer for layer in layers if layer.symbol not in known]
        if new:
            known = self.add(isa, search(new, isa, objects, progress))
        return {layer: dataclasses.replace(layer, most_rows=known[layer.symbol]) for layer in layers}


def candidates(layer: Linear | LinearGlu | LinearBlockMax, isa: Isa) -> dict[int | None, Any]:
    """The layer with each different tile, by `most_rows`. The first is the kernels' own rule, as None."""
    found: dict[int, Any] = {}
    for rows in (None, *CANDIDATES):
        one = dataclasses.replace(layer, most_rows=rows)
        height = tile_height(_plain(one), isa)
        if height not in found:
            found[height] = one
    return {one.most_rows: one for one in found.values()}


def search(
    layers: Sequence[Any], isa: Isa, objects: KernelObjects, progress: Callable[[str, float], None]
) -> dict[str, int | None]:
    """The `most_rows` of each layer that is fastest on this machine, by the layer's symbol."""
    options = [candidates(layer, isa) for layer in layers]
    cores = len(os.sched_getaffinity(0))
    progress("trying tiles", 0.0)
    with objects.compiling([(one, isa) for option in options for one in option.values()], cores):
        pass
    module = NativeModule(isa, objects)
    for number, option in enumerate(options):
        for rows, one in option.items():
            with module.entry(f"xllm_fn_{number}_{rows}") as (args, member, team_size):
                call_with(module, one, args, member, team_size)
    chosen: dict[str, int | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiles.so"
        module.write_shared(path)
        library = ctypes.CDLL(str(path))
        with Team(library, cores) as team:
            for number, (layer, option) in enumerate(zip(layers, options, strict=True)):
                progress("trying tiles", number / len(layers))
                steps = {rows: library[f"xllm_fn_{number}_{rows}"] for rows in option}
                chosen[layer.symbol] = quickest(_times(layer, steps, team))
    return chosen


def quickest(times: dict[int | None, list[float]]) -> int | None:
    """The candidate with the least geometric mean of its times relative to those of None; None unless it is clearly
    less. A candidate has one time for each number of rows."""
    share = {
        rows: math.exp(sum(math.log(t / own) for t, own in zip(found, times[None], strict=True)) / len(found))
        for rows, found in times.items()
    }
    best = min(share, key=lambda rows: (share[rows], rows or 0))
    return best if share[best] < _GAIN else None


def _plain(layer: Linear | LinearGlu | LinearBlockMax) -> Linear | LinearGlu:
    return layer.linear if isinstance(layer, LinearBlockMax) else layer


def _times(layer: Any, steps: dict[int | None, Any], team: Team) -> dict[int | None, list[float]]:
    """The best round, in seconds, of every candidate at each number of rows."""
    plain = _plain(layer)
    k, columns = plain.k, plain.f if isinstance(plain, LinearGlu) else plain.n
    panels, each = plain.panels
    size = panels * each
    weights = [_filled(size) for _ in range(max(1, -(-_COLD_BYTES // size)))]
    rows_tried = [rows for rows in _ROWS if 2.0 * rows * k * panels * PANEL <= _MOST_OPERATIONS] or [1]
    found: dict[int | None, list[float]] = {most: [] for most in steps}
    queues = aligned((team.size, WORDS), np.int64)
    for rows in rows_tried:
        args = layer.args[:-2]
        memory = {arg.name: _filled(rows * (max(k, 2 * columns) + PANEL) * 4) for arg in args if arg.name != "w"}
        memory[WORK_QUEUES.name] = queues
        sizes = {"rows": rows, NEXT_PANELS.name: panels, NEXT_BYTES.name: each}
        calls = []
        for weight, after in zip(weights, weights[1:] + weights[:1], strict=True):
            named = {**memory, "w": weight, NEXT.name: after}
            places = [named[arg.name].ctypes.data if arg.pointer else sizes[arg.name] for arg in args]
            calls.append((ctypes.c_int64 * len(places))(*places))
        best = dict.fromkeys(steps, math.inf)
        for _ in range(_ROUNDS):
            for most, step in steps.items():
                begin = time.perf_counter()
                for call in calls:
                    team.run(step, call)
                best[most] = min(best[most], time.perf_counter() - begin)
        for most, seconds in best.items():
            found[most].append(seconds)
    return found


def _filled(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    memory = aligned((size,), np.uint8)
    memory[:] = _FILL
    return memory
