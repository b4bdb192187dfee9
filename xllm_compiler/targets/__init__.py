"""Targets: what a checkpoint can be compiled for. A file here for each of ours; others come as plug-ins.

`base` is what a target is. An installed package offers one by an entry point of the group "xllm_compiler.targets", such
as `npu = "my_npu.target:Npu"`, and its half of the runtime by one of the same name in "xllm_compiler.runtime_targets"
(`runtime/targets.py`).
"""

from __future__ import annotations

from xllm_compiler.errors import XllmError
from xllm_compiler.plugins import TARGETS
from xllm_compiler.targets.base import Lowered, Target

DEFAULT = "cpu"
"""The target of who names none."""


def target_class(name: str) -> type[Target]:
    """The target called `name`. Raises kind "option" where there is none, it cannot be loaded, or two packages offer
    it."""
    cls = TARGETS.load(name, Target)  # type: ignore[type-abstract]
    if cls is None:
        raise XllmError("option", f"--target {name!r} is not known", help=f"installed: {', '.join(TARGETS.names())}")
    wrong = [preset for preset in cls.presets if preset.partition("-")[0] != name]
    if cls.name != name or name not in cls.presets or wrong:
        raise XllmError(
            "option",
            f"target {name} is called {cls.name!r} by its own class and has the presets {', '.join(cls.presets)}",
            where=f"{cls.__module__}.{cls.__qualname__}",
            help=f"its `name` must be {name!r}; it needs a preset of that name, and others are called {name}-SOMETHING",
        )
    return cls


__all__ = ["DEFAULT", "TARGETS", "Lowered", "Target", "target_class"]
