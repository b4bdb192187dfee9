"""The heads of GGUF files: sound ones as llama.cpp's package reads them, others refused at once by one clear error."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.frontend.gguf.raw import FLOAT, LIST, TEXT, TRUTH, WHOLE, Line, Raw, text
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.gguf.file import GgufFile

KEYS: list[tuple[str, int, Any]] = [
    ("general.architecture", TEXT, "llama"),
    ("llama.block_count", WHOLE, 1),
    ("llama.context_length", WHOLE, 32),
    ("llama.embedding_length", WHOLE, 4),
    ("llama.feed_forward_length", WHOLE, 4),
    ("llama.attention.head_count", WHOLE, 1),
    ("llama.attention.layer_norm_rms_epsilon", FLOAT, 1e-5),
    ("tokenizer.ggml.tokens", LIST, (TEXT, ["a", "é", ""])),
    ("tokenizer.ggml.scores", LIST, (FLOAT, [0.0, -1.5])),
    ("tokenizer.ggml.add_bos_token", TRUTH, True),
]
SOUND = Raw(KEYS, [Line("token_embd.weight"), Line("output_norm.weight", (4,), 0, 16), Line("output.weight")])


def key(name: str, kind: int, value: Any) -> Raw:
    """The sound file with one more key, or another value of one."""
    return SOUND.but(keys=[k for k in KEYS if k[0] != name] + [(name, kind, value)])


def line(**changes: Any) -> Raw:
    """The sound file with another second tensor."""
    return SOUND.but(lines=[SOUND.lines[0], Line(**{"name": "output_norm.weight", **changes}), SOUND.lines[2]])


def test_a_sound_head_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND.data())
    found, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    assert found.metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert [(t.name, t.shape[::-1], t.start) for t in found.tensors.values()] == [
        (t.name, tuple(t.shape), t.data_offset) for t in theirs.tensors
    ]
    opened = Checkpoint.open(path)
    assert opened.config["vocab_size"] == 4 and opened.tensors["model.norm.weight"].shape == (4,)
    np.testing.assert_array_equal(opened.read("lm_head.weight"), np.zeros((4, 4)))


REFUSED: dict[str, tuple[Raw | bytes, str, str]] = {
    "nothing": (b"", "checkpoint", "no GGUF file"),
    "another file": (b"PK\3\4" + bytes(64), "checkpoint", "begins with b'PK"),
    "magic alone": (b"GGUF", "checkpoint", "truncated"),
    "big-endian": (SOUND.but(version=struct.pack(">I", 3)), "unsupported", "big-endian"),
    "newer": (SOUND.but(version=struct.pack("<I", 4)), "unsupported", "version 4, newer than"),
    "older": (SOUND.but(version=struct.pack("<I", 1)), "unsupported", "version 1, older than"),
    "many tensors": (SOUND.but(counts=(2**60, None)), "checkpoint", "truncated: a table of"),
    "many keys": (SOUND.but(counts=(None, 2**60)), "checkpoint", "truncated: a table of"),
    "one key too many": (SOUND.but(counts=(None, len(KEYS) + 1)), "checkpoint", ""),
    "a long name": (SOUND.but(keys=[("k" * 300, WHOLE, 1), *KEYS]), "checkpoint", "a key is called"),
    "no name": (SOUND.but(keys=[("", WHOLE, 1), *KEYS]), "checkpoint", "a key is called ''"),
    "a key twice": (SOUND.but(keys=[*KEYS, KEYS[0]]), "checkpoint", "'general.architecture' stands there twice"),
    "no such kind": (key("x", -1, struct.pack("<I", 13)), "checkpoint", "kind 13"),
    "a text beyond the end": (key("x", -1, struct.pack("<IQ", TEXT, 2**62)), "checkpoint", "truncated"),
    "a list beyond the end": (key("x", -1, struct.pack("<IIQ", LIST, WHOLE, 2**62)), "checkpoint", "truncated"),
    "a list of texts beyond": (key("x", -1, struct.pack("<IIQ", LIST, TEXT, 2**40)), "checkpoint", "truncated"),
    "a list of lists": (key("x", -1, struct.pack("<IIQ", LIST, LIST, 1)), "checkpoint", "kind 9"),
    "no text": (key("x", -1, struct.pack("<I", TEXT) + text(b"\xff\xfe")), "checkpoint", "not UTF-8"),
    "neither true nor false": (key("x", -1, struct.pack("<IB", TRUTH, 2)), "checkpoint", "neither true nor false"),
    "alignment": (key("general.alignment", WHOLE, 24), "checkpoint", "general.alignment is 24"),
    "no alignment": (key("general.alignment", WHOLE, 0), "checkpoint", "general.alignment is 0"),
    "split": (key("split.count", WHOLE, 3), "unsupported", "one part of a split GGUF file"),
    "unknown architecture": (key("general.architecture", TEXT, "mamba"), "unsupported", "architecture 'mamba'"),
    "no architecture": (SOUND.but(keys=KEYS[1:]), "checkpoint", "names no architecture"),
    "an adapter": (key("general.type", TEXT, "adapter"), "unsupported", "type 'adapter'"),
    "no such type": (line(kind=99), "unsupported", "type number 99"),
    "a type not read": (line(kind=10), "unsupported", "of type Q2_K"),
    "no axes": (line(shape=()), "checkpoint", "0 axes"),
    "many axes": (line(shape=(1,) * 5), "checkpoint", "5 axes"),
    "a side of 0": (line(shape=(4, 0)), "checkpoint", "has shape [0, 4]"),
    "too large": (line(shape=(2**40, 2**40)), "checkpoint", "has shape"),
    "leaves the file": (line(shape=(4096,)), "checkpoint", "truncated: tensor 'output_norm.weight'"),
    "offset beyond the end": (line(offset=2**63), "checkpoint", "truncated"),
    "not aligned": (line(offset=68), "checkpoint", "no multiple of 32"),
    "overlap": (line(offset=32), "checkpoint", "overlaps"),
    "a gap": (line(offset=128).but(after=bytes(128)), "checkpoint", "unused before"),
    "a tensor twice": (line(name="token_embd.weight"), "checkpoint", "'token_embd.weight' stands there twice"),
    "part of a block": (line(kind=8, shape=(16, 2)), "checkpoint", "blocks of 32"),
    "a norm in blocks": (line(kind=8, shape=(32,), nbytes=34), "unsupported", "only weights of linear layers"),
    "of no model": (line(name="blk.0.ssm_a.weight"), "unsupported", "no part of a model of the class LlamaFor"),
    "experts": (line(name="blk.0.ffn_up_exps.weight"), "unsupported", "mixture of experts"),
    "no embedding": (line(name="token_embd").but(lines=SOUND.lines[1:]), "checkpoint", "token_embd.weight"),
    "heads": (key("llama.attention.head_count", WHOLE, 2**31), "checkpoint", "more than any model has"),
    "layers": (key("llama.block_count", WHOLE, 1000), "checkpoint", "3 tensors in all"),
    "a text for a number": (key("llama.block_count", TEXT, "1"), "checkpoint", "llama.block_count is 1"),
    "a truth for a number": (key("llama.block_count", TRUTH, True), "checkpoint", "llama.block_count is True"),
    "no number": (key("llama.attention.layer_norm_rms_epsilon", FLOAT, float("nan")), "checkpoint", "is nan"),
    "another model": (key("llama.rope.scaling.type", TEXT, "ntk"), "unsupported", "scaling 'ntk'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_heads_are_refused(name: str, tmp_path: Path) -> None:
    made, kind, message = REFUSED[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(made if isinstance(made, bytes) else made.data())
    started = time.perf_counter()
    with pytest.raises(XllmError) as e:
        Checkpoint.open(path)
    assert time.perf_counter() - started < 1
    assert e.value.kind == kind and message in e.value.message and str(path) in e.value.where


def test_the_head_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    path, data = tmp_path / "m.gguf", SOUND.data()
    for length in range(0, len(data) - 16, 3):
        path.write_bytes(data[:length])
        with pytest.raises(XllmError) as e:
            Checkpoint.open(path)
        assert e.value.kind == "checkpoint" and ("truncated" in e.value.message or length < 4), length


def test_a_part_is_known_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(SOUND.data())
    with pytest.raises(XllmError, match="one part of a split") as e:
        Checkpoint.open(path)
    assert "llama-gguf-split --merge" in e.value.help


def test_a_large_file_of_holes_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(key("x", -1, struct.pack("<IIQ", LIST, TEXT, 2**30)).data())
    os.truncate(path, 1 << 40)
    with pytest.raises(XllmError, match="mostly holes"):
        Checkpoint.open(path)


def test_a_list_has_a_limit(tmp_path: Path) -> None:
    """Of empty texts, 8 bytes each, which would become millions of objects."""
    path = tmp_path / "m.gguf"
    path.write_bytes(key("x", -1, struct.pack("<IIQ", LIST, TEXT, 1 << 23)).data() + bytes(1 << 26))
    with pytest.raises(XllmError, match="lists together"):
        Checkpoint.open(path)


def test_bytes_behind_the_last_tensor_are_told_of(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(SOUND.but(after=bytes(64)).data())
    assert Checkpoint.open(path).notes == ("m.gguf has 64 bytes after its last tensor",)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("m.gguf", _fifo, "a named pipe"),
        ("m.gguf", lambda path: path.symlink_to("/dev/zero"), "a device"),
        ("m.gguf", lambda path: path.symlink_to("nothing"), "a link to a file that is not there"),
        ("m.bin", lambda path: path.write_bytes(b"x" * 99), "no GGUF file"),
        ("m.gguf", lambda path: None, "no such checkpoint"),
    ],
)
def test_what_is_no_file(name: str, make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(XllmError, match=message) as e:
        Checkpoint.open(tmp_path / name)
    assert e.value.kind == "checkpoint"


def test_a_directory_with_a_gguf_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(SOUND.data())
    with pytest.raises(XllmError) as e:
        Checkpoint.open(tmp_path)
    assert f"compile the file itself: {tmp_path / 'm.gguf'}" in e.value.help
