"""Runs an artifact's functions on the CPU. Owns their buffers and the choice of program; must not know requests.

A step is one native call. Everything around it is prepared once: input buffers, argument blocks, guards as closures.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import Manifest
from xllm_compiler.artifact.schema import PAGES
from xllm_compiler.dims import parse_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import host
from xllm_compiler.runtime.cpu.team import Team, native_function
from xllm_compiler.runtime.executor import Outputs
from xllm_compiler.step.abi import ArgumentBlock
from xllm_compiler.step.inputs import ARRAY_DTYPE, StepBatch
from xllm_compiler.step.interface import STEP, Function, TensorSpec

_ALIGN = 64
_PAGE = 4096

Guard = Callable[..., int]


def _anonymous(size: int) -> mmap.mmap:
    """Zeroed memory that costs nothing until it is touched. Raises XllmError("capacity")."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return mmap.mmap(-1, max(size, _PAGE), flags=flags)
    except (OSError, OverflowError) as error:
        raise XllmError("capacity", f"cannot reserve {size} bytes: {error}") from None


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


class _Output:
    """One output's memory, large enough for every call."""

    __slots__ = ("address", "items", "memory", "name", "shape")

    def __init__(self, spec: TensorSpec, order: tuple[str, ...], limits: Mapping[str, int]) -> None:
        self.name = spec.name
        self.memory = _anonymous(spec.nbytes().evaluate(limits))
        host.prefer_huge_pages(self.memory)
        self.address = _address(self.memory)
        self.items: NDArray[Any] = np.frombuffer(self.memory, ARRAY_DTYPE[spec.dtype])
        self.shape: list[Callable[..., int]] = [dim.compile(order) for dim in spec.dims()]

    def view(self, sizes: list[int]) -> NDArray[Any]:
        shape = [axis(*sizes) for axis in self.shape]
        count = 1
        for size in shape:
            count *= size
        return self.items[:count].reshape(shape)


class _Loaded:
    """A function that can be called: its argument block, with the words that do not change filled in."""

    def __init__(self, name: str, function: Function, dims: Iterable[str], library: ctypes.CDLL) -> None:
        self.name, self.function = name, function
        self.block = ArgumentBlock.of(function, dims)
        order = tuple(self.block.dims())
        self.words = (ctypes.c_int64 * len(self.block))()
        self.at = ctypes.c_void_p(ctypes.addressof(self.words))
        self.sizes = self.block.sizes()
        self.profile = self.block.place("profile")
        self.batch: StepBatch | None = None
        self.outputs: list[_Output] = []
        self.programs: list[tuple[str, list[Guard], ctypes.c_void_p]] = [
            (
                program.symbol,
                [parse_dim(text).compile(order) for text in program.guard],
                ctypes.cast(native_function(library, program.symbol), ctypes.c_void_p),
            )
            for program in function.programs
        ]

    def put(self, space: Any, name: str, value: int) -> None:
        self.words[self.block.place(space, name)] = value

    def bind(self, batch: StepBatch) -> None:
        """Write the addresses of a batch's buffers into the argument block; they do not move after that."""
        for spec in self.function.inputs:
            array = batch[spec.name]
            if array.dtype != ARRAY_DTYPE[spec.dtype] or not array.flags.c_contiguous:
                raise XllmError("internal", f"input {spec.name} of @{self.name} must be contiguous {spec.dtype}")
            self.put("input", spec.name, int(array.ctypes.data))
        self.batch = batch

    def choose(self, sizes: list[int]) -> tuple[str, ctypes.c_void_p]:
        """Symbol and code of the first program that takes these sizes."""
        for symbol, guards, code in self.programs:
            for guard in guards:
                if guard(*sizes) < 0:
                    break
            else:
                return symbol, code
        raise XllmError("internal", f"no program of @{self.name} takes the sizes {sizes}")


class CpuExecutor:
    """One artifact on one team of threads."""

    def __init__(
        self,
        manifest: Manifest,
        library: ctypes.CDLL,
        weights: NDArray[np.uint8],
        *,
        pages: int,
        threads: int,
    ) -> None:
        """`weights`: the mapped weights.bin, which must outlive the executor. `pages`: KV pages in the pool."""
        if weights.ctypes.data % _ALIGN:
            raise XllmError("internal", "the weights are not mapped at a multiple of 64")
        self.pages = pages
        self._library = library
        self._weights = weights
        self._limits = manifest.limit_values(pages)
        self._least = {name: limits.lo for name, limits in manifest.dims.items()}
        # of the cache huge pages made first prompts slower, and nothing quicker
        self._arena = _anonymous(manifest.arena_bytes(self._limits))
        host.prefer_huge_pages(self._arena)
        # A block has its tokens of all KV states, one state after the other.
        self._kv = _anonymous(pages * manifest.page_bytes)
        places: dict[str, int] = {}
        end = _address(self._kv)
        for name, state in manifest.states.items():
            places[name], end = end, end + state.block_bytes
        # a barrier, and for each member the words by which it takes turns
        self._barrier = np.zeros((2 + threads) * _ALIGN, np.uint8)
        barrier = (self._barrier.ctypes.data + _ALIGN - 1) & -_ALIGN
        self._functions: dict[str, _Loaded] = {}
        for name, function in manifest.functions.items():
            loaded = self._functions[name] = _Loaded(name, function, manifest.dims, library)
            self._order = tuple(loaded.block.dims())  # the same in all functions
            loaded.put("arena", "", _address(self._arena))
            loaded.put("weights", "", int(weights.ctypes.data))
            loaded.put("barrier", "", barrier)
            for used in function.states:
                loaded.put("state", used, places[used])
            for spec in function.outputs:
                output = _Output(spec, self._order, self._limits)
                loaded.outputs.append(output)
                loaded.put("output", spec.name, output.address)
        self._team: Team | None = Team(library, threads)

    @property
    def threads(self) -> int:
        return 0 if self._team is None else self._team.size

    def new_batch(self, function: str = STEP) -> StepBatch:
        return StepBatch(function, self._loaded(function).function, self._limits)

    def _loaded(self, name: str) -> _Loaded:
        found = self._functions.get(name)
        if found is None:
            raise XllmError("internal", f"there is no function @{name}; there is @{', @'.join(self._functions)}")
        return found

    def program_for(self, batch: StepBatch) -> str:
        """Symbol of the program that runs a batch."""
        return self._loaded(batch.function).choose(self._sizes(batch))[0]

    def _sizes(self, batch: StepBatch) -> list[int]:
        """The sizes of a call in the argument block's order; those of other functions' inputs are at their least.
        Raises XllmError("internal") beyond the limits."""
        given = batch.sizes
        sizes = [self._limits[name] if name == PAGES else given.get(name, self._least[name]) for name in self._order]
        for name, size in zip(self._order, sizes, strict=True):
            if not self._least[name] <= size <= self._limits[name]:
                raise XllmError(
                    "internal",
                    f"@{batch.function} with {name}={size} is beyond the limits {self._least[name]} to "
                    f"{self._limits[name]}",
                )
        if given.get("B", 0) > given.get("N", 0):
            raise XllmError("internal", f"@{batch.function} with {given} is beyond the limits: B is at most N")
        return sizes

    def execute(self, batch: StepBatch) -> Outputs:
        """Run the batch's function once; views that its next call overwrites. Raises XllmError("internal")."""
        loaded = self._loaded(batch.function)
        if batch is not loaded.batch:
            loaded.bind(batch)
        if self._team is None:
            raise XllmError("internal", "the executor is closed")
        sizes = self._sizes(batch)
        loaded.words[loaded.sizes] = sizes  # type: ignore[assignment]
        symbol, code = loaded.choose(sizes)
        status = self._team.run(code, loaded.at)
        if status:
            raise XllmError("internal", f"program {symbol} returned {status} for {batch.sizes}")
        return {output.name: output.view(sizes) for output in loaded.outputs}

    def stamp_into(self, stamps: NDArray[np.int64] | None) -> None:
        """Where the next calls write their time stamps, [threads, calls of the program, 2] in C order, which must be
        kept until it is changed again; None: nowhere."""
        for loaded in self._functions.values():
            loaded.words[loaded.profile] = 0 if stamps is None else int(stamps.ctypes.data)

    def counter(self) -> Callable[[], int]:
        """Reads the counter that the stamps are of. Raises XllmError("artifact") where the library has none."""
        ticks = native_function(self._library, "xllm_team_ticks")
        ticks.argtypes, ticks.restype = [], ctypes.c_int64
        return ticks

    def close(self) -> None:
        if self._team is not None:
            self._team.close()
            self._team = None
