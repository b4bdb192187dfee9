"""What `xllm-serve` can be told. Owns flags, environment twins and their parsing; must not open anything.

Precedence is flag, then environment (`--max-num-seqs` is `XLLM_MAX_NUM_SEQS`), then default. Flags are spelt as vLLM
spells them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from xllm_compiler.errors import XllmError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_MOST_WAITING = 10_000  # the engine itself refuses beyond 16384
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Settings:
    """Everything the server was told. `None` means that the artifact or the machine decides."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] | None = None
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    served_model_names: tuple[str, ...] = ()
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    threads: int | None = None
    cache_dir: str | None = None
    chat_template: str | None = None
    generation_config: str = "auto"
    max_body_size: int = 4 * 2**20
    max_body_memory: int = 128 * 2**20
    timeout_keep_alive: int = 5
    timeout_receive: int = 30
    timeout_graceful_shutdown: int = 60
    max_waiting_requests: int = 1024
    disable_access_log: bool = False
    startup_report: str | None = None
    profile_steps: int | None = None
    profile_trace: str | None = None
    log_level: str = "info"


def parse_bytes(text: str) -> int:
    """`4194304`, `512MiB`, `2GiB`, `1.5G` -> bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a unit, for example 2GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"{value} is not within [{low}, {high}]")
        return value

    return parse


def _text(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    return text


def _choice(options: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in options:
            raise ValueError(f"{text!r} is not one of {', '.join(options)}")
        return text

    return parse


def _size(text: str) -> int:
    value = parse_bytes(text)
    if value < 1:
        raise ValueError("must be at least one byte")
    return value


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"{text!r} is not one of 1, 0, true, false, yes, no, on, off")


def _host(text: str) -> str:
    if text == "*":
        return text
    if not re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?", text):
        raise ValueError(f"{text[:100]!r} is no host name; write example.com, *.example.com or *, without a port")
    return text


def _origin(text: str) -> str:
    if text in ("*", "null"):
        return text
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@,]+", text):
        raise ValueError(f"{text[:100]!r} is no origin; write https://example.com, without a path, or *")
    return text


def _token(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", text):
        raise ValueError(f"{text[:100]!r} is no name of a method or header")
    return text


def check_key(key: str) -> str:
    """Raises ValueError, which does not repeat the key."""
    if not key.strip():
        raise ValueError("an empty key would lock nothing; give one, or leave this out")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("an API key must be printable ASCII without spaces")
    return key


@dataclass(frozen=True)
class _Option:
    flag: str
    parse: Callable[[str], Any]
    help: str
    name: str = ""  # field of Settings, when it differs from the flag
    repeat: bool = False  # the environment twin is then a comma-separated list
    listed: bool = False  # the flag too takes a comma-separated list, or one in JSON as vLLM does
    switch: bool = False

    @property
    def dest(self) -> str:
        return self.name or self.flag[2:].replace("-", "_")

    @property
    def env(self) -> str:
        return "XLLM_" + self.flag[2:].replace("-", "_").upper()

    def split(self, text: str) -> list[str]:
        """The values in a flag that is `listed`, or in an environment twin. Raises ValueError."""
        if not text.strip():
            raise ValueError("must not be empty")
        if not (self.listed and text.lstrip().startswith("[")):
            return [part.strip() for part in text.split(",")] if self.listed else text.split(",")
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not a list in JSON: {error}") from None
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError("not a list of strings")
        return values

    def values(self, given: list[str], *, from_env: bool) -> tuple[Any, ...]:
        """Of an option that repeats. Raises ValueError."""
        texts = [part for text in given for part in self.split(text)] if from_env or self.listed else given
        return tuple(self.parse(text) for text in texts)


_COUNT = _integer(1, 2**31 - 1)
_SECONDS = _integer(0, 86_400)
OPTIONS = (
    _Option("--host", _text, "address to listen on (default 127.0.0.1: this machine only)"),
    _Option("--port", _integer(0, 65535), "port to listen on (default 8000; 0 takes a free one)"),
    _Option(
        "--api-key",
        check_key,
        "require this bearer key; may be given more than once; others on this machine see it in the process list",
        "api_keys",
        repeat=True,
    ),
    _Option("--api-key-file", _text, "file of bearer keys, one a line; any key of it, or of --api-key, is taken"),
    _Option(
        "--allowed-hosts",
        _host,
        "names under which clients may call this server, beside localhost and IP addresses: example.com, "
        "*.example.com or *; may be given more than once",
        repeat=True,
        listed=True,
    ),
    _Option(
        "--allowed-origins",
        _origin,
        "origins whose web pages may call this server (CORS), in place of pages on localhost: https://example.com, "
        "* for all, [] for none; may be given more than once",
        repeat=True,
        listed=True,
    ),
    _Option("--allowed-methods", _token, "methods that they may use (default *)", repeat=True, listed=True),
    _Option("--allowed-headers", _token, "headers that they may send (default *)", repeat=True, listed=True),
    _Option("--allow-credentials", _switch, "let browsers send cookies along", switch=True),
    _Option("--ssl-certfile", _text, "PEM certificate chain: serve https"),
    _Option("--ssl-keyfile", _text, "PEM key of --ssl-certfile"),
    _Option(
        "--served-model-name",
        _text,
        "name that clients use; may be given more than once (default: the model's own name)",
        "served_model_names",
        repeat=True,
    ),
    _Option("--max-model-len", _COUNT, "longest request in tokens, at most the artifact's"),
    _Option("--max-num-seqs", _COUNT, "most requests in one step, at most the artifact's"),
    _Option("--max-num-batched-tokens", _COUNT, "most tokens in one step, at most the artifact's"),
    _Option("--kv-cache-memory-bytes", _size, "size of the KV page pool, for example 2GiB"),
    _Option("--threads", _integer(1, 1024), "threads that compute (default: what this process may use)"),
    _Option("--cache-dir", _text, "where a checkpoint given instead of an artifact is compiled to"),
    _Option("--chat-template", _text, "file with a jinja chat template that replaces the model's"),
    _Option(
        "--generation-config",
        _choice(("auto", "vllm")),
        "auto: sampling defaults from the model's generation_config.json; vllm: neutral defaults",
    ),
    _Option("--max-body-size", _size, "largest request body (default 4MiB)"),
    _Option(
        "--max-body-memory",
        _size,
        "most bytes of all requests that are arriving; beyond it those that take longest get 503 (default 128MiB)",
    ),
    _Option("--timeout-keep-alive", _SECONDS, "seconds that an idle connection is kept after a response (default 5)"),
    _Option(
        "--timeout-receive", _integer(1, 86_400), "seconds for a request's head, and its body, to arrive (default 30)"
    ),
    _Option("--timeout-graceful-shutdown", _SECONDS, "seconds for running requests to finish on SIGTERM (default 60)"),
    _Option(
        "--max-waiting-requests",
        _integer(0, _MOST_WAITING),
        "queued requests beyond which new ones get 429 (default 1024)",
    ),
    _Option("--disable-access-log", _switch, "no line per request", switch=True),
    _Option("--startup-report", _text, "write the start-up phases to this file as JSON"),
    _Option(
        "--profile-steps",
        _integer(1, 1000),
        "print where the time of the first so many prefill and decode steps goes, kernel by kernel",
    ),
    _Option("--profile-trace", _text, "write the profiled steps to this file as a Chrome trace"),
    _Option("--log-level", _choice(LOG_LEVELS), "debug, info, warning or error (default info)"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise XllmError("option", message, help="xllm-serve --help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="xllm-serve",
        description="Serve a compiled model over the OpenAI API. A checkpoint is compiled into the cache first.",
        epilog="Every flag has an environment twin: --max-num-seqs is XLLM_MAX_NUM_SEQS. A flag wins over its twin.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="ARTIFACT_OR_CHECKPOINT", help="a directory that xllm-compile wrote, or a checkpoint"
    )
    for option in OPTIONS:
        if option.switch:
            parser.add_argument(option.flag, dest=option.dest, action="store_const", const="1", help=option.help)
        else:
            action = "append" if option.repeat else "store"
            metavar = option.flag[2:].replace("-", "_").upper()
            parser.add_argument(option.flag, dest=option.dest, action=action, metavar=metavar, help=option.help)
    return parser


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Settings from flags and environment. Raises XllmError("option"), which names the flag or variable to blame.

    A rejected API key is not repeated in the message.
    """
    given = vars(_parser().parse_args(list(argv)))
    _check_names(environ)
    values: dict[str, Any] = {"model": given["model"]}
    for option in OPTIONS:
        texts, where = given[option.dest], option.flag
        if texts is None:
            if option.env not in environ:
                continue
            texts, where = environ[option.env], option.env
        try:
            if option.repeat:
                from_env = where == option.env
                values[option.dest] = option.values([texts] if from_env else texts, from_env=from_env)
            else:
                values[option.dest] = option.parse(texts)
        except ValueError as error:
            raise XllmError("option", f"{where}: {error}", where=where, help=option.help) from None
    settings = Settings(**values)
    if (settings.ssl_certfile is None) != (settings.ssl_keyfile is None):
        raise XllmError("option", "--ssl-certfile and --ssl-keyfile belong together", help="give both or neither")
    if settings.max_body_memory < settings.max_body_size:
        raise XllmError(
            "option",
            f"--max-body-memory {settings.max_body_memory} is less than --max-body-size {settings.max_body_size}",
            where="--max-body-memory",
            help="one body must fit",
        )
    return settings


def _check_names(environ: Mapping[str, str]) -> None:
    """A misspelt variable that was to hold a key would leave the door open without a word."""
    known = {option.env for option in OPTIONS}
    for name in environ:
        if name.startswith("XLLM_") and "KEY" in name and name not in known:
            raise XllmError(
                "option",
                f"the environment variable {name} means nothing here",
                where=name,
                help="keys are read from XLLM_API_KEY and XLLM_API_KEY_FILE",
            )
