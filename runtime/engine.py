"""The engine as other threads see it: submit, abort, drain, stop. Owns what is refused before it is queued, and the
registry of ids; what happens to a request then is `engine_loop`'s. Must not know HTTP, files or kernels.

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
import threading
import time
from collections.abc import Callable

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.drafts import Drafter
from xllm_compiler.runtime.engine_loop import EngineLoop
from xllm_compiler.runtime.engine_state import EngineState
from xllm_compiler.runtime.executor import Executor
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.pooling import PoolingParams
from xllm_compiler.runtime.request import OnOutput, Request
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.stats import EngineStats, Health
from xllm_compiler.runtime.tokenizer import Tokenizer

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
        pool_tokens = executor.pages * model_info.page_tokens
        self.max_tokens = min(model_info.max_model_len, pool_tokens)  # longest request, prompt and answer
        self._executor = executor
        self._max_queued = max_queued
        self._state = EngineState(before_first_output)
        self.loop = EngineLoop(
            executor, model_info, self._state, tokenizer=tokenizer, drafter=drafter, max_tokens=self.max_tokens
        )
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the loop's thread. Raises XllmError("internal") when it was started before."""
        if self._thread is not None:
            raise XllmError("internal", "the engine was started twice")
        self.loop.dispatcher.start()
        self._thread = threading.Thread(target=self.loop.run, name="xllm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_output: OnOutput) -> str:
        """Queue a request; its id. Raises XllmError: "request" when it can never run here, "capacity" when the queue is
        full or the server is shutting down."""
        self._check(request)
        with self._state.lock:
            if self._state.fatal is not None:
                raise self._state.fatal
            if not self._state.accepting:
                raise XllmError("capacity", "the server is shutting down and takes no new requests")
            if len(self._state.ids) >= self._max_queued:
                raise XllmError(
                    "capacity", f"{len(self._state.ids)} requests are queued already", help="try again later"
                )
            if request.request_id in self._state.ids:
                raise XllmError("request", f"a request with the id {request.request_id!r} is running")
            if not self._state.ids:
                self._state.progress = time.monotonic()
            self._state.ids.add(request.request_id)
            self._state.inbox.append((request, on_output))
        self._state.wake.set()
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its pages are free from then on. Unknown ids are ignored."""
        self._state.send(request_id)

    def drain(self, timeout: float) -> bool:
        """Take no new requests and wait for the others, at most `timeout` seconds; then abort what is left. True when
        all of them finished by themselves."""
        with self._state.lock:
            self._state.accepting = False
        done = self._wait_idle(timeout)
        if not done:
            with self._state.lock:
                left = list(self._state.ids)
            for request_id in left:
                self.abort(request_id)
            self._wait_idle(5.0)
        return done

    def stop(self) -> None:
        """Abort everything, end the threads and close the executor. Safe to call twice. A listener may call it too, and
        does not wait for the end."""
        with self._state.lock:
            self._state.accepting = False
        self._state.stopping = True
        self._state.wake.set()
        if self._thread is None:
            self._executor.close()
        elif threading.current_thread() is not self.loop.dispatcher.thread:
            self._thread.join()
            self.loop.dispatcher.thread.join()

    def fail(self, error: XllmError) -> None:
        """End everything with `error`, now and from now on. No step is running when this returns."""
        with self._state.lock:
            if self._state.fatal is None:
                self._state.fatal = error
        self._state.wake.set()
        with self._state.computing:
            pass

    def hold(self, check: Callable[[], None]) -> None:
        """Tell nobody what further steps computed before `check` has returned; what it raises is as for `fail`."""
        with self._state.lock:
            self._state.before_first_output = check

    @property
    def ended(self) -> bool:
        """Whether no step will ever run again."""
        return self._state.stopping or self._state.fatal is not None

    def stats(self) -> EngineStats:
        """A snapshot."""
        stats = copy.copy(self.loop.stats)
        stats.finished, stats.step_seconds = dict(stats.finished), dict(stats.step_seconds)
        stats.running = len(self.loop.running)
        stats.waiting = len(self.loop.waiting) + len(self._state.inbox)
        stats.kv_pages_used = self.loop.pool.used
        return stats

    def health(self) -> Health:
        alive = self._thread is not None and self._thread.is_alive() and self._state.fatal is None
        busy = bool(self._state.ids)
        return Health(alive, busy, time.monotonic() - self._state.progress if busy else 0.0, self._state.fatal)

    def _wait_idle(self, timeout: float) -> bool:
        with self._state.idle:
            return self._state.idle.wait_for(lambda: not self._state.ids or not self.health().alive, timeout)

    def step(self) -> None:
        """Once around the loop, on an engine that was not started."""
        self.loop.step()

    def _check(self, request: Request) -> None:
        ids, params = request.prompt_token_ids, request.params
        if params.function not in self.model_info.functions:
            has = ", ".join(self.model_info.functions)
            raise XllmError("request", f"this model has no function {params.function}; it has {has}", where="model")
        least = 0
        if isinstance(params, PoolingParams):
            params.check_size(self.model_info)
        else:
            self._check_sampling(params)
            least = 0 if params.max_tokens == 0 else max(1, params.min_tokens)
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
        if len(ids) + least > self.max_tokens:
            whole_model = self.max_tokens == self.model_info.max_model_len
            what = "the model's maximum length" if whole_model else "the whole KV cache"
            raise XllmError(
                "request",
                f"the prompt has {len(ids)} tokens and at least {least} are to be generated, "
                f"but {what} is {self.max_tokens} tokens",
                where="prompt",
                help="shorten the prompt",
            )

    def _check_sampling(self, params: SamplingParams) -> None:
        params.check_vocab(self.model_info.vocab_size)
        if params.stop_strings and self.tokenizer is None:
            raise XllmError("request", "stop strings need a tokenizer, and this model has none", where="stop")
