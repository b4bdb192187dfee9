"""A user's words never vanish: content is given to a template in the form that it reads, or as the client sent it where
it reads both. Judged against transformers, which is given that form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.chat_template import ChatTemplate

TEXT = "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
FIRST = "{% for m in messages %}<{{ m.role }}>{{ m['content'][0]['text'] }}{% endfor %}"
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}s:{{ m.content }}{% else %}"
    "{% for p in m.content %}p:{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
MACRO = (
    "{% macro show(content) %}{% for c in content %}{{ c.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ show(m.content) }}{% endfor %}"
)
MIXED = (  # the system prompt as text, everything else in parts
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<{{ m.role }}>{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endfor %}"
)
NAMESPACE = (
    "{% set ns = namespace(c=none) %}{% for m in messages %}{% set ns.c = m.content %}<{{ m.role }}>"
    "{% for p in ns.c if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEXT[23:]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def join(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def wrap(content: Any) -> Any:
    return parts(content) if isinstance(content, str) else content


def same(content: Any) -> Any:
    return content


def one(content: Any) -> Any:
    return parts(join(content))


CHATS = [
    [{"role": "user", "content": "what is 2+2"}],
    [{"role": "user", "content": parts("what is", "2+2")}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a <b> 'c' \"d\""},
        {"role": "assistant", "content": parts("yes")},
        {"role": "user", "content": parts("one", "two")},
    ],
    [
        {"role": "user", "content": parts("q")},
        {"role": "assistant", "content": "calling"},
        {"role": "tool", "content": "42", "tool_call_id": "x"},
        {"role": "user", "content": "thanks"},
    ],
]


def ask(source: Any, chat: list[dict[str, Any]], **options: Any) -> str:
    template = ChatTemplate(source)
    try:
        return template.render(
            chat, add_generation_prompt=False, continue_final_message=options.pop("proceed", False), variables=options
        )
    finally:
        template.close()


@pytest.mark.parametrize(
    ("template", "form"),
    [(TEXT, join), (PARTS, wrap), (FIRST, one), (BOTH, same), (MACRO, wrap), (NAMESPACE, wrap)],
    ids=["text", "parts", "first part", "both", "macro", "namespace"],
)
@pytest.mark.parametrize("chat", CHATS, ids=["text", "parts", "four", "tool"])
def test_the_form_that_the_template_reads(
    template: str, form: Callable[[Any], Any], chat: list[dict[str, Any]]
) -> None:
    given = [{**message, "content": form(message["content"])} for message in chat]
    (wanted,), _ = render_jinja_template([given], chat_template=template)
    assert ask(template, chat) == wanted
    for message in chat:
        for text in (
            [message["content"]] if isinstance(message["content"], str) else [p["text"] for p in message["content"]]
        ):
            assert text in wanted


def test_each_role_has_its_own_form() -> None:
    assert ask(MIXED, CHATS[2]) == "<system>be brief<user>a <b> 'c' \"d\"<assistant>yes<user>onetwo"
    chat = [{"role": "system", "content": parts("be", "brief")}, {"role": "user", "content": "x"}]
    assert ask(MIXED, chat) == "<system>be\nbrief<user>x"


def test_each_named_template_has_its_own_form() -> None:
    named = [{"name": "default", "template": TEXT}, {"name": "tool_use", "template": PARTS}]
    assert ask(named, CHATS[1]) == "<user>what is\n2+2"
    assert ask(named, CHATS[1], tools=[{"type": "function"}]) == "<user>what is2+2"


def test_a_role_that_the_template_refuses_is_refused_still() -> None:
    assert ask(STRICT, CHATS[0]) == ask(TEXT, CHATS[0])
    with pytest.raises(XllmError, match="no system"):
        ask(STRICT, CHATS[2])


@pytest.mark.parametrize("template", [TEXT, PARTS, FIRST, BOTH])
@pytest.mark.parametrize("content", ["so far", parts("so far")], ids=["text", "parts"])
def test_a_final_message_is_continued_in_any_form(template: str, content: Any) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    assert ask(template, chat, proceed=True).endswith("so far")


@pytest.mark.parametrize("name", ["self", "source", "messages_", "context", "loop", "caller", "args", "template"])
def test_a_variable_may_have_any_name(name: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    text = template.render(CHATS[0], add_generation_prompt=False, continue_final_message=False, variables={name: 1})
    template.close()
    assert text == "what is 2+2"
