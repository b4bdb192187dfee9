"""Writes serving.md, the reference of `xllm-serve`, from the server's own code: `python docs/serving.py`.

Endpoints come from `app.py`, fields from `protocol.py`, answers from `responses.py`, flags from `settings.py`, metrics
from a scrape, and error codes from the places that raise them. What has no description there is an error here.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from reference_text import first_paragraph, grouped, table

from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.server import app, engine_metrics, middleware, protocol, settings
from xllm_compiler.runtime.server.budget import Budget
from xllm_compiler.runtime.server.connection_guard import ConnectionGuard
from xllm_compiler.runtime.server.metrics import Metrics
from xllm_compiler.runtime.stats import EngineStats, Health

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "serving.md"
SERVER = ROOT / "runtime" / "server"

HEAD = """\
# The server

`xllm-serve ARTIFACT_OR_CHECKPOINT` speaks the OpenAI API: the `openai` client and anything built on it can talk to it.
Fields, flags and metrics that vLLM has too have vLLM's names. `python docs/serving.py` wrote this page from the code.

- A body is JSON with `content-type: application/json`.
- Fields are **acted on**, **ignored** where they cannot change an answer, or **refused**.
- An unknown field is refused too.
- A sampling field that is left out has the value of the model's generation_config.json, then vLLM's default.
- With API keys, every endpoint asks for `Authorization: Bearer KEY`, but these: {open}.
- What is trusted and what is bounded: [security.md](security.md).
"""

ERRORS = """\
## Errors

Every error has OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. `param` names the field to blame,
`code` is for programs. 429 and 503 come with `retry-after`. In a stream that has begun, the error is the last event.

"""


def type_name(kind: Any) -> str:
    """A field's JSON type: `integer`, `string or list of strings`. Null is left out: it means "not given"."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return "object"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kinds = [k for k in typing.get_args(kind) if k not in (types.NoneType, msgspec.UnsetType)]
        return " or ".join(dict.fromkeys(map(type_name, kinds)))
    if typing.get_origin(kind) is list:
        return f"list of {type_name(typing.get_args(kind)[0])}"
    names = {str: "string", int: "integer", float: "number", bool: "boolean", msgspec.Raw: "any", Any: "any"}
    return names.get(kind, "object")


def own_lines(struct: type) -> dict[str, str]:
    """The strings below a struct's own fields."""
    [body] = ast.parse(inspect.getsource(struct)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def lines_of(struct: type) -> dict[str, str]:
    """Field -> its line, inherited fields last. Ends the program where a field has none."""
    found: dict[str, str] = {}
    for kind in struct.__mro__:
        if issubclass(kind, msgspec.Struct) and kind is not msgspec.Struct:
            found |= {name: line for name, line in own_lines(kind).items() if name not in found}
    for field in msgspec.structs.fields(struct):
        if field.name not in found:
            raise SystemExit(f"{struct.__name__}.{field.name} has no string below it that describes it")
    return found


def fields_of(struct: type, only: set[str] | None = None) -> str:
    known = {field.name: field for field in msgspec.structs.fields(struct)}
    rows = []
    for name, line in lines_of(struct).items():
        if only is None or name in only:
            required = ", required" if known[name].required else ""
            rows.append([f"`{name}`", type_name(known[name].type) + required, line])
    return table(["field", "type", "meaning"], grouped(rows))


def shape(kind: Any, indent: str = "") -> str:
    """A struct as JSON-like text: names and types, `?` behind what is only there when asked for."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        inner = indent + "  "
        lines = []
        for field in msgspec.structs.fields(kind):
            asked = msgspec.UnsetType in typing.get_args(field.type)
            lines.append(f'{inner}"{field.name}"{"?" if asked else ""}: {shape(field.type, inner)}')
        joined = " ".join(line.strip() + "," for line in lines).rstrip(",")
        if len(indent) + len(joined) < 90:
            return "{" + joined + "}"
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        args = [k for k in typing.get_args(kind) if k not in (msgspec.UnsetType, msgspec.Raw)]
        return " | ".join(shape(k, indent) for k in args)
    if typing.get_origin(kind) is list:
        return f"[{shape(typing.get_args(kind)[0], indent)}]"
    if typing.get_origin(kind) is dict:
        key, value = typing.get_args(kind)
        return "{" + shape(key, indent) + ": " + shape(value, indent) + "}"
    names = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null", Any: "any"}
    return names[kind]


def block(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def struct_names(kind: Any) -> Iterator[type]:
    """The structs that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for part in typing.get_args(kind):
        yield from struct_names(part)


def endpoints() -> str:
    rows = []
    for which in app.ENDPOINTS:
        methods = ", ".join(which.methods) if isinstance(which, app.Plain) else "POST"
        text = first_paragraph(which.handler.__doc__, which.handler.__name__)
        rows.append([f"`{methods} {which.path.replace(':path', '')}`", text])
    return "## Endpoints\n\n" + table(["endpoint", "what it does"], rows)


def requests() -> str:
    """A section for each endpoint with a body. Fields that several share stand in one table before them."""
    posts = [which for which in app.ENDPOINTS if isinstance(which, app.Post)]
    shared = protocol._Generation
    sharing = [which for which in posts if issubclass(which.takes, shared)]
    common = {field.name for field in msgspec.structs.fields(shared)}
    out = ["## Fields of " + " and ".join(f"`{which.path}`" for which in sharing) + "\n", fields_of(shared)]
    inner = {s for which in posts for f in msgspec.structs.fields(which.takes) for s in struct_names(f.type)}
    for which in posts:
        own = {field.name for field in msgspec.structs.fields(which.takes)}
        also = " These, and the fields above:" if which in sharing else ""
        text = first_paragraph(which.handler.__doc__, which.handler.__name__)
        out.append(f"## POST {which.path}\n\n{text}{also}\n")
        out.append(fields_of(which.takes, own - common if which in sharing else None))
        out.append("The answer; `?` marks what is only there when asked for:\n")
        out.append(block(shape(which.answer)))
        if which.chunk is not None and which.chunk is not which.answer:
            out.append("One event of a stream:\n")
            out.append(block(shape(which.chunk)))
        elif which.chunk is not None:
            out.append("The events of a stream have the same shape.\n")
    if protocol.Message in inner:
        out.append("## A message\n")
        out.append(fields_of(protocol.Message))
        out.append("A part of `content`:\n")
        out.append(fields_of(protocol.Part))
    return "\n".join(out)


def other_answers() -> str:
    out = ["## Other answers\n"]
    for which in app.ENDPOINTS:
        if isinstance(which, app.Plain) and which.answer is not None:
            out.append(f"`{which.path.replace(':path', '')}`:\n")
            out.append(block(shape(which.answer)))
    return "\n".join(out)


def passed_over() -> str:
    ignored = [[f"`{name}`", why] for name, why in protocol.HARMLESS.items()]
    off = [
        [f"`{name}`", ", ".join(f"`{json.dumps(value)}`" for value in field.values), field.why]
        for name, field in protocol.OFF.items()
    ]
    return (
        "## Fields that are ignored\n\nThey are accepted by every endpoint that takes a body, and change nothing.\n\n"
        + table(["field", "because"], grouped(ignored))
        + '\n## Fields that are refused\n\nA client that sends the value for "off" gets its answer; any other value is '
        "400 with code `unsupported_field`.\n\n" + table(["field", "off", "because"], grouped(off))
    )


def flags() -> str:
    defaults = {f.name: f.default for f in settings.Settings.__dataclass_fields__.values()}
    rows = []
    for option in settings.OPTIONS:
        said = re.search(r"\s*\(default:? ([^)]*)\)", option.help)
        value = defaults[option.dest]
        default = said[1] if said else "" if value in (None, (), False) else f"`{value}`"
        note = "; a switch" if option.switch else ""
        if option.repeat and "more than once" not in option.help:
            note = "; a list"
        text = re.sub(r"\s*\(default[^)]*\)", "", option.help)
        rows.append([f"`{option.flag}`", f"`{option.env}`", default, text + note])
    return (
        "## Flags\n\nA flag wins over its environment variable. In a variable, a list is separated by commas and a "
        "switch is `1` or `0`.\nSizes are bytes, or have a unit: `512MiB`, `2GiB`, `1.5G`.\n\n"
        + table(["flag", "environment", "default", "meaning"], rows)
        + "\nA checkpoint is compiled into the cache: `--cache-dir`, else `XLLM_CACHE_DIR`, else "
        "`$XDG_CACHE_HOME/xllm-compiler`, else `~/.cache/xllm-compiler`.\n"
    )


class _Idle:
    """An engine that has nothing to do."""

    def stats(self) -> EngineStats:
        return EngineStats()

    def health(self) -> Health:
        return Health(True, False, 0.0, None)


def metrics() -> str:
    """Every family of a scrape of a server that has seen one of everything."""
    guard = ConnectionGuard(1, 1.0, Budget(1))
    guard.refused["code"] = 1
    model = ModelInfo("model", "Model", "0", "f32", 1, 1, (0,), None, 1, 1, 1, 16)
    all_counts = Metrics("model")
    all_counts.http["GET", "/health", 200] = 1
    all_counts.sources += [
        engine_metrics.engine_samples(_Idle()),
        engine_metrics.connection_samples(guard),
        engine_metrics.log_samples(lambda: {"stderr": 1}),
        engine_metrics.start_samples(model, [("weights", 1)], 1, {"listen": 1.0}),
    ]
    rows = []
    for family in all_counts.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
        own = [f"`{label}`" for label in labels if label not in ("model_name", "engine", "le")]
        rows.append([f"`{name}`", family.type, ", ".join(own), family.documentation])
    return (
        "## Metrics\n\n`GET /metrics`. Names that begin with `vllm:` mean what they mean in vLLM. All but "
        "`http_requests_total` have the labels `model_name` and `engine`.\n\n"
        + table(["metric", "kind", "labels", "meaning"], rows)
    )


def raised_codes() -> dict[int, set[str]]:
    """HTTP status -> the error codes raised with it, read off the calls in the server's source."""
    found: dict[int, set[str]] = {400: {"capacity"}, 500: set()}
    for path in sorted(SERVER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name not in ("ApiError", "bad_request", "unavailable"):
                continue
            assert isinstance(node, ast.Call)
            given = {word.arg: word.value for word in node.keywords}
            status = given.get("status") or (node.args[0] if name == "ApiError" else None)
            number = {"bad_request": 400, "unavailable": 503}.get(name)
            if isinstance(status, ast.Constant):
                number = int(str(status.value))
            code = given.get("code")
            if number is not None and isinstance(code, ast.Constant):
                found.setdefault(number, set()).add(str(code.value))
            elif isinstance(code, ast.JoinedStr):
                raise SystemExit(f"{path.name}:{node.lineno}: an error code that is made up of parts cannot be listed")
    return found


def errors() -> str:
    rows = [
        [str(status), ", ".join(f"`{code}`" for code in sorted(codes))]
        for status, codes in sorted(raised_codes().items())
        if codes
    ]
    return ERRORS + table(["status", "codes"], rows)


def page() -> str:
    """The whole page."""
    open_paths = ", ".join(f"`{path}`" for path in sorted(middleware.OPEN_PATHS))
    parts = [HEAD.format(open=open_paths), endpoints(), requests(), passed_over(), other_answers(), errors()]
    return "\n".join([*parts, flags(), metrics()])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
