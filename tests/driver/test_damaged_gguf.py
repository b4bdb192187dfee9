"""Random damage to GGUF files: each would compile or is refused by a typed error that blames it, and none is stuck."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.driver.test_damaged_checkpoints import is_refused, until_tracing
from tests.frontend.gguf.raw import FLOAT, LIST, TEXT, TRUTH, WHOLE, Line, Raw, text
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.gguf.file import GgufFile
from xllm_compiler.frontend.gguf.tokenizer import resolve_gguf_tokenizer

HEAD_SECONDS = 1
PER_KIND = 100

LAYER = {"attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), "attn_output": (32, 32)}
MLP = {"ffn_gate": (32, 64), "ffn_up": (32, 64), "ffn_down": (64, 32)}
LETTERS = [chr(c) for c in range(33, 127)]
TOKENS = ["<unk>", "<s>", "</s>", *LETTERS, "\u0120", "ab", "abc", "\u0120a", "\u0120ab"]


def lines() -> list[Line]:
    found = [
        Line("token_embd.weight", (32, len(TOKENS)), 1, 64 * len(TOKENS)),
        Line("output_norm.weight", (32,), 0, 128),
    ]
    for name, (in_, out) in {**LAYER, **MLP}.items():
        found.append(Line(f"blk.0.{name}.weight", (in_, out), 8, in_ * out // 32 * 34))
    return [*found, *(Line(f"blk.0.{name}_norm.weight", (32,), 0, 128) for name in ("attn", "ffn"))]


SOUND = Raw(
    [
        ("general.architecture", TEXT, "llama"),
        ("llama.block_count", WHOLE, 1),
        ("llama.context_length", WHOLE, 64),
        ("llama.embedding_length", WHOLE, 32),
        ("llama.feed_forward_length", WHOLE, 64),
        ("llama.attention.head_count", WHOLE, 2),
        ("llama.attention.head_count_kv", WHOLE, 1),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT, 1e-5),
        ("llama.rope.freq_base", FLOAT, 1e4),
        ("tokenizer.ggml.model", TEXT, "gpt2"),
        ("tokenizer.ggml.pre", TEXT, "gpt-2"),
        ("tokenizer.ggml.tokens", LIST, (TEXT, TOKENS)),
        ("tokenizer.ggml.token_type", LIST, (5, [3] * 3 + [1] * (len(TOKENS) - 3))),
        ("tokenizer.ggml.merges", LIST, (TEXT, ["a b", "ab c", "\u0120 a", "\u0120 ab"])),
        ("tokenizer.ggml.bos_token_id", WHOLE, 1),
        ("tokenizer.ggml.eos_token_id", WHOLE, 2),
        ("tokenizer.chat_template", TEXT, "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ],
    lines(),
)

NUMBERS = (0, 1, 2, 3, 5, 64, 10**3, 10**5, 10**7, 2**31, 2**32 - 1)
VALUES: tuple[tuple[int, Any], ...] = (
    *((WHOLE, n) for n in NUMBERS),
    *((FLOAT, x) for x in (0.0, 0.5, -1.0, 1e30, float("nan"), float("inf"))),
    *((TEXT, t) for t in ("", "a", "linear", "yarn", "{{", "\0", "{% for %}", "x" * 5000)),
    *((LIST, v) for v in ((WHOLE, []), (WHOLE, [1, 2]), (TEXT, ["a"]), (TEXT, [""] * 99), (FLOAT, [0.5] * 99))),
    *((TRUTH, True), (TRUTH, False), (-1, b"\xff" * 4), (-1, struct.pack("<IQ", TEXT, 2**40))),
)
MORE = (
    *(
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "attention.sliding_window",
        "vocab_size",
    ),
    *(
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "expert_count",
        "logit_scale",
    ),
)
OF_TOKENIZERS = ("add_bos_token", "scores", "unknown_token_id", "eot_token_id", "padding_token_id")


def head_bytes(r: random.Random) -> bytes:
    data = bytearray(SOUND.data())
    length = len(data) - sum(line.nbytes for line in SOUND.lines)
    for _ in range(r.randrange(1, 4)):
        data[r.randrange(length)] = r.randrange(256)
    return bytes(data)


def cut(r: random.Random) -> bytes:
    data = SOUND.data()
    return data[: r.randrange(len(data))] if r.random() < 0.7 else data + bytes(r.randrange(1, 200))


def value(r: random.Random) -> bytes:
    """One or two keys with another value, without one, or more of them."""
    keys = list(SOUND.keys)
    for _ in range(r.choice((1, 1, 2))):
        names = [name for name, _, _ in keys] + [f"llama.{name}" for name in MORE]
        name = r.choice(names)
        keys = [k for k in keys if k[0] != name]
        if r.random() < 0.9:
            keys.append((name, *r.choice(VALUES)))
    return SOUND.but(keys=keys).data()


def table(r: random.Random) -> bytes:
    """One line of the tensor table."""
    found = lines()
    at = r.randrange(len(found))
    old = found[at]
    names = [
        *(line.name for line in found),
        "blk.9.attn_q.weight",
        "rope_freqs.weight",
        "x",
        "a" * 300,
        "output.weight",
    ]
    match r.randrange(4):
        case 0:
            found[at] = Line(r.choice(names), old.shape, old.kind, old.nbytes)
        case 1:
            shapes: tuple[tuple[int, ...], ...] = (
                (),
                (32,),
                (32, 1),
                (2**40, 1),
                (1, 2**40),
                (32, 2, 16),
                tuple(old.shape)[::-1],
            )
            found[at] = Line(old.name, r.choice(shapes), old.kind, old.nbytes)
        case 2:
            found[at] = Line(old.name, old.shape, r.choice((0, 1, 2, 3, 8, 12, 10, 99, 2**31)), old.nbytes)
        case 3:
            found[at] = Line(old.name, old.shape, old.kind, old.nbytes, r.choice((0, 32, 33, 2**20, 2**62)))
    return SOUND.but(lines=found).data()


def _read(path: Path) -> None:
    started = time.perf_counter()
    GgufFile.open(path)
    assert time.perf_counter() - started < HEAD_SECONDS
    until_tracing(path)


@pytest.mark.parametrize("kind", [head_bytes, cut, value, table], ids=lambda kind: kind.__name__)
def test_damage_is_told_or_bearable(kind: Callable[[random.Random], bytes], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND.data())
    until_tracing(path)
    refused = 0
    for seed in range(PER_KIND):
        path.write_bytes(kind(random.Random(f"{kind.__name__} {seed}")))
        refused += is_refused(f"{kind.__name__} {seed}", path, _read)
    assert refused >= PER_KIND // 4


def test_damage_to_a_tokenizer_is_told_or_bearable(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND.data())
    assert resolve_gguf_tokenizer(GgufFile.open(path)) is not None
    refused = 0
    for seed in range(40):
        r = random.Random(f"tokenizer {seed}")
        own = [name for name, _, _ in SOUND.keys if name.startswith("tokenizer")]
        name = r.choice((*own, *(f"tokenizer.ggml.{name}" for name in OF_TOKENIZERS)))
        keys = [k for k in SOUND.keys if k[0] != name]
        if name.endswith("tokens") and r.random() < 0.5:
            odd = list(TOKENS)
            odd[r.randrange(len(odd))] = r.choice(("", "a", " ", "\0", "\u2581", "x" * 3000, "é"))
            keys.append((name, LIST, (TEXT, odd)))
        elif r.random() < 0.9:
            keys.append((name, *r.choice([v for v in VALUES if v[0] >= 0])))
        path.write_bytes(SOUND.but(keys=keys).data())
        try:
            resolve_gguf_tokenizer(GgufFile.open(path))
        except XllmError as error:
            refused += 1
            assert error.kind in ("checkpoint", "unsupported"), f"{seed}: {error}"
        except Exception as error:
            raise AssertionError(f"{seed}: {type(error).__name__}: {error}") from error
    assert refused >= 10


def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND.data().replace(text("llama.block_count"), struct.pack("<Q", 17) + b"\xff" * 17))
    with pytest.raises(XllmError, match="not UTF-8"):
        GgufFile.open(path)
