"""The corpus is what it says: every supported family, every op, sound modules that run, and texts that are true."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run_ranks
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.groups import world_size
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.opdef import OPS
from xllm_compiler.ir.ops import Add, AllReduceStart, Collective, KvAppend, KvAttend, KvWrite, Linear, StateRead
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.semantics import Array, state_zeros
from xllm_compiler.ir.verify import verify
from xllm_compiler.testing import corpus as corpus_package
from xllm_compiler.testing.corpus import Entry, corpus, entry, families_of, random_text
from xllm_compiler.testing.graphs import random_module
from xllm_compiler.testing.inputs import make, make_inputs, ranks_of, step_dims

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [e for e in corpus(random_graphs=0)]
# Ops of stages that a random graph is not in.
NOT_IN_GRAPHS = {"sched.record", "sched.wait"}


def test_every_supported_family_is_in_the_corpus() -> None:
    outcomes = json.loads((ROOT / "bench" / "coverage.json").read_text())
    supported = sorted(family for family, r in outcomes.items() if r["status"] == "equal")
    f32 = [f for e in SHIPPED for f in e.families if not e.name.endswith(".bf16")]
    assert sorted(f32) == supported
    assert sum(e.name.endswith(".bf16") for e in SHIPPED) == 8


def test_names_are_unique_and_in_order() -> None:
    entries = corpus()
    names = [e.name for e in entries]
    assert len(set(names)) == len(names)
    assert names == [e.name for e in corpus()]
    kinds = [e.kind for e in entries]
    assert kinds == sorted(kinds, key=["traced", "written", "random"].index)
    assert Counter(kinds)["random"] == corpus_package.RANDOM


def test_equal_modules_share_a_file() -> None:
    hashes = Counter(structural_hash(e.module()) for e in SHIPPED)
    assert set(hashes.values()) == {1}
    assert "ministral" in entry("traced/ministral").families and "mistral" in entry("traced/ministral").families


@pytest.mark.parametrize(
    "e", [*SHIPPED, *(entry(f"random/{i}") for i in range(corpus_package.RANDOM))], ids=lambda e: e.name
)
def test_it_verifies_prints_back_and_runs(e: Entry) -> None:
    module = e.module()
    verify(module)
    if e.kind != "written":  # those have comments between their lines
        text = print_module(module)
        assert e.text.endswith(text)
        comments = e.text.removesuffix(text).splitlines()
        assert len(comments) == (2 if e.kind == "traced" else 0) and all(c.startswith("// ") for c in comments)
    again = e.module()
    assert again is not module and structural_hash(again) == structural_hash(module)
    for func in module.funcs.values():
        given = make(func, {}, seed=1)
        for rank in run_ranks(module, func.name, given.inputs, given.params, given.dims):
            for value in rank:
                assert np.isfinite(value.astype(np.float64)).all(), "inf and NaN hide every difference"


def test_nothing_is_read_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object, **__: object) -> str:
        raise AssertionError("read")

    monkeypatch.setattr(Path, "read_text", no)
    monkeypatch.setattr(corpus_package, "random_module", no)
    entries = corpus()
    with pytest.raises(AssertionError, match="read"):
        _ = entries[0].text


def test_modules_of_test_inputs(tmp_path: Path) -> None:
    """Split files give a module each, on the lines of the file; what is no module is left out."""
    func = "func @f(%x: f32[N]) -> (f32[N]) {\n  %y = t.neg(%x) : f32[N]\n  return %y\n}\n"
    good = f"xir 1 stage=graph\ndim N in [1, 8]\n\n{func}"
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a.xir").write_text("// RUN: xllm-opt %s -p dce\n" + good)
    (tmp_path / "b.xir").write_text(good + "// -----\n" + good.replace("t.neg", "t.nag") + "// -----\n" + good)
    (tmp_path / "c.txt").write_text(good)
    found = [e for e in corpus([tmp_path], random_graphs=0) if e.kind == "test"]
    assert [e.name for e in found] == [f"{tmp_path}/b.xir#1", f"{tmp_path}/b.xir#3", f"{tmp_path}/deeper/a.xir"]
    op = found[1].module().func("f").ops.first
    assert op is not None and (op.loc.file, op.loc.line) == (found[1].name, 21)
    with pytest.raises(XllmError, match="is not a directory of test inputs"):
        corpus([tmp_path / "absent"])


def test_an_entry_by_name() -> None:
    assert entry("random/7").text == random_text(7)
    assert entry("written/decoder-tp2").kind == "written"
    with pytest.raises(XllmError, match="the corpus has no entry 'traced/lama'"):
        entry("traced/lama")


# ------------------------------------------------------------------------------------------------------- random graphs


def graphs(count: int) -> list[Module]:
    return [random_module(random.Random(seed).randrange, 24) for seed in range(count)]


def test_random_graphs_reach_every_op() -> None:
    seen = Counter(op.name for m in graphs(200) for f in m.funcs.values() for op in f.ops)
    assert set(OPS) - set(seen) == NOT_IN_GRAPHS
    assert min(seen.values()) >= 5, seen.most_common()[-5:]


def test_random_graphs_reach_what_else_there_is() -> None:
    """Ranks with real partial sums, two functions, every dtype, every kind of attention, odd sizes."""
    modules = graphs(200)
    ops = [op for m in modules for f in m.funcs.values() for op in f.ops]
    assert {world_size(m.groups) for m in modules} == {1, 2, 4}
    assert any({g.stride for g in m.groups.values()} == {1, 2} for m in modules), "no mesh"
    partial = [op for op in ops if isinstance(op, Linear) and op.partial]
    assert {op.func.module.groups[op.partial].size for op in partial} == {1, 2, 4}
    assert {op.kind for op in ops if isinstance(op, AllReduceStart)} == {"sum", "max"}
    assert {type(op.x.op) for op in ops if isinstance(op, Collective) and op.x.tensor.partial} >= {Linear, Add}
    assert {len(m.funcs) for m in modules} == {1, 2}
    assert {r.type.dtype for op in ops for r in op.results if hasattr(r.type, "dtype")} == {
        *("f32", "f64", "bf16", "f16", "i64", "i32", "i8", "u8", "bool")
    }
    attends = [op for op in ops if isinstance(op, KvAttend)]
    assert {(op.window > 0, op.softcap > 0, op.sinks is not None) for op in attends} == {
        (w, c, s) for w in (False, True) for c in (False, True) for s in (False, True)
    }
    assert any(len(op.kv.users) > 1 and op.kv.op is None for op in attends), "no version is read before it is written"
    reads = [op for op in ops if isinstance(op, StateRead)]
    assert any(len(op.cell.users) > 2 and op.cell.op is None for op in reads), "no version is read twice and written"
    assert {op.cell.cell.dtype for op in reads} == {"f32", "bf16", "f16", "i32"}
    appends = [op for op in ops if isinstance(op, KvAppend)]
    assert {(op.cos is not None, op.qw is not None) for op in appends} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    assert {op.kv.kv.k_dim for op in (*attends, *(o for o in ops if isinstance(o, KvWrite)))} == {4, 5, 6, 7}
    assert {s for m in modules for s in m.scope.symbols} == set("NBSPQC")


def test_a_random_graph_is_a_function_of_its_seed() -> None:
    assert random_text(5) == random_text(5) != random_text(9)


# ------------------------------------------------------------------------------------------------------ several ranks


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("n", (1, 7, 23))
def test_a_tensor_parallel_decoder_is_its_single_rank_twin(ranks: int, n: int) -> None:
    """On the same params: each rank takes its share of them. Only the heads of the cache are split by hand."""
    twin, module = entry("written/decoder-tp1").module(), entry(f"written/decoder-tp{ranks}").module()
    assert ranks_of(twin) == 1 and ranks_of(module) == ranks
    func = twin.func("step")
    given = make(func, n, seed=3)
    (inputs,), (params,) = given.inputs, given.params
    for name in ("kv0", "kv1"):  # heads of the cache are split too: start from what is the same on all ranks
        inputs[name] = state_zeros(func.arg(name).kv, given.dims)
        rng = np.random.default_rng(5)
        inputs[name] += rng.standard_normal(inputs[name].shape).astype(np.float32)
    locals_ = [
        {k: cache_share(v, r, ranks) if k.startswith("kv") else v for k, v in inputs.items()} for r in range(ranks)
    ]
    want = run_ranks(twin, "step", [inputs], [params], given.dims, precise=True)[0]
    got = run_ranks(module, "step", locals_, [params] * ranks, given.dims, precise=True)
    for rank, (logits, *caches) in enumerate(got):
        np.testing.assert_allclose(logits, want[0], rtol=1e-12, atol=1e-12)
        for mine, whole in zip(caches, want[1:], strict=True):
            np.testing.assert_allclose(mine, cache_share(whole, rank, ranks), rtol=1e-12, atol=1e-12)


def cache_share(whole: Array, rank: int, ranks: int) -> Array:
    return np.split(whole, ranks, axis=1)[rank]


def test_the_twin_shares_the_step_of_inputs() -> None:
    """The sizes that laws choose for it are a sound step, and all four all-reduces are reached."""
    module = entry("written/decoder-tp2").module()
    func = module.func("step")
    dims = step_dims(func, {})
    assert make_inputs(func, dims, np.random.default_rng(0)).keys() == {a.name for a in func.args}
    assert sum(isinstance(op, AllReduceStart) for op in func.ops) == 4


# ------------------------------------------------------------------------------------------------------ the script


def check_traced(*only: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/corpus.py", "--check", *(["--only", ",".join(only)] if only else [])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_traced_files_are_what_the_frontend_traces() -> None:
    done = check_traced("llama", "gpt2", "gemma2", "opt", "minicpm3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differ" in done.stdout


def test_a_traced_file_names_its_families() -> None:
    text = entry("traced/gpt-sw3").text
    assert text.startswith("// Traced by bench/corpus.py with transformers ")
    assert families_of(text) == ("gpt-sw3", "gpt2")
    assert families_of("xir 1 stage=graph\n") == ()
