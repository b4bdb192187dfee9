"""Every kind of fault is caught by a law, with a report that a person can act on; tests/testing/faults plants them.

Where the verifier would be first, a second test looks at the broken module with the dynamic check alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xllm_compiler.ir.core import Module
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes import registry
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.passes.registry import load_passes, pass_class, pass_names
from xllm_compiler.testing import laws
from xllm_compiler.testing.corpus import entry
from xllm_compiler.testing.equiv import check_equal
from xllm_compiler.testing.laws import Laboratory
from xllm_compiler.testing.laws_streams import check_collectives, check_interleavings
from xllm_compiler.testing.laws_trial import Trial, source_of

PLANTED = Path(__file__).parent / "faults" / "planted.py"
ENTRIES = ("written/decoder-tp1", "written/decoder-tp2", "written/activations")


@pytest.fixture(scope="module", autouse=True)
def planted() -> Iterator[list[str]]:
    """The faulty passes, known to nobody else afterwards."""
    names = load_passes(str(PLANTED))
    yield names
    for name in names:
        sys.modules.pop(registry._registered.pop(name).__module__, None)
    assert not any(name.startswith("planted-") for name in pass_names() if name in names)


@pytest.fixture(scope="module")
def laboratory(planted: list[str]) -> Laboratory:
    return Laboratory(entry(name) for name in ENTRIES)


# pass -> (the law that it breaks, the op to blame as its line begins, what else the report says)
CAUGHT = {
    "planted-algebra": (
        "meaning",
        "> %quick = t.silu(%x)",
        ("touched by planted-algebra/quick-silu", "was ", "off by ", "allowed ", "in exact arithmetic"),
    ),
    "planted-event": (
        "verifies",
        "comm.all_reduce_start(",
        (
            "V17: comm.all_reduce_start on stream 1 reads",
            "may not have written yet",
            "touched by",
            "planted-event/drop",
        ),
    ),
    "planted-overlap": (
        "verifies",
        ", at=[",
        ("V15: %", "is not provably clear of %", "which is still in use", "planted-overlap/at"),
    ),
    "planted-order": (
        "collectives",
        "= comm.all_reduce_start(",
        ("group @tp: the collective that was number 2 is number 1 now", "planted-order/swap", "reorders_collectives"),
    ),
    "planted-write": (
        "meaning",
        "argument %kv",  # the write is gone: what is returned in its place
        ("it counted drop-write: 1", "kv<f32", "off by "),
    ),
    "planted-version": (
        "verifies",
        "= kv.write(",
        ("V5: state version %kv", "is used up 2 times, by kv.write, return", "planted-version/return"),
    ),
    "planted-type": (
        "verifies",
        "= t.silu(",
        ("V3: t.silu yields f32[N, 1], its results say bf16[N, 1]", "planted-type/narrow"),
    ),
}


def test_there_is_a_fault_of_every_kind(planted: list[str]) -> None:
    assert sorted(planted) == sorted(CAUGHT)


@pytest.mark.parametrize("name", CAUGHT)
def test_a_law_catches_it_and_says_how(name: str, laboratory: Laboratory) -> None:
    law, blamed, says = CAUGHT[name]
    broken = laboratory.results(name).broken
    assert law in broken, broken
    lines = broken[law].splitlines()
    assert lines[0].startswith(f"pass {name} breaks law `{law}`: ")
    assert any(line.lstrip().startswith("on ") and " ops" in line for line in lines[1:2])
    marked = [line for line in lines if line.lstrip().startswith("> ") or ", argument %" in line]
    assert len(marked) == 1 and blamed in marked[0], broken[law]
    for text in says:
        assert text in broken[law], broken[law]
    assert any(line.startswith("  help: ") for line in lines)
    (path,) = (Path(line.split(": ")[1]) for line in lines if line.startswith("  input: "))
    assert path.read_text().startswith(f"// {lines[0]}\nxir 1 ")
    assert any(line.startswith(f"  reproduce: xllm-opt {path} -p {name} --load {PLANTED}") for line in lines)
    assert len(lines) < 30, "a report is read by people"


@pytest.mark.parametrize("name", CAUGHT)
def test_no_other_law_is_blamed_on_a_single_rank(name: str, planted: list[str]) -> None:
    """One fault, one law; with several ranks a wrong value is also one that collectives carry."""
    law = CAUGHT[name][0]
    entries = ["written/decoder-tp2"] if name in ("planted-event", "planted-order") else [ENTRIES[0], ENTRIES[2]]
    broken = Laboratory(entry(e) for e in entries).results(name).broken
    assert list(broken) == [law], broken


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUGHT)
def test_the_whole_corpus_catches_it(name: str, planted: list[str]) -> None:
    assert laws.check(name, CAUGHT[name][0]) is not None


# ------------------------------------------------------------------------------------------- the dynamic checks alone


def broken_by(name: str, entry_name: str, pipeline: str = "") -> tuple[Trial, Module]:
    """A trial of the faulty pass on an entry that `pipeline` has prepared, and the module that it leaves."""
    module = entry(entry_name).module()
    if pipeline:
        run_pipeline(pipeline, module, PassContext())
    trial = Trial(pass_class(name)(), source_of(module))
    assert trial.first.error is None and trial.changed
    return trial, trial.after


def refused(module: Module) -> str:
    with pytest.raises(IrError) as caught:
        verify(module)
    return caught.value.message


def test_a_dropped_event_shows_in_some_order_of_the_streams() -> None:
    trial, module = broken_by("planted-event", "written/decoder-tp2", "assign-streams")
    assert refused(module).startswith("V17: ")
    found = check_interleavings(trial)
    assert found is not None
    assert "of the streams fails" in found and "> %" in found and "= comm.all_reduce_start(" in found
    assert "planted-event/drop" in found


def test_overlapping_buffers_show_in_the_bytes() -> None:
    trial, module = broken_by("planted-overlap", "written/decoder-tp1", "assign-streams,plan-memory")
    assert refused(module).startswith("V15: ")
    found = check_interleavings(trial)
    assert found is not None
    assert "of the streams fails" in found and "planted-overlap/at" in found and ", at=[" in found


def test_a_reordered_collective_shows_nowhere_else() -> None:
    trial, module = broken_by("planted-order", "written/decoder-tp2")
    verify(module)
    assert check_equal(trial.before, module) is None
    found = check_collectives(trial)
    assert found is not None and "the collective that was number 4 is number 3 now" in found


def test_a_lost_write_and_an_old_version_show_in_the_results() -> None:
    trial, module = broken_by("planted-write", "written/decoder-tp1")
    verify(module)
    mismatch = check_equal(trial.before, module)
    assert mismatch is not None and mismatch.precise and "return 0, %logits" in mismatch.message
    trial, module = broken_by("planted-version", "written/decoder-tp1")
    assert refused(module).startswith("V5: ")
    mismatch = check_equal(trial.before, module)
    assert mismatch is not None and mismatch.index == 1 and "return 1, %kv0" in mismatch.message


def test_a_stale_type_shows_in_the_rounding() -> None:
    trial, module = broken_by("planted-type", "written/decoder-tp1")
    assert refused(module) == "V3: t.silu yields f32[N, 24], its results say bf16[N, 24]"
    mismatch = check_equal(trial.before, module)
    assert mismatch is not None and not mismatch.precise and mismatch.error > mismatch.bound
    assert "in the real dtypes: more rounding than allowed" in mismatch.message
    # A value of another type is not compared; the first one that is reads it, and stands right below it.
    assert mismatch.op is not None and mismatch.op.result.name == "m0"
    assert "%s0 = t.silu(%g0) : bf16[N, 24]" in str(mismatch)


def test_wrong_algebra_verifies() -> None:
    trial, module = broken_by("planted-algebra", "written/activations")
    verify(module)
    mismatch = check_equal(trial.before, module)
    assert mismatch is not None and mismatch.op is not None and mismatch.op.result.name == "quick"
