"""Flags, their environment twins, and what is refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.server.keys import load_keys, read_keys
from xllm_compiler.runtime.server.main import main
from xllm_compiler.runtime.server.settings import OPTIONS, Settings, parse_bytes, parse_settings

GIVEN = {
    "--host": ("0.0.0.0", "0.0.0.0"),
    "--port": ("0", 0),
    "--api-key": ("k", ("k",)),
    "--api-key-file": ("k.txt", "k.txt"),
    "--allowed-hosts": ("*.example.com", ("*.example.com",)),
    "--allowed-origins": ("https://a.example", ("https://a.example",)),
    "--allowed-methods": ("GET", ("GET",)),
    "--allowed-headers": ("x-a", ("x-a",)),
    "--allow-credentials": ("1", True),
    "--ssl-certfile": ("c.pem", "c.pem"),
    "--ssl-keyfile": ("k.pem", "k.pem"),
    "--served-model-name": ("m", ("m",)),
    "--max-model-len": ("99", 99),
    "--max-num-seqs": ("7", 7),
    "--max-num-batched-tokens": ("77", 77),
    "--kv-cache-memory-bytes": ("2GiB", 2 * 2**30),
    "--threads": ("3", 3),
    "--cache-dir": ("d", "d"),
    "--chat-template": ("t", "t"),
    "--generation-config": ("vllm", "vllm"),
    "--max-body-size": ("1MiB", 2**20),
    "--max-body-memory": ("64MiB", 64 * 2**20),
    "--timeout-keep-alive": ("9", 9),
    "--timeout-receive": ("8", 8),
    "--timeout-graceful-shutdown": ("0", 0),
    "--max-waiting-requests": ("0", 0),
    "--disable-access-log": ("1", True),
    "--startup-report": ("r.json", "r.json"),
    "--profile-steps": ("5", 5),
    "--profile-trace": ("t.json", "t.json"),
    "--log-level": ("debug", "debug"),
}
PAIRED = {"--ssl-certfile": "--ssl-keyfile", "--ssl-keyfile": "--ssl-certfile"}


def test_this_table_and_the_settings_know_every_option() -> None:
    assert [option.flag for option in OPTIONS] == list(GIVEN)
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert {option.dest for option in OPTIONS} == fields - {"model"}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_every_flag_has_a_twin_and_wins_over_it(option: Any) -> None:
    text, value = GIVEN[option.flag]
    rest = [PAIRED[option.flag], "x"] if option.flag in PAIRED else []
    flags = [option.flag] if option.switch else [option.flag, text]
    by_flag = parse_settings(["m", *flags, *rest], {})
    by_env = parse_settings(["m", *rest], {option.env: text})
    assert getattr(by_flag, option.dest) == getattr(by_env, option.dest) == value != getattr(Settings("m"), option.dest)
    assert parse_settings(["m", *flags, *rest], {option.env: "0" if option.switch else "?"}) == by_flag


def test_lists() -> None:
    assert parse_settings(["m", "--api-key", "a", "--api-key", "b"], {}).api_keys == ("a", "b")
    assert parse_settings(["m"], {"XLLM_API_KEY": "a,b"}).api_keys == ("a", "b")
    for given in (["a", "b"], ["a,b"], ["a, b"], ['["a", "b"]']):  # the last is how vLLM takes it
        flags = [word for text in given for word in ("--allowed-hosts", text)]
        assert parse_settings(["m", *flags], {}).allowed_hosts == ("a", "b")
        assert len(given) > 1 or parse_settings(["m"], {"XLLM_ALLOWED_HOSTS": given[0]}).allowed_hosts == ("a", "b")
    assert parse_settings(["m"], {}).allowed_origins is None
    assert parse_settings(["m", "--allowed-origins", "[]"], {}).allowed_origins == ()


def test_keys_are_not_shown() -> None:
    assert "hush" not in repr(parse_settings(["m", "--api-key", "hush"], {}))


@pytest.mark.parametrize(
    ("argv", "environ", "word"),
    [
        ([], {}, "ARTIFACT_OR_CHECKPOINT"),
        (["m", "--port", "70000"], {}, "--port"),
        (["m", "--port", "x"], {}, "--port"),
        (["m"], {"XLLM_PORT": "x"}, "XLLM_PORT"),
        (["m", "--max-num-seqs", "0"], {}, "--max-num-seqs"),
        (["m", "--kv-cache-memory-bytes", "lots"], {}, "--kv-cache-memory-bytes"),
        (["m", "--kv-cache-memory-bytes", "-1"], {}, "--kv-cache-memory-bytes"),
        (["m", "--log-level", "loud"], {}, "--log-level"),
        (["m", "--ssl-certfile", "x"], {}, "--ssl-keyfile"),
        (["m", "--api-key", ""], {}, "--api-key"),
        (["m", "--api-key", "a b"], {}, "API key"),
        (["m"], {"XLLM_API_KEY": ""}, "XLLM_API_KEY"),
        (["m"], {"XLLM_API_KEY": ","}, "XLLM_API_KEY"),
        (["m"], {"XLLM_API_KEY": " "}, "XLLM_API_KEY"),
        (["m"], {"XLLM_API_KEY": "a,"}, "XLLM_API_KEY"),
        (["m"], {"XLLM_API_KEY": "a\n"}, "XLLM_API_KEY"),
        (["m", "--api-key", "\t"], {}, "--api-key"),
        (["m"], {"XLLM_API_KEY_FILE": ""}, "XLLM_API_KEY_FILE"),
        (["m"], {"XLLM_SSL_KEYFILE": ""}, "XLLM_SSL_KEYFILE"),
        (["m"], {"XLLM_SERVED_MODEL_NAME": ""}, "XLLM_SERVED_MODEL_NAME"),
        (["m"], {"XLLM_API_KEYS": "a"}, "XLLM_API_KEYS"),  # a misspelt lock is an open door
        (["m"], {"XLLM_APIKEY": "a"}, "XLLM_APIKEY"),
        (["m", "--allowed-hosts", "http://a"], {}, "--allowed-hosts"),
        (["m", "--allowed-hosts", "a:80"], {}, "--allowed-hosts"),
        (["m", "--allowed-hosts", "a.*"], {}, "--allowed-hosts"),
        (["m"], {"XLLM_ALLOWED_HOSTS": ""}, "XLLM_ALLOWED_HOSTS"),
        (["m", "--allowed-origins", "example.com"], {}, "--allowed-origins"),
        (["m", "--allowed-origins", "https://example.com/"], {}, "--allowed-origins"),
        (["m", "--allowed-origins", '["a"'], {}, "--allowed-origins"),
        (["m", "--allowed-origins", "[1]"], {}, "--allowed-origins"),
        (["m", "--allowed-methods", "GET POST"], {}, "--allowed-methods"),
        (["m", "--max-body-memory", "1MiB"], {}, "--max-body-memory"),
        (["m", "--nope"], {}, "--nope"),
        (["m", "--por", "1"], {}, "--por"),  # no abbreviations
    ],
)
def test_what_is_refused_is_named(argv: list[str], environ: dict[str, str], word: str) -> None:
    with pytest.raises(XllmError) as caught:
        parse_settings(argv, environ)
    assert caught.value.kind == "option" and word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("10B", 10),
        ("2k", 2000),
        ("2KiB", 2048),
        ("1.5GiB", 3 * 2**29),
        (" 3 mib ", 3 * 2**20),
        ("1T", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1X", "1e9", "nan", "0x10", "1 2"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


def test_main_ends_with_2_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "error[option]" in capsys.readouterr().err
    assert main([str(tmp_path), "--host", "999.1.1.1", "--port", "0"]) == 2
    assert "error[io]" in capsys.readouterr().err


def test_keys_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"one\r\n\n  two\n")
    file.chmod(0o600)
    settings = parse_settings(["m", "--api-key", "zero", "--api-key-file", str(file)], {})
    assert load_keys(settings) == ("zero", "one", "two")
    assert load_keys(parse_settings(["m"], {"XLLM_API_KEY_FILE": str(file)})) == ("one", "two")
    assert not caplog.records
    file.chmod(0o644)
    load_keys(settings)
    assert "read by every user" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\n \n", b"a b\n", b"\xef\xbb\xbfkey\n", b"hush\n\x00\n", b"k" * 2**21])
def test_a_file_without_good_keys_does_not_open_the_door(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(XllmError) as caught:
        read_keys(str(file))
    assert caught.value.kind == "option" and caught.value.where == "--api-key-file"
    assert "hush" not in str(caught.value)


def test_a_key_file_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(XllmError, match="cannot take keys"):
            read_keys(str(path))


def test_a_server_with_an_empty_key_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", ",", " ", "a,,b"):
        monkeypatch.setenv("XLLM_API_KEY", value)
        assert main([str(tmp_path), "--port", "0"]) == 2
    monkeypatch.delenv("XLLM_API_KEY")
    (tmp_path / "keys").touch()
    assert main([str(tmp_path), "--port", "0", "--api-key-file", str(tmp_path / "keys")]) == 2
