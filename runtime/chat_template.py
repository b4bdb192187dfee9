"""A checkpoint's chat template, run in a sandbox. Owns the template language as checkpoints use it (transformers'
helpers); must not know tokens.

A template comes from whoever made the checkpoint, and messages from whoever sends a request: neither may reach Python.
Templates run in jinja's immutable sandbox, and see nothing but plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from xllm_compiler.errors import XllmError

# Private-use characters: no prompt holds this by accident. The space tells whether the template trims messages.
_MARK = "\ue000end of the final message\ue001 "
_MAX_DEPTH = 64


class _Generation(jinja2.ext.Extension):
    """`{% generation %} .. {% endgeneration %}` marks what the assistant wrote, for training; serving prints the
    body."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as a plain class attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(...)` without the type object, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["dict"] = _Dict()
    return env


def _plain(value: object, depth: int = 0) -> Any:
    """A copy made of JSON types only. Raises XllmError("request") for anything else."""
    if depth > _MAX_DEPTH:
        raise XllmError("request", f"messages are nested deeper than {_MAX_DEPTH}", where="messages")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise XllmError("request", f"a message holds a {type(value).__name__}, which is not JSON", where="messages")


class ChatTemplate:
    """One template, or several by name: "default", and "tool_use" when the request brings tools."""

    def __init__(self, source: object) -> None:
        """`source`: the text, or the list of {"name", "template"} that tokenizer_config.json may hold.

        Raises XllmError("artifact") when it does not parse.
        """
        if isinstance(source, str):
            texts = {"default": source}
        elif isinstance(source, list) and all(isinstance(item, Mapping) for item in source):
            texts = {str(item.get("name")): str(item.get("template")) for item in source}
        else:
            raise XllmError("artifact", "the chat template is neither text nor a list of named templates")
        env = _environment()
        try:
            self._templates = {name: env.from_string(text) for name, text in texts.items()}
        except jinja2.TemplateError as error:
            raise XllmError("artifact", f"the chat template does not parse: {error}", where="chat_template") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text. Raises XllmError("request"): what the template refuses is the client's to mend."""
        chat = _plain(messages)
        if not isinstance(chat, list) or not chat or not all(isinstance(item, dict) for item in chat):
            raise XllmError("request", "messages must be a list of at least one object", where="messages")
        # Many templates print "None" for a null that clients send where a key is meant to be missing.
        chat = [{key: item for key, item in message.items() if item is not None} for message in chat]
        if continue_final_message:
            if add_generation_prompt:
                raise XllmError("request", "add_generation_prompt and continue_final_message exclude each other")
            if not isinstance(chat[-1].get("content"), str):
                raise XllmError("request", "the final message has no text to continue", where="messages")
            chat[-1]["content"] += _MARK
        values = {"tools": None, "documents": None, **_plain(variables)}
        name = "tool_use" if values["tools"] and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise XllmError("request", f"the model has chat templates {sorted(self._templates)} and no default")
        try:
            # One mapping, never keywords: a request may call a variable "self".
            text = template.render({**values, "messages": chat, "add_generation_prompt": add_generation_prompt})
        except Exception as error:  # a template may divide by zero or index past the end: all of it is this request's
            raise XllmError(
                "request", f"the chat template refuses this conversation: {error}", where="messages"
            ) from None
        if continue_final_message:
            at = text.rfind(_MARK.rstrip())
            if at < 0:
                raise XllmError("request", "the chat template does not print the final message", where="messages")
            text = text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
        return text
