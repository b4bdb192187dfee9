"""Where an op came from. Owns source locations and pass lineage; must not know how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Loc:
    """The model's source line an op was traced from, and the rewrites that touched it since.

    `file` and `line` are the model's source (line 0: unknown), `module_path` the torch module ("model.layers.3.mlp"),
    `lineage` the "pass/rule" entries that rewrote it, oldest first.
    """

    file: str = ""
    line: int = 0
    module_path: str = ""
    lineage: tuple[str, ...] = ()

    def touched_by(self, entry: str) -> Loc:
        """The same place with one more lineage entry; a repeat of the last entry is not recorded twice."""
        if self.lineage and self.lineage[-1] == entry:
            return self
        return replace(self, lineage=(*self.lineage, entry))

    def describe(self) -> str:
        """One line for people: `model.layers.3.mlp (modeling_llama.py:268)`, or "" when nothing is known."""
        source = f"{self.file}:{self.line}" if self.file else ""
        if self.module_path and source:
            return f"{self.module_path} ({source})"
        return self.module_path or source


UNKNOWN = Loc()
