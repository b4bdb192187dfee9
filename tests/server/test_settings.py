"""Flags, their environment twins, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.server.main import main
from xllm_compiler.runtime.server.settings import OPTIONS, Settings, parse_bytes, parse_settings

GIVEN = {
    "--host": ("0.0.0.0", "0.0.0.0"),
    "--port": ("0", 0),
    "--api-key": ("k", ("k",)),
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
