"""JSON from files that anyone may have written. Owns what is refused that Python's reader takes; must not know what the
values mean.

What comes out can be walked recursively, printed, encoded as UTF-8 and written as JSON again.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, Final, NoReturn

from xllm_compiler.errors import XllmError

MAX_DEPTH: Final = 64  # of lists and objects inside each other
_MAX_DIGITS: Final = 400  # of an integer; the largest float has 309
_AGAIN: Final = "the artifact is damaged; copy it again or compile the checkpoint again"


def parse_json(data: bytes, name: str) -> Any:
    """The value in `data`, which is UTF-8 without a byte order mark. Refused as kind "artifact", beside what is no
    JSON: NaN and infinite numbers, half surrogates, keys that are there twice, nesting deeper than MAX_DEPTH, integers
    of hundreds of digits."""
    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it starts with a byte order mark")
        value = json.loads(
            text, parse_constant=_constant, parse_int=_integer, parse_float=_float, object_pairs_hook=_object
        )
        _check(value)
    except RecursionError:
        raise _bad(name, f"nested deeper than {MAX_DEPTH}") from None
    except UnicodeDecodeError as error:
        raise _bad(name, f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise _bad(name, str(error)) from None
    return value


def _bad(name: str, why: str) -> XllmError:
    return XllmError("artifact", f"{name} is not JSON as it should be: {why}", where=name, help=_AGAIN)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond all numbers")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _check(value: Any) -> None:
    """Strings and nesting, level by level, without recursion."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_string(item)
            elif isinstance(item, dict):
                for name in item:
                    _check_string(name)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level, depth = below, depth + 1


def _check_string(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a string with half of a surrogate pair: {text[:40]!r}") from None
