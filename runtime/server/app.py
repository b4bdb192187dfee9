"""The routes: which path does what, and the small endpoints. Chat and completions have their own files.

A handler's docstring and its row in `ENDPOINTS` are its part of docs/serving.md, which `python docs/serving.py` writes.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from xllm_compiler.runtime.server.access import Cors, Hosts
from xllm_compiler.runtime.server.chat import chat_completions
from xllm_compiler.runtime.server.completions import completions
from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.server.decode import Body
from xllm_compiler.runtime.server.embeddings import embeddings
from xllm_compiler.runtime.server.errors import ApiError, bad_request, unavailable
from xllm_compiler.runtime.server.middleware import Middleware, read_json_body
from xllm_compiler.runtime.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from xllm_compiler.runtime.server.responses import (
    Chat,
    ChatChunk,
    Completion,
    Detokenized,
    EmbeddingList,
    ModelCard,
    ModelList,
    Tokenized,
)
from xllm_compiler.runtime.server.streaming import error_response, json_response
from xllm_compiler.step.interface import EMBED, STEP

BodyHandler = Callable[[Context, Request, Body], Awaitable[Response]]
PlainHandler = Callable[[Context, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Plain:
    """An endpoint without a body. `answer`: the shape of its answer, where that is a struct."""

    path: str
    name: str
    handler: PlainHandler
    answer: type | None = None
    methods: tuple[str, ...] = ("GET",)


@dataclass(frozen=True)
class Post:
    """An endpoint that reads a JSON body of type `takes`. `chunk`: the shape of one event, where it can stream.
    `function`: what the model has to have for it."""

    path: str
    name: str
    handler: BodyHandler
    takes: type
    answer: type
    chunk: type | None = None
    function: str | None = None


def build_app(
    ctx: Context,
    keys: tuple[str, ...] = (),
    *,
    hosts: Hosts | None = None,
    cors: Cors | None = None,
    access_log: bool = True,
) -> ASGIApp:
    """The whole ASGI application. By default it answers to this machine's names, and to pages of this machine."""

    routes = [
        _plain_route(ctx, endpoint) if isinstance(endpoint, Plain) else _post_route(ctx, endpoint)
        for endpoint in ENDPOINTS
    ]
    router = Router(routes, redirect_slashes=False, default=_no_such_path)
    return Middleware(router, ctx, keys, hosts=hosts or Hosts(), cors=cors or Cors(), access_log=access_log)


def _plain_route(ctx: Context, which: Plain) -> Route:
    async def endpoint(request: Request) -> Response:
        return await which.handler(ctx, request)

    return Route(which.path, endpoint, methods=list(which.methods), name=which.name)


def _post_route(ctx: Context, which: Post) -> Route:
    async def endpoint(request: Request) -> Response:
        if which.function is not None:
            ctx.check_function(which.function)
        hold = ctx.budget.hold(_nobody)
        try:
            body = Body(await read_json_body(request, ctx.max_body_size, ctx.receive_timeout, hold), hold)
            return await which.handler(ctx, request, body)
        finally:
            hold.release()

    return Route(which.path, endpoint, methods=["POST"], name=which.name)


def _nobody() -> None:
    """An empty share has nothing to give up."""


async def _no_such_path(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, f"there is no {scope['path'][:200]!r} here", type="not_found_error", code="path_not_found")


def _card(ctx: Context, name: str) -> ModelCard:
    return ModelCard(name, ctx.created, ctx.model_info.name, ctx.model_info.max_model_len)


async def models(ctx: Context, request: Request) -> Response:
    """The names that the server goes by, all of one model."""
    return json_response(ModelList([_card(ctx, name) for name in ctx.names]))


async def model(ctx: Context, request: Request) -> Response:
    """One of them, or 404."""
    return json_response(_card(ctx, ctx.check_model(request.path_params["model"])))


async def health(ctx: Context, request: Request) -> Response:
    """200 while tokens move or there is nothing to do; 503 with the reason otherwise."""
    if ctx.draining:
        return error_response(unavailable("the server is shutting down", code="draining", retry_after=ctx.retry_after))
    reason = ctx.health()
    if reason is not None:
        return error_response(unavailable(reason, code="engine_unhealthy", retry_after=ctx.retry_after))
    return json_response({"status": "ok"})


async def metrics(ctx: Context, request: Request) -> Response:
    """Prometheus text, or OpenMetrics where the Accept header asks for it."""
    await asyncio.to_thread(importlib.import_module, "prometheus_client")  # slow the first time; streams keep flowing
    text, content_type = ctx.metrics.render(request.headers.get("accept", ""))
    return Response(text, headers={"content-type": content_type})


async def version(ctx: Context, request: Request) -> Response:
    """`version` of the server and `artifact`, the id of what it serves."""
    return json_response({"version": ctx.version, "artifact": ctx.model_info.artifact_id})


async def tokenize(ctx: Context, request: Request, body: Body) -> Response:
    """Tokens of a text, or of a conversation as the chat endpoint would see it."""
    asked = body.decode(TokenizeRequest, ctx.bounds)
    ctx.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise bad_request("give either `prompt` or `messages`", param="prompt")
    if asked.messages is not None:
        text = await ctx.render(
            asked.messages,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            kwargs=asked.chat_template_kwargs,
        )
        ids = await ctx.encode(text, add_special_tokens=bool(asked.add_special_tokens), field="messages")
    else:
        ids = await ctx.encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens is not False)
    names = await ctx.token_names(ids) if asked.return_token_strs else None
    return json_response(Tokenized(len(ids), ctx.model_info.max_model_len, ids, names))


async def detokenize(ctx: Context, request: Request, body: Body) -> Response:
    """Text of tokens, special ones included."""
    asked = body.decode(DetokenizeRequest, ctx.bounds)
    ctx.check_model(asked.model)
    await ctx.check_token_ids(asked.tokens, "tokens")
    return json_response(Detokenized(await ctx.decode(asked.tokens, skip_special_tokens=False)))


async def tokenizer_info(ctx: Context, request: Request) -> Response:
    """The special tokens by name: what a client needs beside /tokenize to do without tokenizer files."""
    names = {"bos_token": None, "eos_token": None, "pad_token": None, **ctx.tokenizer.special_tokens}
    return json_response({"tokenizer_class": "xllm", **names})


ENDPOINTS: tuple[Plain | Post, ...] = (
    Post("/v1/chat/completions", "chat", chat_completions, ChatRequest, Chat, ChatChunk, STEP),
    Post("/v1/completions", "completions", completions, CompletionRequest, Completion, Completion, STEP),
    Post("/v1/embeddings", "embeddings", embeddings, EmbeddingRequest, EmbeddingList, function=EMBED),
    Plain("/v1/models", "models", models, ModelList),
    Plain("/v1/models/{model:path}", "model", model, ModelCard),
    Post("/tokenize", "tokenize", tokenize, TokenizeRequest, Tokenized),
    Post("/detokenize", "detokenize", detokenize, DetokenizeRequest, Detokenized),
    Plain("/tokenizer_info", "tokenizer_info", tokenizer_info),
    Plain("/health", "health", health),
    Plain("/ping", "ping", health, methods=("GET", "POST")),
    Plain("/metrics", "metrics", metrics),
    Plain("/version", "version", version),
)
