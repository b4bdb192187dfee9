"""The artifact's tokenizer against AutoTokenizer, for the many ways in which checkpoints store one."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.tokenizer import resolve_tokenizer, tokenizer_files
from xllm_compiler.runtime.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"
TEXTS = [
    "",
    " a  b ",
    "x\n\ny\t",
    "naïve e\u0301 日本語 👩‍👩‍👧 שלום",
    "<|im_start|>user\nhi<|im_end|><|endoftext|> [SEP] </s> <x> <y>",
    "0123 a\x00b " * 5,
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{{ sep_token }}"
)


def write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def bundled(root: Path, **settings: Any) -> Path:
    """A checkpoint's tokenizer files: a byte-level tokenizer.json, and `settings` on its tokenizer_config.json."""
    root.mkdir()
    shutil.copy(BUNDLED / "tokenizer.json", root)
    write(root / "config.json", {"model_type": "llama"})
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    write(root / "tokenizer_config.json", {**known, **settings})
    return root


def vocabulary(root: Path, **settings: Any) -> Path:
    """vocab.json and merges.txt instead of tokenizer.json."""
    bundled(root, **settings)
    model = json.loads((root / "tokenizer.json").read_text())["model"]
    (root / "tokenizer.json").unlink()
    write(root / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    write(root / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    return root


def gpt2(root: Path) -> None:
    vocabulary(root, tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")


def gpt2_by_defaults(root: Path) -> None:
    vocabulary(root)
    write(root / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATE})


def special_tokens_map(root: Path) -> None:
    vocabulary(root)
    write(root / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATE})
    write(root / "special_tokens_map.json", {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}})


def added_tokens_json(root: Path) -> None:
    vocabulary(root, tokenizer_class="GPT2Tokenizer", eos_token="<y>")
    write(root / "added_tokens.json", {"<x>": 4096, "<y>": 4097})


def added_tokens_decoder(root: Path) -> None:
    token = {"content": "<x>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
    bundled(root, added_tokens_decoder={"4096": {**token, "special": True}}, sep_token="<x>")


def more_special_tokens(root: Path) -> None:
    bundled(root, additional_special_tokens=["<x>", "<y>"], image_token="<img>")


def begins_and_ends(root: Path) -> None:
    vocabulary(root, tokenizer_class="Qwen2Tokenizer", bos_token="<|im_start|>", add_bos_token=True, add_eos_token=True)


def post_processor(root: Path) -> None:
    bundled(root, bos_token="<|im_start|>")
    value = json.loads((root / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    value["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens}
    write(root / "tokenizer.json", value)


def padded_and_truncated(root: Path) -> None:
    bundled(root)
    value = json.loads((root / "tokenizer.json").read_text())
    value["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    write(root / "tokenizer.json", value)


def split_special_tokens(root: Path) -> None:
    bundled(root, split_special_tokens=True)


def named_templates(root: Path) -> None:
    bundled(root)
    (root / "chat_template.jinja").write_text("D" + TEMPLATE)
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "tool_use.jinja").write_text("T" + TEMPLATE)


def unknown_class(root: Path) -> None:
    bundled(root, tokenizer_class="NobodysTokenizer")


def another_family(root: Path) -> None:
    bundled(root, tokenizer_class="CohereTokenizer")


def word_pieces(root: Path) -> None:
    root.mkdir()
    write(root / "config.json", {"model_type": "bert"})
    write(root / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "chat_template": TEMPLATE})
    write(root / "vocab.txt", "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "x", "##y", "hi", "0"]))


def tiktoken(root: Path) -> None:
    root.mkdir()
    write(root / "config.json", {"model_type": "llama"})
    write(root / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": TEMPLATE})
    tokens = [*(bytes([byte]) for byte in range(256)), b"na", b" a", b" b"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    write(root / "tokenizer.model", "\n".join(lines))


def tekken(root: Path) -> None:
    root.mkdir()
    write(root / "config.json", {"model_type": "mistral"})
    tokens = [*(bytes([byte]) for byte in range(256)), b"na", b" a", b" b"]
    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    settings = {"pattern": "\\s+|\\S+", "num_vocab_tokens": 1000, "default_vocab_size": 269, "version": "v3"}
    value = {
        "config": {**settings, "default_num_special_tokens": 10},
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(named)],
    }
    write(root / "tekken.json", value)


KINDS: list[Callable[[Path], None]] = [
    gpt2,
    gpt2_by_defaults,
    special_tokens_map,
    added_tokens_json,
    added_tokens_decoder,
    more_special_tokens,
    begins_and_ends,
    post_processor,
    padded_and_truncated,
    split_special_tokens,
    named_templates,
    unknown_class,
    another_family,
    word_pieces,
    tiktoken,
    tekken,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_does_what_transformers_does(kind: Callable[[Path], None], tmp_path: Path) -> None:
    root, out = tmp_path / "model", tmp_path / "out"
    kind(root)
    theirs = AutoTokenizer.from_pretrained(root)
    resolved = resolve_tokenizer(root)
    assert resolved is not None
    out.mkdir()
    write(out / "tokenizer.json", resolved.tokenizer)
    write(out / "tokenizer_config.json", resolved.config)
    ours = Tokenizer.load(out)
    for text in TEXTS:
        for special in (True, False):
            ids = list(theirs(text, add_special_tokens=special)["input_ids"])
            assert ours.encode(text, special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_tokens == theirs.special_tokens_map
    assert resolved.eos == theirs.eos_token_id
    if theirs.chat_template:
        chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
        for tools in (None, [{"type": "function"}]):
            wanted = theirs.apply_chat_template(chat, tools=tools, tokenize=False)
            got = ours.render_chat(
                chat, add_generation_prompt=False, continue_final_message=False, variables={"tools": tools}
            )
            assert got == wanted
    again = resolve_tokenizer(root)
    assert again == resolved, "the same bytes twice"


def broken_json(root: Path, name: str, text: str) -> None:
    bundled(root)
    write(root / name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("tokenizer_config.json", '{"chat_template": {"a": 1}}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("special_tokens_map.json", "[1]"),
        ("added_tokens.json", '{"x": "y"}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
        ("chat_template.jinja", "{% if %}"),
        ("chat_template.jinja", "{% if 1 %}" * 3000 + "{% endif %}" * 3000),
        ("chat_template.jinja", "{{ 'a' * 10**10 }}"),
        ("chat_template.jinja", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    ],
)
def test_damaged_files_are_typed_errors(tmp_path: Path, name: str, text: str) -> None:
    broken_json(tmp_path / "model", name, text)
    with pytest.raises(XllmError) as caught:
        resolve_tokenizer(tmp_path / "model")
    assert caught.value.kind == "checkpoint"


def test_a_template_in_another_encoding_is_a_typed_error(tmp_path: Path) -> None:
    root = bundled(tmp_path / "model")
    (root / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(XllmError, match=r"chat_template\.jinja is not UTF-8") as caught:
        resolve_tokenizer(root)
    assert caught.value.kind == "checkpoint"


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(\s+)+$", "(x+x+)+y", r"(\w+\s?)+$"])
def test_a_pattern_that_gives_up_is_refused(tmp_path: Path, pattern: str) -> None:
    root = bundled(tmp_path / "model")
    value = json.loads((root / "tokenizer.json").read_text())
    value["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    write(root / "tokenizer.json", value)
    with pytest.raises(XllmError, match="repeated to") as caught:
        resolve_tokenizer(root)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("model_type", ["custom", "qwen", "baichuan"])
def test_a_tokenizer_that_is_code_is_refused_and_not_run(tmp_path: Path, model_type: str) -> None:
    root = bundled(
        tmp_path / "model", tokenizer_class="Own", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]}
    )
    write(root / "config.json", {"model_type": model_type, "auto_map": {"AutoConfig": "tokenization_own.C"}})
    write(root / "tokenization_own.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(XllmError, match="never run") as caught:
        resolve_tokenizer(root)
    assert caught.value.kind == "unsupported" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_alone_is_read_or_the_error_says_what_to_do(tmp_path: Path, name: str) -> None:
    root = tmp_path / "model"
    root.mkdir()
    write(root / "config.json", {"model_type": "llama"})
    (root / name).write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02\xff")
    with pytest.raises(XllmError) as caught:
        resolve_tokenizer(root)
    assert caught.value.kind in ("unsupported", "checkpoint") and caught.value.help
    if importlib.util.find_spec("sentencepiece") is None:
        assert "sentencepiece" in caught.value.message and "pip install" in caught.value.help


def test_files_that_may_be_read_are_listed(tmp_path: Path) -> None:
    root = bundled(tmp_path / "model")
    assert tokenizer_files(root) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "tool_use.jinja").write_text("")
    (root / "notes.md").write_text("")
    assert tokenizer_files(root)[-1] == "additional_chat_templates/tool_use.jinja"
    assert "notes.md" not in tokenizer_files(root)


def test_what_is_odd_is_noted(tmp_path: Path) -> None:
    notes = {}
    for name, settings in (
        ("other class", {"tokenizer_class": "CohereTokenizer"}),
        ("silent template", {"chat_template": "hello"}),
        ("nothing", {}),
    ):
        resolved = resolve_tokenizer(bundled(tmp_path / name, **settings))
        assert resolved is not None
        notes[name] = " ".join(resolved.notes)
    assert "CohereTokenizer" in notes["other class"]
    assert "does not print what a user writes" in notes["silent template"]
    assert not notes["nothing"]


def test_no_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"model_type": "llama"})
    write(tmp_path / "tokenizer_config.json", {})
    assert resolve_tokenizer(tmp_path) is None
