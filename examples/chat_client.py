"""A streamed answer from a running server, by OpenAI's own client (`pip install openai`).

xllm-serve models/bundled                       # in one terminal
python examples/chat_client.py                  # in another
"""

from __future__ import annotations

import sys

import openai


def main(url: str, question: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")  # the key that `xllm-serve --api-key` was given
    [model] = [card.id for card in client.models.list()][:1]
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n[{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out]")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else "http://127.0.0.1:8000",
        given[1]
        if len(given) > 1
        else "Write a Python function `read_lines(path)`. Return the lines of the file at path.",
    )
