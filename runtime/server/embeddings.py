"""POST /v1/embeddings: texts or token ids in, vectors out, as numbers or as base64 of their bytes."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid

import msgspec
from msgspec import Raw
from starlette.requests import Request
from starlette.responses import Response

from xllm_compiler.runtime.executor import F32
from xllm_compiler.runtime.pooling import PoolingParams
from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.server.decode import Body, too_long, too_many_prompts
from xllm_compiler.runtime.server.engine_client import RequestStream
from xllm_compiler.runtime.server.errors import bad_request
from xllm_compiler.runtime.server.prompts import split, tokens_of
from xllm_compiler.runtime.server.protocol import EmbeddingRequest
from xllm_compiler.runtime.server.responses import Embedding, EmbeddingList, EmbeddingUsage
from xllm_compiler.runtime.server.streaming import WholeResponse, failure, until_hang_up

_NUMBER = {"float": 64, "base64": 20}  # bytes of one number: in the engine, and beside that as it is sent


async def embeddings(ctx: Context, request: Request, body: Body) -> Response:
    """The embedding of one text or of several, each by itself."""
    arrival = time.monotonic()
    ctx.check_open()
    asked = body.decode(EmbeddingRequest, ctx.bounds)
    model = ctx.check_model(asked.model)
    form = asked.encoding_format or "float"
    if form not in _NUMBER:
        raise bad_request(f"`encoding_format` must be float or base64, got {form[:40]!r}", param="encoding_format")
    params = PoolingParams(dimensions=asked.dimensions)
    params.check_size(ctx.model_info)
    items = split(asked.input, "input")
    if len(items) > ctx.engine_client.max_open:
        raise too_many_prompts(len(items), 1, ctx.engine_client.max_open, "input")
    ctx.engine_client.check_room(len(items))
    prompts: list[list[int]] = []
    for item in items:
        ids = await tokens_of(ctx, item, "input", add_special_tokens=asked.add_special_tokens is not False)
        _check_length(ctx, ids)
        prompts.append(ids)
        await asyncio.sleep(0)
    asked.input = ""
    del items
    size = (params.dimensions or ctx.model_info.embedding_size) * _NUMBER[form]
    name = f"embd-{uuid.uuid4().hex}"
    stream = ctx.engine_client.stream(arrival, keeps=True)
    try:
        for index, ids in enumerate(prompts):
            stream.add(f"{name}-{index}", ids, params)
            stream.hold(size)
    except BaseException:
        stream.close()
        raise
    tokens = sum(map(len, prompts))

    async def answer() -> Response:
        data = await _gather(stream, len(prompts), form)
        whole = EmbeddingList("list", data, model, EmbeddingUsage(tokens, tokens))
        return WholeResponse(ctx.engine_client.held, whole)

    return await until_hang_up(request, stream, answer)


def _check_length(ctx: Context, ids: list[int]) -> None:
    if not ids:
        raise bad_request("`input` must have at least one token", param="input")
    if len(ids) > ctx.model_info.max_model_len:
        raise too_long(len(ids), ctx.model_info.max_model_len, "input")
    if len(ids) > ctx.pool_tokens:
        raise bad_request(
            f"The input has {len(ids)} tokens, but the whole KV cache of this server holds {ctx.pool_tokens}.",
            param="input",
            code="capacity",
        )


async def _gather(stream: RequestStream, count: int, form: str) -> list[Embedding | Raw]:
    """All embeddings in order, as JSON. The event loop serves others in between. Raises ApiError."""
    data: list[Embedding | Raw] = [Raw()] * count
    while batch := await stream.next_batch():
        for output in batch:
            error = failure(output)
            if error is not None:
                raise error
            assert output.embedding is not None
            index = int(output.request_id.rpartition("-")[2])
            data[index] = Raw(msgspec.json.encode(Embedding("embedding", _spell(output.embedding, form), index)))
            output.embedding = None
            await asyncio.sleep(0)
    return data


def _spell(vector: F32, form: str) -> list[float] | str:
    """The numbers, or their bytes as little-endian f32 in base64."""
    if form == "float":
        return [float(value) for value in vector.tolist()]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
