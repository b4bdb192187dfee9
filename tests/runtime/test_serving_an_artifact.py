"""Loader, CPU executor, start-up and LLM on a small artifact whose native code is written in C: real files and threads,
known answers; and every way in which an artifact can be unfit."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from toy_artifact import PAGE, VOCAB, WIDTH, build_toy_artifact, toy_answer

from xllm_compiler.artifact import FORMAT
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import resolve
from xllm_compiler.runtime.cpu import CpuExecutor, Team
from xllm_compiler.runtime.llm import LLM, SamplingParams
from xllm_compiler.runtime.loader import load_artifact
from xllm_compiler.runtime.phases import Phases
from xllm_compiler.runtime.startup import EngineOptions, prepare_engine, sampling_defaults

GREEDY = SamplingParams(temperature=0, max_tokens=9)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_artifact(tmp_path_factory.mktemp("toy") / "artifact")


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "copy"))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tokens_come_from_the_native_code(toy: Path, threads: int) -> None:
    prompts = [[1, 2, 3], [4] * 17, [5]]
    with LLM(toy, threads=threads) as llm:
        for result, prompt in zip(llm.generate(prompts, GREEDY), prompts, strict=True):
            assert result.outputs[0].token_ids == toy_answer(prompt, 9)
            assert result.finished and result.prompt_token_ids == prompt
        stats = llm.engine.stats()
    assert stats.kv_pages_total == 3 * WIDTH, "no more pages than three requests of the longest length can use"


def test_a_moved_artifact_is_the_same(toy: Path, copy: Path) -> None:
    with LLM(copy, threads=1) as llm:
        assert llm.generate([1, 2, 3], GREEDY)[0].outputs[0].token_ids == toy_answer([1, 2, 3], 9)


def executor_of(toy: Path, threads: int = 1) -> CpuExecutor:
    loaded = load_artifact(toy)
    return loaded.code.executor(loaded.weights, pages=6, threads=threads)


def test_programs_are_chosen_by_their_guards(toy: Path) -> None:
    executor = executor_of(toy)
    batch = executor.new_batch()
    names = []
    for n in (1, 3, 4, 12):
        batch.sizes = {"N": n, "B": 1, "S": 1}
        names.append(executor.program_for(batch))
    assert names == ["xllm_fn_step_1", "xllm_fn_step_1", "xllm_fn_step", "xllm_fn_step"]
    executor.close()


def test_a_status_and_a_step_beyond_the_limits_are_typed_errors(toy: Path) -> None:
    executor = executor_of(toy, 2)
    batch = executor.new_batch()
    batch.sizes = {"N": 1, "B": 1, "S": 0}
    batch["start"][1] = 1
    batch["table"][0, 0] = 0
    batch["ids"][0] = VOCAB - 1  # the toy refuses this token
    with pytest.raises(XllmError, match="returned 7") as caught:
        executor.execute(batch)
    assert caught.value.kind == "internal"
    batch["ids"][0] = 1
    assert executor.execute(batch)["logits"].shape == (0, VOCAB)
    for sizes in ((13, 1, 0), (0, 0, 0), (1, 2, 0), (4, 4, 0), (1, 1, 7)):
        batch.sizes = dict(zip("NBS", sizes, strict=True))
        with pytest.raises(XllmError, match="beyond the limits"):
            executor.execute(batch)
    executor.close()
    executor.close()
    batch.sizes = {"N": 1, "B": 1, "S": 0}
    with pytest.raises(XllmError, match="closed"):
        executor.execute(batch)


def test_a_failing_step_leaves_the_engine_serving(toy: Path) -> None:
    with LLM(toy, threads=2) as llm:
        with pytest.raises(XllmError, match="returned 7"):
            llm.generate([VOCAB - 1], GREEDY)
        assert llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids == toy_answer([1, 2], 9)


def test_prompt_forms_and_parameters(toy: Path) -> None:
    with LLM(toy, threads=1) as llm:
        one = llm.generate({"prompt_token_ids": [3, 4]}, GREEDY)
        many = llm.generate([{"prompt_token_ids": [3, 4]}, [5, 6]], [GREEDY, SamplingParams(temperature=0)])
        assert one[0].outputs[0].token_ids == many[0].outputs[0].token_ids == toy_answer([3, 4], 9)
        assert many[1].outputs[0].token_ids == toy_answer([5, 6], 16)
        assert llm.generate([], GREEDY) == []
        assert len(llm.generate([7, 8])[0].outputs[0].token_ids) == 3  # generation_config.json says so
        assert llm.get_default_sampling_params().temperature == 0.5
        logged = llm.generate([1], SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1))[0]
        sequence = logged.outputs[0]
        assert sequence.logprobs is not None and sequence.cumulative_logprob is not None
        total = sum(d[t].logprob for d, t in zip(sequence.logprobs, sequence.token_ids, strict=True))
        assert sequence.cumulative_logprob == pytest.approx(total) and logged.prompt_logprobs == [None]
        bad: list[Any] = ["text", {}, {"prompt": 3}, {"prompt_token_ids": "ab"}, [1, 999], [[1], [1.5]], [[]], {"x": 1}]
        for prompt in bad:
            with pytest.raises(XllmError) as caught:
                llm.generate(prompt, GREEDY)
            assert caught.value.kind == "request", prompt
        with pytest.raises(XllmError):
            llm.generate([[1], [2]], [GREEDY])
        with pytest.raises(XllmError):
            llm.chat([{"role": "user", "content": "x"}])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def names_of(toy: Path) -> list[str]:
    return sorted(str(path.relative_to(toy)) for path in toy.rglob("*") if path.is_file())


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_any_damage_to_any_file_is_found_before_a_token_is_told(toy: Path, tmp_path: Path, how: str) -> None:
    for i, name in enumerate(names_of(toy)):
        broken = Path(shutil.copytree(toy, tmp_path / str(i)))
        path = broken / name
        if how == "flip":
            flip(path)
        elif how == "truncate":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.unlink()
        with pytest.raises(XllmError) as caught:
            llm = LLM(broken, threads=1)
            try:
                llm.generate([1, 2], GREEDY)
            finally:
                llm.close()
        # Without a manifest it is no artifact at all.
        gone = how == "remove" and name == "manifest.json"
        assert caught.value.kind == ("option" if gone else "artifact"), name


def test_foreign_artifacts(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xllm_compiler.runtime.cpu import target

    with pytest.raises(XllmError) as caught:
        load_artifact(copy, level="sse9")
    assert caught.value.kind == "option"

    def choose_none(isas: Any) -> str:
        raise XllmError("artifact", "the artifact has code for none of this CPU's levels")

    with monkeypatch.context() as patch:
        patch.setattr(target, "machine_isas", tuple)
        patch.setattr(target, "choose_isa", choose_none)
        with pytest.raises(XllmError) as caught:
            load_artifact(copy)
        assert caught.value.kind == "artifact"
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(XllmError, match="format") as caught:
        load_artifact(copy)
    assert caught.value.kind == "artifact"


def test_a_library_without_the_functions_is_refused(toy: Path) -> None:
    loaded = load_artifact(toy)
    from ctypes.util import find_library

    from xllm_compiler.runtime.cpu.team import load_library

    libc = find_library("c")
    assert libc is not None
    with pytest.raises(XllmError, match="xllm_team") as caught:
        Team(ctypes.CDLL(libc), 1)
    assert caught.value.kind == "artifact"
    with pytest.raises(XllmError) as caught:
        load_library(toy / "weights.bin")
    assert caught.value.kind == "artifact"
    with pytest.raises(XllmError) as caught:
        Team(loaded.code.shared_library, 0)
    assert caught.value.kind == "option"


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": WIDTH * PAGE + 1},
        {"max_num_seqs": 4},
        {"max_num_batched_tokens": 13},
        {"max_num_batched_tokens": 2, "max_num_seqs": 3},
        {"threads": 0},
        {"threads": 10**6},
        {"max_num_seqs": True},
        {"memory_utilization": 0.0},
        {"memory_utilization": float("nan")},
        {"kv_cache_memory_bytes": -1},
        {"max_queued": 0},
        {"level": "avx1024"},
    ],
    ids=str,
)
def test_options_beyond_the_artifact_are_refused(toy: Path, options: dict[str, Any]) -> None:
    with pytest.raises(XllmError) as caught:
        prepare_engine(toy, EngineOptions(**options), Phases())
    assert caught.value.kind == "option"


def test_limits_can_be_lowered(toy: Path) -> None:
    with LLM(toy, threads=1, max_model_len=10, max_num_seqs=1, max_num_batched_tokens=2) as llm:
        assert llm.generate([1] * 9, SamplingParams(temperature=0))[0].outputs[0].token_ids == toy_answer([1] * 9, 1)
        with pytest.raises(XllmError) as caught:
            llm.generate([1] * 10, GREEDY)
        assert caught.value.kind == "request" and "10" in caught.value.message
    # A KV cache of two pages: requests are held to what it can take.
    with LLM(toy, threads=1, kv_cache_memory_bytes=2 * 16 + 15) as llm:
        assert llm.engine.max_tokens == 8 and llm.engine.stats().kv_pages_total == 2
        assert len(llm.generate([1, 2], SamplingParams(max_tokens=None))[0].outputs[0].token_ids) == 6
    with pytest.raises(XllmError) as caught:
        LLM(toy, kv_cache_memory_bytes=15)
    assert caught.value.kind == "capacity"


def test_the_phases_of_a_start_add_up(toy: Path) -> None:
    phases = Phases.since_process_start()
    phases.mark("imports")
    started = prepare_engine(toy, EngineOptions(threads=1), phases)
    assert sum(seconds for _, seconds in phases.rows) == pytest.approx(phases.total)
    assert all(seconds >= 0 for _, seconds in phases.rows) and "total" in phases.table()
    assert started.memory_plan.total == sum(size for _, size in started.memory_plan.entries())
    assert started.sampling_defaults == {"temperature": 0.5, "max_tokens": 3}
    started.engine.stop()


def test_generation_defaults() -> None:
    assert sampling_defaults({"top_k": 20, "top_p": 0.8, "temperature": None, "eos_token_id": 3}) == {
        "top_k": 20,
        "top_p": 0.8,
    }
    assert sampling_defaults({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}) == {
        "temperature": 0.0,
        "repetition_penalty": 1.1,
    }


def test_resolving_what_is_no_artifact(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve.resolve_artifact(toy) == toy
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(XllmError) as caught:
            resolve.resolve_artifact(path)
        assert caught.value.kind == "option"
    (tmp_path / "config.json").write_text(json.dumps({}))
    told: list[str] = []
    monkeypatch.setattr(resolve, "_COMPILE", ("-c", f"print('progress'); print({str(toy)!r})"))
    assert resolve.resolve_artifact(tmp_path, tell=told.append) == toy and len(told) == 1
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve.resolve_artifact(tmp_path / "m.gguf", tell=told.append) == toy and len(told) == 2
    for silent in (
        "raise SystemExit(2)",
        "print('not json'); raise SystemExit(1)",
        "print('[1]'); raise SystemExit(1)",
    ):
        monkeypatch.setattr(resolve, "_COMPILE", ("-c", silent))
        with pytest.raises(XllmError, match="gave no reason") as caught:
            resolve.resolve_artifact(tmp_path)
        assert caught.value.kind == "internal"


@pytest.mark.parametrize(
    ("config", "options", "kind"),
    [
        ("[]", (), "checkpoint"),
        ('{"model_type": "llama"}', (), "checkpoint"),
        ('{"model_type": "llama"}', ("--cache-dir", "/proc/none"), "io"),
        ('{"model_type": "llama"}', ("--target", "abacus"), "option"),
    ],
)
def test_the_compilers_own_error_comes_through(
    config: str, options: tuple[str, ...], kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not its traceback, and no advice to install what is there."""
    (tmp_path / "config.json").write_text(config)
    if kind != "checkpoint":
        safetensors.numpy.save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(XllmError) as caught:
        resolve.resolve_artifact(tmp_path, compile_options=options)
    assert caught.value.kind == kind and "pip install" not in str(caught.value)
    assert "error[" not in capfd.readouterr().err, "said once"


def test_inputs_start_out_mapped_nowhere(toy: Path) -> None:
    executor = executor_of(toy)
    batch = executor.new_batch()
    table = batch["table"]
    assert table.shape == (3, WIDTH) and (table == -1).all() and batch["ids"].dtype == np.int32
    executor.close()
