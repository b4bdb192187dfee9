"""`xllm-opt --list-passes` and `--help-pass`: passes as text for people. Reads the registry only."""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_type_hints

from xllm_compiler.errors import XllmError
from xllm_compiler.passes.base import Pass
from xllm_compiler.passes.presets import all_presets
from xllm_compiler.passes.registry import pass_class, pass_names


def list_passes() -> str:
    """Every known pass with its stages, options and defaults and the first line of its docstring, then the presets."""
    blocks = []
    for name in pass_names():
        try:
            cls = pass_class(name)
        except XllmError as error:  # somebody else's package is broken; the other passes are still there
            blocks.append(f"{name}\n    cannot be loaded: {error.message}")
            continue
        blocks.append(f"{_head(cls)}\n    {_doc(cls).splitlines()[0]}")
    found, broken = all_presets()
    presets = [f"@{name}\n    {','.join(items)}" for name, items in found.items()]
    presets += [f"@{name}\n    cannot be loaded: {why}" for name, why in broken.items()]
    return "\n".join([*blocks, "", "presets", "", *presets])


def help_pass(name: str) -> str:
    """All that a pass says of itself: stages, options, promises that it takes back, its whole docstring."""
    cls = pass_class(name)
    lines = [_head(cls), "", _doc(cls), ""]
    hints = get_type_hints(cls)
    options = [f"  {_option(f)}  ({_kind(hints[f.name])})" for f in dataclasses.fields(cls)]
    lines += ["options:" if options else "no options", *options]
    promises = [f"rounding: up to {cls.ulps} units in the last place of a result's largest value"]
    if cls.changes_signature:
        promises.append("may change arguments and returns")
    if cls.reorders_collectives:
        promises.append("may reorder collectives")
    if not cls.idempotent:
        promises.append("a second run may change more")
    source = inspect.getsourcefile(cls)
    return "\n".join([*lines, "", *promises, *([f"source: {source}"] if source else [])])


def _head(cls: type[Pass]) -> str:
    options = [_option(f) for f in dataclasses.fields(cls)]
    return f"{cls.name}{'{' + ','.join(options) + '}' if options else ''}  [{cls.needs} -> {cls.leaves}]"


def _option(field: dataclasses.Field[object]) -> str:
    if field.default is dataclasses.MISSING:
        return field.name
    text = str(field.default)
    return f"{field.name}={text.lower() if isinstance(field.default, bool) else text}"


def _doc(cls: type[Pass]) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def _kind(hint: object) -> str:
    return {bool: "true or false", int: "integer", float: "number", str: "word"}.get(hint, str(hint))  # type: ignore[call-overload, no-any-return]
