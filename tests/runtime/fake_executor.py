"""A deterministic toy model in numpy behind the Executor protocol, and helpers to run an engine on it.

What the toy says at position p is a hash of all tokens 0..p of the request, read back from the paged cache. So a wrong
page, position, table or row changes the tokens, and the tokens of a request alone are known by plain recursion.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import sequence
from xllm_compiler.runtime.drafts import Drafter
from xllm_compiler.runtime.engine import Engine
from xllm_compiler.runtime.executor import Outputs
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.outputs import CompletionOutput, Output, RequestOutput
from xllm_compiler.runtime.request import Request
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.tokenizer import Tokenizer
from xllm_compiler.step.inputs import StepBatch, step_inputs
from xllm_compiler.step.interface import EMBED, HIDDEN, LOGITS, STEP, Function, Pooling

VOCAB = 97


def toy_row(tokens: Sequence[int], vocab: int = VOCAB) -> NDArray[np.float32]:
    """The toy's logits after `tokens`: fixed noise chosen by a polynomial hash of all of them."""
    state = 0
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return np.random.default_rng(state).normal(0.0, 3.0, vocab).astype(np.float32)


def toy_greedy(prompt: Sequence[int], count: int, vocab: int = VOCAB) -> list[int]:
    """What the toy answers, without engine, pages or batches."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(toy_row(tokens, vocab).argmax()))
    return tokens[len(prompt) :]


def make_facts(
    *,
    max_model_len: int = 64,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_num_logits: int = 8,
    page_tokens: int = 4,
    eos: tuple[int, ...] = (),
    vocab: int = VOCAB,
    pooling: Pooling | None = None,
) -> ModelInfo:
    return ModelInfo(
        name="toy",
        architecture="Toy",
        artifact_id="0" * 64,
        dtype="f32",
        vocab_size=vocab,
        max_model_len=max_model_len,
        eos_token_ids=eos,
        bos_token_id=None,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_logits=max_num_logits,
        page_tokens=page_tokens,
        functions=(STEP,) if pooling is None else (STEP, EMBED),
        pooling=pooling,
        embedding_size=0 if pooling is None else vocab,
    )


class ToyDrafter:
    """Knows what the toy says, and is right about each token with probability `right`."""

    def __init__(self, right: float, length: int = 4) -> None:
        self.right, self.length = right, length
        self.random = np.random.default_rng(0)

    def propose(self, of: sequence.Sequence, most: int) -> list[int]:
        known = of.span(0, of.known).tolist()
        draft = toy_greedy(known, min(most, self.length))
        return [token if self.random.random() < self.right else (token + 1) % VOCAB for token in draft]


class FakeExecutor:
    """Checks every rule of a step's inputs, stores tokens in pages, and answers from what the pages say."""

    def __init__(self, model_info: ModelInfo, pages: int) -> None:
        self.pages = pages
        self.model_info = model_info
        self.steps = 0
        self.closed = False
        self.fail_next: Exception | None = None
        self.nan_next = False
        self.hold: threading.Event | None = None
        self.step_sizes: list[tuple[int, int, int]] = []
        self._cache = np.full((pages, model_info.page_tokens), -1, np.int64)
        self._logits = np.zeros((model_info.max_num_logits, model_info.vocab_size), np.float32)

    def new_batch(self, function: str = STEP) -> StepBatch:
        info = self.model_info
        assert function in info.functions
        capacity = {"N": info.max_num_batched_tokens, "B": info.max_num_seqs, "S": info.max_num_logits}
        return StepBatch(function, Function(step_inputs(info.max_model_len, info.page_tokens), (), (), ()), capacity)

    def execute(self, batch: StepBatch) -> Outputs:
        if self.hold is not None:
            self.hold.wait()
        self.steps += 1
        n_tokens, seqs, rows = (batch.sizes[name] for name in "NBS")
        self.step_sizes.append((n_tokens, seqs, rows))
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self._check(batch)
        page = self.model_info.page_tokens
        ids, pos, seq, table, sel = (batch[name] for name in ("ids", "pos", "seq", "table", "sel"))
        for n in range(n_tokens):
            self._cache[table[seq[n], pos[n] // page], pos[n] % page] = ids[n]
        for s in range(rows):
            n = int(sel[s])
            row = table[seq[n]]
            tokens = [int(self._cache[row[p // page], p % page]) for p in range(pos[n] + 1)]
            self._logits[s] = toy_row(tokens, self.model_info.vocab_size)
        if self.nan_next and rows:
            self._logits[0, 3] = np.nan
            self.nan_next = False
        return {HIDDEN if batch.function == EMBED else LOGITS: self._logits[:rows]}

    def _check(self, batch: StepBatch) -> None:
        n, b, s = (batch.sizes[name] for name in "NBS")
        pos, seq, start, table, sel = (batch[name] for name in ("pos", "seq", "start", "table", "sel"))
        assert 1 <= b <= n <= self.model_info.max_num_batched_tokens
        assert b <= self.model_info.max_num_seqs and s <= self.model_info.max_num_logits
        assert start[0] == 0 and start[b] == n
        used: list[int] = []
        for i in range(b):
            low, high = int(start[i]), int(start[i + 1])
            assert low < high
            assert (seq[low:high] == i).all()
            assert (np.diff(pos[low:high]) == 1).all()
            held = -(-(int(pos[high - 1]) + 1) // self.model_info.page_tokens)
            row = table[i]
            assert ((row[:held] >= 0) & (row[:held] < self.pages)).all()
            assert (np.diff((row >= 0).astype(int)) <= 0).all()  # mapped pages first, then only -1
            used += [int(p) for p in row if p >= 0]
        assert len(set(used)) == len(used), "two requests of a step share a page"
        sel = sel[:s]
        assert ((sel >= 0) & (sel < n)).all() and (np.diff(sel) > 0).all()

    def close(self) -> None:
        self.closed = True


class Run:
    """An engine on the toy, started, with blocking helpers."""

    def __init__(
        self,
        model_info: ModelInfo | None = None,
        *,
        pages: int = 64,
        tokenizer: Tokenizer | None = None,
        start: bool = True,
        before_first_output: Callable[[], None] | None = None,
        max_queued: int = 1000,
        drafter: Drafter | None = None,
    ) -> None:
        self.model_info = model_info or make_facts()
        self.executor = FakeExecutor(self.model_info, pages)
        self.engine = Engine(
            self.executor,
            self.model_info,
            tokenizer=tokenizer,
            before_first_output=before_first_output,
            max_queued=max_queued,
            drafter=drafter,
        )
        self.events: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._ids = 0
        if start:
            self.engine.start()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *args: object) -> None:
        self.engine.stop()

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> str:
        self._ids += 1
        return self.engine.submit(Request(f"r{self._ids}", prompt, params), self.events.put)

    def collect(self, submitted: dict[str, tuple[Sequence[int], SamplingParams]]) -> dict[str, RequestOutput]:
        """Wait for these requests; results by id. Raises the first error among them."""
        results = {
            i: RequestOutput(i, None, list(prompt), [CompletionOutput(k) for k in range(params.n)])
            for i, (prompt, params) in submitted.items()
        }
        while not all(r.finished for r in results.values()):
            event = self.events.get(timeout=20)
            if event.error is not None:
                raise event.error
            results[event.request_id].add(event)
        return results

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        name = self.submit(prompt, params)
        return self.collect({name: (prompt, params)})[name]


def error_of(run: Run, prompt: Sequence[int], params: SamplingParams) -> XllmError:
    """The error that a request ends with."""
    try:
        run.generate(prompt, params)
    except XllmError as error:
        return error
    raise AssertionError("the request was answered")
