"""How a broken law is told: the smallest input that shows it, in a file, and the commands to go on with.

pass fuse-glu breaks law `meaning`: every function computes what it did, in exact arithmetic
  on random/7, before fuse-glu (81 ops, reduced to 4)
  <what is wrong: the op, its window, its lineage>
  help: ...
  input: /tmp/xllm-laws-x1/fuse-glu-meaning.xir
  reproduce: xllm-opt /tmp/.. -p fuse-glu --check-equiv
"""

from __future__ import annotations

import re
import shlex
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.testing.failures import message_class
from xllm_compiler.testing.laws_child import load_spec
from xllm_compiler.testing.laws_judge import Law, Unjudged
from xllm_compiler.testing.laws_trial import Trial, source_of
from xllm_compiler.testing.reducer import reduce_module

REDUCE_SECONDS: Final = 4.0  # per law that is broken; what has been reached by then is shown

# What shows a breach again; {f}: the file, {p}: the pass, {p2}: the pass twice.
_COMMANDS: Final = {
    "runs": ("xllm-opt {f} -p {p}", "xllm-bisect {f} -p {p} --check error"),
    "verifies": ("xllm-opt {f} -p {p}", "xllm-bisect {f} -p {p} --check verify"),
    "text": ("xllm-opt {f} -p {p} | xllm-opt -",),
    "deterministic": (
        "PYTHONHASHSEED=1 xllm-opt {f} -p {p} --loc --remarks --stats",
        "PYTHONHASHSEED=2 xllm-opt {f} -p {p} --loc --remarks --stats",
    ),
    "honest": ("xllm-opt {f} -p {p}",),
    "signature": ("xllm-opt {f} -p {p} --diff",),
    "collectives": ("xllm-opt {f} -p {p} --diff",),
    "meaning": ("xllm-opt {f} -p {p} --check-equiv", "xllm-bisect {f} -p {p}"),
    "rounding": ("xllm-opt {f} -p {p} --check-equiv", "xllm-bisect {f} -p {p}"),
    "loss": ("xllm-opt {f} -p {p} --check-equiv", "xllm-bisect {f} -p {p}"),
    "ranks": ("xllm-opt {f} -p {p} --check-equiv", "xllm-bisect {f} -p {p}"),
    "idempotent": ("xllm-opt {f} -p {p2} --print-after all --diff",),
    "interleavings": ("xllm-opt {f} -p {p} | xllm-run - --orders 16",),
}


def report(law: Law, t: Trial, wrong: str) -> str:
    """The whole text for a law that a trial broke; writes the input, reduced where that works in time."""
    small, text = _reduced(law, t, wrong)
    ops, left = t.source.ops, small.source.ops
    lines = [head(t.setting, law), f"  on {t.source} ({ops} ops{f', reduced to {left}' if left < ops else ''})"]
    lines += [f"  {line}" for line in text.splitlines()]
    if small.first.stats:
        lines.append("  it counted " + ", ".join(f"{name}: {n}" for name, n in small.first.stats.items()))
    return "\n".join([*lines, f"  help: {law.help}", *how_to_go_on(law, t, small.before)])


def head(setting: str, law: Law) -> str:
    """The first line of a report."""
    return f"pass {setting} breaks law `{law.name}`: {law.says}"


def how_to_go_on(law: Law, t: Trial, module: Module) -> list[str]:
    """Writes the input and gives the commands for it."""
    cls = type(t.p)
    path = folder() / f"{cls.name}-{law.name}.xir"
    path.write_text(f"// {head(t.setting, law)}\n{print_module(module, loc=True)}", encoding="utf-8")
    spec = load_spec(cls)
    load = f" --load {shlex.quote(spec)}" if spec else ""
    p = shlex.quote(t.setting) + load
    p2 = shlex.quote(f"{t.setting},{t.setting}") + load
    commands = [c.format(f=shlex.quote(str(path)), p=p, p2=p2) for c in _COMMANDS[law.name]]
    lines = [f"  input: {path}"]
    return lines + [f"  {'reproduce:' if i == 0 else ' ' * 10} {c}" for i, c in enumerate(commands)]


@cache
def folder() -> Path:
    """Where inputs of this process go; it stays when the process ends."""
    return Path(tempfile.mkdtemp(prefix="xllm-laws-"))


def _reduced(law: Law, t: Trial, wrong: str) -> tuple[Trial, str]:
    """A trial on a smaller module that breaks the law in the same way, and what is wrong there; `t` where none is
    found. Its module has been read back from text, so that the file shows what the report says."""
    wanted = _kind(wrong)

    def breaks(module: Module) -> bool:
        found = judged(law, Trial(t.p, source_of(module)))
        return found is not None and _kind(found) == wanted

    try:
        module = reduce_module(t.before, breaks, time_limit=REDUCE_SECONDS)
    except XllmError:
        return t, wrong  # the source itself does not show it a second time
    small = Trial(t.p, source_of(parse_module(print_module(module, loc=True))))
    found = judged(law, small)
    return (t, wrong) if found is None else (small, found)


def judged(law: Law, t: Trial) -> str | None:
    """What is wrong, None also where that cannot be told."""
    try:
        return law.judge(t)
    except Unjudged:
        return None


def _kind(wrong: str) -> str:
    """What stays the same of a finding while its module shrinks."""
    first, *rest = wrong.splitlines()
    invariant = re.search(r"\bV\d+\b", wrong)
    if invariant is not None:
        return f"{message_class(first)} {invariant[0]}"
    by_next = first.startswith("it raises") and rest
    return message_class(rest[0]) if by_next else message_class(re.split(r"[:(]", first)[0])
