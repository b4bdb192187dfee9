"""Finding passes by name. Owns the table of our own passes and `@register_pass`; imports a pass only when asked for it.

To add a pass: write its file, decorate the class, add one line to BUILTIN. Passes from outside only need to be
imported; the decorator registers them.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from typing import Final, TypeVar

from xllm_compiler.errors import XllmError
from xllm_compiler.passes.base import Pass

P = TypeVar("P", bound=Pass)

_ROOT: Final = "xllm_compiler.passes."
BUILTIN: Final[dict[str, str]] = {  # name -> module below xllm_compiler.passes
    "canonicalise": "canonical.canonicalise",
    "cse": "cleanup.cse",
    "dce": "cleanup.dce",
    "fold": "cleanup.fold",
    "fuse-add-norm": "fusion.fuse_add_norm",
    "fuse-epilogue": "fusion.fuse_epilogue",
    "fuse-glu": "fusion.fuse_glu",
    "fuse-kv-append": "fusion.fuse_kv_append",
    "fuse-qkv": "fusion.fuse_qkv",
    "import-clean": "canonical.import_clean",
    "plan-memory": "memory.plan",
    "tabulate-positions": "canonical.tabulate_positions",
}
_registered: dict[str, type[Pass]] = {}


def register_pass(name: str) -> Callable[[type[P]], type[P]]:
    """Makes a pass class known under a kebab-case name."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or name == "fix":
        raise XllmError("internal", f"{name!r} is not a pass name", help="use kebab-case, such as fuse-norm")

    def declare(cls: type[P]) -> type[P]:
        old = _registered.get(name)
        if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise XllmError("internal", f"pass {name} is registered by {old.__module__} and {cls.__module__}")
        if not cls.__doc__:
            raise XllmError("internal", f"pass {name} needs a docstring that shows before and after")
        cls.name = name
        _registered[name] = cls
        return cls

    return declare


def pass_names() -> list[str]:
    """Every known name, sorted."""
    return sorted({*BUILTIN, *_registered})


def pass_class(name: str) -> type[Pass]:
    """The class registered under `name`; an XllmError of kind "option" proposes the nearest name."""
    if name not in _registered and name in BUILTIN:
        importlib.import_module(_ROOT + BUILTIN[name])
    if name not in _registered:
        raise XllmError("option", f"there is no pass called {name!r}", help=did_you_mean(name, pass_names()))
    return _registered[name]


def did_you_mean(word: str, known: list[str]) -> str:
    """Help text: the nearest known word, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
