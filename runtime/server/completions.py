"""POST /v1/completions. Owns the legacy shapes: text choices, echo, and log-probabilities of prompts."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from xllm_compiler.runtime.outputs import CompletionOutput, LogprobDict, Output, RequestOutput
from xllm_compiler.runtime.server import pieces
from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.server.decode import Body, too_many_prompts
from xllm_compiler.runtime.server.engine_client import RequestStream
from xllm_compiler.runtime.server.errors import bad_request
from xllm_compiler.runtime.server.logprobs import (
    completion_logprobs,
    extend,
    shown_characters,
    shown_length,
)
from xllm_compiler.runtime.server.params import check_stream_options, completion_params
from xllm_compiler.runtime.server.prompts import split, tokens_of
from xllm_compiler.runtime.server.protocol import CompletionRequest
from xllm_compiler.runtime.server.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    usage_of,
)
from xllm_compiler.runtime.server.streaming import (
    DONE,
    EventResponse,
    WholeResponse,
    event,
    failure,
    until_hang_up,
)
from xllm_compiler.runtime.token_text import drop_first_space, first_entry

_LARGE = 65536  # bytes of a chunk that is sent by itself
_SCORE = 32  # bytes of one token's log-probability as JSON


@dataclass
class _Prompt:
    """One prompt of a request: its tokens and the text that `echo` gives back. `given`: the tokens are all of that
    text's, as it was sent."""

    ids: list[int]
    text: str
    given: bool = False


async def completions(ctx: Context, request: Request, body: Body) -> Response:
    """Continue one prompt or several. Raises ApiError, XllmError and ClientGone."""
    arrival = time.monotonic()
    ctx.check_open()
    asked = body.decode(CompletionRequest, ctx.bounds)
    model = ctx.check_model(asked.model)
    check_stream_options(asked)
    shared = completion_params(asked, ctx.defaults)
    shared.check_vocab(ctx.model_info.vocab_size)
    items, n = split(asked.prompt, "prompt"), shared.n
    if n * len(items) > ctx.engine_client.max_open:
        raise too_many_prompts(len(items), n, ctx.engine_client.max_open, "prompt")
    ctx.engine_client.check_room(n * len(items))
    prompts, jobs = [], []
    for item in items:
        prompt = await _prepare(ctx, asked, item)
        params = copy.copy(shared)  # the lists are shared
        ctx.fit(params, len(prompt.ids), explicit=asked.max_tokens is not None, field="prompt")
        prompts.append(prompt)
        jobs.append((prompt.ids, params))
        await asyncio.sleep(0)
    asked.forget_lists()
    del items
    answer = _Answer(ctx, asked, model, prompts, n)
    stream = ctx.engine_client.stream(arrival, keeps=not asked.stream)
    try:
        for index, (ids, params) in enumerate(jobs):
            stream.add(answer.part(index), ids, params)
            if asked.echo:
                stream.hold(answer.echo_bytes(index))
    except BaseException:
        stream.close()
        raise
    if asked.stream:
        return EventResponse(stream, answer.events(stream))
    return await until_hang_up(request, stream, lambda: answer.whole(stream))


async def _prepare(ctx: Context, asked: CompletionRequest, item: str | list[int]) -> _Prompt:
    special = asked.add_special_tokens is not False
    ids = await tokens_of(ctx, item, "prompt", add_special_tokens=special, cut=asked.truncate_prompt_tokens)
    text = item if isinstance(item, str) else None
    kept = ctx.truncate(ids, asked.truncate_prompt_tokens)
    if not kept:
        raise bad_request("`prompt` must have at least one token", param="prompt")
    if not asked.echo:
        return _Prompt(kept, "")
    if text is None or len(kept) < len(ids):
        text = await ctx.decode_within(kept, skip_special_tokens=asked.skip_special_tokens is not False)
        return _Prompt(kept, text)
    return _Prompt(kept, text, given=True)


class _Answer:
    """One request's answer, in either form. Choice k of prompt p has index p * n + k."""

    def __init__(self, ctx: Context, asked: CompletionRequest, model: str, prompts: list[_Prompt], n: int) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.ctx = ctx
        self.asked = asked
        self.model = model
        self.prompts = prompts
        self.n = n
        self.created = int(time.time())
        self.as_ids = bool(asked.return_tokens_as_token_ids)
        self.echo = bool(asked.echo)
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)

    def part(self, index: int) -> str:
        """The engine's name for prompt number `index`."""
        return f"{self.id}-{index}"

    def echo_bytes(self, index: int) -> int:
        """About what the copies of an echoed prompt will take in the answer."""
        prompt, scores = self.prompts[index], 0
        if self.asked.logprobs is not None:
            scores = len(prompt.ids) * (2 + self.asked.logprobs) * _SCORE
        return self.n * (len(prompt.text) + scores)

    def _index(self, output: Output) -> int:
        return int(output.request_id.rpartition("-")[2])

    async def scored(self, index: int, rows: list[LogprobDict | None]) -> CompletionLogprobs:
        """The log-probabilities of a prompt, which all its choices begin with."""
        prompt, tokenizer = self.prompts[index], self.ctx.tokenizer
        ids = prompt.ids
        first = first_entry(tokenizer, ids[0], len(ids) == 1, self.asked.skip_special_tokens is not False)
        if prompt.given:
            drop_first_space(first, ids, rows, prompt.text)
        written = shown_characters(first) + shown_length(ids[1:], rows[1:])
        out = await pieces.prompt_completion_logprobs(ids, rows, first=first, as_ids=self.as_ids)
        if prompt.given and written != len(prompt.text):
            # The tokens write something else than what they were made of: a normalized form, say.
            out.text_offset = await self.ctx.spans(prompt.text, self.asked.add_special_tokens is not False)
        return out

    async def whole(self, stream: RequestStream) -> Response:
        """The answer in one piece."""
        results = [
            RequestOutput(self.part(i), None, prompt.ids, [CompletionOutput(k) for k in range(self.n)])
            for i, prompt in enumerate(self.prompts)
        ]
        while batch := await stream.next_batch():
            for output in batch:
                error = failure(output)
                if error is not None:
                    raise error
                results[self._index(output)].add(output)
        choices = []
        for i, result in enumerate(results):
            scored, listed = None, None
            if result.prompt_logprobs is not None:
                if self.echo and self.asked.logprobs is not None:
                    scored = await self.scored(i, result.prompt_logprobs)
                if self.asked.prompt_logprobs is not None:
                    listed = await pieces.prompt_logprobs(result.prompt_logprobs)
                result.prompt_logprobs = None
            for out in result.outputs:
                choices.append(await self._choice(i, out, scored))
                if listed is not None:
                    choices[-1].prompt_logprobs = listed
        generated = sum(len(out.token_ids) for result in results for out in result.outputs)
        usage = usage_of(self.prompt_tokens, generated)
        answer = Completion(
            self.id, "text_completion", self.created, self.model, choices, self.ctx.model_info.artifact_id, usage
        )
        return WholeResponse(self.ctx.engine_client.held, answer)

    async def _choice(self, index: int, out: CompletionOutput, scored: CompletionLogprobs | None) -> CompletionChoice:
        prompt = self.prompts[index]
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = CompletionLogprobs([], [], [], [])
            if scored is not None:
                extend(logprobs, scored)
            if out.token_ids:
                offset = len(prompt.text) if self.echo else 0
                await pieces.completion_logprobs(
                    logprobs, out.token_ids, out.logprobs or [], offset=offset, as_ids=self.as_ids
                )
        choice = CompletionChoice(
            index * self.n + out.index,
            prompt.text + out.text if self.echo else out.text,
            logprobs,
            out.finish_reason,
            out.stop_reason,
        )
        if self.asked.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = out.token_ids, prompt.ids
        return choice

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        options = self.asked.stream_options
        shown = usage if options is not None and (options.include_usage or options.continuous_usage_stats) else UNSET
        return event(
            Completion(
                self.id, "text_completion", self.created, self.model, choices, self.ctx.model_info.artifact_id, shown
            )
        )

    async def events(self, stream: RequestStream) -> AsyncIterator[bytes]:
        """Chunks: the echoed prompt first, if asked for, then what is new, then the usage."""
        options = self.asked.stream_options
        continuous = options is not None and options.continuous_usage_stats
        states = [_PromptState(self, i) for i in range(len(self.prompts))]
        generated = 0
        while batch := await stream.next_batch():
            parts: list[bytes] = []
            for output in batch:
                error = failure(output)
                if error is not None:
                    if parts:
                        yield b"".join(parts)
                    raise error
                generated += len(output.token_ids)
                usage = usage_of(self.prompt_tokens, generated) if continuous else None
                for choice in await states[self._index(output)].take(output):
                    parts.append(self._chunk([choice], usage))
                    if len(parts[-1]) > _LARGE:  # an echoed prompt: its copies must not pile up
                        yield b"".join(parts)
                        parts = []
            if parts:
                yield b"".join(parts)
        if options is not None and options.include_usage:
            yield self._chunk([], usage_of(self.prompt_tokens, generated))
        yield DONE


class _PromptState:
    """The streaming state of one prompt: what was echoed, where each choice's text stands, what must wait.

    The prompt's log-probabilities come with choice 0's first event, and every choice's echo needs them; events of other
    choices that come earlier wait here.
    """

    def __init__(self, answer: _Answer, index: int) -> None:
        self._answer = answer
        self._index = index
        self._waiting: list[Output] = []
        self._scored: CompletionLogprobs | None = None
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    async def take(self, output: Output) -> list[CompletionChoice]:
        """The chunks that this event allows, in order."""
        answer = self._answer
        if answer.echo and answer.asked.logprobs is not None and self._scored is None:
            self._waiting.append(output)
            if output.prompt_logprobs is None:
                return []
            self._scored = await answer.scored(self._index, output.prompt_logprobs)
            ready, self._waiting = self._waiting, []
        else:
            ready = [output]
        return [choice for item in ready for choice in self._chunks(item)]

    def _chunks(self, output: Output) -> list[CompletionChoice]:
        answer, prompt = self._answer, self._answer.prompts[self._index]
        place = self._index * answer.n + output.index
        show_ids = bool(answer.asked.return_token_ids)
        out = []
        if output.index not in self._begun:
            self._begun.add(output.index)
            self._offsets[output.index] = len(prompt.text) if answer.echo else 0
            if answer.echo or show_ids:
                head = CompletionChoice(place, prompt.text, self._scored)
                if show_ids:
                    head.prompt_token_ids, head.token_ids = prompt.ids, []
                out.append(head)
        logprobs = None
        if answer.asked.logprobs is not None and output.token_ids and output.logprobs is not None:
            offset = self._offsets[output.index]
            logprobs = completion_logprobs(output.token_ids, output.logprobs, offset=offset, as_ids=answer.as_ids)
            self._offsets[output.index] += shown_length(output.token_ids, output.logprobs)
        if output.text or logprobs is not None or output.finish_reason is not None or (show_ids and output.token_ids):
            choice = CompletionChoice(place, output.text, logprobs, output.finish_reason, output.stop_reason)
            if show_ids:
                choice.token_ids = output.token_ids
            out.append(choice)
        return out
