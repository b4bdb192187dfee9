"""Whether the chat template can be served: it parses, within its limits, and prints what a user writes. The template
runs in a child process, as in the server. Owns what is said about it while compiling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_compiler.confined import Confined, Limits, Overrun, Refusal
from xllm_compiler.errors import XllmError


def check_template(config: Mapping[str, Any], where: str) -> list[str]:
    """Notes about the templates of an artifact's tokenizer_config.json. Raises XllmError("checkpoint")."""
    template = config.get("chat_template")
    if template is None:
        return []
    texts = (
        {"default": template}
        if isinstance(template, str)
        else {str(item["name"]): item["template"] for item in template}
    )
    variables = {name: text for name, text in config.items() if name.endswith("_token")}
    child = Confined(
        "templates", ("jinja2", "markupsafe"), Limits(), ("load", {"templates": texts, "variables": variables})
    )
    try:
        forms: dict[str, dict[str, str]] = child.opened()
    except Refusal as error:
        raise XllmError("checkpoint", f"the chat template does not parse: {error}", where=where) from None
    except Overrun as error:
        raise XllmError("checkpoint", f"the chat template {error}", where=where) from None
    finally:
        child.close()
    return [
        f"the chat template {name!r} does not print what a user writes, neither as text nor as a list of parts"
        for name, of_role in forms.items()
        if of_role["user"] == "none"
    ]
