"""The laws that every registered pass is held to, without asking. Owns the run of one pass over the corpus.

    for law in law_names():
        report = check("fuse-glu", law)        # None: kept; otherwise a text to read

One run per pass serves all of its laws. A pass is tried on every module of the corpus at several points of the preset
(laws_inputs.py), with its default options and with those of `samples`. The cheap laws are asked of every module, those
that interpret, print or run the pass again of a choice: of everything that the pass does somewhere, at several sizes.
What a pass refuses is counted, and so is what cannot be judged; a pass that never changes anything fails `exercised`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module, Op
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.base import Pass
from xllm_compiler.passes.manager import item_text, parse_pipeline
from xllm_compiler.passes.registry import did_you_mean, pass_class
from xllm_compiler.testing.corpus import Entry, corpus
from xllm_compiler.testing.laws_child import digests, digests_elsewhere
from xllm_compiler.testing.laws_inputs import PRESET, SMALL, Workbench
from xllm_compiler.testing.laws_judge import LAWS, Law, Unjudged
from xllm_compiler.testing.laws_report import head, how_to_go_on, report
from xllm_compiler.testing.laws_trial import Trial

CHEAP: Final = frozenset({"runs", "verifies", "honest", "signature"})  # asked of every module
SAMPLED: Final = 3  # every so manyth module is tried with samples of options
CLOSER: Final = (40, 12)  # larger modules that all laws are asked of: with the defaults, with a sample of options
ELSEWHERE: Final = (16, 6)  # texts that are given to a process with another hash seed

OPTIONS: Final = "options"
EXERCISED: Final = "exercised"


@dataclass
class Results:
    """What became of one pass: a report per broken law, and how much was looked at."""

    pass_name: str
    broken: dict[str, str] = field(default_factory=dict)
    tried: int = 0
    changed: int = 0
    refused: dict[str, str] = field(default_factory=dict)  # source -> what the pass said
    unjudged: dict[str, str] = field(default_factory=dict)  # source -> why its meaning could not be compared
    unreachable: dict[str, str] = field(default_factory=dict)  # corpus entry -> which pass before this one failed
    seconds: float = 0.0  # of processor time, what it shares with other passes included where it came first

    def __str__(self) -> str:
        """One line for people."""
        parts = [f"{self.changed} of {self.tried} modules changed"]
        parts += [f"{len(self.refused)} refused"] if self.refused else []
        parts += [f"{len(self.unjudged)} not comparable"] if self.unjudged else []
        parts += [f"{len(self.unreachable)} out of reach"] if self.unreachable else []
        parts += [f"broken: {', '.join(self.broken)}"] if self.broken else []
        return f"{self.pass_name}: {', '.join(parts)} ({self.seconds:.1f} s)"


class Laboratory:
    """A corpus, and the results of the passes that were tried on it at points of `preset`."""

    def __init__(self, entries: Iterable[Entry], preset: str = PRESET) -> None:
        self.bench = Workbench(entries, preset)
        self._results: dict[type[Pass], Results] = {}

    def results(self, pass_name: str) -> Results:
        """All laws on one pass, run when first asked for."""
        cls = pass_class(pass_name)
        if cls not in self._results:
            self._results[cls] = _Run(self.bench, cls).results()
        return self._results[cls]


class _Run:
    def __init__(self, bench: Workbench, cls: type[Pass]) -> None:
        self.bench, self.cls = bench, cls
        self.out = Results(cls.name)

    def results(self) -> Results:
        begin = time.process_time()
        for i, p in enumerate(self.settings()):
            trials = [Trial(p, source) for source in self.bench.sources(self.cls)[:: SAMPLED if i else 1]]
            for t in trials:
                if t.refused:
                    self.out.refused[f"{t.setting} on {t.source}"] = str(t.first.error)
                self.ask(t, cheap=True)
            firing = [t for t in trials if t.changed]
            for t in spread(firing, CLOSER[i > 0]):
                self.ask(t, cheap=False)
            self.elsewhere(p, firing or trials, ELSEWHERE[i > 0])
            if i == 0:
                self.out.tried, self.out.changed = len(trials), len(firing)
        self.out.unreachable = dict(self.bench.unreachable)
        self.exercised()
        self.out.seconds = time.process_time() - begin
        return self.out

    def settings(self) -> list[Pass]:
        """The pass as it is by default, then with each of its samples."""
        out: dict[Pass, None] = {self.cls(): None}
        for sample in self.cls.samples:
            try:
                (p,) = parse_pipeline(f"{self.cls.name}{sample}").passes()
                if list(parse_pipeline(item_text(p)).passes()) != [p]:
                    raise XllmError("internal", f"{item_text(p)} is read back as another setting")
            except XllmError as e:
                self.out.broken.setdefault(OPTIONS, f"pass {self.cls.name}, sample {sample!r}\n{e}")
                continue
            if p in out:
                text = f"pass {self.cls.name}: sample {sample!r} is a setting that is tried anyway"
                self.out.broken.setdefault(OPTIONS, f"{text}\n  help: name options that differ from the defaults")
            out[p] = None
        return list(out)

    def ask(self, t: Trial, cheap: bool) -> None:
        """Puts a trial before the laws that are still unbroken."""
        for law in LAWS:
            if law.name in self.out.broken or (law.name in CHEAP) != cheap:
                continue
            try:
                wrong = law.judge(t)
            except Unjudged as e:
                self.out.unjudged[str(t.source)] = str(e)
                continue
            if wrong is not None:
                self.out.broken[law.name] = report(law, t, wrong)

    def elsewhere(self, p: Pass, trials: Sequence[Trial], most: int) -> None:
        """Law `deterministic` across processes: one more process per setting."""
        law = law_named("deterministic")
        if law.name in self.out.broken or not trials:
            return
        chosen = trials[:: -(-len(trials) // most)]
        texts = [print_module(t.before, loc=True) for t in chosen]
        try:
            there = digests_elsewhere(p, texts)
        except XllmError as e:
            self.out.broken[law.name] = f"{head(item_text(p), law)}\n{e}"
            return
        for t, here, other in zip(chosen, digests(p, texts), there, strict=True):
            if here != other:
                lines = [head(t.setting, law), f"  on {t.source} ({t.source.ops} ops)"]
                lines.append("  a process with another PYTHONHASHSEED leaves another text, or other counts or remarks")
                lines.append(f"  help: {law.help}")
                self.out.broken[law.name] = "\n".join([*lines, *how_to_go_on(law, t, t.before)])
                return

    def exercised(self) -> None:
        """Laws that were never put to the test are not kept."""
        if self.out.changed and len(self.out.unjudged) < self.out.changed:
            return
        name = self.cls.name
        lines = [f"pass {name} breaks law `{EXERCISED}`: the corpus has a module that it changes"]
        if self.out.changed:
            where, why = next(iter(self.out.unjudged.items()))
            lines.append(
                f"  none of the {self.out.changed} modules that it changed can be interpreted, such as {where}"
            )
            lines += [f"  {line}" for line in why.splitlines()]
        else:
            refused = f", {len(self.out.refused)} refused" if self.out.refused else ""
            lines.append(f"  {self.out.tried} modules in stage {self.cls.needs} were tried, none changed{refused}")
            lines += [f"  {line}" for why in list(self.out.refused.values())[:1] for line in why.splitlines()]
        lines.append(f"  help: add tests/passes/{name}/fires.xir with a module that the pass changes")
        self.out.broken[EXERCISED] = "\n".join(lines)


def spread(trials: Sequence[Trial], most: int) -> list[Trial]:
    """All trials on small modules, and up to `most` others that differ in what the pass did, and then in size; at least
    one of each kind of doing.

    What a pass did is what it counted, which kinds of op came and went, and on how many ranks. Two ops are of a kind if
    they agree in name, in the optional operands that they have, and in choices such as an activation.
    """
    kinds: dict[object, list[Trial]] = {}
    chosen: dict[Trial, None] = {}
    for t in trials:
        if t.source.ops <= SMALL:
            chosen[t] = None
        before, after = _op_kinds(t.before), _op_kinds(t.after)
        key = (t.ranks, tuple(t.first.stats), tuple(sorted(before - after)), tuple(sorted(after - before)))
        kinds.setdefault(key, []).append(t)
    most += len(chosen)
    queues = [_far_apart(k) for k in kinds.values()]
    for i in range(max(map(len, queues), default=0)):
        for queue in queues:
            if i < len(queue) and (i == 0 or len(chosen) < most):
                chosen[queue[i]] = None
    return [t for t in trials if t in chosen]


def _far_apart(trials: Sequence[Trial]) -> list[Trial]:
    """The same in another order, in which every beginning is spread over the whole: middle, quarters, eighths.."""
    out: dict[Trial, None] = {}
    step = len(trials)
    while step:
        out.update(dict.fromkeys(trials[step // 2 :: step]))
        step //= 2
    return list(out)


def _op_kinds(module: Module) -> Counter[tuple[str, ...]]:
    return Counter(_kind(op) for f in module.funcs.values() for op in f.ops)


def _kind(op: Op) -> tuple[str, ...]:
    optional = [f.name for f in op.SPEC.operands if f.arity == "opt" and op.field(f.name)]
    choices = [
        f"{a.name}={op.attrs[a.name]}" for a in op.SPEC.attrs if a.kind in ("enum", "bool") and a.name in op.attrs
    ]
    return (op.name, *optional, *choices)


def law_names() -> list[str]:
    """Every law, in the order in which they are best read."""
    return [EXERCISED, *(law.name for law in LAWS), OPTIONS]


def law_named(name: str) -> Law:
    """A law that is judged module by module."""
    return next(law for law in LAWS if law.name == name)


def check(pass_name: str, law_name: str, directories: Sequence[Path] = (), preset: str = PRESET) -> str | None:
    """The report of a broken law, None where it is kept. `directories`: more modules, from *.xir test inputs there.
    `preset`: of the target that the pass is tried for."""
    if law_name not in law_names():
        raise XllmError("option", f"there is no law called {law_name!r}", help=did_you_mean(law_name, law_names()))
    return laboratory(tuple(directories), preset).results(pass_name).broken.get(law_name)


def tally(pass_name: str, directories: Sequence[Path] = (), preset: str = PRESET) -> str:
    """One line about a pass: how many modules it was tried on, and how many it changed."""
    return str(laboratory(tuple(directories), preset).results(pass_name))


@cache
def laboratory(directories: tuple[Path, ...] = (), preset: str = PRESET) -> Laboratory:
    """The corpus with the test inputs of `directories`: one per process and preset."""
    return Laboratory(corpus(directories), preset)
