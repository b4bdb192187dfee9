"""Offline use: `LLM(path).generate(prompts, SamplingParams(...))`. Owns the blocking front of the engine, with vLLM's
names and result shapes; must not know HTTP.

    from xllm_compiler import LLM, SamplingParams

    with LLM("artifact-or-checkpoint") as llm:
        for result in llm.generate(["def add(a, b):"], SamplingParams(temperature=0, max_tokens=32)):
            print(result.outputs[0].text)
"""

from __future__ import annotations

import itertools
import queue
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.chat_template import ChatTemplate, Message
from xllm_compiler.runtime.engine import Engine
from xllm_compiler.runtime.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    Output,
    RequestOutput,
)
from xllm_compiler.runtime.phases import Phases
from xllm_compiler.runtime.pooling import PoolingParams
from xllm_compiler.runtime.request import Request
from xllm_compiler.runtime.resolve import resolve_artifact
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.startup import EngineOptions, prepare_engine
from xllm_compiler.runtime.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
]

Prompt = str | Sequence[int] | Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model in this process, from an artifact or (compiled into the cache first) a checkpoint directory."""

    def __init__(
        self,
        model: str | Path,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        memory_utilization: float = 0.9,
        threads: int | None = None,
        level: str | None = None,
        compile_options: Sequence[str] = (),
    ) -> None:
        """Options are those of `EngineOptions`; `compile_options` go to xllm-compile when `model` is a checkpoint.

        Raises XllmError.
        """
        options = EngineOptions(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            memory_utilization=memory_utilization,
            threads=threads,
            level=level,
            max_queued=sys.maxsize,
        )
        path = resolve_artifact(
            Path(model), compile_options=compile_options, tell=lambda line: print(line, file=sys.stderr)
        )
        started = prepare_engine(path, options, Phases())
        self._start(started.engine, started.sampling_defaults)

    @classmethod
    def from_engine(cls, engine: Engine, sampling_defaults: Mapping[str, Any] | None = None) -> LLM:
        """Wrap an engine that was not started yet."""
        self = cls.__new__(cls)
        self._start(engine, sampling_defaults or {})
        return self

    def _start(self, engine: Engine, sampling_defaults: Mapping[str, Any]) -> None:
        self._engine = engine
        self._defaults = dict(sampling_defaults)
        self._ids = itertools.count()
        engine.start()

    @property
    def engine(self) -> Engine:
        return self._engine

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Abort what runs and free threads and memory. Safe to call twice."""
        self._engine.stop()
        if self._engine.tokenizer is not None and self._engine.tokenizer.has_chat_template:
            self._engine.tokenizer.chat_template.close()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises XllmError("request") when the artifact has none."""
        if self._engine.tokenizer is None:
            raise XllmError("request", "this model has no tokenizer", help="pass prompt_token_ids")
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends, over SamplingParams' own defaults."""
        return SamplingParams(**self._defaults)

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> list[RequestOutput]:
        """Complete prompts; results in their order.

        A prompt is text, a list of token ids, {"prompt": text} or {"prompt_token_ids": [...]}; one prompt or a list of
        them. `sampling_params`: one for all, or one for each; None takes the checkpoint's defaults. When a request
        fails the others are aborted and its XllmError is raised.
        """
        batch: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(batch)
        else:
            params = list(sampling_params)
        if len(params) != len(batch):
            raise XllmError("request", f"{len(batch)} prompts but {len(params)} sampling_params")
        # All are turned into tokens before the first one runs: a bad prompt then costs nothing.
        return self._run([self._request(prompt, p) for prompt, p in zip(batch, params, strict=True)])

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling_params: PoolingParams | None = None
    ) -> list[EmbeddingRequestOutput]:
        """Embeddings of prompts, in their order; a prompt is what it is for `generate`.

        Texts get the special tokens that the tokenizer adds. A checkpoint's prompts, such as "query: ", are the
        caller's to put before them. Raises XllmError("request") for a model that makes no embeddings.
        """
        batch: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        params = PoolingParams() if pooling_params is None else pooling_params
        requests = [self._request(prompt, params) for prompt in batch]
        found = {}
        for event in self._events(requests):
            assert event.embedding is not None
            found[event.request_id] = EmbeddingOutput(event.embedding.tolist())
        return [EmbeddingRequestOutput(r.request_id, found[r.request_id], list(r.prompt_token_ids)) for r in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the checkpoint's chat template or `chat_template`.

        A content is text or a list of {"type": "text", "text": ..}; the template gets the form that it reads, and sees
        `variables`, such as {"tools": [..]}, under their names.
        """
        tokenizer = self.get_tokenizer()
        special = tokenizer.special_tokens
        template = tokenizer.chat_template if chat_template is None else ChatTemplate(chat_template, special)
        many = bool(messages) and not isinstance(messages[0], Mapping)
        chats: Sequence[Any] = messages if many else [messages]
        prompts: list[Prompt] = []
        for chat in chats:
            text = template.render(
                chat,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={**special, **(variables or {})},
            )
            ids = tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params)

    def _request(self, prompt: Prompt, params: SamplingParams | PoolingParams) -> Request:
        text: object = None
        ids: object = None
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
            if unknown:
                raise XllmError("request", f"a prompt has unknown keys: {', '.join(map(str, unknown))}", where="prompt")
        else:
            ids = prompt
        if text is not None and not isinstance(text, str):
            raise XllmError("request", f"a prompt must be text, got {type(text).__name__}", where="prompt")
        if ids is None:
            if text is None:
                raise XllmError("request", "a prompt needs prompt or prompt_token_ids", where="prompt")
            ids = self.get_tokenizer().encode(text)
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
            raise XllmError("request", f"token ids must be a list, got {type(ids).__name__}", where="prompt")
        return Request(f"offline-{next(self._ids)}", ids, params, prompt=text)

    def _run(self, requests: Sequence[Request]) -> list[RequestOutput]:
        results = {
            r.request_id: RequestOutput(
                r.request_id, r.prompt, list(r.prompt_token_ids), [CompletionOutput(i) for i in range(r.params.n)]
            )
            for r in requests
        }
        for event in self._events(requests):
            results[event.request_id].add(event)
        return list(results.values())

    def _events(self, requests: Sequence[Request]) -> Iterator[Output]:
        """Submit all, and what comes of them until each has ended. The first failure ends all, and is raised."""
        events: queue.SimpleQueue[Output] = queue.SimpleQueue()
        queued: list[str] = []
        try:
            for request in requests:
                queued.append(self._engine.submit(request, events.put))
            open_ = len(queued)
            while open_:
                event = _next(events, self._engine)
                if event.error is not None:
                    raise event.error
                yield event
                open_ -= event.finished
        except BaseException:
            for request_id in queued:
                self._engine.abort(request_id)
            raise


def _is_one(prompts: object) -> bool:
    """Whether this is one prompt rather than a list of them: text, a mapping, or a list of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return True
    return isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int)


def _next(events: queue.SimpleQueue[Output], engine: Engine) -> Output:
    """The next event. Raises when the engine ended, which it checks once a second."""
    while True:
        try:
            return events.get(timeout=1.0)
        except queue.Empty:
            health = engine.health()
            if not health.alive and events.empty():
                raise health.error or XllmError("internal", "the engine stopped") from None
