"""Presets by name: `@cpu` in a pipeline's text. They belong to targets, which are found as plug-ins; must not know any.

A preset is called like its target, or like it, a hyphen and more: `cpu`, `cpu-rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from xllm_compiler.errors import XllmError
from xllm_compiler.plugins import TARGETS


class HasPresets:
    """The part of a target that pipelines ask for. `presets`: items by name."""

    presets: ClassVar[Mapping[str, tuple[str, ...]]]


def preset(name: str) -> tuple[str, ...] | None:
    """The items of `@name`, or None where no installed target has it. Raises kind "option" where the target that it
    would belong to cannot be loaded."""
    cls = TARGETS.load(name.partition("-")[0], HasPresets)
    return None if cls is None else cls.presets.get(name)


def all_presets() -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Every preset by its name, and for each target that cannot be loaded the reason."""
    found: dict[str, tuple[str, ...]] = {}
    broken: dict[str, str] = {}
    for target in TARGETS.names():
        try:
            cls = TARGETS.load(target, HasPresets)
            found |= {} if cls is None else cls.presets
        except XllmError as error:
            broken[target] = error.message
    return dict(sorted(found.items())), broken
