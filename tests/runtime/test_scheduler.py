"""The scheduler's theorem and limits on arbitrary states, and whole simulated lives under memory pressure."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.runtime.scheduler import PROMPT_ROWS_BESIDE_DECODES, PROMPT_TOKENS_BESIDE_DECODES, Limits, Plan, plan


@dataclass(eq=False)
class FakeJob:
    known: int
    computed: int = 0
    pages: int = 0
    scored: bool = False  # wants every row of its prompt
    prompt: int = 0
    target: int = 0
    moved: int = 0
    drafted: int = 0
    function: str = "step"

    @property
    def first_row(self) -> int:
        return self.computed if self.scored and self.known == self.prompt else self.known - 1


def pages_of(tokens: int, page: int) -> int:
    return -(-tokens // page)


def rows_of(job: FakeJob, count: int) -> int:
    return sum(1 for p in range(job.computed, job.computed + count) if p >= job.first_row)


def check_plan(
    p: Plan[FakeJob], running: list[FakeJob], waiting: list[FakeJob], free: int, limits: Limits, last: str = ""
) -> None:
    """Everything that must hold of one plan."""
    failed = [job for job, _ in p.fail]
    assert all(job.function == p.function for job, _ in p.work)
    oldest = [*running, *[job for job in waiting if job not in failed]][:1]
    if oldest and oldest[0].function != last and not p.fail:
        assert p.function != last, "the oldest can always move, and it was its turn"
    assert p.work or p.fail, "something is queued and nothing moves"
    assert all(why for _, why in p.fail)
    # The victims are the youngest running ones, and get nothing.
    assert p.preempt == running[len(running) - len(p.preempt) :][::-1]
    survivors = running[: len(running) - len(p.preempt)]
    order = survivors + waiting
    jobs = [job for job, _ in p.work]
    assert jobs == [job for job in order if job in jobs], "oldest first, each once, none invented"
    assert not set(map(id, jobs)) & set(map(id, [*p.preempt, *failed]))
    # Admission takes the oldest that are not failed.
    left = [job for job in waiting if job not in failed]
    assert p.admit == left[: len(p.admit)]
    assert [job for job in p.admit if job.function == p.function] == [job for job in jobs if job in waiting]
    if p.preempt:
        assert not p.admit
    assert len([job for job in survivors if job not in failed]) + len(p.admit) <= limits.seqs
    # The step's limits.
    assert sum(count for _, count in p.work) <= limits.max_tokens
    assert sum(rows_of(job, count) for job, count in p.work) <= limits.max_rows
    for job, count in p.work:
        drafts = job.drafted if job.known - job.computed == 1 else 0
        assert 1 <= count <= job.known - job.computed + drafts
    # Pages.
    have = free + sum(job.pages for job in p.preempt)
    new = sum(max(0, pages_of(j.computed + c, limits.page_tokens) - j.pages) for j, c in p.work)
    assert new <= have
    for job, count in p.work:
        if job.known - job.computed == 1:
            page = limits.page_tokens
            assert pages_of(job.computed + count, page) == pages_of(job.known, page), "a draft took a page"
    # Decodes are never put off for lack of tokens or rows.
    for job in survivors:
        if job.function == p.function and job.known - job.computed == 1 and job not in jobs and job not in failed:
            assert pages_of(job.known, limits.page_tokens) > job.pages


FUNCTIONS = st.sampled_from(["step", "embed"])


@st.composite
def snapshots(draw: st.DrawFn) -> tuple[list[FakeJob], list[FakeJob], int, Limits]:
    limits = Limits(
        max_tokens=draw(st.integers(1, 12)),
        max_seqs=draw(st.integers(1, 5)),
        max_rows=draw(st.integers(1, 6)),
        page_tokens=draw(st.integers(1, 4)),
        total_pages=draw(st.integers(1, 12)),
    )
    free = limits.total_pages
    running: list[FakeJob] = []
    for _ in range(draw(st.integers(0, limits.seqs))):
        known = draw(st.integers(1, 30))
        most = min(known - 1, free * limits.page_tokens)
        computed = draw(st.sampled_from([most, draw(st.integers(0, most))]))
        pages = pages_of(computed, limits.page_tokens)
        free -= pages
        scored = draw(st.booleans())
        drafted = draw(st.integers(0, 6))
        job = FakeJob(known, computed, pages, scored, prompt=known if scored else 0, drafted=drafted)
        job.function = draw(FUNCTIONS)
        running.append(job)
    waiting = [FakeJob(draw(st.integers(1, 60)), function=draw(FUNCTIONS)) for _ in range(draw(st.integers(0, 4)))]
    return running, waiting, free, limits


@settings(max_examples=600, deadline=None)
@given(snapshots(), st.sampled_from(["", "step", "embed"]))
def test_any_plan_obeys_the_limits_and_moves_somebody(
    state: tuple[list[FakeJob], list[FakeJob], int, Limits], last: str
) -> None:
    running, waiting, free, limits = state
    if running or waiting:
        check_plan(plan(running, waiting, free, limits, last), running, waiting, free, limits, last)


@settings(max_examples=150, deadline=None)
@given(
    lives=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 15), st.booleans(), FUNCTIONS), min_size=1, max_size=8),
    max_tokens=st.integers(1, 9),
    max_seqs=st.integers(1, 5),
    max_rows=st.integers(1, 5),
    page=st.integers(1, 4),
    pages=st.integers(1, 14),
)
def test_every_request_ends(
    lives: list[tuple[int, int, bool, str]], max_tokens: int, max_seqs: int, max_rows: int, page: int, pages: int
) -> None:
    """Run to the end: all finish or fail, in a bounded number of steps, and only those fail that could never fit."""
    limits = Limits(max_tokens, max_seqs, max_rows, page, pages)
    waiting = [
        FakeJob(prompt, scored=scored, prompt=prompt, target=prompt + more, function=function)
        for prompt, more, scored, function in lives
    ]
    everyone, running, failed = list(waiting), [], []
    free, last = pages, ""
    for _ in range(5000):
        if not running and not waiting:
            break
        p = plan(running, waiting, free, limits, last)
        check_plan(p, running, waiting, free, limits, last)
        last = p.function
        for job in p.preempt:
            assert running.pop() is job
            waiting.insert(0, job)
            free += job.pages
            job.pages = job.computed = 0
        for job, _ in p.fail:
            (running if job in running else waiting).remove(job)
            failed.append(job)
            free += job.pages
            job.pages = 0
        for job in p.admit:
            assert waiting.pop(0) is job
            running.append(job)
        for job, count in p.work:
            need = max(0, pages_of(job.computed + count, page) - job.pages)
            job.pages += need
            free -= need
            job.computed += count
            job.moved += count
            if job.computed == job.known:
                job.known += 1
                if job.known >= job.target:
                    running.remove(job)
                    free += job.pages
                    job.pages = 0
        assert free >= 0
    assert not running and not waiting
    assert free == pages
    for job in everyone:
        if job in failed:
            assert pages_of(job.known, page) > pages
        else:
            assert job.known >= job.target


def test_decodes_run_first_and_prompts_share_the_rest() -> None:
    limits = Limits(max_tokens=8, max_seqs=8, max_rows=8, page_tokens=4, total_pages=100)
    prompt, decode = FakeJob(known=30, computed=8, pages=2), FakeJob(known=6, computed=5, pages=2)
    newcomer = FakeJob(known=3)
    p = plan([prompt, decode], [newcomer], 50, limits)
    assert p.work == [(prompt, 7), (decode, 1)] and not p.admit


def test_prompts_are_cut_short_while_anybody_decodes() -> None:
    """A step of a long prompt is a gap in every stream, whichever function the stream is of."""
    limits = Limits(max_tokens=2048, max_seqs=8, max_rows=8, page_tokens=4, total_pages=5000)
    decode, prompt, newcomer = FakeJob(known=6, computed=5, pages=2), FakeJob(known=200), FakeJob(known=1000)
    few = PROMPT_TOKENS_BESIDE_DECODES
    assert plan([decode, prompt], [newcomer], 4000, limits).work == [(decode, 1), (prompt, 200), (newcomer, few - 200)]
    text = FakeJob(known=1000, function="embed")
    assert plan([decode, text], [], 4000, limits, "step").work == [(text, few)]
    assert plan([text], [], 4000, limits).work == [(text, 1000)]
    wide = Limits(max_tokens=2048, max_seqs=8, max_rows=512, page_tokens=4, total_pages=5000)
    scored = FakeJob(known=300, scored=True, prompt=300)
    assert plan([decode], [scored], 4000, wide).work == [(decode, 1), (scored, PROMPT_ROWS_BESIDE_DECODES)]
    assert plan([], [scored], 4000, wide).work == [(scored, 300)]


def test_the_oldest_takes_the_pages_of_the_youngest() -> None:
    limits = Limits(max_tokens=8, max_seqs=8, max_rows=8, page_tokens=4, total_pages=4)
    old, middle, young = (FakeJob(known=k, computed=k - 1, pages=n) for k, n in ((9, 2), (3, 1), (3, 1)))
    p = plan([old, middle, young], [], 0, limits)
    assert p.preempt == [young] and p.work == [(old, 1), (middle, 1)]


def test_the_youngest_waits_in_place_rather_than_lose_its_own_work() -> None:
    limits = Limits(max_tokens=8, max_seqs=8, max_rows=8, page_tokens=4, total_pages=3)
    old, young = FakeJob(known=3, computed=2, pages=1), FakeJob(known=9, computed=8, pages=2)
    p = plan([old, young], [], 0, limits)
    assert p.work == [(old, 1)] and not p.preempt and not p.fail


def test_admission_leaves_what_running_prompts_were_promised() -> None:
    limits = Limits(max_tokens=8, max_seqs=8, max_rows=8, page_tokens=4, total_pages=10)
    running = FakeJob(known=32, computed=4, pages=1)  # will need seven more pages
    p = plan([running], [FakeJob(known=8)], 9, limits)
    assert p.work == [(running, 8)] and not p.admit
    small = Limits(max_tokens=40, max_seqs=8, max_rows=8, page_tokens=4, total_pages=10)
    assert not plan([running], [FakeJob(known=8)], 9, small).admit  # one page short of the reserve
    assert plan([running], [FakeJob(known=4)], 9, small).admit


def test_admission_leaves_what_prompts_of_the_other_function_were_promised() -> None:
    limits = Limits(max_tokens=40, max_seqs=8, max_rows=8, page_tokens=4, total_pages=10)
    chat, text = FakeJob(known=4, computed=3, pages=1), FakeJob(known=32, computed=4, pages=1, function="embed")
    p = plan([chat, text], [FakeJob(known=1)], 8, limits, "embed")
    assert (p.function, p.work, p.admit) == ("step", [(chat, 1)], [])


def test_prompt_rows_are_rationed() -> None:
    limits = Limits(max_tokens=16, max_seqs=4, max_rows=4, page_tokens=4, total_pages=10)
    scored = FakeJob(known=12, scored=True, prompt=12)
    decode = FakeJob(known=5, computed=4, pages=1)
    p = plan([decode], [scored], 9, limits)
    assert p.work == [(decode, 1), (scored, 3)]


def test_what_can_never_fit_is_refused_and_does_not_block_those_behind() -> None:
    limits = Limits(max_tokens=8, max_seqs=8, max_rows=8, page_tokens=4, total_pages=2)
    giant, dwarf = FakeJob(known=9), FakeJob(known=2)
    p = plan([], [giant, dwarf], 2, limits)
    assert [job for job, _ in p.fail] == [giant] and p.work == [(dwarf, 2)]
    assert "9 tokens" in p.fail[0][1] and "8" in p.fail[0][1]


def test_functions_take_turns_and_are_admitted_in_the_order_of_arrival() -> None:
    limits = Limits(max_tokens=8, max_seqs=8, max_rows=8, page_tokens=4, total_pages=100)
    chat, text = FakeJob(known=6, computed=5, pages=2), FakeJob(known=40, function="embed")
    later = FakeJob(known=3)
    p = plan([chat], [text, later], 50, limits, "embed")
    assert (p.function, p.work, p.admit) == ("step", [(chat, 1), (later, 3)], [text, later])
    p = plan([chat, text], [], 50, limits, "step")
    assert (p.function, p.work) == ("embed", [(text, 8)])
    assert plan([chat, text], [], 50, limits, "embed").function == "step"


def test_a_turn_that_nobody_can_use_passes_on() -> None:
    limits = Limits(max_tokens=8, max_seqs=8, max_rows=8, page_tokens=4, total_pages=3)
    chat, text = FakeJob(known=3, computed=2, pages=1), FakeJob(known=12, computed=8, pages=2, function="embed")
    p = plan([chat, text], [], 0, limits, "step")
    assert (p.function, p.work, p.preempt) == ("step", [(chat, 1)], [])
