"""At which sizes a report shows formulas as numbers. Owns the usual steps and the filling in of what is not given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xllm_compiler.dims import DimScope
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.cost import CONTEXT
from xllm_compiler.ir.groups import rank_symbols
from xllm_compiler.ir.types import Kv

CONTEXT_NAME = CONTEXT.symbols[0]
USUAL = (("decode, 1 request", 1, 1, 512), ("decode, 8 requests", 8, 8, 512), ("prefill, 512 tokens", 512, 1, 0))
"""Name, tokens, requests, tokens of context that each request has."""
USUAL_SIZE = 64  # of a symbol that is not one of the step function's


@dataclass(frozen=True, slots=True)
class Scenario:
    """A named step: sizes of all symbols of the module, and the context."""

    name: str
    dims: Mapping[str, int]


def scenarios(module: Module, given: Mapping[str, int] | None = None) -> list[Scenario]:
    """What was asked for, if anything, then the usual steps that the module admits; never empty."""
    found = [Scenario("as asked", complete(module, given))] if given else []
    if "N" not in module.scope.symbols:
        return found or [Scenario("sizes", complete(module, {}))]
    for name, tokens, requests, context in USUAL:
        hi = module.scope.symbols["N"].hi
        if hi is not None and tokens > hi:
            continue
        if "B" not in module.scope.symbols:
            name = f"N={tokens}"
        wanted = {"N": tokens, "B": requests, CONTEXT_NAME: context}
        known = _names(module)
        found.append(Scenario(name, complete(module, {k: v for k, v in wanted.items() if k in known})))
    return found or [Scenario("sizes", complete(module, {}))]


def _names(module: Module) -> list[str]:
    """What may be given a size: the symbols, ranks' places apart, and, where there is a KV cache, the context."""
    caches = any(isinstance(a.type, Kv) for f in module.funcs.values() for a in f.args)
    ranks = rank_symbols(module.groups)
    return [*(name for name in module.scope.symbols if name not in ranks), *([CONTEXT_NAME] if caches else [])]


def complete(module: Module, given: Mapping[str, int]) -> dict[str, int]:
    """A size for every symbol: as `given`, otherwise one request, a row of logits for each of them, as many pages as
    they fill, and whatever else is nearest to the usual size. XllmError of kind "option" for sizes out of range."""
    scope = module.scope
    names = _names(module)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise XllmError("option", f"the module has no dim {', '.join(unknown)}", help="it has " + ", ".join(names))
    for name, value in given.items():
        _check(scope, name, value)
    tokens = given.get("N", _within(scope, "N", 1))
    requests = given.get("B", min(tokens, _within(scope, "B", 1)))
    each = -(-tokens // max(1, requests))
    longest = _longest_request(module)
    context = given.get(CONTEXT_NAME, 0)
    if longest is not None:
        context = max(0, min(context, longest - each))
    page = next((a.type.page for f in module.funcs.values() for a in f.args if isinstance(a.type, Kv)), 1)
    known = {"N": tokens, "B": requests, "S": requests, "P": requests * -(-(context + each) // page)}
    sizes = {name: given.get(name, _within(scope, name, known.get(name, USUAL_SIZE))) for name in names}
    return {**sizes, CONTEXT_NAME: context} if CONTEXT_NAME in names else sizes


def _within(scope: DimScope, name: str, wanted: int) -> int:
    """The admissible size nearest to `wanted`, not below it where there is one."""
    symbol = scope.symbols.get(name)
    if symbol is None:
        return wanted
    size = wanted if symbol.lo is None else max(wanted, symbol.lo)
    size = -(-size // symbol.multiple) * symbol.multiple
    if symbol.hi is not None and size > symbol.hi:
        size = symbol.hi // symbol.multiple * symbol.multiple
    return size


def _check(scope: DimScope, name: str, value: int) -> None:
    symbol = scope.symbols.get(name)
    low = 0 if symbol is None or symbol.lo is None else symbol.lo
    if value < low or (symbol is not None and symbol.hi is not None and value > symbol.hi):
        bounds = "0 or more" if symbol is None else f"[{low}, {'*' if symbol.hi is None else symbol.hi}]"
        raise XllmError("option", f"{name}={value} is out of range", help=f"{name} is in {bounds}")
    if symbol is not None and value % symbol.multiple:
        raise XllmError("option", f"{name}={value} is not a multiple of {symbol.multiple}")


def _longest_request(module: Module) -> int | None:
    """Tokens that a request can have: as many as there are positions, where a function says so."""
    ranges = [f.ranges[a] for f in module.funcs.values() for a in f.args if a.name == "pos" and a in f.ranges]
    return max((limits.hi + 1 for limits in ranges), default=None)
