"""Where passes are tried: every corpus entry at every sensible point of the preset. Owns that choice and its caches.

A pass on graphs is tried on every entry as it is, once canonical (before the fusions), once everything else has run
(before the schedule), and, if it stands in the preset, on exactly what it gets where it stands first. A pass on a later
stage gets what the preset leaves in that stage. Points at which a module is the same are one. A module with collectives
is also tried with groups of two ranks as it is, and of four at the other points, unless it fits its own sizes only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module, Stage
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.ops import Collective
from xllm_compiler.passes.base import Capabilities, Pass, PassContext
from xllm_compiler.passes.manager import MAX_ROUNDS, Fix, Item, Pipeline, parse_pipeline
from xllm_compiler.targets import DEFAULT, target_class
from xllm_compiler.testing.corpus import Entry
from xllm_compiler.testing.edits import with_ranks
from xllm_compiler.testing.equiv import Reference
from xllm_compiler.testing.laws_trial import Source

PRESET = f"@{DEFAULT}"
"""Where passes are tried unless the preset of another target is asked for."""
RANKS = (2, 4)  # as it is, and at all later points
SMALL = 24  # ops; larger modules are interpreted at these sizes only: a ragged step, and one of decoding
SIZES = ({"N": 7}, {"N": 3, "B": 3})


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the preset: `prefix` is what runs before it."""

    label: str
    prefix: tuple[Item, ...]
    stage: Stage


def points(cls: type[Pass], preset: str = PRESET) -> list[Point]:
    """Where a pass is tried on modules of stage graph, earliest first. `preset`: such as "@cpu"."""
    every = _preset_points(preset)
    fitting = [point for point in every if point.stage == cls.needs]
    own = [point for point in fitting if point.label == f"before {cls.name}" and point.prefix]
    fusions = next((point for point in fitting if point.label.startswith("before fuse-")), None)
    chosen = [*fitting[:1], *([fusions] if fusions else []), *own[:1], *fitting[-1:]]
    return list(dict.fromkeys(chosen))


def _preset_points(preset: str) -> list[Point]:
    """Every place of the preset, each pass of a fix(..) included as in its first round; the last one is its end."""
    out: list[Point] = []
    stage: Stage = "graph"

    def walk(items: Sequence[Item], done: tuple[Item, ...]) -> None:
        nonlocal stage
        for i, item in enumerate(items):
            before = (*done, *items[:i])
            if isinstance(item, Fix):
                walk(item.items, before)
            else:
                out.append(Point("as it is" if not before else f"before {item.name}", before, stage))
                stage = item.leaves

    items = parse_pipeline(preset).items
    walk(items, ())
    out.append(Point(f"after {preset}", items, stage))
    return out


class Workbench:
    """A corpus with what pipelines made of it, shared by all passes of a process. `preset`: of the target that passes
    are tried for."""

    def __init__(self, entries: Iterable[Entry], preset: str = PRESET) -> None:
        self.entries = list(entries)
        self.preset = preset
        self._capabilities = target_class(preset.removeprefix("@").partition("-")[0]).capabilities
        self.unreachable: dict[str, str] = {}  # source -> why the passes before it could not be run
        self._snapshots: dict[str, dict[tuple[Item, ...], Module | None]] = {}
        self._references: dict[str, Reference] = {}
        self._sources: dict[tuple[Point, ...], list[Source]] = {}

    def sources(self, cls: type[Pass]) -> list[Source]:
        """Everything that a pass is tried on, no module twice, small ones first."""
        places = points(cls, self.preset)
        if (*places,) not in self._sources:
            out: dict[str, Source] = {}
            for entry in self.entries:
                for source in self._of_entry(entry, places, cls.needs):
                    out.setdefault(structural_hash(source.module), source)
            self._sources[*places,] = sorted(out.values(), key=lambda s: (s.ops, s.name, s.point))
        return self._sources[*places,]

    def _of_entry(self, entry: Entry, places: Sequence[Point], needs: Stage) -> Iterator[Source]:
        module = self._snapshot(entry, ())
        assert module is not None
        if module.stage != "graph":  # a test input of a later stage: only passes of that stage want it
            if module.stage == needs:
                yield self._source(entry.name, "as it is", module)
            return
        for place in places:
            here = self._snapshot(entry, place.prefix)
            if here is None or here.stage != needs:
                continue
            yield self._source(entry.name, place.label, here)
            if any(isinstance(op, Collective) for f in here.funcs.values() for op in f.ops):
                ranks = RANKS[place is not places[0]]
                try:
                    more = with_ranks(here, ranks)
                except XllmError:
                    continue  # it is for as many as it says, and has been tried on those
                yield self._source(entry.name, f"{place.label}, {ranks} ranks", more)

    def _source(self, name: str, label: str, module: Module) -> Source:
        def reference() -> Reference:
            key = structural_hash(module)
            if key not in self._references:
                few = sum(len(f.ops) for f in module.funcs.values()) <= SMALL
                self._references[key] = Reference(module, None if few else fitting_sizes(module))
            return self._references[key]

        return Source(name, label, module, reference, self._capabilities)

    def _snapshot(self, entry: Entry, prefix: tuple[Item, ...]) -> Module | None:
        """The entry once `prefix` has run; None where that fails, which is another pass's fault and told there."""
        known = self._snapshots.setdefault(entry.name, {})
        if not known:
            known[()] = entry.module()
        if prefix not in known:
            start = max((p for p in known if p == prefix[: len(p)]), key=len)
            known[prefix] = self._run(entry, known[start], prefix[len(start) :])
        return known[prefix]

    def _run(self, entry: Entry, start: Module | None, items: tuple[Item, ...]) -> Module | None:
        if start is None:
            return None
        module = clone_module(start)
        try:
            _run_plainly(items, module, self._capabilities)
        except Exception as e:  # whatever it is, it is reported among the laws of the pass that raised it
            self.unreachable[f"{entry.name}, {Pipeline(items)}"] = f"{type(e).__name__}: {e}"
            return None
        return module


def _run_plainly(items: Sequence[Item], module: Module, target: Capabilities) -> bool:
    """Runs passes without any of the manager's checks, which take longer than the passes; whether one changed it."""
    changed = False
    for item in items:
        if isinstance(item, Fix):
            rounds = 0
            while rounds < MAX_ROUNDS and _run_plainly(item.items, module, target):
                rounds += 1
            changed |= rounds > 0
        else:
            changed |= item.run(module, PassContext(target, current=item.name))
    return changed


def fitting_sizes(module: Module) -> list[dict[str, int]] | None:
    """SIZES, where the module has such symbols; None: no step, so whatever shows mistakes."""
    symbols = module.scope.symbols
    return [dict(s) for s in SIZES] if "N" in symbols and "B" in symbols else None
