"""Strict reading of JSON values into frozen dataclasses. Owns type checks; must not know what any field means."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin

from xllm_compiler.errors import XllmError

_INT_MAX = 2**63 - 1

T = TypeVar("T")


def bad(where: str, message: str) -> XllmError:
    """A manifest value is not what this format allows."""
    return XllmError(
        "artifact",
        f"manifest.json: {message}",
        where=where,
        help="the artifact is damaged; compile the checkpoint again",
    )


def decode(cls: type[T], value: object, where: str = "$") -> T:
    """Build dataclass `cls` from parsed JSON. Every field must be present, no other key may be, and types are exact:
    a bool is no int, a float is no int, and integers fit in a signed 64-bit word."""
    return typing.cast(T, _decode(cls, value, where))


def encode(value: object) -> Any:
    """The JSON value of a dataclass tree; inverse of `decode`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {name: encode(item) for name, item in value.items()}
    return value


@cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _decode(tp: Any, value: object, where: str) -> object:
    origin = get_origin(tp)
    if tp is Any:
        return _plain(value, where)
    if dataclasses.is_dataclass(tp):
        return _decode_fields(typing.cast(type, tp), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise bad(where, f"a list is expected, not {shown(value)}")
        return tuple(_decode(get_args(tp)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise bad(where, f"an object is expected, not {shown(value)}")
        return {name: _decode(get_args(tp)[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(tp):
            return None
        (inner,) = (arg for arg in get_args(tp) if arg is not type(None))
        return _decode(inner, value, where)
    if tp is int:
        if type(value) is not int or abs(value) > _INT_MAX:
            raise bad(where, f"an integer is expected, not {shown(value)}")
        return value
    if tp is bool:
        if not isinstance(value, bool):
            raise bad(where, f"true or false is expected, not {shown(value)}")
        return value
    if tp is str:
        if not isinstance(value, str):
            raise bad(where, f"a string is expected, not {shown(value)}")
        return value
    raise TypeError(f"{where}: no decoder for {tp!r}")


def _decode_fields(cls: type, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise bad(where, f"an object is expected, not {shown(value)}")
    hints = _fields(cls)
    missing = [name for name in hints if name not in value]
    unknown = sorted(name for name in value if name not in hints)
    if missing:
        raise bad(where, f"missing {', '.join(map(repr, missing))}")
    if unknown:
        raise bad(where, f"unknown {', '.join(map(shown, unknown[:8]))}")
    return cls(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


def _plain(value: object, where: str) -> object:
    """Any JSON value, as it stands; only an integer's width is checked."""
    if isinstance(value, dict):
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is int and abs(value) > _INT_MAX:
        raise bad(where, f"an integer is expected, not {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value in a message, however long it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
