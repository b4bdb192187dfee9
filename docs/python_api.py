"""Writes python.md, the reference of the offline API, from signatures and docstrings: `python docs/python_api.py`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from reference_text import table

from xllm_compiler import LLM, PoolingParams, SamplingParams
from xllm_compiler.errors import Kind, XllmError
from xllm_compiler.runtime.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestOutput,
)
from xllm_compiler.runtime.startup import EngineOptions

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "python.md"

HEAD = """\
# Python, without a server

    from xllm_compiler import LLM, SamplingParams

    with LLM("my-artifact") as llm:
        for result in llm.generate(["def add(a, b):"], SamplingParams(temperature=0, max_tokens=32)):
            print(result.outputs[0].text)

Names and shapes are vLLM's where vLLM has them. `examples/offline.py` is a program.
`python docs/python_api.py` wrote this page from the code.
"""

PARAMS = """\
Fields mean what they mean in a request; [serving.md](serving.md) has a line on each. Here `max_tokens` is 16 by
default, and None goes on to the model's length. `detokenize=False` makes no text.
"""


def prose(thing: Any, where: str) -> str:
    """A docstring as paragraphs."""
    doc = inspect.getdoc(thing)
    if not doc:
        raise SystemExit(f"{where} has no docstring")
    return doc.replace("\n    ", "\n        ") + "\n"


def signature(name: str, call: Callable[..., Any]) -> str:
    """A call as text, in one line where it fits."""
    shown = inspect.signature(call)
    parameters = [p for p in shown.parameters.values() if p.name not in ("self", "cls")]
    texts = [f"{p.name}: {p.annotation}" + ("" if p.default is p.empty else f" = {p.default!r}") for p in parameters]
    star = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if star is not None:
        texts.insert(star, "*")
    back = shown.return_annotation
    end = f" -> {back}" if back not in (inspect.Signature.empty, "None") and call.__name__ != "__init__" else ""
    one = f"    {name}({', '.join(texts)}){end}"
    if len(one) <= 116:
        return one + "\n"
    return f"    {name}(\n" + "".join(f"        {text},\n" for text in texts) + f"    ){end}\n"


def fields(kind: type) -> str:
    rows = []
    for field in dataclasses.fields(kind):
        none = field.default is dataclasses.MISSING
        default = "" if none else f"`{field.default!r}`"
        rows.append([f"`{field.name}`", f"`{field.type}`", default])
    return table(["field", "type", "default"], rows)


def methods(kind: type) -> list[tuple[str, Any]]:
    """Public methods in the order in which they stand; properties are for our own use."""
    return [
        (name, value.__func__ if isinstance(value, classmethod) else value)
        for name, value in vars(kind).items()
        if not name.startswith("_") and not isinstance(value, property) and name != "from_engine"
    ]


def page() -> str:
    """The whole page."""
    out = [HEAD, "## LLM\n", signature("LLM", LLM.__init__), prose(LLM, "LLM"), prose(LLM.__init__, "LLM.__init__")]
    out += [prose(EngineOptions, "EngineOptions")]
    for name, method in methods(LLM):
        out += [signature(f"llm.{name}", method), prose(method, f"LLM.{name}")]
    out += ["## SamplingParams\n", PARAMS, fields(SamplingParams)]
    kinds = (RequestOutput, CompletionOutput, Logprob, PoolingParams, EmbeddingRequestOutput, EmbeddingOutput)
    for kind in kinds:
        out += [f"## {kind.__name__}\n", prose(kind, kind.__name__), fields(kind)]
    names = ", ".join(f"`{kind}`" for kind in get_args(Kind))
    out += [
        "## Errors\n",
        signature("XllmError", XllmError.__init__),
        prose(XllmError, "XllmError"),
        f"Kinds: {names}.\n",
    ]
    return "\n".join(out)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
