"""Chat templates in a running server: a hostile one stops nobody, and content comes in the form that it reads."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from xllm_compiler.confined import Limits
from xllm_compiler.runtime.chat_template import ChatTemplate

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
LOOPS = (
    "{{ messages[0].content }}{% for i in range(n or 0) %}{% for j in range(n) %}{% endfor %}{% endfor %}"
    "{{ 'x' * (m or 0) }}"
)
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_holds_up_nobody(make: Any, listen: Any) -> None:
    template = ChatTemplate(LOOPS, limits=Limits(cpu=1.0, wall=5.0))
    with listen(make(template=template)) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        answers: list[httpx.Response] = []

        def hostile(**variables: Any) -> None:
            body = {"messages": HELLO, "max_tokens": 1, "chat_template_kwargs": variables}
            answers.append(httpx.post(served.url + PATH, json=body, timeout=30))

        threads = [threading.Thread(target=hostile, kwargs=kw) for kw in ({"n": 99_999}, {"m": 10**10}, {"n": 99_999})]
        for thread in threads:
            thread.start()
        longest = 0.0
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
            longest = max(longest, time.monotonic() - began)
        assert longest < 1.0
        assert [answer.status_code for answer in answers] == [400, 400, 400]
        told = " ".join(answer.json()["error"]["message"] for answer in answers)
        assert "1 s of processor time" in told and "512 MiB" in told
        assert client.post(PATH, json={"messages": HELLO, "max_tokens": 1}).status_code == 200
    template.close()


@pytest.mark.parametrize(
    "content", ["hello", [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]], ids=["text", "parts"]
)
def test_parts_for_a_template_that_walks_parts(make: Any, content: Any) -> None:
    served = make(template=ChatTemplate(PARTS))
    messages = [{"role": "user", "content": content}]
    tokens = served.post("/tokenize", messages=messages).json()["tokens"]
    assert bytes(tokens).decode() == "hello"
    assert served.post(PATH, messages=messages, max_tokens=1).json()["choices"][0]["message"]["content"] == "p"


@pytest.mark.parametrize("name", ["self", "variables", "name", "arguments", "__class__", "", "for", "loop"])
def test_template_variables_of_any_name_are_no_fault_of_ours(fake: Any, name: str) -> None:
    answer = fake.post(PATH, messages=HELLO, max_tokens=1, chat_template_kwargs={name: 1})
    assert answer.status_code in (200, 400)
