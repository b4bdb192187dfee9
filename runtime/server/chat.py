"""POST /v1/chat/completions. Owns the chat shapes; prompts come from the model's template through `Context.render`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from xllm_compiler.runtime.outputs import CompletionOutput, LogprobDict, Output, RequestOutput
from xllm_compiler.runtime.server import pieces
from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.server.decode import Body
from xllm_compiler.runtime.server.engine_client import RequestStream
from xllm_compiler.runtime.server.logprobs import chat_logprobs
from xllm_compiler.runtime.server.params import chat_params, check_stream_options
from xllm_compiler.runtime.server.protocol import ChatRequest
from xllm_compiler.runtime.server.responses import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
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


async def chat_completions(ctx: Context, request: Request, body: Body) -> Response:
    """Continue a conversation. Raises ApiError, XllmError and ClientGone."""
    arrival = time.monotonic()
    ctx.check_open()
    asked = body.decode(ChatRequest, ctx.bounds)
    model = ctx.check_model(asked.model)
    check_stream_options(asked)
    params = chat_params(asked, ctx.defaults)
    params.check_vocab(ctx.model_info.vocab_size)
    ctx.engine_client.check_room(params.n)
    text = await ctx.render(
        asked.messages,
        add_generation_prompt=asked.add_generation_prompt,
        continue_final_message=asked.continue_final_message,
        kwargs=asked.chat_template_kwargs,
    )
    cut = asked.truncate_prompt_tokens
    ids = await ctx.encode(text, add_special_tokens=bool(asked.add_special_tokens), field="messages", cut=cut)
    ids = ctx.truncate(ids, cut)
    explicit = asked.max_tokens is not None or asked.max_completion_tokens is not None
    ctx.fit(params, len(ids), explicit=explicit, field="messages")
    del text
    asked.forget_lists()
    answer = _Answer(ctx, asked, model, ids, params.n)
    stream = ctx.engine_client.stream(arrival, keeps=not asked.stream)
    stream.add(answer.id, ids, params)
    if asked.stream:
        return EventResponse(stream, answer.events(stream))
    return await until_hang_up(request, stream, lambda: answer.whole(stream))


class _Answer:
    """One chat request's answer, in either form."""

    def __init__(self, ctx: Context, asked: ChatRequest, model: str, prompt: list[int], n: int) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.asked = asked
        self.model = model
        self.prompt = prompt
        self.n = n
        self.created = int(time.time())
        self.fingerprint = ctx.model_info.artifact_id
        self.held = ctx.engine_client.held

    def _logprobs(self, token_ids: list[int], rows: list[LogprobDict] | None) -> ChatLogprobs | None:
        if not self.asked.logprobs or rows is None:
            return None
        as_ids = bool(self.asked.return_tokens_as_token_ids)
        return chat_logprobs(token_ids, rows, top=self.asked.top_logprobs or 0, as_ids=as_ids)

    async def whole(self, stream: RequestStream) -> Response:
        """The answer in one piece."""
        result = RequestOutput(self.id, None, self.prompt, [CompletionOutput(i) for i in range(self.n)])
        while batch := await stream.next_batch():
            for output in batch:
                error = failure(output)
                if error is not None:
                    raise error
                result.add(output)
        want_ids = bool(self.asked.return_token_ids)
        choices = []
        for out in result.outputs:
            logprobs = None
            if self.asked.logprobs:
                as_ids, top = bool(self.asked.return_tokens_as_token_ids), self.asked.top_logprobs or 0
                logprobs = await pieces.chat_logprobs(out.token_ids, out.logprobs or [], top=top, as_ids=as_ids)
            choices.append(
                ChatChoice(
                    out.index,
                    ChatMessage("assistant", out.text),
                    logprobs,
                    out.finish_reason,
                    out.stop_reason,
                    out.token_ids if want_ids else UNSET,
                )
            )
        usage = usage_of(len(self.prompt), sum(len(out.token_ids) for out in result.outputs))
        answer = Chat(self.id, "chat.completion", self.created, self.model, choices, self.fingerprint, usage)
        if self.asked.prompt_logprobs is not None and result.prompt_logprobs is not None:
            answer.prompt_logprobs = await pieces.prompt_logprobs(result.prompt_logprobs)
        if want_ids:
            answer.prompt_token_ids = self.prompt
        return WholeResponse(self.held, answer)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None, *, first: bool = False) -> bytes:
        options = self.asked.stream_options
        shown = usage if options is not None and (options.include_usage or options.continuous_usage_stats) else UNSET
        prompt = self.prompt if first and self.asked.return_token_ids else UNSET
        return event(
            ChatChunk(
                self.id,
                "chat.completion.chunk",
                self.created,
                self.model,
                choices,
                self.fingerprint,
                shown,
                prompt,
            )
        )

    async def events(self, stream: RequestStream) -> AsyncIterator[bytes]:
        """Chunks: the role of every choice, then what is new, then how it ended, then the usage."""
        options = self.asked.stream_options
        continuous = options is not None and options.continuous_usage_stats
        generated = 0
        first = True
        while batch := await stream.next_batch():
            parts: list[bytes] = []
            for output in batch:
                error = failure(output)
                if error is not None:
                    if parts:
                        yield b"".join(parts)
                    raise error
                usage = usage_of(len(self.prompt), generated) if continuous else None
                if first:
                    first = False
                    for index in range(self.n):
                        role = ChatChunkChoice(index, ChatDelta("assistant", ""))
                        parts.append(self._chunk([role], usage, first=index == 0))
                generated += len(output.token_ids)
                choice = self._delta(output)
                if choice is not None:
                    usage = usage_of(len(self.prompt), generated) if continuous else None
                    parts.append(self._chunk([choice], usage))
            if parts:
                yield b"".join(parts)
        if options is not None and options.include_usage:
            yield self._chunk([], usage_of(len(self.prompt), generated))
        yield DONE

    def _delta(self, output: Output) -> ChatChunkChoice | None:
        """What one event adds; None when there is nothing to show yet."""
        ended = output.finish_reason is not None
        show_ids = bool(self.asked.return_token_ids)
        logprobs = self._logprobs(output.token_ids, output.logprobs)
        if not (output.text or ended or logprobs or (show_ids and output.token_ids)):
            return None
        return ChatChunkChoice(
            output.index,
            ChatDelta(content=output.text) if output.text or not ended else ChatDelta(),
            logprobs,
            output.finish_reason,
            output.stop_reason if ended else UNSET,
            output.token_ids if show_ids else UNSET,
        )
