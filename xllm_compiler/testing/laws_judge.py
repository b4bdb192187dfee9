"""The laws: what every pass keeps unless it says otherwise. Owns what each law asks; trials come from laws_trial.py.

A judge looks at one trial and returns None, or a text that says what is wrong: the op in its window with its lineage
where there is one, a diff where texts disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.instruments import diff_text
from xllm_compiler.testing.laws_loss import excess
from xllm_compiler.testing.laws_streams import OTHER_VALUE, check_collectives, check_interleavings
from xllm_compiler.testing.laws_trial import Trial, run_pass

Judge = Callable[[Trial], str | None]

DIFF_LINES: Final = 24


@dataclass(frozen=True, slots=True)
class Law:
    """One promise: `says` in words, `judge` on a trial; `help` is what to do about a breach."""

    name: str
    says: str
    judge: Judge
    help: str


class Unjudged(Exception):
    """The question cannot be asked of this module; the text says why."""


def _runs(t: Trial) -> str | None:
    error = t.first.error
    if error is None or t.refused:
        return None
    text = str(error) if isinstance(error, XllmError) else f"{type(error).__name__}: {error}{_raised_at(error)}"
    return f"it raises\n{text}"


def _raised_at(error: Exception) -> str:
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return "" if tb is None else f"\n  at {tb.tb_frame.f_code.co_filename}:{tb.tb_lineno}"


def _verifies(t: Trial) -> str | None:
    if t.first.error is not None or t.broken is None:
        return None
    return f"what it leaves breaks an invariant\n{t.broken}"


def _text(t: Trial) -> str | None:
    if not t.sound or not t.changed:
        return None
    text = print_module(t.after)
    try:
        back = parse_module(text, "printed.xir")
    except XllmError as e:
        return f"what it leaves prints as text that does not parse\n{e}"
    again = print_module(back)
    if again != text:
        return f"what it leaves prints differently once it has been parsed\n{cut_diff(text, again)}"
    if structural_hash(back) != t.first.hash:
        return "what it leaves is another module once it has been printed and parsed, though both print alike"
    return None


def _deterministic(t: Trial) -> str | None:
    if t.first.error is not None:
        return None
    twin = run_pass(t.p, t.before, t.source.target)
    if twin.error is not None:
        return f"a second run on an equal module raises\n{twin.error}"
    if twin.text != t.first.text:
        return f"two runs on equal modules leave different texts\n{cut_diff(t.first.text, twin.text)}"
    if twin.stats != t.first.stats or twin.remarks != t.first.remarks:
        return f"two runs on equal modules count or remark differently: {t.first.stats} and {twin.stats}"
    return None


def _honest(t: Trial) -> str | None:
    if t.first.error is not None:
        return None
    if t.after.stage != t.p.leaves:
        return f"it promises to leave stage {t.p.leaves} and leaves {t.after.stage}"
    if t.first.claimed and not t.changed:
        return "run() returned True, and the module is what it was"
    if t.changed and not t.first.claimed:
        diff = cut_diff(print_module(t.before), print_module(t.after))
        return f"run() returned False, and the module is another one\n{diff}"
    return None


def _signature(t: Trial) -> str | None:
    if t.p.changes_signature or not t.sound:
        return None
    before, after = signature_text(t.before), signature_text(t.after, [*t.before.funcs])
    if before == after:
        return None
    return f"the interface of the module is another one\n{cut_diff(before, after)}"


def signature_text(module: Module, funcs: Sequence[str] | None = None) -> str:
    """What callers rely on: symbols, assumptions, groups, and of each function arguments, returns and aliases."""
    lines = [f"dim {s.name} in [{s.lo}, {s.hi}] % {s.multiple}" for s in module.scope.symbols.values()]
    lines += [f"assume {a.expr} >= 0" for a in module.scope.assumptions]
    lines += [f"group @{name} {group}" for name, group in module.groups.items()]
    for name in module.funcs if funcs is None else funcs:
        func = module.funcs.get(name)
        lines += [f"no @{name}"] if func is None else _func_lines(func)
    return "\n".join(lines) + "\n"


def _func_lines(func: Func) -> list[str]:
    lines = [f"@{func.name}"]
    lines += [f"  argument {i}, %{a.name}: {a.type} in {func.ranges.get(a)}" for i, a in enumerate(func.args)]
    for i, r in enumerate(func.returns):
        alias = func.aliases.get(i)
        lines.append(
            f"  return {i}, {func.outputs.get(i)}: {r.type}" + ("" if alias is None else f" alias %{alias.name}")
        )
    return lines


def _collectives(t: Trial) -> str | None:
    if t.p.reorders_collectives or not t.sound or not t.changed:
        return None
    found = _asked(check_collectives, t)
    if found is not None and OTHER_VALUE in found and (t.p.loss or _compared(t, True) is not None):
        return None  # wrong algebra, which another law tells better, or less precision, which is the pass's purpose
    return found


def _meaning(t: Trial) -> str | None:
    return _compared(t, True) if t.ranks == 1 else None


def _ranks(t: Trial) -> str | None:
    return _compared(t, True) if t.ranks > 1 else None


def _rounding(t: Trial) -> str | None:
    if _compared(t, True) is not None:
        return None  # wrong algebra, which another law tells better
    return _compared(t, False)


def _compared(t: Trial, precise: bool) -> str | None:
    if not t.sound or not t.changed or t.p.loss:
        return None
    if precise not in t.compared:
        t.compared[precise] = _asked(lambda t: _mismatch(t, precise), t)
    return t.compared[precise]


def _mismatch(t: Trial, precise: bool) -> str | None:
    found = t.reference.compare(t.after, ulps=t.p.ulps, modes=(precise,))
    return None if found is None else found.finding


def _loss(t: Trial) -> str | None:
    if not t.sound or not t.changed or not t.p.loss:
        return None
    return _asked(lambda t: excess(t.reference, t.after, t.p.loss), t)


def _asked(check: Judge, t: Trial) -> str | None:
    try:
        return check(t)
    except XllmError as e:
        if signature_text(t.before) != signature_text(t.after, [*t.before.funcs]):
            return None  # another interface cannot be compared; whether it may be another one is another law
        raise Unjudged(str(e)) from e


def _idempotent(t: Trial) -> str | None:
    if not t.p.idempotent or not t.sound or t.p.needs != t.p.leaves:
        return None
    again = run_pass(t.p, t.after, t.source.target)
    if again.error is not None:
        return f"a second run, on what the first one left, raises\n{again.error}"
    if again.hash != t.first.hash:
        diff = cut_diff(print_module(t.after), print_module(again.module))
        return f"a second run changes what the first one left\n{diff}"
    return None


def _interleavings(t: Trial) -> str | None:
    if not t.sound or t.after.stage == "graph":
        return None
    return _asked(check_interleavings, t)


def cut_diff(before: str, after: str) -> str:
    """The lines that differ, the first of them where there are many."""
    lines = diff_text(before, after).splitlines()
    left = len(lines) - DIFF_LINES
    return "\n".join([f"  {line}" for line in lines[:DIFF_LINES]] + ([f"  ... {left} lines more"] if left > 0 else []))


_BISECT = "`xllm-bisect` below finds the one rewrite that did it"

LAWS: Final[tuple[Law, ...]] = (
    Law(
        "runs",
        "it handles every sound module, or refuses it with an XllmError of kind unsupported or option",
        _runs,
        "make the pass leave alone what it does not know, or raise XllmError('unsupported', ..)",
    ),
    Law("verifies", "what it leaves keeps all invariants", _verifies, _BISECT),
    Law(
        "text",
        "what it leaves prints and parses back to the same module",
        _text,
        "values must have one definition and names, attributes their stored form",
    ),
    Law(
        "deterministic",
        "equal modules give equal results, in every process",
        _deterministic,
        "look for iteration over a set, sorting by id() or hash(), random numbers, clocks",
    ),
    Law(
        "honest",
        "run() returns True exactly when the module is another one",
        _honest,
        "return what really happened; rules through apply_rules do",
    ),
    Law(
        "signature",
        "arguments, returns, aliases, symbols and assumptions stay",
        _signature,
        "set `changes_signature: ClassVar[bool] = True` if that is what the pass is for",
    ),
    Law(
        "collectives",
        "each group sees the same collectives in the same order",
        _collectives,
        "ranks that disagree on the order wait for ever; set `reorders_collectives: ClassVar[bool] = True` if the pass "
        "does the same on all ranks and means to",
    ),
    Law("meaning", "every function computes what it did, in exact arithmetic", _meaning, _BISECT),
    Law(
        "rounding",
        "in the real dtypes results differ by no more than the pass's `ulps`",
        _rounding,
        "round as often as before, in the same dtypes; or set `ulps: ClassVar[int]` with a reason",
    ),
    Law(
        "loss",
        "a pass that gives up precision on purpose gives up no more than it says",
        _loss,
        "make the error of what is multiplied no larger than the pass's `loss`, or say a larger one with a reason",
    ),
    Law("ranks", "that holds on two and on four ranks in lockstep too", _ranks, _BISECT),
    Law(
        "idempotent",
        "a second run changes nothing",
        _idempotent,
        "run the rules to a fixed point, or set `idempotent: ClassVar[bool] = False`",
    ),
    Law(
        "interleavings",
        "once scheduled, every legal order of the streams gives the same bits, in poisoned memory",
        _interleavings,
        "an event is missing, or bytes are taken that may still be in use",
    ),
)
