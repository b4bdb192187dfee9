"""Strings and bytes of tokens in log-probabilities, against the rule that defines them: strings join to the text that
the tokenizer decodes, bytes join to that text's UTF-8."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from xllm_compiler.runtime.outputs import Logprob, LogprobDict
from xllm_compiler.runtime.text import TextStream
from xllm_compiler.runtime.token_text import TokenNames, append_rest, drop_first_space, first_entry, name_prompt
from xllm_compiler.runtime.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat",
    "true and true or not true",
    "naïve café 😀 日本語 한국어",
    "def f(x): return x  # ok",
] * 4


def byte_level() -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens([" added", "plain"])
    return Tokenizer(core, {}, None)


def metaspace() -> Tokenizer:
    """Llama's kind: a metaspace, bytes for characters that are no token, the first space of a text stripped."""
    words = ["▁", "▁true", "true", "▁the", "▁cat", "cat", "s", "▁é", "é", "é▁"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocab |= {word: 259 + i for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(core, {}, None)


def word_pieces() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "##ing", "play", "é", "##é", "."]
    core = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece(cleanup=False)
    core.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return Tokenizer(core, {}, None)


def suffixed() -> Tokenizer:
    """GPT-1's kind: a token says that a word ends."""
    words = ["<unk>", "the</w>", "cat", "s</w>", "c", "a</w>"]
    core = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    core.decoder = decoders.BPEDecoder("</w>")
    return Tokenizer(core, {}, None)


KINDS = {"byte-level": byte_level(), "metaspace": metaspace(), "wordpiece": word_pieces(), "suffix": suffixed()}


def named(
    tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), others: Sequence[int] = (), skip: bool = True
) -> tuple[list[LogprobDict], str]:
    """The rows of an answer and its text."""
    stream = TextStream(tokenizer, prompt, skip_special_tokens=skip)
    names = TokenNames(tokenizer)
    rows, text = [], ""
    for token in ids:
        text += stream.push(token)
        row = {t: Logprob(-1.0) for t in (token, *others)}
        names.name(row, token, stream.added)
        rows.append(row)
    text += stream.finish()
    if rows and stream.added:
        append_rest(rows[-1][ids[-1]], stream.added)
    return rows, text


def chosen(rows: list[LogprobDict]) -> list[Logprob]:
    return [next(iter(row.values())) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_strings_join_to_the_text_and_bytes_to_its_utf8(kind: str, skip: bool) -> None:
    tokenizer = KINDS[kind]

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12),
        st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4),
    )
    def check(ids: list[int], prompt: list[int]) -> None:
        rows, text = named(tokenizer, ids, prompt, skip=skip)
        entries = chosen(rows)
        assert "".join(e.decoded_token or "" for e in entries if e.shown) == text
        if "\ufffd" not in text and "\ufffd" not in tokenizer.decode(prompt, skip):
            assert b"".join(e.token_bytes or b"" for e in entries) == text.encode()

    check()


@pytest.mark.parametrize("following", [[], ["true"], ["▁true"], ["▁", "▁"]])
def test_a_space_that_the_start_of_a_text_loses_has_no_bytes(following: list[str]) -> None:
    tokenizer = KINDS["metaspace"]
    ids = [tokenizer.token_id(name) or 0 for name in ("▁", *following)]
    rows, text = named(tokenizer, ids)
    assert b"".join(e.token_bytes or b"" for e in chosen(rows)) == text.encode()
    assert "".join(e.decoded_token or "" for e in chosen(rows)) == text


@pytest.mark.parametrize("text", ["the cat", " true true", "naïve 😀", "日本語 text", "a\u0301 é", "\n\n x", "\x00"])
def test_bytes_of_a_real_text_are_its_own(text: str) -> None:
    tokenizer = KINDS["byte-level"]
    ids = tokenizer.encode(text)
    letters = _letters()
    assert [tokenizer.token_bytes(i) for i in ids] == [
        bytes(letters[letter] for letter in tokenizer.id_to_token(i) or "") for i in ids
    ]
    rows, shown = named(tokenizer, ids)
    assert shown == text and b"".join(e.token_bytes or b"" for e in chosen(rows)) == text.encode()


def _letters() -> dict[str, int]:
    """Found by encoding each byte's character, not by a table."""
    found = {}
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for point in (*range(0x800), *range(0x800, 0x10000, 0x800), *range(0x10000, 0x110000, 0x10000)):
        if not 0xD800 <= point < 0xE000:
            ((letters, _),) = level.pre_tokenize_str(chr(point))
            found.update(zip(letters, chr(point).encode(), strict=True))
    return found


def test_a_space_before_a_word_is_part_of_its_name() -> None:
    tokenizer = KINDS["metaspace"]
    spaced, bare = (tokenizer.token_id(name) for name in ("▁true", "true"))
    cat = tokenizer.token_id("▁cat")
    assert spaced is not None and bare is not None and cat is not None
    rows, text = named(tokenizer, [cat], prompt=[spaced], others=[spaced, bare])
    assert text == " cat"
    assert [(e.decoded_token, e.token_bytes) for e in rows[0].values()] == [
        (" cat", b" cat"),
        (" true", b" true"),
        ("true", b"true"),
    ]


def test_the_first_space_of_a_text_is_dropped_in_its_name_too() -> None:
    tokenizer = KINDS["metaspace"]
    spaced = tokenizer.token_id("▁true")
    assert spaced is not None
    rows, text = named(tokenizer, [spaced, spaced], prompt=[1], others=[])
    assert text == "true true" and [e.decoded_token for e in chosen(rows)] == ["true", " true"]
    assert [e.token_bytes for e in chosen(rows)] == [b"true", b" true"]


def test_half_a_character_adds_nothing_and_keeps_its_bytes() -> None:
    tokenizer = KINDS["metaspace"]
    ids = [3 + byte for byte in "😀".encode()]
    rows, text = named(tokenizer, ids, others=[3 + 0x80])
    assert text == "😀" and [e.decoded_token for e in chosen(rows)] == ["", "", "", "😀"]
    assert [e.token_bytes for e in chosen(rows)] == [bytes([byte]) for byte in "😀".encode()]
    last = rows[3][3 + 0x80]
    alone = "😀".encode()
    if alone[3] != 0x80:  # the alternative completes another character
        assert last.decoded_token == (alone[:3] + b"\x80").decode()


def test_pieces_of_words() -> None:
    tokenizer = KINDS["wordpiece"]
    ids = [tokenizer.token_id(name) or 0 for name in ("play", "##ing", "the", "cat", "##s")]
    rows, text = named(tokenizer, ids, others=[ids[1], ids[2]])
    assert text == "playing the cats"
    assert [e.decoded_token for e in chosen(rows)] == ["play", "ing", " the", " cat", "s"]
    assert {rows[3][t].decoded_token for t in (ids[1], ids[2])} == {"ing", " the"}


def test_special_tokens_have_a_name_and_are_no_part_of_the_text_unless_shown() -> None:
    tokenizer = KINDS["byte-level"]
    a = tokenizer.token_id("a")
    assert a is not None
    hidden, text = named(tokenizer, [a, 0, a])
    assert text == "aa" and [(e.decoded_token, e.shown, e.token_bytes) for e in chosen(hidden)] == [
        ("a", True, b"a"),
        ("<s>", False, b""),
        ("a", True, b"a"),
    ]
    shown, text = named(tokenizer, [a, 0, a], skip=False)
    assert text == "a<s>a" and [e.token_bytes for e in chosen(shown)] == [b"a", b"<s>", b"a"]


def test_a_prompt_is_named_as_it_reads() -> None:
    tokenizer = KINDS["metaspace"]
    true, cat = (tokenizer.token_id(name) or 0 for name in ("▁true", "▁cat"))
    ids = [1, true, cat, *(3 + byte for byte in "日".encode())]
    rows: list[LogprobDict | None] = [None, *({t: Logprob(-1.0)} for t in ids[1:])]
    name_prompt(tokenizer, ids, rows, True)
    assert [row[t].decoded_token for t, row in zip(ids, rows, strict=True) if row is not None] == [
        " true",
        " cat",
        "",
        "",
        "日",
    ]
    first = first_entry(tokenizer, 1, False, True)
    assert (first.decoded_token, first.shown) == ("<s>", False)
    assert first_entry(tokenizer, 1, False, False).shown
    assert tokenizer.decode_within(ids) == " true cat日"
    drop_first_space(first, ids, rows, "true cat日")
    assert (rows[1] or {})[true].decoded_token == "true", "the text that was sent has no space there"


def test_tokens_that_differ_by_a_space_have_two_names_wherever_they_stand() -> None:
    tokenizer = KINDS["metaspace"]
    spaced, bare = (tokenizer.token_id(name) or 0 for name in ("▁true", "true"))
    rows: list[LogprobDict | None] = [None, {spaced: Logprob(-1.0), bare: Logprob(-2.0)}]
    name_prompt(tokenizer, [1, spaced], rows, True)
    assert [entry.decoded_token for entry in (rows[1] or {}).values()] == [" true", "true"]
    assert [first_entry(tokenizer, token, True, True).decoded_token for token in (spaced, bare)] == [" true", "true"]


@pytest.mark.parametrize("text", ["Hello THERE", "É x", "a b"])
def test_spans_point_into_a_text_that_is_normalized(text: str) -> None:
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(core, {}, None)
    ids, spans = tokenizer.encode(text), tokenizer.spans(text, True)
    assert len(spans) == len(ids) and spans[0] == 0 and spans == sorted(spans)
    for token, at in list(zip(ids, spans, strict=True))[1:]:
        assert tokenizer.token_bytes(token).decode()[0] in text[at : at + 1].lower() + "e" * (text[at] == "É")
