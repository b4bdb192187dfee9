"""A checkpoint's chat template: gives it conversations in the form that it reads, and limits its time and memory.

The template language itself is `confined/templates.py`, which runs in a child process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xllm_compiler.confined import Confined, Limits, Overrun, Refusal
from xllm_compiler.errors import XllmError

# Private-use characters: no prompt holds this by accident. The space tells whether the template trims messages.
_MARK = "\ue000end of the final message\ue001 "
_MAX_DEPTH = 64

Message = Mapping[str, Any]


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
    """One template, or several by name: "default", and "tool_use" when the request brings tools.

    A process of its own parses and renders them; `start` starts it, `check` waits until the templates are parsed, and
    the first render does both.
    """

    def __init__(
        self, source: object, variables: Mapping[str, str] | None = None, limits: Limits | None = None
    ) -> None:
        """`source`: the text, or the list of {"name", "template"} that tokenizer_config.json may hold. `variables`:
        what every render sees, such as bos_token. Raises XllmError("artifact") when `source` is neither.
        """
        if isinstance(source, str):
            self._texts = {"default": source}
        elif isinstance(source, list) and all(_is_named(item) for item in source):
            self._texts = {item["name"]: item["template"] for item in source}
        else:
            raise XllmError("artifact", "the chat template is neither text nor a list of named templates")
        self._worker = Confined(
            "templates",
            ("jinja2", "markupsafe"),
            limits or Limits(),
            ("load", {"templates": self._texts, "variables": dict(variables or {})}),
        )

    @property
    def pid(self) -> int | None:
        """The process that renders; None while it does not run."""
        return self._worker.pid

    def start(self) -> None:
        """Start the process without waiting for it."""
        self._worker.start()

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def check(self) -> dict[str, dict[str, str]]:
        """The form of content that each template reads, by role: "both", "text", "parts", "part" or "none" of them.
        Raises XllmError("artifact") when a template does not parse, or not within the limits."""
        try:
            forms: dict[str, dict[str, str]] = self._worker.opened()
        except (Refusal, Overrun) as error:
            raise _unusable(error) from None
        return forms

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text.

        Raises XllmError("request") when the template refuses the conversation or exceeds its limits,
        XllmError("artifact") when it cannot be used at all.
        """
        plain = _Conversation(messages, add_generation_prompt, continue_final_message, variables, self._texts)
        call = plain.call(self.check())
        try:
            return plain.text(self._worker.call("render", call))
        except (Refusal, Overrun) as error:
            raise _refused(error) from None

    async def arender(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """As `render`, without blocking the event loop. Raises XllmError("capacity") when too many wait."""
        plain = _Conversation(messages, add_generation_prompt, continue_final_message, variables, self._texts)
        try:
            forms = await self._worker.aopened()
        except (Refusal, Overrun) as error:
            raise _unusable(error) from None
        call = plain.call(forms)
        try:
            return plain.text(await self._worker.acall("render", call))
        except (Refusal, Overrun) as error:
            raise _refused(error) from None


def _is_named(item: object) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)


def _unusable(error: Exception) -> XllmError:
    if isinstance(error, Overrun):
        return XllmError("artifact", f"the chat template {error} before it renders anything", where="chat_template")
    return XllmError("artifact", f"the chat template does not parse: {error}", where="chat_template")


def _refused(error: Exception) -> XllmError:
    if isinstance(error, Overrun):
        return XllmError("request", f"the chat template {error} for this conversation", where="messages")
    return XllmError("request", f"the chat template refuses this conversation: {error}", where="messages")


class _Conversation:
    """One request's messages, checked, on their way into a template and its text on the way out."""

    def __init__(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
        templates: Mapping[str, str],
    ) -> None:
        """Raises XllmError("request")."""
        chat = _plain(messages)
        if not isinstance(chat, list) or not chat or not all(isinstance(item, dict) for item in chat):
            raise XllmError("request", "messages must be a list of at least one object", where="messages")
        # Many templates print "None" for a null that clients send where a key is meant to be missing.
        self._chat = [{key: item for key, item in message.items() if item is not None} for message in chat]
        self._continue = continue_final_message
        if continue_final_message:
            if add_generation_prompt:
                raise XllmError("request", "add_generation_prompt and continue_final_message exclude each other")
            _mark(self._chat[-1])
        self._values = {"tools": None, "documents": None, **_plain(variables)}
        self._values |= {"add_generation_prompt": add_generation_prompt}
        name = "tool_use" if self._values["tools"] and "tool_use" in templates else "default"
        if name not in templates:
            raise XllmError("request", f"the model has chat templates {sorted(templates)} and no default")
        self._template = name

    def call(self, forms: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """What the child is asked, with contents in the form that the template reads."""
        of_role = forms[self._template]
        chat = [
            {**message, "content": _content(message["content"], _form(of_role, message))}
            if "content" in message
            else message
            for message in self._chat
        ]
        return {"template": self._template, "variables": {**self._values, "messages": chat}}

    def text(self, text: str) -> str:
        """The prompt, from what the template printed."""
        if self._continue:
            at = text.rfind(_MARK.rstrip())
            if at < 0:
                raise XllmError("request", "the chat template does not print the final message", where="messages")
            text = text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
        return text


def _form(of_role: Mapping[str, str], message: Mapping[str, Any]) -> str:
    """The form that the template reads in a message of that role; that of users where this could not be found out."""
    role = message.get("role")
    form = of_role.get("system" if role == "developer" else str(role), "none")
    return of_role["user"] if form == "none" else form


def _mark(message: dict[str, Any]) -> None:
    """Put the mark after the last text of a message."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _MARK
        return
    parts = content if isinstance(content, list) else []
    if not parts or not isinstance(parts[-1], dict) or not isinstance(parts[-1].get("text"), str):
        raise XllmError("request", "the final message has no text to continue", where="messages")
    parts[-1]["text"] += _MARK


def _content(content: Any, form: str) -> Any:
    """A message's content, text or parts, in the form from which the template prints it."""
    if isinstance(content, str):
        return content if form in ("both", "text", "none") else [{"type": "text", "text": content}]
    if not isinstance(content, list) or form in ("both", "parts"):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        return content  # images and the like: the template may know what to do, or refuses
    joined = "\n".join(str(text) for text in texts)
    return [{"type": "text", "text": joined}] if form == "part" else joined
