"""Carries requests from the event loop to the engine's threads, and outputs back. Counts open requests.

The engine's dispatcher thread calls `EngineClient._deliver` once per output event. The events of one step reach the
loop in one wake-up. Everything else here runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.pooling import PoolingParams
from xllm_compiler.runtime.request import Request
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.server.errors import ApiError, bad_request, unavailable
from xllm_compiler.runtime.server.held import Held, of_output, of_prompt
from xllm_compiler.runtime.server.metrics import Metrics

log = logging.getLogger("xllm.server")
DEFAULT_HELD = 512 * 2**20


class EngineLike(Protocol):
    """What the server needs of `runtime.engine.Engine`. Both calls are thread-safe and return at once."""

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> str:
        """Queue a request; `on_output` is called from another thread, always the same, with each of its outputs."""
        ...

    def abort(self, request_id: str) -> None:
        """Stop a request, free its pages within a step, and deliver no more. Unknown ids are ignored."""
        ...


class ClientGone(Exception):
    """The client hung up; there is nobody to answer."""


class RequestStream:
    """The outputs of one HTTP request, which may be several prompts with several sequences each.

    Call `add` for every prompt, `next_batch` until it is empty, and always `close()`. What it holds counts towards the
    server's bound. Prompts count until it is closed; outputs until the next ones are asked for, or with `keeps` until
    it is closed.
    """

    def __init__(self, engine_client: EngineClient, arrival: float, *, keeps: bool) -> None:
        self.arrival = arrival
        self.gone = False
        self.held = 0
        self._keeps = keeps
        self._fresh = 0  # of `held`: outputs that were handed out last, or were not yet
        self._handed = 0
        self._failure: ApiError | None = None
        self._listed = False
        self._engine_client = engine_client
        self._pending: list[Output] = []
        self._open: dict[str, _Tracked] = {}
        self._waiter: asyncio.Future[None] | None = None

    def add(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams | PoolingParams) -> None:
        """Submit one prompt. Raises ApiError 429 when the queue or the memory is full, XllmError from the engine."""
        size = of_prompt(len(prompt_token_ids), params)
        if not self._listed:
            self._listed = True
            size += params.nbytes
        self._engine_client.check_memory(size)
        self._engine_client.admit(params.n)
        self._engine_client.holders.add(self)
        self._hold(size)
        self._open[request_id] = _Tracked(len(prompt_token_ids), params, self.arrival)
        try:
            self._engine_client.start(request_id, prompt_token_ids, params, self)
        except BaseException:
            del self._open[request_id]
            self._engine_client.release(params.n)
            raise

    def hold(self, size: int) -> None:
        """Count bytes that the answer will take beside what is counted by itself. Raises ApiError as `add` does."""
        self._engine_client.check_memory(size)
        self._hold(size)

    async def next_batch(self) -> list[Output]:
        """What has arrived since the last call, at least one output; empty when everything is finished.

        Raises ClientGone after `hang_up`, and the ApiError given to `fail`.
        """
        if not self._keeps:
            self._hold(-self._handed)
            self._handed = 0
        while not self._pending:
            if self.gone:
                raise ClientGone
            if self._failure is not None:
                raise self._failure
            if not self._open:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        batch, self._pending = self._pending, []
        self._handed, self._fresh = self._fresh, 0
        return batch

    def _hold(self, size: int) -> None:
        self.held += size
        self._engine_client.held.used += size

    def push(self, output: Output) -> None:
        """One output from the engine, on the loop's thread."""
        tracked = self._open.get(output.request_id)
        if tracked is None:  # closed while the output was on its way
            return
        tracked.observe(output, self._engine_client.metrics)
        if output.finished:
            del self._open[output.request_id]
            self._engine_client.release(tracked.params.n)
        self._pending.append(output)
        size = of_output(output)
        self._fresh += size
        self._hold(size)
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End the request with an error for the client."""
        self.close()
        self._pending = []
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def hang_up(self) -> None:
        """The client is gone: stop all of it now, without waiting for the handler to notice."""
        self.gone = True
        self.close()
        self._wake()

    def close(self) -> None:
        """Abort what is unfinished. Safe to call twice."""
        for request_id, tracked in self._open.items():
            self._engine_client.stop(request_id)
            self._engine_client.release(tracked.params.n)
            self._engine_client.metrics.finished["abort"] += 1
        self._open.clear()
        self._engine_client.holders.discard(self)
        self._hold(-self.held)
        self._fresh = self._handed = 0


class _Tracked:
    """The times of one prompt in flight, for the histograms. All times are `time.monotonic()` of this process."""

    __slots__ = ("arrival", "first", "generated", "last", "params", "prompt_tokens")

    def __init__(self, prompt_tokens: int, params: SamplingParams | PoolingParams, arrival: float) -> None:
        self.prompt_tokens = prompt_tokens
        self.params = params
        self.arrival = arrival
        self.first = 0.0
        self.last: dict[int, float] = {}
        self.generated = 0

    def observe(self, output: Output, metrics: Metrics) -> None:
        now = output.time or time.monotonic()
        count = len(output.token_ids)
        if count:
            if not self.first:
                self.first = now
                metrics.observe("time_to_first_token_seconds", now - self.arrival)
            before = self.last.get(output.index)
            if before is not None:
                for _ in range(count):
                    metrics.observe("inter_token_latency_seconds", max(0.0, now - before) / count)
            self.last[output.index] = now
            self.generated += count
            metrics.counters["generation_tokens"] += count
        if output.finished:
            self._finish(output, now, metrics)

    def _finish(self, output: Output, now: float, metrics: Metrics) -> None:
        metrics.finished[output.finish_reason or "stop"] += 1
        metrics.counters["prompt_tokens"] += self.prompt_tokens
        metrics.observe("e2e_request_latency_seconds", now - self.arrival)
        metrics.observe("request_prompt_tokens", self.prompt_tokens)
        metrics.observe("request_generation_tokens", self.generated)
        metrics.observe("request_params_n", self.params.n)
        if isinstance(self.params, SamplingParams) and self.params.max_tokens is not None:
            metrics.observe("request_params_max_tokens", self.params.max_tokens)
        per_choice = self.generated / max(1, len(self.last))
        if self.first and per_choice > 1:
            metrics.observe("request_time_per_output_token_seconds", (now - self.first) / (per_choice - 1))
        times = output.metrics
        if times is not None and times.first_scheduled:
            metrics.observe("request_queue_time_seconds", max(0.0, times.first_scheduled - times.arrival))
            if times.first_token:
                metrics.observe("request_prefill_time_seconds", times.first_token - times.first_scheduled)
                metrics.observe("request_decode_time_seconds", times.last_token - times.first_token)
                metrics.observe("request_inference_time_seconds", times.last_token - times.first_scheduled)


class EngineClient:
    """One per server. `max_open` bounds the choices in flight: those that run plus those that may wait. `max_held`
    bounds what they hold, in bytes."""

    def __init__(self, engine: EngineLike, metrics: Metrics, max_open: int, max_held: int = DEFAULT_HELD) -> None:
        self.metrics = metrics
        self.max_open = max_open
        self.held = Held(max_held)
        self.holders: set[RequestStream] = set()
        self.open = 0
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: deque[tuple[RequestStream, Output]] = deque()
        self._streams: dict[str, RequestStream] = {}
        self._scheduled = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say on which loop the streams live, before the first of them."""
        self._loop = loop
        self._scheduled = False  # what a loop that has ended was to call is never called

    def stream(self, arrival: float | None = None, *, keeps: bool = False) -> RequestStream:
        """`keeps`: its outputs are gathered until the answer is whole."""
        if self._loop is None:
            self.attach(asyncio.get_running_loop())
        return RequestStream(self, time.monotonic() if arrival is None else arrival, keeps=keeps)

    def check_memory(self, size: int) -> None:
        """Raises ApiError: 429 when `size` bytes more do not fit now, 400 when they never will."""
        if size > self.held.limit:
            raise bad_request(
                f"the request would hold {size} bytes, and all requests of this server may hold {self.held.limit}",
                code="capacity",
            )
        if not self.held.fits(size):
            raise unavailable(
                "the server is full: its requests hold all the memory that they may",
                code="server_overloaded",
                status=429,
            )

    def _make_room(self) -> None:
        """End whoever holds most while all together hold too much: answers grow after they were let in."""
        while self.held.used > self.held.limit:
            largest = max(self.holders, key=lambda stream: stream.held, default=None)
            if largest is None:
                return
            self.metrics.finished["error"] += 1
            log.warning("a request was ended: its answer held %d bytes, most of all", largest.held)
            largest.fail(
                unavailable(
                    "the answer grew beyond the memory that the server's requests may hold; ask for fewer tokens, "
                    "choices or log-probabilities",
                    code="server_overloaded",
                )
            )

    def check_room(self, choices: int) -> None:
        """Raises ApiError: 429 when so many more choices do not fit now, 400 when they never will."""
        if choices > self.max_open:
            raise bad_request(
                f"n is {choices}, and this server takes {self.max_open} at once", param="n", code="capacity"
            )
        if self.open + choices > self.max_open:
            raise unavailable(
                f"the server is full: {self.open} requests are running or waiting", code="server_overloaded", status=429
            )

    def admit(self, choices: int) -> None:
        """Count `choices` more as open. Raises ApiError as `check_room` does."""
        self.check_room(choices)
        self.open += choices

    def release(self, choices: int) -> None:
        self.open -= choices

    def start(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams | PoolingParams,
        stream: RequestStream,
    ) -> None:
        def sink(output: Output) -> None:
            self._deliver(stream, output)

        self._engine.submit(Request(request_id, prompt_token_ids, params, arrival=stream.arrival), sink)
        self._streams[request_id] = stream

    def stop(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._engine.abort(request_id)

    def end_all(self) -> None:
        """Abort every request in flight and tell its handler, with a last event of reason "abort"."""
        for request_id, stream in list(self._streams.items()):
            self._engine.abort(request_id)
            stream.push(Output(request_id, 0, finish_reason="abort", finished=True))
        self._streams.clear()

    def _deliver(self, stream: RequestStream, output: Output) -> None:
        """Runs on the dispatcher's thread. A deque's append and popleft are atomic, so no lock is needed.

        The flag is cleared before the inbox is emptied. An event in between then costs a spare wake-up; the other order
        would lose it.
        """
        self._inbox.append((stream, output))
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: the server is gone and so is the client
                self._scheduled = False
                self._inbox.clear()

    def _drain(self) -> None:
        self._scheduled = False
        while self._inbox:
            stream, output = self._inbox.popleft()
            stream.push(output)
            if output.finished:
                self._streams.pop(output.request_id, None)
        if self.held.used > self.held.limit:
            self._make_room()
