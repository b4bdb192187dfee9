"""Chat templates against transformers, and what a template or a message may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.chat_template import ChatTemplate
from xllm_compiler.runtime.tokenizer import Tokenizer

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ "\\n" }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.content is not string %}{{ raise_exception('Only text, got ' ~ message.content) }}{%- endif %}
    {%- if loop.index0 == 100 %}{% break %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
    {%- else %}{{- message.content }}{%- endif %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA = """{{ bos_token }}{% for m in messages %}
{{ '[INST] ' + m['content'] | trim + ' [/INST]' if m['role'] == 'user' else m['content'] | trim + eos_token }}
{% endfor %}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": 'Hi <b>there</b> & "you"'}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  padded  "},
        {"role": "assistant", "content": "Ja, größer 🙂"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}", "name": None},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ä < b", "parameters": {"type": "object"}}}]


def both(folder: Path, template: str) -> tuple[Tokenizer, Any]:
    """The same files read by us and by transformers."""
    transformers = pytest.importorskip("transformers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    core.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
    }
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return Tokenizer.load(folder), theirs


@pytest.mark.parametrize("template", [QWEN, LLAMA], ids=["qwen", "llama"])
@pytest.mark.parametrize("chat", CHATS, ids=["one", "four"])
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"add_generation_prompt": True, "enable_thinking": False},
        {"add_generation_prompt": True, "tools": TOOLS},
    ],
    ids=str,
)
def test_renders_what_transformers_renders(
    tmp_path: Path, template: str, chat: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    ours, theirs = both(tmp_path, template)
    own = {name: options[name] for name in ("add_generation_prompt", "continue_final_message") if name in options}
    variables = {name: value for name, value in options.items() if name not in own}
    text = ours.render_chat(chat, variables=variables, **own)
    assert text == theirs.apply_chat_template(chat, tokenize=False, **options)


def render(source: Any, messages: Any = ({"role": "user", "content": "x"},), **variables: Any) -> str:
    return ChatTemplate(source).render(
        messages, add_generation_prompt=True, continue_final_message=False, variables=variables
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ dict.__call__.__globals__['__builtins__'] }}",
        "{{ namespace.__init__.__globals__['sys'] }}",
        "{{ messages.append(1) }}",
        "{% set x = messages[0].update({'content': 'y'}) %}",
        "{{ '%s' | format('') | attr('__class__') }}x{{ ('{0.__class__}').format(1).__len__.__self__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ messages[5].content }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(XllmError) as caught:
        render(source)
    assert caught.value.kind == "request"


def test_messages_are_data() -> None:
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "{{ 7*7 }}"}]) == "{{ 7*7 }}"
    for bad in ([], {}, "hi", [1], [{"content": object()}], None):
        with pytest.raises(XllmError) as caught:
            render("x", bad)
        assert caught.value.kind == "request"
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(XllmError):
        render("x", [{"content": deep}])


def test_the_templates_own_refusal_reaches_the_client() -> None:
    with pytest.raises(XllmError) as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.kind == "request" and "roles must alternate" in caught.value.message


def test_named_templates() -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert render(named) == "D" and render(named, tools=TOOLS) == "T"
    with pytest.raises(XllmError):
        render([{"name": "rag", "template": "R"}])


def test_a_template_that_does_not_parse_is_found_at_load() -> None:
    for bad in ("{% if %}", 7, ["x"]):
        with pytest.raises(XllmError) as caught:
            ChatTemplate(bad).check()
        assert caught.value.kind == "artifact"


def test_time_is_available() -> None:
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    bare, _ = both(tmp_path, "")
    assert not bare.has_chat_template
    with pytest.raises(XllmError) as caught:
        bare.render_chat(
            [{"role": "user", "content": "x"}], add_generation_prompt=True, continue_final_message=False, variables={}
        )
    assert caught.value.kind == "request" and "chat template" in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "Nonsense"}}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_a_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(XllmError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.kind == "artifact"


def test_text_that_cannot_be_encoded_and_ids_that_cannot_be_decoded(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, "x")
    with pytest.raises(XllmError) as caught:
        ours.encode("\ud800")
    assert caught.value.kind == "request"
    for ids in ([-1], [1 << 40]):
        with pytest.raises(XllmError) as caught:
            ours.decode(ids)
        assert caught.value.kind == "request"
    assert ours.decode([10**6]) == ""


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(\w+\s?)+$", "(a|aa)+$"])
def test_a_pattern_that_gives_up_is_the_requests_error(pattern: str) -> None:
    """The binding raises a panic then, which is no Exception."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "!": 1}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    ours = Tokenizer(core, {}, None)
    with pytest.raises(XllmError) as caught:
        ours.encode("a" * 3000 + "!")
    assert caught.value.kind == "request"
    assert ours.encode("a") == [0]
