"""The loss of quantization: figures against formulas, variants against modules that the passes made, the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from xllm_compiler.analysis.weights import param_names
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.trace import Traced, trace_checkpoint
from xllm_compiler.interp import run
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.semantics import state_zeros
from xllm_compiler.ir.types import Kv
from xllm_compiler.models.corpus import python_version, source_files
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.passes.pipelines import BEFORE
from xllm_compiler.passes.quantize.forms import NARROW, WIDE, parse_form
from xllm_compiler.quant_eval import mixed_precision
from xllm_compiler.quant_eval.compare import compare, compare_on
from xllm_compiler.quant_eval.measure import Reference
from xllm_compiler.quant_eval.replay import replay
from xllm_compiler.quant_eval.text import HELD_OUT, Window, pieces, take, windows

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"


def traced(checkpoint: Path) -> Traced:
    got = trace_checkpoint(
        Checkpoint.open(checkpoint),
        dtype="f32",
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_num_logits=64,
    )
    run_pipeline(",".join(BEFORE), got.module, PassContext())
    return got


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    settings = {**TINY, "tie_word_embeddings": request.param}
    return traced(write_random_checkpoint("llama", tmp_path_factory.mktemp("m") / "m", settings=settings, seed=1))


IDS = [np.arange(3, 20, dtype=np.int32), np.array([7, 7, 1], np.int32)]


def test_figures_against_torch() -> None:
    draw = np.random.default_rng(0)
    p, q = draw.normal(size=(2, 40, 100)).astype(np.float32) * 3
    q = (p + 0.3 * q).astype(np.float32)
    logs = [torch.log_softmax(torch.from_numpy(x).double(), 1) for x in (p, q)]
    want = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean").item()
    got = compare(p, q)
    assert got.kl == pytest.approx(want, rel=1e-9) and got.positions == 40
    assert got.top1 == (p.argmax(1) == q.argmax(1)).mean() < 1
    following = np.concatenate([draw.integers(0, 100, 39), [-1]])
    text = compare_on(p, q, following)
    want = [
        torch.nn.functional.cross_entropy(torch.from_numpy(x[:-1]).double(), torch.from_numpy(following[:-1]))
        for x in (p, q)
    ]
    assert text.loss == got
    assert [text.reference_perplexity, text.perplexity] == pytest.approx([each.exp().item() for each in want], rel=1e-6)
    assert compare(p, p).kl == 0 and compare(p, np.full_like(p, np.nan)).kl == np.inf


@pytest.mark.parametrize("form", ["w8a8", "w8a16", "w4a16-g64-asym", "int4"])
def test_a_variant_is_what_the_passes_make(model: Traced, form: str) -> None:
    """All requests in one step of the interpreter, over the module that quantize-weights and quantize-rows changed."""
    kind = parse_form(form)
    start = clone_module(model.module)
    run_pipeline(",".join(kind.preparation), start, PassContext())
    bench = Reference(start, model.weights, [Window("text", ids) for ids in IDS], "")
    for chosen in (bench.weights, bench.weights[3:4], bench.weights[-1:]):
        plain, got = replay(start, model.weights, IDS, [dict.fromkeys(chosen, kind)])
        module = clone_module(start)
        only = ":".join(param_names(w)[0] for w in chosen)
        passes = [p.replace("{", f"{{only={only},") for p in kind.passes()]
        run_pipeline(",".join(passes), module, PassContext())
        want = whole(module, model)
        off = np.abs(got - want) / np.abs(want).max()  # large only where an activation's rounding fell the other way
        assert np.median(off) < 1e-6 and off.max() < 2e-2
        assert np.median(np.abs(plain - want)) > 1e-5 * np.abs(want).max()
    assert np.allclose(plain, whole(model.module, model), atol=1e-5)


def whole(module: object, model: Traced) -> np.ndarray:
    """Each request in a step of its own."""
    out = []
    func = module.func("step")  # type: ignore[attr-defined]
    for ids in IDS:
        n = len(ids)
        table = np.full((1, func.arg("table").shape[1].value), -1, np.int32)
        table[0, :2] = [1, 0]
        inputs = {
            **{"ids": ids, "pos": np.arange(n, dtype=np.int32), "seq": np.zeros(n, np.int32), "table": table},
            **{"start": np.array([0, n], np.int32), "sel": np.arange(n, dtype=np.int32)},
            **{a.name: state_zeros(a.type, {"P": 2}) for a in func.args if isinstance(a.type, Kv)},
        }
        out.append(run(module, "step", inputs, model.weights)[0])  # type: ignore[arg-type]
    return np.concatenate(out)


def test_mixed_takes_the_best_first_and_keeps_the_limit(model: Traced) -> None:
    bench = Reference(model.module, model.weights, [Window("text", ids) for ids in IDS], "")
    narrow = bench.losses(IDS, [dict.fromkeys(bench.weights, NARROW)])[0].kl
    wide = bench.losses(IDS, [dict.fromkeys(bench.weights, WIDE)])[0].kl
    assert wide < narrow / 10
    assert set(mixed_precision.choose(bench, narrow * 2)[0].values()) == {NARROW}
    assert set(mixed_precision.choose(bench, wide / 2)[0].values()) == {WIDE}
    forms, alone = mixed_precision.choose(bench, narrow / 2)
    assert set(forms.values()) == {WIDE, NARROW}
    assert bench.losses(IDS, [forms])[0].kl < narrow / 2
    gains = {
        form: [loss.kl / w.tensor.nbytes.value for w, loss in alone.items() if forms[w] == form]
        for form in (WIDE, NARROW)
    }
    assert min(gains[WIDE]) >= max(gains[NARROW])
    assert mixed_precision.choose(bench, narrow / 2)[0] == forms


def test_windows() -> None:
    found, text = windows(BUNDLED / "tokenizer.json", 4096, 2048)
    kinds = {file.stem for file in HELD_OUT.glob("*.txt")}
    assert text == "held-out text" and {len(each.ids) for each in found} == {128} and len(found) == len(pieces())
    assert len(kinds) == 10 and [{each.kind for each in found[i : i + 10]} for i in (0, 10)] == [kinds, kinds]
    cut = take(found, 200)
    assert [len(each.ids) for each in cut] == [128, 72] and np.array_equal(cut[1].ids, found[1].ids[:72])
    assert [len(each.ids) for each in take(found, 256)] == [128, 128]
    for broken, vocab in ((None, 50), (BUNDLED / "tokenizer.json", 20)):
        found, text = windows(broken, vocab, 30)
        assert text.startswith("random ids") and all(len(each.ids) == 30 and each.ids.max() < vocab for each in found)
        assert np.array_equal(found[3].ids, windows(broken, vocab, 30)[0][3].ids)


@pytest.mark.skipif(python_version() != "3.11.7", reason="the text is of the Python that the model was trained with")
def test_the_text_was_held_out() -> None:
    files = source_files()
    for piece in (text for kind, text in pieces() if kind == "code"):
        assert sum(piece in file.text for file in files if file.held_out) == 1
        assert not any(piece in file.text for file in files if not file.held_out)
