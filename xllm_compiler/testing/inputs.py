"""Made-up but sound inputs for any function. Owns sizes, arguments and parameters; must not run or compare anything.

    given = make(module.func(), {"N": 7}, seed=0)      # B, S, P and whatever else the module declares are completed
    run_ranks(module, "step", given.inputs, given.params, given.dims)

Sound: sizes are in their ranges and meet every `assume`; `pos seq start table sel` describe one step of a server,
whether they are called so or only used so by kv ops; rows have slots of their own; an integer that ends as an index
stays in its range. Adversarial
within that: pages are permuted and unmapped ones -1, starts are ragged, requests have contexts of different length, one
of them none, floats hold zeros and a large value, integers touch the ends of their range. What a collective exchanges
differs from rank to rank, everything else is the same on all of them. Rank dims get no size: each rank has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from xllm_compiler.dims import Dim
from xllm_compiler.dims.scope import DimScope, Symbol
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.groups import rank_symbols, world_size
from xllm_compiler.ir.ops import Collective, Linear, Param, StateRead, StateWrite
from xllm_compiler.ir.semantics import NP_DTYPE, Array, possible
from xllm_compiler.ir.spec import dims_in
from xllm_compiler.ir.types import Cell, Kv, State, Tensor
from xllm_compiler.step.inputs import WRITTEN
from xllm_compiler.testing.ranges import Range, index_ranges

Sizes = Mapping[str, int]

MAX_TRIES = 20_000  # assignments tried before sizes are said not to exist
SPARE_PAGES = 2  # of context per request, beyond what the step's own tokens need
MOST_POSITIONS = 64  # of a request, where no range says it
SPARE_SLOTS = 2  # beyond one for each token and each request
SMALL = 64  # limits up to here are worth a run at the limit
MAX_RANKS = 64  # that inputs are made up for


@dataclass(frozen=True, slots=True)
class Given:
    """Sizes of the symbols, and per rank the arguments and the parameters, by name."""

    dims: dict[str, int]
    inputs: list[dict[str, Array]]
    params: list[dict[str, Array]]


def make(func: Func, sizes: Sizes | int, seed: int = 0) -> Given:
    """Everything that one call of `func` needs, the same for the same arguments."""
    dims = step_dims(func, sizes)
    rng = np.random.default_rng([seed, *dims.values()])
    inputs, params = make_inputs(func, dims, rng), make_params(func, rng, dims)
    local = rank_local(func)
    ranks_in, ranks_par = [inputs], [params]
    for _ in range(1, ranks_of(func.module)):
        ranks_in.append({k: _other(v, rng) if k in local else v for k, v in inputs.items()})
        ranks_par.append({k: _other(v, rng) if k in local else v for k, v in params.items()})
    return Given(dims, ranks_in, ranks_par)


def ranks_of(module: Module) -> int:
    """How many ranks a module has to be run on: those of its groups' mesh."""
    ranks = world_size(module.groups)
    if ranks > MAX_RANKS:
        raise XllmError("unsupported", f"the groups need {ranks} ranks", help=f"inputs are made up for {MAX_RANKS}")
    return ranks


def rank_local(func: Func) -> set[str]:
    """Names of the arguments and parameters that differ by rank: what collectives exchange, and what makes it.

    A partial sum's weight is each rank's share; an operand that is no partial sum is different by its nature, or it
    would not be exchanged. Everything else is taken to be replicated, so that a rewrite may rely on it. So is what a
    rank dim cuts into shares: then the whole is the same on all ranks.
    """
    found: dict[str, None] = {}
    for op in func.ops:
        if isinstance(op, Linear) and op.partial:
            found.update(_leaves(op.w))
        elif isinstance(op, Collective):
            source = op.x.op
            if isinstance(source, Linear):
                found.update(_leaves(source.w))
            elif source is None or isinstance(source, Param):
                found.update(_leaves(op.x))
    return set(found)


def _leaves(value: Value) -> dict[str, None]:
    """Float arguments and parameters that `value` is made of on every rank in the same way."""
    out: dict[str, None] = {}
    seen: set[Value] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        if v.op is None:
            if isinstance(v.type, Tensor) and v.type.is_float:
                out[v.name] = None
        elif isinstance(v.op, Param):
            if v.tensor.is_float:
                out[v.op.name_] = None
        elif not _chosen_by_rank(v.op):
            stack.extend(v.op.operands)
    return out


def _chosen_by_rank(op: Op) -> bool:
    """Whether an attribute of `op` depends on a rank dim, so that its results differ by rank by themselves."""
    ranks = rank_symbols(op.func.module.groups)
    return any(name in ranks for d in dims_in(op.attrs.values()) for name in d.symbols)


def _other(array: Array, rng: np.random.Generator) -> Array:
    """Another rank's array of the same kind and size of values."""
    spread = float(np.std(array.astype(np.float64))) if array.size else 0.0
    return np.asarray(rng.standard_normal(array.shape) * (spread or 1.0)).astype(array.dtype)


# --------------------------------------------------------------------------------------------------------------- sizes


def step_dims(func: Func, sizes: Sizes | int, *others: DimScope) -> dict[str, int]:
    """A size for every symbol: those given (an integer is N), the others small and such that every `assume` holds.

    `others`: further scopes whose symbols and assumptions must be met too, such as those of a changed module.
    """
    wanted = {"N": sizes} if isinstance(sizes, int) else dict(sizes)
    scopes = (func.module.scope, *others)
    ranks = rank_symbols(func.module.groups)
    symbols = {name: s for scope in scopes for name, s in scope.symbols.items() if name not in ranks}
    if isinstance(sizes, int) and "N" not in symbols:
        wanted = {}
    for name in wanted:
        if name in ranks:
            raise XllmError(
                "option", f"{name} has no size: it is each rank's place in @{ranks[name]}", help="leave it out"
            )
        if name not in symbols:
            raise XllmError(
                "option", f"the module has no symbol {name}", help="it has " + (", ".join(symbols) or "none")
            )
    assumptions = list(dict.fromkeys(a.expr for scope in scopes for a in scope.assumptions))
    first = ("N", "B", "S")
    order = [n for n in first if n in symbols] + [n for n in symbols if n not in (*first, "P")]
    order += ["P"] if "P" in symbols else []
    search = _Search(func, [symbols[n] for n in order], assumptions, wanted)
    found = search.solve({})
    if found is None:
        raise search.failure()
    return {name: found[name] for name in symbols}


class _Search:
    """Backtracking over a small box of sizes, most natural sizes first."""

    def __init__(self, func: Func, order: Sequence[Symbol], assumptions: Sequence[Dim], wanted: Sizes) -> None:
        self.func, self.order, self.assumptions, self.wanted = func, order, assumptions, wanted
        self.left = MAX_TRIES
        self.broken: dict[Dim, int] = {}

    def solve(self, chosen: dict[str, int]) -> dict[str, int] | None:
        if len(chosen) == len(self.order):
            return chosen
        symbol = self.order[len(chosen)]
        for n in self.candidates(symbol, chosen):
            self.left -= 1
            if self.left < 0:
                return None
            now = {**chosen, symbol.name: n}
            bad = next((a for a in self.assumptions if _decided(a, symbol.name, now) and a.evaluate(now) < 0), None)
            if bad is not None:
                self.broken[bad] = self.broken.get(bad, 0) + 1
                continue
            found = self.solve(now)
            if found is not None:
                return found
        return None

    def candidates(self, symbol: Symbol, chosen: Sizes) -> Iterator[int]:
        step = symbol.multiple
        if symbol.name in self.wanted:
            n = self.wanted[symbol.name]
            if _outside(symbol, n):
                text = f"{symbol.name} = {n} is outside [{symbol.lo}, {symbol.hi}]"
                raise XllmError("option", text + (f" or no multiple of {step}" if step > 1 else ""))
            yield n
            return
        lo = symbol.lo if symbol.lo is not None else 1
        base = -(-lo // step) * step
        natural = -(-self.natural(symbol.name, lo, chosen) // step) * step
        if symbol.hi is not None:
            natural = min(natural, symbol.hi // step * step)
        tried = dict.fromkeys(
            [natural, *(base + i * step for i in range(17)), *(n // step * step for n in chosen.values())]
        )
        if symbol.hi is not None:
            tried[symbol.hi // step * step] = None
        yield from (n for n in tried if not _outside(symbol, n))

    def natural(self, name: str, lo: int, chosen: Sizes) -> int:
        """The size a server would most likely have: a third as many requests as tokens, a row each, pages enough."""
        n = chosen.get("N", 1)
        b = chosen.get("B", 1)
        if name == "N":
            return 7
        if name == "B":
            return max(1, (n + 2) // 3)
        if name == "S":
            return b
        if name == "P":
            page = next((a.type.page for a in self.func.args if isinstance(a.type, Kv)), 1)
            return -(-n // page) + (SPARE_PAGES + 1) * b + 1
        if any(isinstance(a.type, Cell) and name in a.type.slots.symbols for a in self.func.args):
            return max(n, b) + SPARE_SLOTS
        return max(lo, min(2, lo + 1))

    def failure(self) -> XllmError:
        given = ", ".join(f"{k}={v}" for k, v in self.wanted.items())
        where = f"@{self.func.name}" + (f" at {given}" if given else "")
        if not self.broken:
            return XllmError("option", "no small sizes are inside the ranges of the module's symbols", where=where)
        worst = max(self.broken, key=lambda a: self.broken[a])
        whys = {a.expr: a.why for a in self.func.module.scope.assumptions}
        why = f" ({whys[worst]})" if whys.get(worst) else ""
        return XllmError(
            "option",
            f"no sizes of a small box meet the assumption {worst} >= 0{why}",
            where=where,
            help="give sizes for " + ", ".join(worst.symbols),
        )


def _decided(a: Dim, last: str, sizes: Sizes) -> bool:
    """Whether choosing `last` has just made the assumption's value known."""
    return last in a.symbols and all(s in sizes for s in a.symbols)


def _outside(symbol: Symbol, n: int) -> bool:
    low = symbol.lo is not None and n < symbol.lo
    return low or (symbol.hi is not None and n > symbol.hi) or n % symbol.multiple != 0


def telling_sizes(func: Func, *others: DimScope) -> list[dict[str, int]]:
    """Sizes at which mistakes show: one token; decode (N = B); ragged prefill; the greatest N, where that is small."""
    symbols = func.module.scope.symbols
    wanted: list[dict[str, int]] = [{}]
    if "N" in symbols:
        wanted = [{"N": 1}, {"N": 7}]
        if "B" in symbols:
            wanted.insert(1, {"N": 3, "B": 3})
        hi = symbols["N"].hi
        if hi is not None and hi <= SMALL:
            wanted.append({"N": hi})
    out: list[dict[str, int]] = []
    for sizes in wanted:
        fitting = {k: v for k, v in sizes.items() if not _outside(symbols[k], v)}
        try:
            dims = step_dims(func, fitting, *others)
        except XllmError:
            continue  # this shape of a step does not exist here; the plain one below must
        if dims not in out:
            out.append(dims)
    return out or [step_dims(func, {}, *others)]


# -------------------------------------------------------------------------------------------------------------- arrays


def make_inputs(func: Func, dims: Sizes, rng: np.random.Generator) -> dict[str, Array]:
    """An array for every argument."""
    demands = index_ranges(func, dims)
    known = _Step(func, dims, demands, rng).arrays()
    out: dict[str, Array] = {}
    for arg in func.args:
        match arg.type:
            case State() as state:
                out[arg.name] = _contents(state, dims, demands.get(arg), rng)
            case Tensor() as ty:
                array = known.get(arg.name)
                shape = tuple(d.evaluate(dims) for d in ty.shape)
                if array is None and _names_slots(arg):
                    array = _slots(shape[0], demands[arg], rng)
                out[arg.name] = (
                    made_up(ty, shape, demands.get(arg), rng) if array is None else array.astype(NP_DTYPE[ty.dtype])
                )
            case _:
                raise XllmError("unsupported", f"no input can be made up for %{arg.name}: {arg.type}")
    return out


def make_params(func: Func, rng: np.random.Generator, dims: Sizes | None = None) -> dict[str, Array]:
    """An array for every parameter, of a size that keeps sums over its last axis near 1."""
    demands = index_ranges(func, dims or {})
    out: dict[str, Array] = {}
    for op in func.ops:
        if not isinstance(op, Param):
            continue
        ty = op.result.tensor
        shape = tuple(d.evaluate(dims or {}) for d in ty.shape)
        if op.name_ not in out:
            array = made_up(ty, shape, demands.get(op.result), rng)
            if ty.is_float:
                scale = min(0.3, 1.2 / max(1, shape[-1] if len(shape) > 1 else 1) ** 0.5)
                array = (array.astype(np.float64) * scale).astype(array.dtype)
            out[op.name_] = array
    return out


def made_up(ty: Tensor, shape: tuple[int, ...], demand: Range | None, rng: np.random.Generator) -> Array:
    """Values of one tensor; integers inside `demand`, both of its ends among them."""
    possible(shape, ty)
    if ty.is_float:
        return _floats(shape, rng).astype(NP_DTYPE[ty.dtype])
    if ty.dtype == "bool":
        return np.asarray(rng.integers(0, 2, shape)).astype(np.bool_)
    lo, hi = (0 if ty.dtype == "u8" else -8, 8) if demand is None else (demand.lo, demand.hi)
    if lo > hi:
        raise XllmError("unsupported", f"no {ty.dtype} is an index for every use of it: it would be in [{lo}, {hi}]")
    array = np.asarray(rng.integers(lo, hi + 1, shape))
    if array.size > 2:
        array.flat[rng.choice(array.size, 2, replace=False)] = (lo, hi)
    return array.astype(NP_DTYPE[ty.dtype])


def _floats(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    array = np.asarray(rng.standard_normal(shape))
    if array.size >= 8:
        array.flat[rng.choice(array.size, 2, replace=False)] = (0.0, 6.0)
    return array


def _contents(state: State, dims: Sizes, demand: Range | None, rng: np.random.Generator) -> Array:
    """What earlier calls may have left in a state."""
    shape = tuple(d.evaluate(dims) for d in state.array_shape)
    return made_up(Tensor(state.array_dtype, shape), shape, demand, rng)


def _names_slots(arg: Value) -> bool:
    """Whether an argument says which slot of a cell belongs to which row."""
    return any(isinstance(op, (StateRead, StateWrite)) and op.slot is arg for op in arg.users)


def _slots(rows: int, demand: Range, rng: np.random.Generator) -> Array:
    """A slot for each row in no order, no two the same; where rows are more than slots, which is fine for reading, some
    rows share."""
    slots = demand.hi - demand.lo + 1
    if slots < 1 <= rows:
        raise XllmError("option", f"{rows} rows and no slot", help="give more slots")
    return np.asarray(demand.lo + rng.permutation(max(rows, slots))[:rows] % max(1, slots))


class _Step:
    """The arrays that describe a step. What they are called counts, and what kv ops use them for."""

    RANK: ClassVar[dict[str, int]] = {name: len(shape) for name, shape in WRITTEN.items() if name != "ids"}

    def __init__(self, func: Func, dims: Sizes, demands: Mapping[Value, Range], rng: np.random.Generator) -> None:
        self.func, self.dims, self.rng = func, dims, rng
        self.roles: dict[str, Value] = {}
        for arg in func.args:
            role = _role(arg)
            if role and role not in self.roles:
                self.roles[role] = arg
        self.tokens = next((self.length(r) for r in ("pos", "seq") if r in self.roles), dims.get("N", 1))
        self.requests = dims.get("B", 1)
        if "table" in self.roles:
            self.requests = self.length("table")
        elif "start" in self.roles:
            self.requests = self.length("start") - 1
        kvs = [a.type for a in func.args if isinstance(a.type, Kv)]
        self.columns = self.roles["table"].shape[1].evaluate(dims) if "table" in self.roles else 0
        limits = func.ranges.get(self.roles["pos"]) if "pos" in self.roles else None
        most = MOST_POSITIONS if limits is None else limits.hi + 1
        self.page = kvs[0].page if kvs else max(1, most // max(1, self.columns))
        pages = [kv.pages.evaluate(dims) for kv in kvs]
        self.pages = min(pages) if pages else self.requests * max(1, self.columns)
        demand = demands.get(self.roles["pos"]) if "pos" in self.roles else None
        self.positions = self.columns * self.page if self.columns else most
        if limits is not None:
            self.positions = min(self.positions, most)
        if demand is not None:
            self.positions = min(self.positions, demand.hi + 1)

    def length(self, role: str) -> int:
        return self.roles[role].shape[0].evaluate(self.dims)

    def arrays(self) -> dict[str, Array]:
        """By argument name. Nothing where no argument has a part in a step."""
        if not self.roles:
            return {}
        counts = self.counts()
        start = np.concatenate([[0], np.cumsum(counts)])
        context = self.contexts(counts)
        pos = np.concatenate([c + np.arange(n) for c, n in zip(context, counts, strict=True)])
        made = {
            "start": start,
            "seq": np.repeat(np.arange(self.requests), counts),
            "pos": pos % self.positions,  # only a step without pages is longer than its positions
            "table": self.table(counts, context),
        }
        if "sel" in self.roles:
            wanted = self.length("sel")
            made["sel"] = self.rng.choice(self.tokens, wanted, replace=wanted > self.tokens)
        shapes = {r: tuple(d.evaluate(self.dims) for d in v.shape) for r, v in self.roles.items()}
        return {v.name: made[r] for r, v in self.roles.items() if made[r].shape == shapes[r]}

    def counts(self) -> list[int]:
        """Tokens per request, ragged; none of them empty where there are tokens enough."""
        n, b = self.tokens, self.requests
        if n < b:
            return [1] * n + [0] * (b - n)
        most = self.positions if self.columns else n
        if n > b * most:
            raise self.too_small(f"{b} requests of at most {most} positions")
        cuts = sorted(int(c) + 1 for c in self.rng.choice(max(1, n - 1), b - 1, replace=False)) if b > 1 else []
        counts = [hi - lo for lo, hi in zip([0, *cuts], [*cuts, n], strict=True)]
        while max(counts) > most:  # cut at random it did not fit; what is too much goes to the emptiest
            i, j = counts.index(max(counts)), counts.index(min(counts))
            moved = min(counts[i] - most, most - counts[j])
            counts[i], counts[j] = counts[i] - moved, counts[j] + moved
        return counts

    def contexts(self, counts: Sequence[int]) -> list[int]:
        """Tokens already cached per request: none for the first, the others differ as far as there are pages."""
        need = [-(-n // self.page) for n in counts]
        spare = self.pages - sum(need) if self.columns else SPARE_PAGES * len(counts)
        if spare < 0:
            raise self.too_small(f"{self.pages} pages of {self.page}; {sum(need)} are needed")
        out = []
        for i, n in enumerate(counts):
            extra = min(spare, SPARE_PAGES)
            room = min((need[i] + extra) * self.page, self.positions) - n if i or len(counts) == 1 else 0
            context = int(self.rng.integers(0, max(0, room) + 1))
            spare -= -(-(context + n) // self.page) - need[i]
            out.append(context)
        return out

    def table(self, counts: Sequence[int], context: Sequence[int]) -> Array:
        """Pages of the pool in random order; -1 behind the last one of a request, if only kv ops read the table."""
        used = [-(-(c + n) // self.page) for c, n in zip(context, counts, strict=True)]
        pool = self.rng.permutation(max(self.pages, sum(used)))
        out = np.full((self.requests, self.columns), -1)
        at = 0
        for i, n in enumerate(used):
            n = min(n, self.columns)
            out[i, :n] = pool[at : at + n]
            at += n
        if "table" in self.roles and any(not u.name.startswith("kv.") for u in self.roles["table"].users):
            out = np.where(out < 0, 0, out)
        return out

    def too_small(self, what: str) -> XllmError:
        return XllmError(
            "option",
            f"a step of {self.tokens} tokens does not fit into {what}",
            where=f"@{self.func.name} at " + ", ".join(f"{k}={v}" for k, v in self.dims.items()),
            help="give fewer tokens (N), more requests (B) or more pages (P)",
        )


def _role(arg: Value) -> str:
    """What an argument is in a step, or "": told by the kv ops that use it, else by its name."""
    if not isinstance(arg.type, Tensor) or not arg.type.is_int:
        return ""
    for user, index in arg.uses:
        if user.name.startswith("kv."):
            return _field_at(user, index)
    return arg.name if _Step.RANK.get(arg.name) == arg.type.rank else ""


def _field_at(op: Op, index: int) -> str:
    for spec, count in zip(op.SPEC.operands, op.segments, strict=True):
        if index < count:
            return spec.name
        index -= count
    raise AssertionError(f"{op.name} has no operand {index}")
