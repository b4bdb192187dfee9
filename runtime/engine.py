"""The loop: take messages, plan, run, sample. Owns requests from `submit` to their last event; must not know HTTP,
files or kernels.

One thread runs everything but the delivery of events, which another does during the next step (output_dispatcher.py);
other threads only append to the inbox. So nothing here needs a lock but the registry of ids.

    engine = Engine(executor, model_info, tokenizer=tokenizer); engine.start()
    engine.submit(Request("id", token_ids, SamplingParams(...)), on_output)    # any thread; XllmError when refused
    engine.abort("id")                                                         # any thread; unknown ids are ignored
    engine.stats(); engine.health()                                            # any thread
    engine.drain(timeout) -> bool; engine.stop()

`on_output(Output)` is called on the dispatcher's thread, once per sequence and token, in order, and must return at
once: a server hands over with `loop.call_soon_threadsafe`. An event with `finished` is the last one of its request.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import scheduler
from xllm_compiler.runtime.drafts import Drafter
from xllm_compiler.runtime.executor import F32, Executor, Logits
from xllm_compiler.runtime.kv import BlockTable, PagePool
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.output_dispatcher import Delivery, OutputDispatcher
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.request import OnOutput, Request, SequenceGroup
from xllm_compiler.runtime.sampler import Scratch
from xllm_compiler.runtime.sequence import Sequence
from xllm_compiler.runtime.stats import EngineStats, Health
from xllm_compiler.runtime.tokenizer import Tokenizer
from xllm_compiler.step.inputs import StepWriter

MAX_QUEUED = 16384


class Engine:
    """Serves requests on one executor until stopped."""

    def __init__(
        self,
        executor: Executor,
        model_info: ModelInfo,
        *,
        tokenizer: Tokenizer | None = None,
        max_queued: int = MAX_QUEUED,
        before_first_output: Callable[[], None] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """`before_first_output` is called once, before the first output is delivered (the loader's digest check of the
        weights); it raises XllmError when nothing may be delivered."""
        self.model_info = model_info
        self.tokenizer = tokenizer
        self._executor = executor
        self._batch = executor.new_batch()
        self._writer = StepWriter(self._batch)
        self._pool = PagePool(executor.pages)
        self._limits = scheduler.Limits(
            max_tokens=model_info.max_num_batched_tokens,
            max_seqs=model_info.max_num_seqs,
            max_rows=model_info.max_num_logits,
            page_tokens=model_info.page_tokens,
            total_pages=executor.pages,
        )
        pool_tokens = executor.pages * model_info.page_tokens
        self.max_tokens = min(model_info.max_model_len, pool_tokens)  # longest request, prompt and answer
        self._max_queued = max_queued
        self._before_first_output = before_first_output
        self._drafter = drafter
        self._running: list[Sequence] = []  # both in the order of arrival, and all running arrived before all waiting
        self._waiting: deque[Sequence] = deque()
        self._groups: dict[str, list[Sequence]] = {}
        self._scratch = Scratch(model_info.vocab_size)
        self._serial = itertools.count()
        self._stats = EngineStats(kv_pages_total=executor.pages)
        self._inbox: deque[tuple[Request, OnOutput] | tuple[Sequence, XllmError] | str] = deque()
        self._undelivered: list[Delivery] = []
        self._dispatcher = OutputDispatcher("xllm-outputs")
        self._wake = threading.Event()
        self._idle = threading.Condition()
        self._lock = threading.Lock()
        self._computing = threading.Lock()  # held while a step runs
        self._ids: set[str] = set()
        self._accepting = True
        self._stopping = False
        self._fatal: XllmError | None = None
        self._progress = time.monotonic()
        self._thread: threading.Thread | None = None

    # What other threads call.

    def start(self) -> None:
        """Start the loop's thread. Raises XllmError("internal") when it was started before."""
        if self._thread is not None:
            raise XllmError("internal", "the engine was started twice")
        self._dispatcher.start()
        self._thread = threading.Thread(target=self._loop, name="xllm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_output: OnOutput) -> str:
        """Queue a request; its id. Raises XllmError: "request" when it can never run here, "capacity" when the queue is
        full or the server is shutting down."""
        self._check(request)
        with self._lock:
            if self._fatal is not None:
                raise self._fatal
            if not self._accepting:
                raise XllmError("capacity", "the server is shutting down and takes no new requests")
            if len(self._ids) >= self._max_queued:
                raise XllmError("capacity", f"{len(self._ids)} requests are queued already", help="try again later")
            if request.request_id in self._ids:
                raise XllmError("request", f"a request with the id {request.request_id!r} is running")
            if not self._ids:
                self._progress = time.monotonic()
            self._ids.add(request.request_id)
            self._inbox.append((request, on_output))
        self._wake.set()
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its pages are free from then on. Unknown ids are ignored."""
        self._inbox.append(request_id)
        self._wake.set()

    def drain(self, timeout: float) -> bool:
        """Take no new requests and wait for the others, at most `timeout` seconds; then abort what is left. True when
        all of them finished by themselves."""
        with self._lock:
            self._accepting = False
        done = self._wait_idle(timeout)
        if not done:
            with self._lock:
                left = list(self._ids)
            for request_id in left:
                self.abort(request_id)
            self._wait_idle(5.0)
        return done

    def stop(self) -> None:
        """Abort everything, end the threads and close the executor. Safe to call twice. A listener may call it too, and
        does not wait for the end."""
        with self._lock:
            self._accepting = False
        self._stopping = True
        self._wake.set()
        if self._thread is None:
            self._executor.close()
        elif threading.current_thread() is not self._dispatcher.thread:
            self._thread.join()
            self._dispatcher.thread.join()

    def fail(self, error: XllmError) -> None:
        """End everything with `error`, now and from now on. No step is running when this returns."""
        with self._lock:
            if self._fatal is None:
                self._fatal = error
        self._wake.set()
        with self._computing:
            pass

    def hold(self, check: Callable[[], None]) -> None:
        """Tell nobody what further steps computed before `check` has returned; what it raises is as for `fail`."""
        with self._lock:
            self._before_first_output = check

    @property
    def ended(self) -> bool:
        """Whether no step will ever run again."""
        return self._stopping or self._fatal is not None

    def stats(self) -> EngineStats:
        """A snapshot."""
        stats = copy.copy(self._stats)
        stats.finished, stats.step_seconds = dict(stats.finished), dict(stats.step_seconds)
        stats.running = len(self._running)
        stats.waiting = len(self._waiting) + len(self._inbox)
        stats.kv_pages_used = self._pool.used
        return stats

    def health(self) -> Health:
        alive = self._thread is not None and self._thread.is_alive() and self._fatal is None
        busy = bool(self._ids)
        return Health(alive, busy, time.monotonic() - self._progress if busy else 0.0, self._fatal)

    def _wait_idle(self, timeout: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not self._ids or not self.health().alive, timeout)

    def _check(self, request: Request) -> None:
        ids, params = request.prompt_token_ids, request.params
        params.check_vocab(self.model_info.vocab_size)
        if params.stop_strings and self.tokenizer is None:
            raise XllmError("request", "stop strings need a tokenizer, and this model has none", where="stop")
        if not ids:
            raise XllmError("request", "the prompt has no tokens", where="prompt")
        if not all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, ids))):
            raise XllmError("request", "token ids must be integers", where="prompt")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.model_info.vocab_size:
            wrong = low if low < 0 else high
            raise XllmError(
                "request", f"token id {wrong} is not in the vocabulary of {self.model_info.vocab_size}", where="prompt"
            )
        least = 0 if params.max_tokens == 0 else max(1, params.min_tokens)
        if len(ids) + least > self.max_tokens:
            what = (
                "the model's maximum length"
                if self.max_tokens == self.model_info.max_model_len
                else "the whole KV cache"
            )
            raise XllmError(
                "request",
                f"the prompt has {len(ids)} tokens and at least {least} are to be generated, "
                f"but {what} is {self.max_tokens} tokens",
                where="prompt",
                help="shorten the prompt",
            )

    # What the engine's thread does.

    def _loop(self) -> None:
        while not self._stopping:
            if not (self._inbox or self._running or self._waiting):
                self._wake.wait()
                self._wake.clear()
                continue
            self.step()
        self._read_inbox()
        for sequence in [*self._running, *self._waiting]:
            self._finish(sequence, sequence.end("abort"))
        self._flush_outputs()
        self._dispatcher.end()
        self._executor.close()
        with self._idle:
            self._idle.notify_all()

    def step(self) -> None:
        """Once around the loop: take messages, run one step. Only for the engine's own thread, or instead of it."""
        try:
            self._read_inbox()
            if self._running or self._waiting:
                self._run_step()
                self._progress = time.monotonic()
        except Exception as error:  # a bug of ours: no request may hang because of it
            self._fail_all(_internal(error))
        if self._thread is None or not (self._running or self._waiting):
            self._flush_outputs()

    def _flush_outputs(self) -> None:
        """Hand what is undelivered to the dispatcher."""
        if self._undelivered:
            undelivered, self._undelivered = self._undelivered, []
            self._dispatcher.dispatch(undelivered)

    def _read_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, str):
                for sequence in list(self._groups.get(message, ())):
                    self._finish(sequence, sequence.end("abort"))
            elif isinstance(message[0], Sequence):
                sequence, wrong = message
                if sequence in self._running or sequence in self._waiting:
                    self._finish(sequence, sequence.end("error", wrong))
            else:
                request, on_output = message
                try:
                    self._add(request, on_output)
                except Exception as error:
                    self._refuse(request, on_output, _internal(error))

    def _refuse(self, request: Request, on_output: OnOutput, error: XllmError) -> None:
        """End a request that never came to have sequences."""
        self._groups.pop(request.request_id, None)
        event = Output(request.request_id, 0, finish_reason="error", error=error, finished=True)
        self._undelivered.append(partial(self._deliver, None, request.request_id, on_output, event))

    def _add(self, request: Request, on_output: OnOutput) -> None:
        group = SequenceGroup(request, on_output)
        seed = int.from_bytes(os.urandom(8), "little")
        width = self._batch["table"].shape[1]
        sequences: list[Sequence] = []
        self._groups[request.request_id] = sequences
        for index in range(request.params.n):
            serial = next(self._serial)
            table = BlockTable(self._pool, serial, width, self.model_info.page_tokens)
            sequences.append(
                Sequence(
                    group,
                    index,
                    serial,
                    seed=seed,
                    table=table,
                    model_info=self.model_info,
                    tokenizer=self.tokenizer,
                    limit=self.max_tokens,
                    scratch=self._scratch,
                )
            )
        self._waiting.extend(sequences)
        self._stats.prompt_tokens += len(request.prompt_token_ids)

    def _run_step(self) -> None:
        seconds = self._stats.step_seconds
        began = time.perf_counter()
        self._propose()
        plan = scheduler.plan(self._running, self._waiting, self._pool.free, self._limits)
        self._apply(plan)
        self._flush_outputs()
        planned = time.perf_counter()
        seconds["schedule"] += planned - began
        if not plan.work:
            return
        try:
            self._fill(plan.work)
            filled = time.perf_counter()
            with self._computing:
                self._check_alive()
                logits = Logits.of(self._executor.execute(self._batch))
            ran = time.perf_counter()
            if self._before_first_output is not None:
                self._run_first_output_check()
            self._check_alive()
        except Exception as error:
            # The KV of everyone in the step is suspect now; the others never saw it.
            for sequence, _ in plan.work:
                self._finish(sequence, sequence.end("error", _internal(error)))
            return
        self._take(plan.work, logits)
        seconds["prepare"] += filled - planned
        seconds["execute"] += ran - filled
        seconds["sample"] += time.perf_counter() - ran
        self._stats.steps += 1
        self._stats.step_tokens += self._batch.sizes["N"]

    def _propose(self) -> None:
        """Ask for a draft of every sequence that decodes next."""
        if self._drafter is None:
            return
        vocab = range(self.model_info.vocab_size)
        for sequence in self._running:
            most = sequence.limit - sequence.known - 1
            if sequence.known - sequence.computed == 1 and most > 0:
                draft = list(self._drafter.propose(sequence, most))[:most]
                sequence.draft = list(itertools.takewhile(vocab.__contains__, draft))

    def _check_alive(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _run_first_output_check(self) -> None:
        before_first_output = self._before_first_output
        assert before_first_output is not None
        try:
            before_first_output()
        except XllmError as error:
            with self._lock:
                self._fatal = error
            raise
        with self._lock:
            if self._before_first_output is before_first_output:
                self._before_first_output = None

    def _apply(self, plan: scheduler.Plan[Sequence]) -> None:
        for sequence in plan.preempt:
            self._running.pop()
            self._waiting.appendleft(sequence)
            self._stats.preemptions += 1
            self._stats.recomputed_tokens += sequence.computed
            sequence.group.metrics.preemptions += 1
            sequence.table.clear()
            sequence.computed = 0
            sequence.draft = []
        for sequence, why in plan.fail:
            error = XllmError("capacity", why, help="shorten the request, or give the server more KV cache memory")
            self._finish(sequence, sequence.end("error", error))
        for sequence in plan.admit:
            self._waiting.popleft()
            self._running.append(sequence)
            if not sequence.group.metrics.first_scheduled:
                sequence.group.metrics.first_scheduled = time.monotonic()

    def _fill(self, work: list[tuple[Sequence, int]]) -> None:
        """Write the step's inputs, and give every sequence the pages of its new positions."""
        writer = self._writer
        writer.begin()
        for sequence, count in work:
            low = sequence.computed
            sequence.table.ensure(low + count)
            tokens = (sequence.token(low),) if count == 1 else sequence.span(low, low + count)
            writer.add(tokens, low, sequence.table.row, range(max(0, sequence.first_row - low), count))
        writer.end()

    def _take(self, work: list[tuple[Sequence, int]], logits: Logits) -> None:
        """Hand each sequence its rows; what came of it is to be told to its client."""
        s = 0
        now = time.monotonic()
        for sequence, count in work:
            low, high = sequence.computed, sequence.computed + count
            sequence.computed = high
            first = max(low, sequence.first_row)
            wanted = slice(s, s + max(0, high - first))
            s = wanted.stop
            draft, sequence.draft = sequence.draft[: high - sequence.known], []
            events: list[Output] = []
            try:
                self._advance(sequence, first, logits.rows[wanted], logits.maxima[wanted], draft, events)
            except XllmError as error:
                events.append(sequence.end("error", error))
            except Exception as error:
                events.append(sequence.end("error", _internal(error)))
            for event in events:
                self._emit(sequence, event, now)

    def _emit(self, sequence: Sequence, event: Output, now: float) -> None:
        """Count what an event tells, and have it delivered."""
        if event.token_ids:
            metrics = sequence.group.metrics
            metrics.first_token = metrics.first_token or now
            metrics.last_token = now
            self._stats.generation_tokens += len(event.token_ids)
        if event.finish_reason is None:
            group = sequence.group
            self._undelivered.append(partial(self._deliver, sequence, group.request.request_id, group.on_output, event))
        else:
            self._finish(sequence, event)

    def _advance(
        self, sequence: Sequence, first: int, rows: F32, maxima: F32, draft: list[int], events: list[Output]
    ) -> None:
        """Use the logits of positions `first`, `first` + 1, ...; `events` gets what there is to tell.

        The rows from the last known position on each give a token, as long as the tokens before were those of `draft`,
        which the step was run with."""
        last = sequence.known - 1
        for offset in range(len(rows)):
            position = first + offset
            if position < last:
                sequence.score_prompt(rows[offset], position)
                sequence.first_row = position + 1
        if first + len(rows) <= last or not len(rows):
            return
        if sequence.known >= sequence.limit:
            events.append(sequence.end("length"))  # max_tokens is 0: only the prompt's logprobs were wanted
            return
        self._stats.draft_tokens += len(draft)
        for row, expected in zip(range(last - first, len(rows)), [*draft, None], strict=True):
            event = sequence.sample(rows[row], maxima[row])
            events.append(event)
            sequence.computed = sequence.known - 1  # what was computed behind it is not part of the text
            if event.finish_reason is not None or event.token_ids[0] != expected:
                break
            self._stats.accepted_draft_tokens += 1

    def _finish(self, sequence: Sequence, event: Output) -> None:
        """Free what the sequence holds; its last event is to be told."""
        sequence.table.clear()
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        group = sequence.group
        group.open -= 1
        request_id = group.request.request_id
        sequences = self._groups[request_id]
        sequences.remove(sequence)
        assert event.finish_reason is not None
        self._stats.finished[event.finish_reason] += 1
        if group.open == 0:
            event.finished = True
            group.metrics.finished = time.monotonic()
            event.metrics = group.metrics
            del self._groups[request_id]
        self._undelivered.append(partial(self._deliver, sequence, request_id, group.on_output, event))

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._ids.discard(request_id)
        with self._idle:
            self._idle.notify_all()

    def _deliver(self, sequence: Sequence | None, request_id: str, on_output: OnOutput, event: Output) -> None:
        """On the dispatcher's thread."""
        if sequence is not None:
            self._put_text(sequence, event)
        event.time = time.monotonic()
        try:
            on_output(event)
        except Exception:
            # Somebody else's bug must not stop the loop; a request that nobody listens to is not worth running.
            self._stats.callback_errors += 1
            if not event.finished:
                self._inbox.append(request_id)
        if event.finished:
            self._forget(request_id)

    def _put_text(self, sequence: Sequence, event: Output) -> None:
        if sequence.broken is None:
            try:
                sequence.put_text(event)
            except Exception as error:  # a bug of ours, or of the tokenizer
                sequence.broken = _internal(error)
                if event.finish_reason is None:
                    self._inbox.append((sequence, sequence.broken))
        if sequence.broken is not None and event.finish_reason is not None:
            event.finish_reason, event.error = "error", sequence.broken

    def _fail_all(self, error: XllmError) -> None:
        for sequence in [*self._running, *self._waiting]:
            self._finish(sequence, sequence.end("error", error))


def _internal(error: Exception) -> XllmError:
    if isinstance(error, XllmError):
        return error
    return XllmError("internal", f"{type(error).__name__}: {error}")
