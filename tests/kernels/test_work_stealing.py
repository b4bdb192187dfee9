"""Work stealing: every piece is done once, a fast member does more, and queues need no reset between runs."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tvm.tirx.script.builder import ir as T

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels.tir.codegen.builder import build_function
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, scalar
from xllm_compiler.kernels.tir.codegen.work_stealing import WORK_QUEUES, steal_work
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa
from xllm_compiler.kernels.tir.native.standalone import Standalone


@dataclass(frozen=True)
class Pieces(Kernel):
    """Counts how often each piece is done, and says by whom; `slow`: ticks that a member takes over one."""

    @property
    def args(self) -> tuple[Arg, ...]:
        counts, who = Arg("counts", "i32", "total", written=True), Arg("who", "i32", "total", written=True)
        return (counts, who, Arg("slow", "i64", "team"), WORK_QUEUES, scalar("total"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def ticks() -> Any:
            return T.call_extern("int64", "xllm_team_ticks")

        def body(counts: Any, who: Any, slow: Any, turns: Any, total: Any, member: Any, team: Any) -> None:
            def piece(number: Any, onward: Any) -> None:
                T.buffer_store(counts, counts[number] + 1, [number])
                T.buffer_store(who, member * 10 + onward, [number])
                until = T.bind(ticks() + slow[member])
                with T.While(ticks() < until):
                    T.evaluate(T.int32(0))

            steal_work(total, turns, member, team, piece)

        return build_function(self, isa, body)


@pytest.fixture(scope="module")
def pieces() -> Standalone:
    return Standalone(Pieces(), ISAS[machine_isas()[-1]])


@pytest.mark.parametrize("team", [1, 2, 3, 7])
def test_every_piece_is_done_once(pieces: Standalone, team: int) -> None:
    slow = np.zeros(team, np.int64)
    slow[1::2] = 2000
    for total in (0, 1, team - 1, team, 5 * team + 2, 300):
        counts, who = np.zeros((2, total), np.int32)
        for times in range(1, 20):
            pieces(counts, who, slow, total, team=team)
            assert (counts == times).all(), (total, times)


def test_whoever_is_quick_does_more(pieces: Standalone) -> None:
    pieces.code.xllm_team_ticks.restype = ctypes.c_int64
    first = pieces.code.xllm_team_ticks()
    time.sleep(0.1)
    second = (pieces.code.xllm_team_ticks() - first) * 10
    counts, who = np.zeros((2, 60), np.int32)
    # the quick one takes 15 ms for its own part: time enough for the slow one to say what its part is
    pieces(counts, who, np.array([second // 50, second // 2000]), 60, team=2)
    assert (counts == 1).all()
    own = int((who[:30] == 1).sum())
    # the slow one from the front; the other its own part to its end, and then from the end of the slow one's
    assert 1 <= own < 20
    assert (who == [1] * own + [9] * (30 - own) + [11] * 29 + [10]).all()
