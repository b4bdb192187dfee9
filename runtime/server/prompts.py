"""From a field that may hold a prompt in four forms to token ids; what completions and embeddings share."""

from __future__ import annotations

from typing import cast

from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.server.errors import bad_request

Prompts = str | list[str | int | list[int]]  # of one kind only, which `decode.py` sees to


def split(prompt: Prompts, field: str) -> list[str | list[int]]:
    """The prompts in any of the four forms: text, texts, token ids, lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request(f"`{field}` must not be empty", param=field)
    if isinstance(prompt[0], int):
        return [cast(list[int], prompt)]
    return cast(list[str | list[int]], prompt)


async def tokens_of(
    ctx: Context, item: str | list[int], field: str, *, add_special_tokens: bool, cut: int | None = None
) -> list[int]:
    """Token ids of one prompt, all of them within the vocabulary where the client gave them. `cut` as in
    `Context.encode`."""
    if isinstance(item, str):
        return await ctx.encode(item, add_special_tokens=add_special_tokens, field=field, cut=cut)
    await ctx.check_token_ids(item, field)
    return item
