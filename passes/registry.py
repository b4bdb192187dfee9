"""Finding passes by name. Owns the table of our own passes and `@register_pass`; imports a pass only when asked for it.

To add a pass: write its file, decorate the class, add one line to BUILTIN. Passes from outside only need to be
imported; the decorator registers them. `load_passes` imports a module or a file by name; an installed package may offer
its passes by entry points of the group "xllm_compiler.passes", such as `fuse-swish = "my_passes.swish:FuseSwish"`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from xllm_compiler.errors import XllmError
from xllm_compiler.passes.base import Pass
from xllm_compiler.plugins import Plugins

P = TypeVar("P", bound=Pass)

_ROOT: Final = "xllm_compiler.passes."
_PLUGINS: Final = Plugins("xllm_compiler.passes", "pass", {})
BUILTIN: Final[dict[str, str]] = {  # name -> module below xllm_compiler.passes
    "assign-streams": "schedule.assign_streams",
    "canonicalise": "canonical.canonicalise",
    "cse": "cleanup.cse",
    "dce": "cleanup.dce",
    "fold": "cleanup.fold",
    "fuse-add-norm": "fusion.fuse_add_norm",
    "fuse-epilogue": "fusion.fuse_epilogue",
    "fuse-glu": "fusion.fuse_glu",
    "fuse-kv-append": "fusion.fuse_kv_append",
    "fuse-norm-rows": "fusion.fuse_norm_rows",
    "fuse-qkv": "fusion.fuse_qkv",
    "import-clean": "canonical.import_clean",
    "plan-memory": "memory.plan",
    "quantize-kv": "quantize.kv",
    "quantize-rows": "quantize.rows",
    "quantize-weights": "quantize.weights",
    "return-block-max": "fusion.return_block_max",
    "rotate-stream": "quantize.rotate_stream",
    "split-attention": "schedule.split_attention",
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
    return sorted({*BUILTIN, *_registered, *_PLUGINS.names()})


def pass_class(name: str) -> type[Pass]:
    """The class registered under `name`; an XllmError of kind "option" proposes the nearest name."""
    if name not in _registered:
        if name in BUILTIN:
            importlib.import_module(_ROOT + BUILTIN[name])
        elif (cls := _PLUGINS.load(name, Pass)) is not None and name not in _registered:  # type: ignore[type-abstract]
            raise XllmError("option", f"{cls.__module__}:{cls.__qualname__} does not register a pass {name!r}")
    if name not in _registered:
        help = did_you_mean(name, pass_names())
        if help.startswith("known"):
            help += "; one from outside needs --load FILE.py, or in pytest a line of `xllm_passes` in the ini"
        raise XllmError("option", f"there is no pass called {name!r}", help=help)
    return _registered[name]


def load_passes(spec: str) -> list[str]:
    """Imports a module by its dotted name, or a Python file by its path, and returns the names of the passes that it
    holds, in order of registration. A module, and what it imports in turn, is found in the current directory too, after
    everything that is installed. Raises kind "option"."""
    if spec.endswith(".py") or "/" in spec:
        module = _load_file(Path(spec))
    else:
        with _found_here():
            _import(f"module {spec}", lambda: importlib.import_module(spec))
        module = spec
    found = [n for n, c in _registered.items() if c.__module__ == module or c.__module__.startswith(module + ".")]
    if not found:
        raise XllmError("option", f"{spec} registers no pass", help="decorate a Pass class with @register_pass(name)")
    return found


@contextmanager
def _found_here() -> Iterator[None]:
    """Modules are found in the current directory. Last, and no longer than this: a torch.py that happens to lie there
    is not what our own imports mean."""
    here = os.getcwd()
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _load_file(path: Path) -> str:
    """Imports a file once under a name made of its own and of its contents, and returns that name: what is made of the
    name, such as a key of the compile cache, is then the same wherever the file lies."""
    full = path.resolve()
    try:
        digest = hashlib.sha256(full.read_bytes()).hexdigest()[:8]
    except OSError as error:
        raise XllmError("option", f"cannot read passes: {error.strerror}", where=str(path)) from None
    name = f"{full.stem}_{digest}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, full)
        if spec is None or spec.loader is None:
            raise XllmError("option", "this is not a Python file", where=str(path))
        module = importlib.util.module_from_spec(spec)
        loader = spec.loader
        sys.modules[name] = module  # dataclasses look their module up
        try:
            _import(str(path), lambda: loader.exec_module(module))
        except XllmError:
            del sys.modules[name]
            raise
    return name


def _import(what: str, load: Callable[[], object]) -> None:
    """Runs somebody's import; whatever it raises is told as an error of theirs."""
    try:
        load()
    except XllmError:
        raise
    except Exception as error:
        text = f"cannot load passes from {what}: {type(error).__name__}: {error}"
        raise XllmError("option", text, help="XLLM_DEBUG=1 shows the traceback") from error


def did_you_mean(word: str, known: list[str]) -> str:
    """Help text: the nearest known word, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
