"""llama.cpp's C API through llama-cpp-python's thin layer: the same calls as llama-batched-bench, prompts of our own.

A step is one llama_decode; the Python around it is about 0.1 ms of 25 to 40.
"""

from __future__ import annotations

import time

import llama_cpp
import numpy as np
from protocol import Options, Steps, serve


class Llama:
    def __init__(self, options: Options) -> None:
        llama_cpp.llama_backend_init()
        # its progress reports would fill the log
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        self.threads = int(options["threads"])
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(options["model"].encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {options['model']}")
        self.vocab = int(options["vocab"])

    def _context(self, sequences: int, tokens: int) -> llama_cpp.llama_context_p:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = sequences * (-(-tokens // 256) * 256)
        parameters.n_batch = 2048
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.no_perf = True
        context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not context:
            raise MemoryError("llama_init_from_model made no context")
        return context

    def _run(self, context: llama_cpp.llama_context_p, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode rows of (token, position, sequence, wants logits); the greedy choices, in order."""
        chosen = []
        for start in range(0, len(rows), 2048):
            part = rows[start : start + 2048]
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for index, (token, position, sequence, wanted) in enumerate(part):
                batch.token[index], batch.pos[index] = token, position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = wanted
            status = llama_cpp.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode ended with status {status}")
            for index, row in enumerate(part):
                if row[3]:
                    logits = llama_cpp.llama_get_logits_ith(context, index)
                    chosen.append(int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax()))
            llama_cpp.llama_batch_free(batch)
        return chosen

    def prefill(self, prompt: list[int]) -> float:
        context = self._context(1, len(prompt) + 16)
        last = len(prompt) - 1
        start = time.perf_counter()
        self._run(context, [(token, index, 0, index == last) for index, token in enumerate(prompt)])
        seconds = time.perf_counter() - start
        llama_cpp.llama_free(context)
        return seconds

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        length = len(prompts[0])
        context = self._context(len(prompts), length + new)
        rows = [(ids[at], at, which, at == length - 1) for which, ids in enumerate(prompts) for at in range(length)]
        tokens = self._run(context, rows)
        steps = Steps(len(prompts))
        steps.start()
        for step in range(new - 1):
            tokens = self._run(context, [(token, length + step, which, True) for which, token in enumerate(tokens)])
            steps.mark()
        llama_cpp.llama_free(context)
        return steps.total()


if __name__ == "__main__":
    serve(Llama)
