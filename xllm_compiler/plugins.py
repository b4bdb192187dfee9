"""What installed packages offer under a name, by entry points: targets and the runtime's half of them, and passes.

Must not know what is offered: who asks says which class it must be. A package that cannot be loaded, or two that offer
one name, are an error for whoever asks for that name, and for nobody else.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from xllm_compiler.errors import XllmError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plugins:
    """The entry points of `group`. `what`: the word for one of them in messages. `builtin`: our own, spelled as entry
    points are; asking for one of these does not read the metadata of all installed packages, which takes 10 ms."""

    group: str
    what: str
    builtin: Mapping[str, str]

    def offers(self) -> dict[str, list[EntryPoint]]:
        """The entry points of other packages, by name."""
        from importlib.metadata import entry_points  # slow, and not needed for what is built in

        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            if entry.value != self.builtin.get(entry.name):
                found.setdefault(entry.name, []).append(entry)
        return found

    def names(self) -> list[str]:
        """Everything that is offered, sorted."""
        return sorted({*self.builtin, *self.offers()})

    def load(self, name: str, base: type[T]) -> type[T] | None:
        """The subclass of `base` that is offered as `name`; None where nobody offers it. Raises kind "option", which
        names the package, where that fails."""
        if name in self.builtin:
            module, _, attribute = self.builtin[name].partition(":")
            return self._checked(getattr(importlib.import_module(module), attribute), name, base, "xllm-compiler")
        entries = self.offers().get(name, [])
        if not entries:
            return None
        if len(entries) > 1:
            raise self._contested(name, [_package(entry) for entry in entries])
        (entry,) = entries
        try:
            found = entry.load()
        except Exception as error:  # whatever their code raises is told as theirs
            raise XllmError(
                "option",
                f"package {_package(entry)} offers {self.what} {name}, which cannot be loaded: "
                f"{type(error).__name__}: {error}",
                where=entry.value,
                help="mend or uninstall the package; XLLM_DEBUG=1 shows the traceback",
            ) from error
        return self._checked(found, name, base, _package(entry))

    def refuse_rivals(self, name: str) -> None:
        """Raises kind "option" where another package offers one of our own names: which is meant cannot be known."""
        rivals = self.offers().get(name, []) if name in self.builtin else []
        if rivals:
            raise self._contested(name, ["xllm-compiler", *map(_package, rivals)])

    def _contested(self, name: str, packages: list[str]) -> XllmError:
        return XllmError(
            "option",
            f"{self.what} {name} is offered by several packages: {', '.join(sorted(packages))}",
            where=f"entry points of the group {self.group}",
            help="uninstall all of them but one",
        )

    def _checked(self, found: Any, name: str, base: type[T], package: str) -> type[T]:
        if not isinstance(found, type) or not issubclass(found, base):
            raise XllmError(
                "option",
                f"package {package} offers {self.what} {name}, which is not a subclass of "
                f"{base.__module__}.{base.__qualname__}",
                where=f"entry points of the group {self.group}",
                help="mend or uninstall the package",
            )
        return found


TARGETS = Plugins("xllm_compiler.targets", "target", {"cpu": "xllm_compiler.targets.cpu:Cpu"})
"""The compiler's half of each target: subclasses of `targets.Target`."""


def _package(entry: EntryPoint) -> str:
    return "(without a name)" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
