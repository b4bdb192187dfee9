"""Which tokens run in the next step: a pure function of a snapshot. No I/O, no state, no clock.

Requests are ordered by arrival, and that order is never broken: everything running arrived before everything waiting.
From it follows the theorem that the property tests check: *if any request is queued, the plan moves some request
forward or fails one with a reason*. The oldest running request may take the pages of all others. So it moves, or it
alone needs more than the whole pool, which is a reason to fail it. With nothing running all pages are free, and the
same holds for the oldest waiting request.

A step runs one function. Those that have requests take turns. Where the one whose turn it is cannot move, because older
requests of the other hold all pages, the turn passes on; that of the oldest request can always move. Requests of both
are admitted in the order of arrival, whoever's turn it is: they then wait in the batch, without pages, for a step of
their own.

The policy. Each running request of the step's function that needs one token (a decode) gets a token and a row first.
The step's other tokens and rows go, oldest first, to the drafts of decodes and to unfinished prompts, in chunks. While
anybody decodes, of whichever function, a step has few tokens and rows of prompts: it is the gap that every stream sees.
A draft fills only the page of its decode, so a rejected one leaves nothing behind. A running request that finds no page
takes those of the youngest, which goes back to the head of the queue and will be computed again. The youngest itself
skips the step: keeping its pages costs nothing until an older one asks. A new request needs free pages for its whole
prompt, beyond what running prompts still need, plus one for each running request. Admitting on the first chunk alone
causes preemption storms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Job(Protocol):
    """What the policy sees of a request, all counts in tokens (positions) but `pages`."""

    @property
    def function(self) -> str:
        """The function that its steps run."""
        ...

    @property
    def known(self) -> int:
        """Prompt and generated tokens so far; at least 1."""
        ...

    @property
    def computed(self) -> int:
        """How many of them have their KV in the pool; less than `known`."""
        ...

    @property
    def first_row(self) -> int:
        """First position whose logits are wanted; from there on all are. At most known - 1."""
        ...

    @property
    def drafted(self) -> int:
        """Tokens proposed to follow the known ones. A decode may run some of them in the same step, a row each."""
        ...

    @property
    def pages(self) -> int:
        """Pages held."""
        ...


# The most prompt tokens in a step while somebody decodes. 2,048 would make prompts 6 % faster, and every stream's gap
# six times as long (bench/RESULTS.md).
PROMPT_TOKENS_BESIDE_DECODES = 256
# The same of rows, each of which is judged or drawn from on one thread: of log-probabilities of a prompt.
PROMPT_ROWS_BESIDE_DECODES = 64


@dataclass(frozen=True, slots=True)
class Limits:
    max_tokens: int
    max_seqs: int
    max_rows: int
    page_tokens: int
    total_pages: int

    @property
    def seqs(self) -> int:
        """Requests that may run at once: each needs a token and a row of the step."""
        return min(self.max_seqs, self.max_tokens, self.max_rows)


J = TypeVar("J", bound=Job)


@dataclass(slots=True)
class Plan(Generic[J]):
    """A step of `function`. `preempt` (youngest first) loses its pages before `work` takes any; `work` is (request,
    tokens to run), oldest first; `admit` lists the newly admitted, of which those of `function` end `work`; `fail` can
    never run: (request, why). The tokens of a decode beyond the first are its draft's."""

    function: str
    work: list[tuple[J, int]] = field(default_factory=list)
    preempt: list[J] = field(default_factory=list)
    admit: list[J] = field(default_factory=list)
    fail: list[tuple[J, str]] = field(default_factory=list)


def plan(running: Sequence[J], waiting: Sequence[J], free: int, limits: Limits, last: str = "") -> Plan[J]:
    """The next step's work. `running` and `waiting` are oldest first, and one of them is there; `free` is the number of
    free pages, `last` the function of the step before."""
    functions = sorted({job.function for job in running} | ({waiting[0].function} if waiting else set()))
    turns = [name for name in functions if name > last] + [name for name in functions if name <= last]
    for function in turns:
        out = _Planner(running, free, limits, function).plan(waiting)
        if out.work or out.fail:
            return out
    return out


class _Planner(Generic[J]):
    """The counters of one try at a plan."""

    __slots__ = (
        "end",
        "free",
        "function",
        "limits",
        "out",
        "promised",
        "prompt_rows",
        "prompt_tokens",
        "rows",
        "running",
        "tokens",
    )

    def __init__(self, running: Sequence[J], free: int, limits: Limits, function: str) -> None:
        decodes = others = 0
        for job in running:
            if job.known - job.computed == 1:
                decodes += job.function == function
                others += job.function != function
        self.running = running
        self.end = len(running)  # those from here on were preempted
        self.free = free
        self.limits = limits
        self.function = function
        self.tokens = limits.max_tokens - decodes  # left for prompts and drafts
        self.rows = limits.max_rows - decodes
        # of those, left for prompts
        self.prompt_tokens = PROMPT_TOKENS_BESIDE_DECODES if decodes + others else limits.max_tokens
        self.prompt_rows = PROMPT_ROWS_BESIDE_DECODES if decodes + others else limits.max_rows
        self.promised = 0  # pages that running prompts will need after this step
        self.out: Plan[J] = Plan(function)

    def plan(self, waiting: Iterable[J]) -> Plan[J]:
        index = 0
        while index < self.end:
            self._advance(index)
            index += 1
        # Room that was made by preempting must not be given to a newcomer, least of all to the victim itself.
        if not self.out.preempt:
            self._admit(waiting)
        return self.out

    def _advance(self, index: int) -> None:
        job = self.running[index]
        need = job.known - job.computed
        page = self.limits.page_tokens
        if job.function != self.function:
            self.promised += max(0, -(-job.known // page) - job.pages) if need > 1 else 0
            return
        held = job.pages * page - job.computed
        count = 1 if need == 1 else self._prompt_chunk(job)
        while count and held + self.free * page <= 0 and self.end - 1 > index:
            self._preempt_youngest()
        fits = min(count, held + self.free * page)
        if fits:
            if need == 1 and job.drafted:
                fits += self._draft(job, held)
            self._take(job, fits)
            if need > 1:
                self._spend(job, fits)
        elif count and self.end == 1:
            pool = self.limits.total_pages * page
            self.out.fail.append((job, f"the request is longer than the whole KV cache, which holds {pool} tokens"))
            return
        if need > 1:
            self.promised += max(0, -(-job.known // page) - max(job.pages, -(-(job.computed + fits) // page)))

    def _preempt_youngest(self) -> None:
        self.end -= 1
        victim = self.running[self.end]
        self.free += victim.pages
        self.out.preempt.append(victim)
        if victim.known - victim.computed == 1 and victim.function == self.function:
            self.tokens += 1
            self.rows += 1

    def _draft(self, job: J, held: int) -> int:
        """How many drafted tokens run behind a decode; they are spent."""
        room = held or self.limits.page_tokens
        count = max(0, min(job.drafted, self.tokens, self.rows, room - 1))
        self.tokens -= count
        self.rows -= count
        return count

    def _prompt_chunk(self, job: J) -> int:
        """How many of the prompt's tokens the step's tokens and rows allow."""
        tokens, rows = min(self.tokens, self.prompt_tokens), min(self.rows, self.prompt_rows)
        rowless = max(0, job.first_row - job.computed)
        return max(0, min(job.known - job.computed, tokens, rowless + rows))

    def _take(self, job: J, count: int) -> None:
        new = -(-(job.computed + count) // self.limits.page_tokens) - job.pages
        self.free -= max(0, new)
        self.out.work.append((job, count))

    def _spend(self, job: J, count: int) -> None:
        self.tokens -= count
        self.prompt_tokens -= count
        rows = max(0, job.computed + count - max(job.first_row, job.computed))
        self.rows -= rows
        self.prompt_rows -= rows

    def _admit(self, waiting: Iterable[J]) -> None:
        page = self.limits.page_tokens
        active = self.end - len(self.out.fail)
        for job in waiting:
            pages = -(-job.known // page)
            if pages > self.limits.total_pages:
                pool = self.limits.total_pages * page
                why = f"{job.known} tokens are more than the whole KV cache, which holds {pool}"
                self.out.fail.append((job, why))
                continue
            if active >= self.limits.seqs or pages + active > self.free - self.promised:
                break
            count = self._prompt_chunk(job) if job.function == self.function else 0
            if count:
                self._take(job, count)
                self._spend(job, count)
            elif job.function == self.function:
                break
            self.promised += pages - -(-(job.computed + count) // page)
            self.out.admit.append(job)
            active += 1
