"""Runs an artifact's steps on the CPU. Owns the buffers of a step and the choice of program; must not know requests.

A step is one native call. Everything around it is prepared once: input buffers, argument block, guards as closures.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import Manifest
from xllm_compiler.dims import parse_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import host
from xllm_compiler.runtime.cpu.team import Team, native_function
from xllm_compiler.runtime.executor import F32, Logits, StepBatch

SYMBOLS = ("N", "B", "S", "P")
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


class _Program:
    __slots__ = ("guards", "name", "step")

    def __init__(self, name: str, guards: Sequence[Guard], step: ctypes.c_void_p) -> None:
        self.name = name
        self.guards = tuple(guards)
        self.step = step


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
        self._manifest = manifest
        self._library = library
        self._weights = weights
        limits = manifest.limits
        self._most = (limits.max_num_batched_tokens, limits.max_num_seqs, limits.max_num_logits, pages)
        self._programs = [
            _Program(
                program.name,
                [parse_dim(text).compile(SYMBOLS) for text in program.guard],
                ctypes.cast(native_function(library, program.symbol), ctypes.c_void_p),
            )
            for program in manifest.programs
        ]
        at_limits = dict(zip(SYMBOLS, self._most, strict=True))
        self._arena = _anonymous(parse_dim(manifest.memory.arena).evaluate(at_limits))
        self._kv = _anonymous(pages * manifest.memory.kv.page_bytes)
        # the outputs lie one behind the other, each as long as the step's rows make it
        self._columns = [int(spec.shape[1]) for spec in manifest.outputs]
        self._logits_memory = _anonymous(parse_dim(manifest.memory.logits).evaluate(at_limits))
        for memory in (
            self._arena,
            self._logits_memory,
        ):  # of the cache they made first prompts slower, and nothing quicker
            host.prefer_huge_pages(memory)
        self._logits: F32 = np.frombuffer(self._logits_memory, np.float32)
        # a barrier, and for each member the words by which it takes turns
        self._barrier = np.zeros((2 + threads) * _ALIGN, np.uint8)
        barrier = (self._barrier.ctypes.data + _ALIGN - 1) & -_ALIGN
        self._batch: StepBatch | None = None
        self._args = (ctypes.c_int64 * 16)()
        self._args_at = ctypes.c_void_p(ctypes.addressof(self._args))
        self._args[0:3] = [_address(self._arena), int(weights.ctypes.data), _address(self._kv)]
        self._args[9] = int(self._logits.ctypes.data)
        self._args[14] = barrier
        self._team: Team | None = Team(library, threads)

    @property
    def threads(self) -> int:
        return 0 if self._team is None else self._team.size

    def new_batch(self) -> StepBatch:
        tokens, seqs, rows, _ = self._most
        width = -(-self._manifest.model.max_model_len // self._manifest.target.page)
        return StepBatch(tokens, seqs, rows, width)

    def program_for(self, n: int, b: int, s: int) -> str:
        """Name of the program that a step of these sizes runs."""
        return self._choose(n, b, s).name

    def _choose(self, n: int, b: int, s: int) -> _Program:
        for program in self._programs:
            for guard in program.guards:
                if guard(n, b, s, self.pages) < 0:
                    break
            else:
                return program
        raise XllmError("internal", f"no program takes a step of N={n}, B={b}, S={s}, P={self.pages}")

    def _bind(self, batch: StepBatch) -> None:
        """Write the addresses of a batch's buffers into the argument block; they do not move after that."""
        for place, array in enumerate((batch.ids, batch.pos, batch.seq, batch.start, batch.table, batch.sel), 3):
            if array.dtype != np.int32 or not array.flags.c_contiguous:
                raise XllmError("internal", f"input {place - 3} of a step must be contiguous int32")
            self._args[place] = int(array.ctypes.data)
        self._batch = batch

    def execute(self, batch: StepBatch) -> Logits:
        """Run one step; views that the next call overwrites. Raises XllmError("internal")."""
        if batch is not self._batch:
            self._bind(batch)
        if self._team is None:
            raise XllmError("internal", "the executor is closed")
        n, b, s = batch.n, batch.b, batch.s
        most = self._most
        if not (1 <= b <= most[1] and b <= n <= most[0] and 0 <= s <= most[2]):
            raise XllmError("internal", f"a step of N={n}, B={b}, S={s} is beyond the limits N, B, S <= {most[:3]}")
        args = self._args
        args[10], args[11], args[12], args[13] = n, b, s, self.pages
        program = self._choose(n, b, s)
        status = self._team.run(program.step, self._args_at)
        if status:
            raise XllmError("internal", f"program {program.name} returned {status} for N={n}, B={b}, S={s}")
        return self._outputs(s)

    def _outputs(self, s: int) -> Logits:
        vocab, *rest = self._columns
        end = s * vocab
        rows = self._logits[:end].reshape(s, vocab)
        if not rest:  # compiled without return-block-max
            return Logits.of(rows)
        return Logits(rows, self._logits[end : end + s * rest[0]].reshape(s, rest[0]))

    def stamp_into(self, stamps: NDArray[np.int64] | None) -> None:
        """Where the next steps write their time stamps, [threads, calls of the program, 2] in C order, which must be
        kept until it is changed again; None: nowhere."""
        self._args[15] = 0 if stamps is None else int(stamps.ctypes.data)

    def counter(self) -> Callable[[], int]:
        """Reads the counter that the stamps are of. Raises XllmError("artifact") where the library has none."""
        ticks = native_function(self._library, "xllm_team_ticks")
        ticks.argtypes, ticks.restype = [], ctypes.c_int64
        return ticks

    def close(self) -> None:
        if self._team is not None:
            self._team.close()
            self._team = None
