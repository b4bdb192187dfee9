"""Streaming text: pieces join to the whole, no piece ends in half a character or in what may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.runtime.text import TextStream
from xllm_compiler.runtime.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """One token per byte, as a byte-level BPE without merges; id 256 is special."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    table = bytes_to_letters()
    core = tokenizers.Tokenizer(tokenizers.models.BPE({table[b]: b for b in range(256)}, []))
    assert set(table.values()) == set(letters)
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return Tokenizer(core, {}, None)


def bytes_to_letters() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in keep}
    for i, b in enumerate(b for b in range(256) if b not in keep):
        table[b] = chr(256 + i)
    return table


def byte_fallback() -> Tokenizer:
    """Llama's kind: words with a metaspace, other characters as byte tokens, the first space stripped."""
    words = ["▁Hello", "▁world", "lo", "▁", "!"]
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {w: 256 + i for i, w in enumerate(words)} | {"<unk>": 300}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    decoders = tokenizers.decoders
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(core, {}, None)


BYTES, LLAMA = byte_level(), byte_fallback()


def run(
    tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), **options: Any
) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, prompt, **options)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped_by is not None:
            return pieces, stream
    return [*pieces, stream.finish()], stream


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    pieces, _ = run(BYTES, list(data))
    assert "".join(pieces) == data.decode("utf-8", "replace")
    if "\ufffd" not in data.decode("utf-8", "replace"):
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_show_as_in_the_whole(data: bytes) -> None:
    pieces, _ = run(BYTES, list(data))
    assert "".join(pieces) == data.decode("utf-8", "replace")


def test_an_emoji_comes_at_once_when_its_last_byte_does() -> None:
    pieces, _ = run(BYTES, list("a🙂b".encode()))
    assert pieces == ["a", "", "", "", "🙂", "b", ""]


def test_byte_tokens_hold_back_every_byte_of_an_unfinished_character() -> None:
    """Such a decoder shows one U+FFFD for each byte, not one for all."""
    pieces, _ = run(LLAMA, list("é🙂".encode()))
    assert pieces == ["", "é", "", "", "", "🙂", ""]


def test_half_a_character_at_the_end_is_shown_when_nothing_can_follow() -> None:
    pieces, _ = run(BYTES, list("a🙂".encode())[:-1])
    assert "".join(pieces) == "a\ufffd" and pieces[-1] == "\ufffd"


def test_an_endless_run_of_broken_bytes_is_shown_in_the_end() -> None:
    pieces, _ = run(BYTES, [0x80] * 500)
    assert "".join(pieces) == "\ufffd" * 500
    assert len(pieces[-1]) < 100, "held back for ever"


def test_spaces_between_words_survive_a_decoder_that_strips_the_first() -> None:
    hello, world, bang = 256, 257, 260
    assert "".join(run(LLAMA, [world, hello, bang], prompt=[hello])[0]) == " world Hello!"
    assert "".join(run(LLAMA, [hello, world])[0]) == "Hello world"
    ids = [world, *"é".encode(), world]
    assert "".join(run(LLAMA, ids, prompt=[hello])[0]) == " worldé world"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*b"ab", 256, *b"c"]
    assert "".join(run(BYTES, ids)[0]) == "abc"
    assert "".join(run(BYTES, ids, skip_special_tokens=False)[0]) == "ab<end>c"


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    width=st.integers(1, 4),
)
def test_stop_strings_cut_at_their_first_occurrence(text: str, stops: list[str], include: bool, width: int) -> None:
    """Against the definition: the shortest prefix of tokens whose text holds a stop string ends the answer."""

    class Chunks:
        """Tokens of `width` characters."""

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return "".join(text[i * width : (i + 1) * width] for i in ids)

    count = -(-len(text) // width)
    expected, stopped = text, None
    for end in range(1, count + 1):
        seen = text[: end * width]
        hits = [(seen.find(stop), stop) for stop in stops if stop in seen]
        if hits:
            at, stopped = min(hits)
            expected = seen[: at + len(stopped)] if include else seen[:at]
            break
    stream = TextStream(Chunks(), [], stops=stops, include_stop=include)
    shown = ""
    for token in range(count):
        shown += stream.push(token)
        assert expected.startswith(shown), "something was shown that is not in the answer"
        if stream.stopped_by is not None:
            break
        held = text[len(shown) : (token + 1) * width]
        assert not held or any(stop.startswith(held) for stop in stops), "held back for no reason"
    shown += stream.finish()
    assert shown == expected and stream.stopped_by == stopped


def test_stop_strings_wait_for_the_minimum_length() -> None:
    stream = TextStream(BYTES, [], stops=["b"])
    assert stream.push(ord("a"), may_stop=False) == "a"
    assert stream.push(ord("b"), may_stop=False) == "b" and stream.stopped_by is None
    assert stream.push(ord("c")) == "c" and stream.stopped_by is None
    assert stream.push(ord("b")) == "" and stream.stopped_by == "b"


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_work_per_token_does_not_grow(size: int) -> None:
    """The window stays short however long the text gets."""
    longest = 0

    class Spy:
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return BYTES.decode(ids)

    stream = TextStream(Spy(), list(b"x" * size))
    for byte in ("plain, ünï¢ode 🙂 " * 20).encode():
        stream.push(byte)
    assert longest <= 12
