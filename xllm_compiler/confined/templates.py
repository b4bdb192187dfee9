"""Chat templates, in the child: parsed, probed and rendered in jinja's immutable sandbox. Owns the template language as
checkpoints use it (transformers' helpers) and finds out which form of content a template reads; must not import
anything of this project.

A template comes from whoever made the checkpoint, and messages from whoever sends a request: neither may reach Python.
Templates see nothing but plain JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.constants  # of `lipsum`, which would import it when it is called
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


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


ROLES = ("user", "system", "assistant", "tool")
_USER: dict[str, object] = {"role": "user", "content": "hello"}
# The quotes show whether the text was printed, or the list or object that holds it.
_FIRST, _SECOND = "Zq7\"k'v", "Xj9'w\"b"

_templates: dict[str, jinja2.Template] = {}


def load(arguments: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Parse `arguments["templates"]`, texts by name, and find how each reads content, given
    `arguments["variables"]`: {template: {role: "both", "text", "parts", "part" or "none"}}."""
    env = _environment()
    _templates.clear()
    for name, text in arguments["templates"].items():
        _templates[name] = env.from_string(text)
    variables = arguments["variables"]
    return {name: {role: _form(t, role, variables) for role in ROLES} for name, t in _templates.items()}


def render(arguments: Mapping[str, Any]) -> str:
    """One conversation through one template."""
    return _templates[arguments["template"]].render(arguments["variables"])


def _form(template: jinja2.Template, role: str, variables: Mapping[str, Any]) -> str:
    """The form of content from which this template prints what a message of that role says."""

    def prints(content: object, *words: str) -> bool:
        message: dict[str, object] = {"role": role, "content": content}
        if role == "tool":
            message |= {"name": "f", "tool_call_id": "call00001"}
        contexts: dict[str, list[list[dict[str, object]]]] = {
            "user": [[message], [{"role": "system", "content": "hello"}, message]],
            "system": [[message, _USER]],
            "assistant": [[_USER, message, _USER], [_USER, message]],
            "tool": [[_USER, {"role": "assistant", "content": "hello"}, message]],
        }
        for chat in contexts[role]:
            try:
                text = template.render({**variables, "messages": chat, "add_generation_prompt": True})
            except MemoryError:
                raise
            except Exception:
                continue
            if all(word in text for word in words):
                return True
        return False

    one, two = ({"type": "text", "text": word} for word in (_FIRST, _SECOND))
    string = prints(_FIRST, _FIRST)
    if prints([one, two], _FIRST, _SECOND):
        return "both" if string else "parts"
    if string:
        return "text"
    return "part" if prints([one], _FIRST) else "none"


CALLS: Mapping[str, Callable[[Any], Any]] = {"load": load, "render": render}
