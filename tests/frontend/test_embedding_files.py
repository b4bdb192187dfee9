"""What the files of sentence-transformers ask for, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.embedding import default_functions, embedding_files, pooling_of
from xllm_compiler.frontend.trace import trace_checkpoint
from xllm_compiler.models.embedding_checkpoint import write_embedding_checkpoint, write_pooling
from xllm_compiler.models.random_checkpoint import TINY, random_config, write_random_checkpoint
from xllm_compiler.options import CompileOptions, resolve
from xllm_compiler.step.interface import Pooling


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    return write_random_checkpoint("llama", path, settings=TINY, tokenizer=False)


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    for file in written.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def set_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_chat_model_is_one(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    assert default_functions(checkpoint) == ("step",) and embedding_files(path) == ["modules.json"]
    pooling, notes = pooling_of(checkpoint)
    assert pooling == Pooling("last", True, None) and "says nothing of pooling" in notes[0]


@pytest.mark.parametrize(("mode", "kind"), [("lasttoken", "last"), ("mean_tokens", "mean"), ("cls_token", "cls")])
@pytest.mark.parametrize("normalize", [True, False])
def test_modes(path: Path, mode: str, kind: str, normalize: bool) -> None:
    write_pooling(path, mode, normalize=normalize)
    assert pooling_of(Checkpoint.open(path)) == (Pooling(kind, normalize, None), [])
    assert "1_Pooling/config.json" in embedding_files(path)


def test_the_spelling_of_newer_versions(path: Path) -> None:
    write_pooling(path, "mean_tokens")
    (path / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 64, "pooling_mode": "lasttoken"}')
    listed = json.loads((path / "modules.json").read_text())
    listed[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    (path / "modules.json").write_text(json.dumps(listed))
    assert pooling_of(Checkpoint.open(path))[0].kind == "last"


@pytest.mark.parametrize(
    ("fields", "functions"),
    [
        ({}, ("step", "embed")),  # its head is stored
        ({"architectures": ["LlamaModel"]}, ("embed",)),
    ],
)
def test_an_embedding_model_has_step_where_it_has_a_head(
    path: Path, fields: dict[str, object], functions: tuple[str, ...]
) -> None:
    write_pooling(path, "lasttoken")
    set_config(path, **fields)
    checkpoint = Checkpoint.open(path)
    assert default_functions(checkpoint) == functions == resolve(CompileOptions(), checkpoint).functions
    assert resolve(CompileOptions(functions=("embed",)), checkpoint).functions == ("embed",)


def test_sizes_and_prompts(path: Path) -> None:
    write_pooling(path, "lasttoken")
    (path / "config_sentence_transformers.json").write_text('{"prompts": {"query": "Instruct: ", "document": ""}}')
    set_config(path, matryoshka_dimensions=[32, 16])
    pooling, notes = pooling_of(Checkpoint.open(path))
    assert pooling.dimensions == (16, 32)
    assert len(notes) == 1 and "(query)" in notes[0]
    set_config(path, matryoshka_dimensions=None, is_matryoshka=True)
    assert pooling_of(Checkpoint.open(path))[0].dimensions == ()
    set_config(path, matryoshka_dimensions=[0])
    with pytest.raises(XllmError, match="not a list of sizes"):
        pooling_of(Checkpoint.open(path))


@pytest.mark.parametrize(
    ("modes", "said"),
    [(("max_tokens",), "max_tokens"), (("cls_token", "mean_tokens"), "cls_token and mean_tokens"), ((), "nothing")],
)
def test_other_pooling_is_refused(path: Path, modes: tuple[str, ...], said: str) -> None:
    write_pooling(path, *modes)
    with pytest.raises(XllmError, match=f"pools by {said}") as found:
        pooling_of(Checkpoint.open(path))
    assert found.value.kind == "unsupported" and found.value.where.endswith("1_Pooling/config.json")


def test_other_modules_are_refused(path: Path) -> None:
    write_pooling(path, "lasttoken")
    listed = json.loads((path / "modules.json").read_text())
    listed.insert(2, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(XllmError, match="lists Transformer, Pooling, Dense, Normalize"):
        pooling_of(Checkpoint.open(path))
    listed[1]["path"] = "../elsewhere"
    (path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(XllmError, match="no folder of the checkpoint"):
        embedding_files(path)
    (path / "modules.json").write_text("{}")
    with pytest.raises(XllmError, match="not a list of modules"):
        pooling_of(Checkpoint.open(path))


def test_texts_in_lower_case_are_refused(path: Path) -> None:
    write_pooling(path, "lasttoken")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 512, "do_lower_case": true}')
    with pytest.raises(XllmError, match="lower case"):
        pooling_of(Checkpoint.open(path))


LIMITS = {"dtype": "f32", "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_num_logits": 8}


@pytest.mark.parametrize(
    ("family", "settings"),
    [("bert", {"num_key_value_heads": None}), ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 16})],
)
def test_attention_that_looks_ahead_is_refused(family: str, settings: dict[str, object]) -> None:
    config = random_config(family, {**TINY, **settings})
    with pytest.raises(XllmError) as found:
        trace_checkpoint(config, functions=("embed",), **LIMITS)
    assert found.value.kind == "unsupported"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "phi3", "opt"])
def test_families_give_hidden_states_from_one_trace(family: str) -> None:
    settings = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 384}}.get(family, TINY)
    traced = trace_checkpoint(random_config(family, settings), functions=("step", "embed"), **LIMITS)
    step, embed = traced.module.func("step"), traced.module.func("embed")
    assert [a.name for a in step.args] == [a.name for a in embed.args]
    assert str(embed.returns[0].type) == "f32[S, 64]" and embed.outputs == {0: "hidden"}


def test_what_a_form_loses_is_measured_on_logits(path: Path) -> None:
    with pytest.raises(XllmError, match="--quantize measures"):
        resolve(CompileOptions(functions=("embed",), quantize="int8"), Checkpoint.open(path))
    with pytest.raises(XllmError, match="--functions 'draft' is not known"):
        resolve(CompileOptions(functions=("draft",)), Checkpoint.open(path))


@pytest.mark.parametrize(("tied", "functions"), [(True, ("step", "embed")), (False, ("embed",))])
def test_a_published_form_of_qwen3(tmp_path: Path, tied: bool, functions: tuple[str, ...]) -> None:
    """A causal LM's class over the base model's tensors, which have no prefix; the head is the table, or nowhere."""
    settings = {**TINY, "head_dim": 16, "tie_word_embeddings": tied}
    path = write_embedding_checkpoint("qwen3", tmp_path / "qwen3", "lasttoken", settings=settings)
    set_config(path, architectures=["Qwen3ForCausalLM"])
    checkpoint = Checkpoint.open(path)
    assert "layers.0.self_attn.q_proj.weight" in checkpoint.tensors
    assert default_functions(checkpoint) == functions
    traced = trace_checkpoint(checkpoint, functions=functions, **LIMITS)
    assert {name for name in traced.weights if not name.startswith("traced.")} == set(checkpoint.tensors)
    assert list(traced.module.funcs) == list(functions)
    assert traced.info.vocab_size == 384 and traced.info.pooling == Pooling("last", True, None)
