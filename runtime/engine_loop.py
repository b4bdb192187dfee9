"""The engine's thread: take messages, plan, run, and give each sequence its rows. Owns requests from the inbox to their
last event; must not know HTTP, files or kernels.

One thread runs everything but the delivery of events, which another does during the next step (output_dispatcher.py).
A step runs one function of the artifact, and what its rows mean is the sequences' own: text, or an embedding.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from functools import partial

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import scheduler
from xllm_compiler.runtime.base_sequence import BaseSequence
from xllm_compiler.runtime.drafts import Drafter
from xllm_compiler.runtime.engine_state import EngineState
from xllm_compiler.runtime.executor import Executor, Outputs
from xllm_compiler.runtime.kv import BlockTable, PagePool
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.output_dispatcher import Delivery, OutputDispatcher
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.pooled_sequence import PooledSequence
from xllm_compiler.runtime.pooling import PoolingParams
from xllm_compiler.runtime.request import OnOutput, Request, SequenceGroup
from xllm_compiler.runtime.sampler import Scratch
from xllm_compiler.runtime.sequence import Sequence
from xllm_compiler.runtime.stats import EngineStats
from xllm_compiler.runtime.tokenizer import Tokenizer
from xllm_compiler.step.inputs import StepBatch, StepWriter


class EngineLoop:
    """What runs between two messages. Only `stats` and sizes may be read by other threads."""

    def __init__(
        self,
        executor: Executor,
        model_info: ModelInfo,
        state: EngineState,
        *,
        tokenizer: Tokenizer | None,
        drafter: Drafter | None,
        max_tokens: int,
    ) -> None:
        """`max_tokens`: of the longest request, prompt and answer."""
        self.running: list[BaseSequence] = []  # both in the order of arrival; all running arrived before all waiting
        self.waiting: deque[BaseSequence] = deque()
        self.groups: dict[str, list[BaseSequence]] = {}
        self.stats = EngineStats(kv_pages_total=executor.pages)
        self.pool = PagePool(executor.pages)
        self.limits = scheduler.Limits(
            max_tokens=model_info.max_num_batched_tokens,
            max_seqs=model_info.max_num_seqs,
            max_rows=model_info.max_num_logits,
            page_tokens=model_info.page_tokens,
            total_pages=executor.pages,
        )
        self.dispatcher = OutputDispatcher("xllm-outputs")
        self._executor = executor
        self._info = model_info
        self._state = state
        self._tokenizer = tokenizer
        self._drafter = drafter
        self._max_tokens = max_tokens
        self._writers = {name: StepWriter(executor.new_batch(name)) for name in model_info.functions}
        self._width = next(iter(self._writers.values())).batch["table"].shape[1]
        self._last = ""  # the function of the step before
        self._scratch = Scratch(model_info.vocab_size)
        self._serial = itertools.count()
        self._undelivered: list[Delivery] = []
        self._threaded = False

    def run(self) -> None:
        """Until the state says stop: what the engine's thread does."""
        state = self._state
        self._threaded = True
        while not state.stopping:
            if not (state.inbox or self.running or self.waiting):
                state.wake.wait()
                state.wake.clear()
                continue
            self.step()
        self._read_inbox()
        for sequence in [*self.running, *self.waiting]:
            self._finish(sequence, sequence.end("abort"))
        self._flush_outputs()
        self.dispatcher.end()
        self._executor.close()
        with state.idle:
            state.idle.notify_all()

    def step(self) -> None:
        """Once around the loop: take messages, run one step. Only for the engine's own thread, or instead of it."""
        try:
            self._read_inbox()
            if self.running or self.waiting:
                self._run_step()
                self._state.progress = time.monotonic()
        except Exception as error:  # a bug of ours: no request may hang because of it
            self._fail_all(_internal(error))
        if not self._threaded or not (self.running or self.waiting):
            self._flush_outputs()

    def _flush_outputs(self) -> None:
        """Hand what is undelivered to the dispatcher."""
        if self._undelivered:
            undelivered, self._undelivered = self._undelivered, []
            self.dispatcher.dispatch(undelivered)

    def _read_inbox(self) -> None:
        while self._state.inbox:
            message = self._state.inbox.popleft()
            if isinstance(message, str):
                for sequence in list(self.groups.get(message, ())):
                    self._finish(sequence, sequence.end("abort"))
            elif isinstance(message[0], BaseSequence):
                sequence, wrong = message
                if sequence in self.running or sequence in self.waiting:
                    self._finish(sequence, sequence.end("error", wrong))
            else:
                request, on_output = message
                try:
                    self._add(request, on_output)
                except Exception as error:
                    self._refuse(request, on_output, _internal(error))

    def _refuse(self, request: Request, on_output: OnOutput, error: XllmError) -> None:
        """End a request that never came to have sequences."""
        self.groups.pop(request.request_id, None)
        event = Output(request.request_id, 0, finish_reason="error", error=error, finished=True)
        self._undelivered.append(partial(self._deliver, None, request.request_id, on_output, event))

    def _add(self, request: Request, on_output: OnOutput) -> None:
        group = SequenceGroup(request, on_output)
        seed = int.from_bytes(os.urandom(8), "little")
        sequences: list[BaseSequence] = []
        self.groups[request.request_id] = sequences
        for index in range(request.params.n):
            serial = next(self._serial)
            table = BlockTable(self.pool, serial, self._width, self._info.page_tokens)
            sequences.append(self._sequence(group, index, serial, table, seed))
        self.waiting.extend(sequences)
        self.stats.prompt_tokens += len(request.prompt_token_ids)

    def _sequence(self, group: SequenceGroup, index: int, serial: int, table: BlockTable, seed: int) -> BaseSequence:
        if isinstance(group.request.params, PoolingParams):
            assert self._info.pooling is not None  # or the request would have been refused
            return PooledSequence(group, serial, table, self._info.pooling)
        return Sequence(
            group,
            index,
            serial,
            seed=seed,
            table=table,
            model_info=self._info,
            tokenizer=self._tokenizer,
            limit=self._max_tokens,
            scratch=self._scratch,
        )

    def _run_step(self) -> None:
        seconds = self.stats.step_seconds
        began = time.perf_counter()
        self._propose()
        plan = scheduler.plan(self.running, self.waiting, self.pool.free, self.limits, self._last)
        self._last = plan.function
        self._apply(plan)
        self._flush_outputs()
        planned = time.perf_counter()
        seconds["schedule"] += planned - began
        if not plan.work:
            return
        try:
            batch = self._fill(plan)
            filled = time.perf_counter()
            with self._state.computing:
                self._state.check_alive()
                outputs = self._executor.execute(batch)
            ran = time.perf_counter()
            self._state.run_first_output_check()
            self._state.check_alive()
        except Exception as error:
            # The KV of everyone in the step is suspect now; the others never saw it.
            for sequence, _ in plan.work:
                self._finish(sequence, sequence.end("error", _internal(error)))
            return
        self._take(plan.work, outputs)
        seconds["prepare"] += filled - planned
        seconds["execute"] += ran - filled
        seconds["sample"] += time.perf_counter() - ran
        self.stats.steps += 1
        self.stats.step_tokens += batch.sizes["N"]

    def _propose(self) -> None:
        """Ask for a draft of every sequence that decodes next."""
        if self._drafter is None:
            return
        vocab = range(self._info.vocab_size)
        for sequence in self.running:
            if not isinstance(sequence, Sequence):
                continue
            most = sequence.limit - sequence.known - 1
            if sequence.known - sequence.computed == 1 and most > 0:
                draft = list(self._drafter.propose(sequence, most))[:most]
                sequence.draft = list(itertools.takewhile(vocab.__contains__, draft))

    def _apply(self, plan: scheduler.Plan[BaseSequence]) -> None:
        for sequence in plan.preempt:
            self.running.pop()
            self.waiting.appendleft(sequence)
            self.stats.preemptions += 1
            self.stats.recomputed_tokens += sequence.computed
            sequence.group.metrics.preemptions += 1
            sequence.table.clear()
            sequence.computed = 0
            sequence.draft = []
        for sequence, why in plan.fail:
            error = XllmError("capacity", why, help="shorten the request, or give the server more KV cache memory")
            self._finish(sequence, sequence.end("error", error))
        for sequence in plan.admit:
            self.waiting.popleft()
            self.running.append(sequence)
            if not sequence.group.metrics.first_scheduled:
                sequence.group.metrics.first_scheduled = time.monotonic()

    def _fill(self, plan: scheduler.Plan[BaseSequence]) -> StepBatch:
        """Write the step's inputs, and give every sequence the pages of its new positions."""
        writer = self._writers[plan.function]
        writer.begin()
        for sequence, count in plan.work:
            low = sequence.computed
            sequence.table.ensure(low + count)
            tokens = (sequence.token(low),) if count == 1 else sequence.span(low, low + count)
            writer.add(tokens, low, sequence.table.row, range(max(0, sequence.first_row - low), count))
        return writer.end()

    def _take(self, work: list[tuple[BaseSequence, int]], outputs: Outputs) -> None:
        """Hand each sequence its rows; what came of it is to be told to its client."""
        s = 0
        now = time.monotonic()
        for sequence, count in work:
            low, high = sequence.computed, sequence.computed + count
            sequence.computed = high
            first = max(low, sequence.first_row)
            rows = range(s, s + max(0, high - first))
            s = rows.stop
            draft, sequence.draft = sequence.draft[: high - sequence.known], []
            events: list[Output] = []
            try:
                self.stats.accepted_draft_tokens += sequence.take(first, outputs, rows, draft, events)
                self.stats.draft_tokens += len(draft)
            except XllmError as error:
                events.append(sequence.end("error", error))
            except Exception as error:
                events.append(sequence.end("error", _internal(error)))
            for event in events:
                self._emit(sequence, event, now)

    def _emit(self, sequence: BaseSequence, event: Output, now: float) -> None:
        """Count what an event tells, and have it delivered."""
        if event.token_ids:
            metrics = sequence.group.metrics
            metrics.first_token = metrics.first_token or now
            metrics.last_token = now
            self.stats.generation_tokens += len(event.token_ids)
        if event.finish_reason is None:
            group = sequence.group
            self._undelivered.append(partial(self._deliver, sequence, group.request.request_id, group.on_output, event))
        else:
            self._finish(sequence, event)

    def _finish(self, sequence: BaseSequence, event: Output) -> None:
        """Free what the sequence holds; its last event is to be told."""
        sequence.table.clear()
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        group = sequence.group
        group.open -= 1
        request_id = group.request.request_id
        sequences = self.groups[request_id]
        sequences.remove(sequence)
        assert event.finish_reason is not None
        self.stats.finished[event.finish_reason] += 1
        if group.open == 0:
            event.finished = True
            group.metrics.finished = time.monotonic()
            event.metrics = group.metrics
            del self.groups[request_id]
        self._undelivered.append(partial(self._deliver, sequence, request_id, group.on_output, event))

    def _deliver(self, sequence: BaseSequence | None, request_id: str, on_output: OnOutput, event: Output) -> None:
        """On the dispatcher's thread."""
        if sequence is not None:
            self._put_text(sequence, event)
        event.time = time.monotonic()
        try:
            on_output(event)
        except Exception:
            # Somebody else's bug must not stop the loop; a request that nobody listens to is not worth running.
            self.stats.callback_errors += 1
            if not event.finished:
                self._state.inbox.append(request_id)
        if event.finished:
            self._state.forget(request_id)

    def _put_text(self, sequence: BaseSequence, event: Output) -> None:
        if sequence.broken is None:
            try:
                sequence.put_text(event)
            except Exception as error:  # a bug of ours, or of the tokenizer
                sequence.broken = _internal(error)
                if event.finish_reason is None:
                    self._state.inbox.append((sequence, sequence.broken))
        if sequence.broken is not None and event.finish_reason is not None:
            event.finish_reason, event.error = "error", sequence.broken

    def _fail_all(self, error: XllmError) -> None:
        for sequence in [*self.running, *self.waiting]:
            self._finish(sequence, sequence.end("error", error))


def _internal(error: Exception) -> XllmError:
    if isinstance(error, XllmError):
        return error
    return XllmError("internal", f"{type(error).__name__}: {error}")
