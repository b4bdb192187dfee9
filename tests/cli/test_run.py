"""`xllm-run`: results as text and as arrays, given inputs, ranks, orders of streams, and what cannot be run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from xllm_compiler.tools import evaluate
from xllm_compiler.tools.opt import main as opt
from xllm_compiler.tools.run import main

DOUBLE = """\
xir 1 stage=graph
dim N in [1, 64]
dim B in [1, 8]  // requests
assume N - B >= 0  // every request has a token
func @double(%x: f32[N, 2], %ids: i32[B]) -> (f32[N, 2], i32[B], bool[N, 2]) {
  %w = param(name="w") : f32[2]
  %y = t.add(%x, %x) : f32[N, 2]
  %z = t.mul(%y, %w) : f32[N, 2]
  %m = t.lt(%x, %y) : bool[N, 2]
  return %z, %ids, %m
}
"""
RANKS = """\
xir 1 stage=graph
dim N in [1, 64]
group @tp size=2
func @step(%x: f32[N, 8]) -> (f32[N, 8]) {
  %w = param(name="w") : f32[8, 8]
  %p = nn.linear(%x, %w, partial=@tp) : f32[N, 8] partial(@tp)
  %q = t.neg(%x) : f32[N, 8]
  %f = comm.all_reduce_start(%p, group=@tp) : !future<f32[N, 8]>
  %h = comm.wait(%f) : f32[N, 8]
  %y = t.add(%h, %q) : f32[N, 8]
  return %y
}
"""
SHARES = """\
xir 1 stage=graph
dim R in [0, 1]
group @tp size=2 rank=R
func @step(%x: f32[8]) -> (f32[4]) {
  %y = t.slice(%x, axis=0, start=4*R, stop=4*R + 4) : f32[4]
  return %y
}
"""

CELLS = """\
xir 1 stage=graph
dim B in [1, 8]
dim Q in [1, 64]
assume Q - B >= 0
func @step(%x: bf16[B, 2], %slot: i32[B], %c: cell<bf16, [2]>[Q]) -> (bf16[B, 2], cell<bf16, [2]>[Q] alias %c) {
  %old = state.read(%c, %slot) : bf16[B, 2]
  %new = t.add(%old, %x) : bf16[B, 2]
  %next = state.write(%c, %new, %slot) : cell<bf16, [2]>[Q]
  return %old, %next
}
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.xir").write_text(DOUBLE)
    Path("r.xir").write_text(RANKS)
    Path("s.xir").write_text(SHARES)
    Path("c.xir").write_text(CELLS)


def digest(array: np.ndarray) -> str:  # type: ignore[type-arg]
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()[:12]


def test_given_arrays_give_exact_lines(capsys: Capture) -> None:
    x = np.array([[1, 2], [3, -4], [0, 0]], np.float32)
    ids = np.array([5, 7], np.int64)
    np.savez("in.npz", x=x, ids=ids, w=np.array([1, 0.5]))
    assert main(["d.xir", "--inputs", "in.npz", "-o", "out.npz"]) == 0
    z = np.array([[2, 2], [6, -4], [0, 0]], np.float32)
    mask = x < 2 * x
    assert capsys.readouterr() == (
        "@double at N=3, B=2\n"
        f"  %z    f32[N, 2]   [3, 2]  min -4  mean 1    max 6  {digest(z)}\n"
        f"  %ids  i32[B]      [2]     min 5   mean 6    max 7  {digest(ids.astype(np.int32))}\n"
        f"  %m    bool[N, 2]  [3, 2]  min 0   mean 0.5  max 1  {digest(mask)}\n",
        "",
    )
    with np.load("out.npz") as out:
        assert sorted(out.files) == ["0", "1", "2"]
        assert np.array_equal(out["0"], z) and np.array_equal(out["1"], ids) and np.array_equal(out["2"], mask)


def test_made_up_inputs_depend_on_the_seed_alone(capsys: Capture) -> None:
    texts = []
    for seed in ("0", "0", "1"):
        assert main(["d.xir", "N=4", "--seed", seed, "B=1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("@double at N=4, B=1\n") for text in texts)


def test_sizes_not_given_are_completed(capsys: Capture) -> None:
    assert main(["d.xir", "B=8"]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    n = int(head.removeprefix("@double at N=").partition(",")[0])
    assert head == f"@double at N={n}, B=8" and n >= 8


def test_parameters_that_the_file_lacks_are_made_up_and_said_so(capsys: Capture) -> None:
    np.savez("in.npz", x=np.ones((2, 2), np.float32), ids=np.zeros(1, np.int32))
    assert main(["d.xir", "--inputs", "in.npz"]) == 0
    assert capsys.readouterr().err == "note: 1 of 1 parameters are not in the file; made up from the seed\n"


def test_precise_computes_in_f64(capsys: Capture) -> None:
    text = "xir 1 stage=graph\nfunc @f(%x: bf16[1]) -> (bf16[1]) {\n  %y = t.add(%x, %x) : bf16[1]\n  return %y\n}\n"
    Path("b.xir").write_text(text)
    np.savez("in.npz", x=np.array([0.1]))
    assert main(["b.xir", "--inputs", "in.npz", "-o", "typed.npz"]) == 0
    assert main(["b.xir", "--inputs", "in.npz", "-o", "exact.npz", "--precise"]) == 0
    rounded = np.array([0.1]).astype(ml_dtypes.bfloat16)
    with np.load("typed.npz") as typed, np.load("exact.npz") as exact:
        assert typed["0"].dtype == np.float32 and typed["0"][0] == np.float32(rounded[0]) * 2
        assert exact["0"].dtype == np.float64 and exact["0"][0] == np.float64(rounded[0]) * 2
    capsys.readouterr()
    np.savez("in.npz", x=rounded)  # numpy writes what it does not know as two bytes each
    assert main(["b.xir", "--inputs", "in.npz", "-o", "again.npz"]) == 0
    with np.load("again.npz") as again:
        assert again["0"][0] == np.float32(rounded[0]) * 2


def test_empty_and_not_a_number(capsys: Capture) -> None:
    text = "xir 1 stage=graph\ndim S in [0, 4]\nfunc @f(%x: f32[S]) -> (f32[S]) {\n  return %x\n}\n"
    Path("e.xir").write_text(text)
    assert main(["e.xir", "S=0"]) == 0
    assert "[0]  empty" in capsys.readouterr().out
    np.savez("in.npz", x=np.array([np.nan, 1], np.float32))
    assert main(["e.xir", "--inputs", "in.npz"]) == 0
    assert "min nan  mean nan  max nan" in capsys.readouterr().out


def test_every_rank_is_told(capsys: Capture) -> None:
    for ranks in ([], ["--ranks", "3"]):
        count = 3 if ranks else 2
        assert main(["r.xir", "N=3", *ranks, "-o", "out.npz"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[::2] == [f"@step at N=3, rank {i} of {count}" for i in range(count)]
        assert len({line.split()[-1] for line in lines[1::2]}) == 1  # a sum over all ranks, and a replicated part
        with np.load("out.npz") as out:
            assert sorted(out.files) == [f"rank{i}/0" for i in range(count)]


def test_ranks_may_be_given_different_arrays(capsys: Capture) -> None:
    one, eye = np.ones((1, 8), np.float32), np.eye(8, dtype=np.float32)
    np.savez("in.npz", **{"x": one, "w": eye, "rank1/w": 10 * eye})
    assert main(["r.xir", "--inputs", "in.npz", "-o", "out.npz"]) == 0
    with np.load("out.npz") as out:
        assert np.array_equal(out["rank0/0"], 10 * one) and np.array_equal(out["rank1/0"], 10 * one)


def test_every_rank_takes_its_share(capsys: Capture) -> None:
    np.savez("in.npz", x=np.arange(8, dtype=np.float32))
    for ranks in ([], ["--ranks", "2"]):
        assert main(["s.xir", "--inputs", "in.npz", "-o", "out.npz", *ranks]) == 0
        with np.load("out.npz") as out:
            assert out["rank0/0"].tolist() == [0, 1, 2, 3] and out["rank1/0"].tolist() == [4, 5, 6, 7]


def test_orders_of_streams(capsys: Capture) -> None:
    assert opt(["r.xir", "-p", "assign-streams,plan-memory", "-o", "s.xir"]) == 0
    assert main(["s.xir", "N=3", "--orders", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 orders that the streams allow give the same bits"
    lines = Path("s.xir").read_text().splitlines(keepends=True)
    Path("bad.xir").write_text("".join(line for line in lines if "sched.wait" not in line))
    assert main(["bad.xir", "N=3", "--orders", "5"]) == 2
    assert "error[ir]: V17: comm.all_reduce_start on stream 1 reads %p" in capsys.readouterr().err
    assert main(["bad.xir", "N=3", "--orders", "5", "--no-verify"]) == 2
    assert "bytes that were never written" in capsys.readouterr().err
    assert main(["r.xir", "N=3", "--orders", "5"]) == 2
    assert "a module in stage graph has one order" in capsys.readouterr().err


def test_without_verify_every_size_must_still_be_declared(capsys: Capture) -> None:
    Path("u.xir").write_text(
        DOUBLE.replace("dim B in [1, 8]  // requests\n", "").replace("assume N - B", "assume N - 1")
    )
    assert main(["u.xir", "--no-verify"]) == 2
    assert capsys.readouterr().err == (
        "error[ir]: the module declares no size B\n  at @double, %ids: i32[B]\n  help: its sizes: N\n"
    )


def test_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def greedy(*given: object) -> None:
        raise MemoryError("Unable to allocate 8.00 TiB for an array")

    monkeypatch.setattr(evaluate, "call", greedy)
    assert main(["d.xir"]) == 2
    assert capsys.readouterr().err == (
        "error[capacity]: not enough memory: Unable to allocate 8.00 TiB for an array\n  help: ask for smaller sizes\n"
    )


@pytest.mark.parametrize(
    ("argv", "message", "help"),
    [
        ([], "no file is given", "xllm-run FILE.xir, or - for standard input"),
        (["d.xir", "--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 on", ""),
        (["x.xir"], "there is no file x.xir", ""),
        (["d.xir", "M=3"], "xllm-run: the module has no size M", "its sizes: N, B"),
        (["d.xir", "N=65"], "xllm-run: N=65 is outside [1, 64]", ""),
        (["d.xir", "B=9"], "xllm-run: B=9 is outside [1, 8]", "help: requests"),
        (["d.xir", "N=3", "B=4"], "N - B >= 0 (every request has a token)", ""),
        (["d.xir", "N=3", "N=4"], "xllm-run: N is given twice", ""),
        (["d.xir", "e.xir"], "xllm-run: 'e.xir' is not a size", "write SYMBOL=NUMBER, such as N=3"),
        (["d.xir", "N=1,2"], "xllm-run: N has several sizes", ""),
        (["d.xir", "--func", "dubble"], "--func: the module has no function dubble", "did you mean 'double'?"),
        (["d.xir", "--ranks", "0"], "--ranks 0: at least one rank has to run", ""),
        (["d.xir", "--rank", "2"], "xllm-run has no flag --rank", "did you mean --ranks?"),
        (["s.xir", "--ranks", "3"], "the module is for group @tp as it is: size=2 rank=R", "can be given another size"),
        (["s.xir", "R=1"], "R has no size: it is each rank's place in @tp", "leave it out"),
        (["d.xir", "--inputs", "no.npz"], "there is no file no.npz", ""),
        (["d.xir", "--inputs", "d.xir"], "d.xir is not a sound .npz file", ""),
        (["d.xir", "--inputs", "one.npy"], "one.npy holds a single array", ""),
        (["d.xir", "--inputs", "part.npz"], "--inputs has no array for argument %ids: i32[B]", "it has x"),
        (["d.xir", "--inputs", "typo.npz"], "--inputs: 'idz' is neither an argument nor a", "did you mean 'ids'?"),
        (["d.xir", "--inputs", "rank.npz"], "--inputs: %x is f32[N, 2], the array has shape [4]", ""),
        (["d.xir", "N=3", "--inputs", "full.npz"], "f32[N, 2] has shape [2, 2], but N=3", ""),
        (["d.xir", "--inputs", "float.npz"], "--inputs: %ids is i32[B], the array is float64", ""),
        (["d.xir", "--inputs", "shape.npz"], "input %x has shape [2, 3], f32[N, 2] is [2, 2]", ""),
        (["d.xir", "-o", "no/out.npz"], "cannot write no/out.npz: No such file or directory", ""),
    ],
)
def test_what_cannot_be_run(argv: list[str], message: str, help: str, capsys: Capture) -> None:
    x, ids = np.ones((2, 2), np.float32), np.zeros(1, np.int32)
    np.save("one.npy", x)
    np.savez("part.npz", x=x)
    np.savez("typo.npz", x=x, idz=ids)
    np.savez("rank.npz", x=x.reshape(4), ids=ids)
    np.savez("full.npz", x=x, ids=ids)
    np.savez("float.npz", x=x, ids=np.array([0.5]))
    np.savez("shape.npz", x=np.ones((2, 3), np.float32), ids=ids)
    assert main(argv) == 2
    err = capsys.readouterr().err.removeprefix("note: 1 of 1 parameters are not in the file; made up from the seed\n")
    assert err.startswith("error[") and message in err and help in err and "Traceback" not in err


def test_a_damaged_file_of_arrays_is_one_error(capsys: Capture) -> None:
    np.savez_compressed("in.npz", x=np.ones((2, 2), np.float32), ids=np.zeros(1, np.int32))
    sound = Path("in.npz").read_bytes()
    for cut in range(0, len(sound), 7):
        Path("in.npz").write_bytes(sound[:cut])
        assert main(["d.xir", "--inputs", "in.npz"]) == 2
        assert capsys.readouterr().err.startswith("error[io]: in.npz is not a sound .npz file")
    for at in range(0, len(sound), 5):
        Path("in.npz").write_bytes(sound[:at] + bytes([sound[at] ^ 0xFF]) + sound[at + 1 :])
        assert main(["d.xir", "--inputs", "in.npz"]) in (0, 2)  # not every byte of a zip file counts
        assert "error[internal]" not in capsys.readouterr().err


def test_several_functions_need_a_name(capsys: Capture) -> None:
    func = "func @{}(%x: f32[2]) -> (f32[2]) {{\n  return %x\n}}\n"
    Path("two.xir").write_text("xir 1 stage=graph\n" + func.format("a") + func.format("b"))
    assert main(["two.xir"]) == 2
    assert capsys.readouterr().err == "error[option]: the module has 2 functions\n  help: --func a | b\n"
    assert main(["two.xir", "--func", "@b"]) == 0
    assert capsys.readouterr().out.startswith("@b\n  %x  f32[2]  [2]")


def test_a_given_cell_tells_its_slots_and_comes_back(capsys: Capture) -> None:
    cell = np.arange(10, dtype=np.float32).reshape(5, 2)
    slot = np.array([4, 1], np.int32)
    np.savez("in.npz", x=np.ones((2, 2), np.float32), slot=slot, c=cell)
    assert main(["c.xir", "--inputs", "in.npz", "-o", "out.npz"]) == 0
    assert capsys.readouterr().out.startswith("@step at B=2, Q=5\n")
    out = np.load("out.npz")
    old, new = (out[name].astype(np.float32) for name in ("0", "1"))
    np.testing.assert_array_equal(old, cell[slot])
    cell[slot] += 1
    np.testing.assert_array_equal(new, cell)
    np.savez("wide.npz", x=np.ones((2, 2), np.float32), slot=slot, c=np.ones((5, 3), np.float32))
    assert main(["c.xir", "--inputs", "wide.npz"]) == 2
    assert "input %c has shape [5, 3], cell<bf16, [2]>[Q] is [5, 2]" in capsys.readouterr().err
