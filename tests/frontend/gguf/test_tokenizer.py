"""The tokenizer of a GGUF file against the one that transformers makes of the same file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.gguf.config import generation_of
from xllm_compiler.frontend.gguf.file import GgufFile
from xllm_compiler.frontend.gguf.tokenizer import resolve_gguf_tokenizer
from xllm_compiler.frontend.tokenizer_check import TEXTS

BUNDLED = Path(__file__).resolve().parents[3] / "models" / "bundled" / "tokenizer.json"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
NORMAL, CONTROL, BYTE = 1, 3, 6


def byte_level() -> dict[str, Any]:
    """The bundled vocabulary."""
    read = json.loads(BUNDLED.read_text())
    vocab = {**read["model"]["vocab"], **{t["content"]: t["id"] for t in read["added_tokens"]}}
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {t["content"] for t in read["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in read["model"]["merges"]]
    kinds = [CONTROL if token in special else NORMAL for token in tokens]
    return {"model": "gpt2", "tokens": tokens, "merges": merges, "token_type": kinds}


def sentence_piece() -> dict[str, Any]:
    """A small vocabulary of SentencePiece's BPE: bytes, letters and some words made of two known parts."""
    letters = [chr(c) for c in range(33, 127)] + ["\u2581", "é", "中", "ж"]
    made = [
        "he",
        "ll",
        "ello",
        "\u2581a",
        "\u2581he",
        "lo",
        "wo",
        "rl",
        "\u2581\u2581",
        "an",
        "and",
        "\u2581and",
        "12",
        "  ",
    ]
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", *(f"<0x{n:02X}>" for n in range(256)), *made, *letters]
    kinds = [2, CONTROL, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(made) + len(letters))
    scores = [0.0] * 260 + [-float(n) for n in range(len(made) + len(letters))]
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds}


def write(path: Path, architecture: str, described: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_uint32(f"{architecture}.block_count", 1)
    for key, value in described.items():
        own = key.startswith("template")
        name = f"tokenizer.chat_{key}" if own else f"tokenizer.ggml.{key}"
        add = {list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2": ("qwen2", {**byte_level(), "pre": "qwen2", "eos_token_id": 0}, ""),
    "llama 3": ("llama", {**byte_level(), "pre": "llama-bpe", "bos_token_id": 0, "add_bos_token": True}, ""),
    "gpt-2": (
        "llama",
        {**byte_level(), "pre": "gpt-2", "bos_token_id": 1, "add_eos_token": True, "eos_token_id": 0},
        "",
    ),
    "unknown words": ("llama", {**byte_level(), "pre": "strange"}, "how 'strange' cuts a text into words is not known"),
    "unsaid words": ("llama", byte_level(), "the file does not say how"),
    "llama 2": ("llama", {**sentence_piece(), "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}, ""),
    "no bos": ("llama", {**sentence_piece(), "bos_token_id": 1, "add_bos_token": False, "unknown_token_id": 0}, ""),
    "gemma": ("gemma3", {**sentence_piece(), "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}, ""),
    "phi": ("phi3", {**sentence_piece(), "bos_token_id": 1, "add_bos_token": False, "unknown_token_id": 0}, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    architecture, described, note = CASES[name]
    path = write(tmp_path / "m.gguf", architecture, {**described, "template": TEMPLATE})
    found = resolve_gguf_tokenizer(GgufFile.open(path))
    assert found is not None and note in " ".join(found.notes) and bool(note) == bool(found.notes)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = Tokenizer.from_str(found.tokenizer)
    for text in (*TEXTS, "hello and hello  world 12", "12 123 a1b22", "<|im_end|>hello", " é中ж"):
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    settings = json.loads(found.config)
    assert settings["chat_template"] == TEMPLATE == theirs.chat_template
    for kind in ("bos", "eos", "unk"):
        number = described.get(f"{'unknown' if kind == 'unk' else kind}_token_id")
        assert settings.get(f"{kind}_token") == (None if number is None else described["tokens"][number])
    assert found.eos == described.get("eos_token_id")


def test_digits_stand_alone_where_the_vocabulary_was_learned_so(tmp_path: Path) -> None:
    """SmolLM and others: no file of theirs has a token of two digits; this one has."""
    cut = {}
    for words in ("gpt-2", "smollm"):
        path = write(tmp_path / "m.gguf", "llama", {**byte_level(), "pre": words})
        found = resolve_gguf_tokenizer(GgufFile.open(path))
        assert found is not None and not found.notes
        cut[words] = Tokenizer.from_str(found.tokenizer).encode("10 a12").tokens
    assert cut == {"gpt-2": ["10", "\u0120a", "12"], "smollm": ["1", "0", "\u0120a", "1", "2"]}


def test_chat_templates_may_have_names(tmp_path: Path) -> None:
    described = {**byte_level(), "pre": "gpt-2", "template": TEMPLATE, "template.tool_use": "{{ messages }}"}
    found = resolve_gguf_tokenizer(GgufFile.open(write(tmp_path / "m.gguf", "llama", described)))
    assert found is not None and json.loads(found.config)["chat_template"] == [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "{{ messages }}"},
    ]


def test_the_gguf_package_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, described, _ = CASES["gemma"]
    path = write(tmp_path / "m.gguf", architecture, described)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert resolve_gguf_tokenizer(GgufFile.open(path)) is not None


def test_a_file_without_a_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    assert resolve_gguf_tokenizer(GgufFile.open(write(tmp_path / "m.gguf", "llama", {}))) is None


def test_ends_of_text(tmp_path: Path) -> None:
    """All that the file names, and a control token that the template ends turns with."""
    tokens = ["a", "<|im_end|>", "b", "<|eot_id|>", "<|end|>"]
    keys = {"tokens": tokens, "token_type": [1, 3, 3, 3, 1], "bos_token_id": 2, "eos_token_id": 0, "eot_token_id": 2}
    path = write(tmp_path / "m.gguf", "llama", {**keys, "template": "<|end|>" + TEMPLATE})
    assert generation_of(GgufFile.open(path)) == {"bos_token_id": 2, "eos_token_id": [0, 2, 1]}
    assert generation_of(GgufFile.open(write(tmp_path / "n.gguf", "llama", {}))) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"tokens": []}, "no tokens"),
        ({"tokens": ["a", "b", "a"]}, "a token twice"),
        ({"token_type": [1, 1]}, "speaks of 2 tokens"),
        ({"merges": ["a b c"]}, "no pair"),
        ({"merges": ["qqqq zzzz"]}, "cannot make the tokenizer"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"add_bos_token": 1}, "add_bos_token is 1"),
        ({"template": "{% for %}"}, "chat template does not parse"),
    ],
    ids=str,
)
def test_a_tokenizer_that_makes_no_sense(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    described = {**byte_level(), "pre": "gpt-2", **changes}
    if described["tokens"] == []:
        del described["tokens"]
    path = write(tmp_path / "m.gguf", "llama", described)
    with pytest.raises(XllmError) as e:
        resolve_gguf_tokenizer(GgufFile.open(path))
    assert e.value.kind in ("checkpoint", "unsupported") and message in e.value.message
