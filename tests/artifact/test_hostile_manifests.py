"""Manifests that somebody damaged, or edited and sealed again: a typed error each, from every reader, never a hang."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_artifact import build_toy_artifact

from xllm_compiler.artifact import Contents, FileEntry, Manifest, digest_file, read_calls, read_manifest, unlisted
from xllm_compiler.artifact.decode import decode, encode
from xllm_compiler.artifact.schema import FORMAT, canonical_json
from xllm_compiler.artifact.strict_json import MAX_DEPTH, parse_json
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.llm import LLM
from xllm_compiler.runtime.loader import load_artifact
from xllm_compiler.tools.compile import main


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_artifact(tmp_path_factory.mktemp("toy") / "artifact")


@pytest.fixture
def toy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "toy"))


def refused(path: Path, capsys: pytest.CaptureFixture[str], *, show_reads: bool = True) -> XllmError:
    """The error of the loader; that `LLM`, `show` and `diff` have the same is checked."""
    began = time.monotonic()
    with pytest.raises(XllmError) as caught:
        load_artifact(path)
    assert caught.value.kind == "artifact", caught.value
    with pytest.raises(XllmError) as again:
        LLM(path, threads=1)
    assert again.value.kind == "artifact"
    if show_reads:
        for argv in (["show", str(path)], ["diff", str(path), str(path)], ["verify", str(path)]):
            assert main(argv) == 2
            assert capsys.readouterr().err.startswith("error[artifact]"), argv
    assert len(str(caught.value)) < 4000 and time.monotonic() - began < 10
    return caught.value


DEEP = 100_000


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def text_edit(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit


RAW: dict[str, Callable[[str], str]] = {
    "half a surrogate pair": text_edit('"name": "toy"', '"name": "\\ud800"'),
    "the other half": text_edit('"architecture": "Toy"', '"architecture": "a\\udfffb"'),
    "a surrogate in a key": text_edit('"key": {}', '"key": {"\\udc00": 1}'),
    "NaN": text_edit('"key": {}', '"key": {"x": NaN}'),
    "infinity": text_edit('"key": {}', '"key": {"x": -Infinity}'),
    "a number beyond numbers": text_edit('"key": {}', '"key": {"x": 1e999}'),
    "nested 600 deep": text_edit('"key": {}', '"key": {"x": ' + nested(600) + "}"),
    "nested 100,000 deep": text_edit('"key": {}', '"key": {"x": ' + nested(DEEP) + "}"),
    "objects 100,000 deep": text_edit('"key": {}', '"key": ' + '{"x":' * DEEP + "1" + "}" * DEEP),
    "only brackets": lambda text: "[" * DEEP,
    "5,000 digits": text_edit('"layers": 1', '"layers": ' + "9" * 5000),
    "5,000 digits in the key": text_edit('"key": {}', '"key": {"x": ' + "9" * 5000 + "}"),
    "a format of 5,000 digits": text_edit(f'"format": {FORMAT}', '"format": ' + "9" * 5000),
    "a long format": text_edit(f'"format": {FORMAT}', '"format": "' + "9" * 50000 + '"'),
    "a nested format": text_edit(f'"format": {FORMAT}', '"format": ' + nested(500)),
    "a key twice": text_edit('"key": {}', '"key": {"x": 1, "x": 1}'),
    "a field twice": text_edit(f'"format": {FORMAT}', f'"format": {FORMAT},\n "format": {FORMAT}'),
    "a byte order mark": lambda text: "\ufeff" + text,
    "nothing": lambda text: "",
    "a NUL": lambda text: "\0" + text,
    "another value": lambda text: "[]",
    "null": lambda text: "null",
}


@pytest.mark.parametrize("name", RAW)
def test_raw_text(name: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = toy / "manifest.json"
    path.write_text(RAW[name](path.read_text()), encoding="utf-8", errors="surrogatepass")
    refused(toy, capsys)


@pytest.mark.parametrize("data", [b"\xff\xfe{\0}\0", b"\xff" * 100, b'{"format": "\xed\xa0\x80"}', os.urandom(1000)])
def test_bytes_that_are_no_text(data: bytes, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (toy / "manifest.json").write_bytes(data)
    refused(toy, capsys)


def seal(path: Path, edit: Callable[[Any], None]) -> None:
    """Edit the manifest's values and make the id right, as somebody with a script would."""
    file = path / "manifest.json"
    value = json.loads(file.read_text())
    edit(value)
    unsealed = decode(Manifest, value)
    value["id"] = unsealed.computed_id()
    file.write_text(canonical_json(value), encoding="utf-8")


def put(*path: Any) -> Callable[[Any], None]:
    *names, last, new = path

    def edit(value: Any) -> None:
        for name in names:
            value = value[name]
        value[last] = new

    return edit


FUNCTION = ("functions", "step")
PROGRAM, LAST = ((*FUNCTION, "programs", i) for i in (0, 1))
STATE = ("states", "kv0")
TENSOR = ("weights", "tensors", 0)
SEALED: dict[str, Callable[[Any], None]] = {
    "arena of one byte": put(*LAST, "arena", "1"),
    "arena of another formula": put(*LAST, "arena", "4*N + 60"),
    "negative arena of a variant": put(*PROGRAM, "arena", "-N"),
    "negative arena": put(*LAST, "arena", "-N"),
    "arena of unknown symbols": put(*LAST, "arena", "4*Q"),
    "arena that divides by nothing": put(*LAST, "arena", "N // (B - 1)"),
    "huge arena": put(*LAST, "arena", "9999999999999999*N*N*N"),
    "parentheses": put(*LAST, "arena", "(" * 8000),
    "powers": put(*LAST, "arena", "9**9**9"),
    "a product of sums": put(*LAST, "arena", "*".join(["(N + B + S + P + 1)"] * 700)),
    "a long product": put(*LAST, "arena", "*".join(["N"] * 4000)),
    "nested minima": put(*LAST, "arena", "min(N, " * 60 + "1" + ")" * 60),
    "many minima": put(*LAST, "arena", "min(" + ", ".join(f"{i}*N" for i in range(1800)) + ")"),
    "large numbers": put(*LAST, "arena", "*".join(["9" * 900] * 16)),
    "a formula of a megabyte": put(*LAST, "arena", "1+" * 500_000 + "1"),
    "logits of one number": put(*FUNCTION, "outputs", 0, "shape", ["S", "1"]),
    "logits of one row": put(*FUNCTION, "outputs", 0, "shape", ["1", "50"]),
    "logits per token": put(*FUNCTION, "outputs", 0, "shape", ["N", "50"]),
    "logits of another name": put(*FUNCTION, "outputs", 0, "name", "scores"),
    "maxima of no logits": lambda v: (
        v["functions"]["step"]["outputs"].append({"name": "block_max", "dtype": "f32", "shape": ["S"], "range": None})
    ),
    "page bytes": put(*STATE, "block_bytes", 15),
    "page bytes of another type": put(*STATE, "block_bytes", 32),
    "another type of the same bytes": put(*STATE, "dtype", "i32"),
    "heads": put(*STATE, "sizes", "heads", 2),
    "negative heads": put(*STATE, "sizes", "heads", -1),
    "no heads": put(*STATE, "sizes", {"k": 1, "v": 1, "page": 4}),
    "a size too many": put(*STATE, "sizes", "rows", 1),
    "page tokens": put(*STATE, "sizes", "page", 8),
    "a state of another kind": put(*STATE, "kind", "cell"),
    "a state of other blocks": put(*STATE, "blocks", "N"),
    "a layout that is no name": put(*STATE, "layout", "../x"),
    "no states": put("states", {}),
    "a state too many": lambda v: v["states"].update(kv1=v["states"]["kv0"]),
    "a state that is in no table": put(*FUNCTION, "states", ["kv0", "kv1"]),
    "a state twice": put(*FUNCTION, "states", ["kv0", "kv0"]),
    "no state": put(*FUNCTION, "states", []),
    "no functions": put("functions", {}),
    "another function": lambda v: v.update(functions={"chat": v["functions"]["step"]}),
    "a function too many": lambda v: v["functions"].update(embed=v["functions"]["step"]),
    "a function that is a path": lambda v: v["functions"].update({"../x": v["functions"]["step"]}),
    "model length": put("model", "max_model_len", 2**40),
    "vocabulary": put("model", "vocab_size", 100),
    "dtype": put("model", "dtype", "i8"),
    "negative token": put("model", "eos_token_ids", [-1]),
    "large token": put("model", "eos_token_ids", [2**40]),
    "a name that steers the terminal": put("model", "name", "\x1b[2J"),
    "a name with NUL": put("model", "architecture", "a\0b"),
    "limits above the code's": lambda v: (put("limits", "max_num_seqs", 9)(v), put("dims", "B", "hi", 9)(v)),
    "rows above the code's": lambda v: (put("limits", "max_num_logits", 60)(v), put("dims", "S", "hi", 60)(v)),
    "negative range": put("dims", "S", "lo", -1),
    "empty steps": put("dims", "N", "lo", 0),
    "pages": put("dims", "P", "hi", 2**40),
    "a symbol that is none": put("dims", "a b", {"lo": 1, "hi": 2, "why": ""}),
    "an input that is none": put(*FUNCTION, "inputs", 0, "name", "idz"),
    "an input of another shape": put(*FUNCTION, "inputs", 0, "shape", ["B"]),
    "an input of another type": put(*FUNCTION, "inputs", 0, "dtype", "f64"),
    "an input that nobody gives": lambda v: (
        v["functions"]["step"]["inputs"].append({"name": "pixels", "dtype": "bf16", "shape": ["N"], "range": None})
    ),
    "an input that changes along two axes": put(*FUNCTION, "inputs", 4, "shape", ["B", "N"]),
    "a table of another width": put(*FUNCTION, "inputs", 4, "shape", ["B", "9"]),
    "an empty range": put(*FUNCTION, "inputs", 0, "range", {"lo": 1, "hi": 0}),
    "a range that the text lacks": put(*FUNCTION, "inputs", 0, "range", {"lo": 0, "hi": 49}),
    "an output of another type": put(*FUNCTION, "outputs", 0, "dtype", "f64"),
    "a pooling of nothing": put("model", "pooling", {"kind": "last", "normalize": True, "dimensions": None}),
    "a weight beyond the file": put(*TENSOR, "offset", 4096),
    "a weight that is not aligned": lambda v: v["weights"]["tensors"][0].update(offset=4, shape=[4], bytes=16),
    "a weight before the file": put(*TENSOR, "offset", -64),
    "a weight of other bytes": put(*TENSOR, "bytes", 64),
    "a weight of negative size": put(*TENSOR, "shape", [-1024]),
    "a weight of another layout": put(*TENSOR, "layout", "panel"),
    "weights larger than the file": put("weights", "bytes", 8192),
    "a guard of unknown symbols": put(*PROGRAM, "guard", ["Q"]),
    "a guard that is none": put(*PROGRAM, "guard", ["8 -"]),
    "a guard that divides by zero": put(*PROGRAM, "guard", ["N % (B - 1)"]),
    "a function of the system": put(*PROGRAM, "symbol", "abort"),
    "a function of the team": put(*PROGRAM, "symbol", "xllm_team_run"),
    "a function that is not there": put(*PROGRAM, "symbol", "xllm_fn_nothing"),
    "no programs": put(*FUNCTION, "programs", []),
    "an instruction set that is a path": put("target", "levels", ["../x"]),
    "code that is not listed": put("target", "files", ["cpu/sse1.so"]),
    "another kind": put("target", "kind", "abacus"),
    "a file above": put("files", "../x", {"bytes": 0, "xxh3_128": "0" * 32}),
    "a file with NUL": put("files", "a\0b", {"bytes": 0, "xxh3_128": "0" * 32}),
    "a file of a long name": put("files", "a" * 300, {"bytes": 0, "xxh3_128": "0" * 32}),
    "a file of a long path": put("files", "/".join(["a" * 200] * 50), {"bytes": 0, "xxh3_128": "0" * 32}),
    "a file of negative size": put("files", "calls.json", "bytes", -1),
    "a file of huge size": put("files", "calls.json", "bytes", 2**62),
    "a file that is absent": put("files", "gone", {"bytes": 0, "xxh3_128": "0" * 32}),
}  # fmt: skip


@pytest.mark.parametrize("name", SEALED)
def test_sealed_contradictions(name: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seal(toy, SEALED[name])
    shown = name not in ("a file that is absent", "a function that is not there", "another kind") and read_fails(toy)
    refused(toy, capsys, show_reads=shown)


def read_fails(path: Path) -> bool:
    """Whether the manifest alone is enough to see it: then every tool refuses it."""
    try:
        read_manifest(path)
    except XllmError:
        return True
    return False


def test_most_contradictions_are_seen_in_the_manifest_alone(sound: Path, tmp_path: Path) -> None:
    seen = 0
    for i, edit in enumerate(SEALED.values()):
        path = Path(shutil.copytree(sound, tmp_path / str(i)))
        seal(path, edit)
        seen += read_fails(path)
    assert seen >= len(SEALED) - 23, "the rest contradicts module.xir, files, or what a runtime gives"


def replace_file(path: Path, name: str, data: bytes) -> None:
    """Put other bytes in a file, or a new file, and seal it."""
    (path / name).write_bytes(data)

    def edit(value: Any) -> None:
        value["files"][name] = encode(FileEntry(len(data), digest_file(path / name)))

    seal(path, edit)


BAD_JSON = {
    "nested": b"[" * DEEP,
    "surrogate": b'{"top_p": "\\ud800"}',
    "nan": b'{"temperature": NaN}',
    "infinite": b'{"temperature": 1e999}',
    "digits": b'{"top_k": ' + b"9" * 5000 + b"}",
    "twice": b'{"top_k": 1, "top_k": 2}',
    "mark": b"\xef\xbb\xbf{}",
    "bytes": b"\xff\xff",
    "list": b"[]",
    "empty": b"",
}


@pytest.mark.parametrize("name", BAD_JSON)
@pytest.mark.parametrize("file", ["generation_config.json", "calls.json", "quantization.json"])
def test_other_json_of_an_artifact(file: str, name: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace_file(toy, file, BAD_JSON[name])
    if file == "generation_config.json":
        with pytest.raises(XllmError) as caught:
            LLM(toy, threads=1)
    elif file == "calls.json":
        with pytest.raises(XllmError) as caught:
            read_calls(toy, read_manifest(toy))
    else:
        assert main(["show", str(toy)]) == 2
        assert "error[artifact]" in capsys.readouterr().err
        return
    assert caught.value.kind == "artifact"


STEPS = {
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "no step": b"xir 1 stage=buf\n",
    "another step": b"xir 1 stage=buf\nfunc @step(\n) -> () {\n",
    "cut": b"xir 1 stage=buf\ndim N in [1, 12]\nfunc @step(\n    %ids: i32[N],\n",
    "long": b"xir 1 stage=buf\n" + b"(" * (8 << 20),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_are_not_those_of_the_manifest(name: str, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace_file(toy, "module.xir", STEPS[name])
    refused(toy, capsys, show_reads=False)


@pytest.mark.parametrize("file", ["manifest.json", "weights.bin", "module.xir", "calls.json", "cpu"])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "loop", "dangling", "secret"])
def test_what_is_no_file_is_not_waited_for(file: str, kind: str, toy: Path) -> None:
    path = next((toy / "cpu").iterdir()) if file == "cpu" else toy / file
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "dangling":
            path.symlink_to("nowhere")
        case _:
            path.symlink_to("/etc/passwd")
    began = time.monotonic()
    with pytest.raises(XllmError) as caught:
        LLM(toy, threads=1)
    assert caught.value.kind in ("artifact", "io") or (file == "manifest.json" and caught.value.kind == "option")
    assert time.monotonic() - began < 5


def test_links_to_sound_files_are_followed(toy: Path, tmp_path: Path) -> None:
    """As caches of downloads have them; what is read is compared with the digest like any file."""
    for name in ("weights.bin", "module.xir", "manifest.json"):
        os.rename(toy / name, tmp_path / name)
        (toy / name).symlink_to(tmp_path / name)
    os.link(toy / "calls.json", tmp_path / "calls.json")
    load_artifact(toy).wait_checked()


def test_what_is_not_listed_is_named_and_not_read(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    def unlist(value: Any) -> None:
        del value["files"]["generation_config.json"]

    seal(toy, unlist)
    for name in ("chat_template.jinja", "tokenizer.json", "cpu/extra.so", "tokenizer_config.json"):
        (toy / name).write_bytes(b"\xff not even text")
    os.mkfifo(toy / "pipe")
    with LLM(toy, threads=1) as llm:
        assert llm.get_default_sampling_params().top_p == 1.0 and llm.engine.tokenizer is None
    told = caplog.text
    for name in ("chat_template.jinja", "cpu/extra.so", "generation_config.json", "pipe"):
        assert name in told
    assert len(unlisted(toy, read_manifest(toy))) == 6
    for i in range(100):
        (toy / f"more{i}").touch()
    assert unlisted(toy, read_manifest(toy))[-1] == "98 more"


def test_contents_are_read_as_listed(toy: Path) -> None:
    files = Contents(toy, read_manifest(toy))
    assert (files / "calls.json").read_text() == "{}\n" and str(files / "x") == str(toy / "x")
    for name in ("manifest.json", "../toy/calls.json", "nothing", ""):
        with pytest.raises(FileNotFoundError):
            (files / name).read_bytes()
    (toy / "calls.json").write_text("{]\n")
    with pytest.raises(XllmError, match="damaged"):
        (files / "calls.json").read_bytes()


def test_strict_json_takes_what_is_json() -> None:
    value = {"a": [1, -2.5, None, True, "\U0001f600 \u0000"], "b": {}, "c": 10**300}
    assert parse_json(json.dumps(value).encode(), "x") == value
    assert parse_json(nested(MAX_DEPTH).encode(), "x")
    with pytest.raises(XllmError, match="deeper"):
        parse_json(nested(MAX_DEPTH + 2).encode(), "x")


def test_the_server_says_the_same(toy: Path) -> None:
    """In a process of its own: no traceback, exit code 2."""
    path = toy / "manifest.json"
    path.write_text(path.read_text().replace('"name": "toy"', '"name": "\\ud800"'))
    command = "from xllm_compiler.runtime.server.main import entry; entry()"
    done = subprocess.run([sys.executable, "-c", command, str(toy)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error[artifact]" in done.stderr and "Traceback" not in done.stderr
