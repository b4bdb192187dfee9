"""The command of the demo: `python -m xllm_compiler.runtime.ask MODEL PROMPT` streams one answer, without a server."""

from __future__ import annotations

import argparse
import queue
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.llm import LLM
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.request import Request


def main(argv: Sequence[str] | None = None) -> int:
    """Answer and return the exit code: the text goes to stdout, a line of figures to stderr."""
    parser = argparse.ArgumentParser(prog="python -m xllm_compiler.runtime.ask", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="an artifact, or a checkpoint to compile into the cache first")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, help="default: what the checkpoint recommends")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true", help="continue the text instead of answering it as chat")
    options = parser.parse_args(argv)
    try:
        with LLM(options.model) as llm:
            return _answer(llm, options)
    except XllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _answer(llm: LLM, options: argparse.Namespace) -> int:
    params = replace(llm.get_default_sampling_params(), max_tokens=options.max_tokens, seed=options.seed)
    if options.temperature is not None:
        params = replace(params, temperature=options.temperature)
    tokenizer = llm.get_tokenizer()
    if options.raw:
        ids = tokenizer.encode(options.prompt)
    else:
        text = tokenizer.render_chat(
            [{"role": "user", "content": options.prompt}],
            add_generation_prompt=True,
            continue_final_message=False,
            variables={},
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
    events: queue.SimpleQueue[Output] = queue.SimpleQueue()
    start = time.monotonic()
    llm.engine.submit(Request("ask", ids, params), events.put)
    tokens, first, finished = 0, start, False
    while not finished:
        event = events.get()
        if event.error is not None:
            raise event.error
        if not tokens:
            first = time.monotonic()
        tokens += len(event.token_ids)
        finished = event.finished
        print(event.text, end="", flush=True)
    print()
    rate = f", then {(tokens - 1) / (time.monotonic() - first):.0f} tokens/s" if tokens > 1 else ""
    print(f"[{len(ids)} prompt tokens, first token after {first - start:.3f} s{rate}]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
