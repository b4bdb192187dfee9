"""Answers from a model in this process, without a server: `python examples/offline.py [ARTIFACT_OR_CHECKPOINT]`.

A checkpoint is compiled into the cache first; the next run finds it there.
"""

from __future__ import annotations

import sys

from xllm_compiler import LLM, SamplingParams


def main(model: str) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=48)
    with LLM(model) as llm:
        # Prompts of one call run as one batch; an answer has the same bits alone.
        for result in llm.generate(["def add(a, b):", "class Stack:"], greedy):
            print(f"--- {result.prompt!r}\n{result.outputs[0].text}")

        [answer] = llm.chat(
            [
                {
                    "role": "user",
                    "content": "Write a Python function `read_lines(path)`. Return the lines of the file at path.",
                }
            ],
            greedy,
        )
        print(f"--- chat\n{answer.outputs[0].text}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "models/bundled")
