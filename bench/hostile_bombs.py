"""The requests that `hostile.py` throws. Owns their bytes; must not know how they are judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

MIB = 2**20
Body = Callable[[], bytes]


@dataclass
class Bomb:
    """`body` is posted to `path` as JSON on `times` connections; or `raw` is sent as it is. `statuses`: the right
    answers; none given: any of 200 and of 4xx. 1 stands for a closed connection."""

    name: str
    path: str = "/v1/completions"
    body: Body | None = None
    raw: Callable[[], Iterable[bytes]] | None = None
    times: int = 1
    statuses: tuple[int, ...] = ()
    template: str = ""
    _built: bytes = field(default=b"", repr=False)

    def build(self) -> None:
        """Make the bytes before time is measured."""
        if self.body is not None and not self._built:
            body = self.body()
            head = f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            self._built = f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    def pieces(self) -> Iterator[bytes]:
        if self.raw is not None:
            yield from self.raw()
        else:
            yield self._built

    def right(self, status: int) -> bool:
        return status in self.statuses if self.statuses else status == 200 or 400 <= status < 500


def _json(**fields: Any) -> Body:
    return lambda: json.dumps(fields, separators=(",", ":")).encode()


def _text(size: int) -> str:
    line = "def merge(left, right):\n    return sorted(left + right, key=lambda item: item[0])  # stable\n"
    return (line * (size // len(line) + 1))[:size]


def _trailers() -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
    for _ in range(500):
        yield b"a:b\r\n" * 13000
    yield b"\r\n"


def _heads() -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\n"
    for _ in range(500):
        yield b"a:b\r\n" * 13000


USER = {"role": "user", "content": "x"}
ONE = {"max_tokens": 1}
EIGHT = {"prompt": "x", "max_tokens": 8, "ignore_eos": True}

BOMBS = [
    Bomb("trailers without end", raw=_trailers, statuses=(1, 400, 413, 431)),
    Bomb("head without end", raw=_heads, statuses=(1, 400, 431)),
    Bomb("800,000 prompts", body=_json(prompt=["a"] * 800_000), statuses=(400,)),
    Bomb("500,000 prompts of one id", body=_json(prompt=[[1]] * 500_000), statuses=(400,)),
    Bomb("1,088 prompts", body=_json(prompt=["a"] * 1088, **ONE), statuses=(200, 429)),
    Bomb("a prompt of 1,300,000 ids", body=_json(prompt=[12] * 1_300_000), statuses=(400,)),
    Bomb("the same, truncated", body=_json(prompt=[12] * 1_300_000, truncate_prompt_tokens=8, **ONE), statuses=(200,)),
    Bomb("a text of 4 MB", body=lambda: _json(prompt=_text(4 * MIB - 99000))(), statuses=(400,)),
    Bomb("a text of 200 KB", body=lambda: _json(prompt=_text(200_000))(), statuses=(400,)),
    Bomb(
        "a text of 3 MB, truncated",
        body=lambda: _json(prompt=_text(3 * MIB), truncate_prompt_tokens=8, **ONE)(),
        statuses=(200,),
    ),
    Bomb(
        "six of them",
        body=lambda: _json(prompt=_text(3 * MIB), truncate_prompt_tokens=8, **ONE)(),
        times=6,
    ),
    Bomb(
        "/tokenize of 4 MB",
        path="/tokenize",
        body=lambda: _json(prompt=_text(4 * MIB - 99000), return_token_strs=True)(),
    ),
    Bomb(
        "/tokenize of 80 KB",
        path="/tokenize",
        body=lambda: _json(prompt=_text(80_000), return_token_strs=True)(),
        statuses=(200,),
    ),
    Bomb("/detokenize of 4 MB", path="/detokenize", body=_json(tokens=[123] * 1_000_000)),
    Bomb("100,000 messages", path="/v1/chat/completions", body=_json(messages=[USER] * 100_000), statuses=(400,)),
    Bomb("8,000 messages", path="/v1/chat/completions", body=_json(messages=[USER] * 8_000), statuses=(400,)),
    Bomb(
        "100,000 parts",
        path="/v1/chat/completions",
        body=_json(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 100_000}]),
        statuses=(400,),
    ),
    Bomb(
        "a million template variables",
        path="/v1/chat/completions",
        body=_json(messages=[USER], chat_template_kwargs={"a": [[]] * 1_000_000}),
        statuses=(400,),
    ),
    Bomb("100,000 biases", body=_json(logit_bias={str(i): 1 for i in range(100_000)}, **EIGHT), statuses=(400,)),
    Bomb("4,000 biases, n=128", body=_json(logit_bias={str(i): 1 for i in range(4_000)}, n=128, **EIGHT)),
    Bomb("1,000,000 stop ids", body=_json(stop_token_ids=[5] * 1_000_000, **EIGHT)),
    Bomb("1,000,000 stop ids, n=128", body=_json(stop_token_ids=[5] * 1_000_000, n=128, **EIGHT)),
    Bomb("1,000,000 allowed ids, n=128", body=_json(allowed_token_ids=[5] * 1_000_000, n=128, **EIGHT)),
    Bomb(
        "4,000 stop ids and allowed ids, n=128, min_tokens",
        body=_json(
            stop_token_ids=list(range(3, 4000)), allowed_token_ids=list(range(4096)), n=128, min_tokens=4, **EIGHT
        ),
    ),
    Bomb("300,000 unknown fields", body=_json(prompt="x", **{f"u{i}": 1 for i in range(300_000)}), statuses=(400,)),
    Bomb("1,000,000 lists nobody reads", body=_json(metadata=[[]] * 1_000_000, **EIGHT), statuses=(200,)),
    Bomb("1,000,000 tools", body=_json(tools=[{}] * 1_000_000, **EIGHT), statuses=(400,)),
    Bomb("nested 2,000,000 deep", body=lambda: b'{"prompt":' + b"[" * 2_000_000, statuses=(400,)),
    Bomb(
        "a number of 4,000,000 digits", body=lambda: b'{"prompt":"x","seed":' + b"9" * 4_000_000 + b"}", statuses=(400,)
    ),
    Bomb("a stop string of 4 MB", body=lambda: _json(prompt="x", stop="a" * 4_000_000)(), statuses=(400,)),
    Bomb("1,000,000 stop strings", body=_json(stop=["a"] * 1_000_000, **EIGHT), statuses=(400,)),
    Bomb(
        "64 stop strings of 1,024 characters, n=64",
        body=_json(
            prompt=" " * 400,
            max_tokens=200,
            n=64,
            ignore_eos=True,
            stop=[" " * (1024 - i) for i in range(64)],
            logit_bias={"222": 100},
        ),
    ),
    # no bomb: what the next two cost without log-probabilities, which is drawing 32 tokens in each step
    Bomb("100 tokens, n=32", body=_json(prompt="x", max_tokens=100, n=32, ignore_eos=True)),
    Bomb(
        "20 logprobs of 100 tokens, n=32",
        body=_json(prompt="x", max_tokens=100, n=32, logprobs=20, ignore_eos=True, temperature=0),
    ),
    Bomb(
        "20 logprobs of 100 tokens, n=16, chat",
        path="/v1/chat/completions",
        body=_json(
            messages=[USER], max_tokens=100, n=16, logprobs=True, top_logprobs=20, ignore_eos=True, temperature=0
        ),
    ),
    Bomb("20 logprobs of 2,000 prompt tokens", body=_json(prompt=[12] * 2000, max_tokens=1, prompt_logprobs=20)),
    Bomb("the same, echoed to 16", body=_json(prompt=[12] * 2000, max_tokens=1, n=16, logprobs=20, echo=True)),
    # no bomb: what the next one costs without its penalty, which is the prompt of each choice
    Bomb("1,900 tokens, n=16", body=_json(prompt=list(range(3, 1900)), max_tokens=8, ignore_eos=True, n=16)),
    Bomb(
        "repetition penalty of 1,900 tokens, n=16",
        body=_json(prompt=list(range(3, 1900)), max_tokens=8, ignore_eos=True, n=16, repetition_penalty=1.1),
    ),
]

_GO = {"role": "user", "content": "go"}
_CHAT: dict[str, Any] = {"path": "/v1/chat/completions", "body": _json(messages=[_GO], max_tokens=1)}
# A template that costs as much without that word is refused while the server starts.
_WHEN_TOLD = "{% for m in messages %}{{ m.content }}{% if m.content == 'go' %}BOMB{% endif %}{% endfor %}"
TEMPLATES = [
    Bomb(
        "a template that loops",
        template=_WHEN_TOLD.replace(
            "BOMB", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        ),
        **_CHAT,
    ),
    Bomb(
        "a template that doubles",
        template=_WHEN_TOLD.replace(
            "BOMB", "{% set ns = namespace(s='a') %}{% for i in range(34) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}x"
        ),
        **_CHAT,
    ),
]
