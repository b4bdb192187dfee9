"""One sequence of a request while the engine works on it: its tokens, KV pages, sampler and text. A request has `n`."""

from __future__ import annotations

from array import array
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.runtime.base_sequence import BaseSequence
from xllm_compiler.runtime.executor import F32, Outputs, block_maxima
from xllm_compiler.runtime.kv import BlockTable
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.outputs import Logprob, LogprobDict, Output
from xllm_compiler.runtime.request import SequenceGroup
from xllm_compiler.runtime.sampler import RawLogprobs, RowSampler, Scratch, raw_logprobs
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.text import CONTEXT, TextStream
from xllm_compiler.runtime.token_text import TokenNames, append_rest, name_prompt
from xllm_compiler.runtime.tokenizer import Tokenizer
from xllm_compiler.step.interface import LOGITS


class Sequence(BaseSequence):
    """A token list that grows by what is sampled."""

    __slots__ = (
        "_eos",
        "_generated",
        "_names",
        "_params",
        "_prompt_logprobs",
        "_reported",
        "_sampler",
        "_scratch",
        "_stop_ids",
        "_text",
        "_tokenizer",
        "limit",
    )

    def __init__(
        self,
        group: SequenceGroup,
        index: int,
        serial: int,
        *,
        seed: int,
        table: BlockTable,
        model_info: ModelInfo,
        tokenizer: Tokenizer | None,
        limit: int,
        scratch: Scratch,
    ) -> None:
        """`serial`: its place in the order of arrival. `limit`: tokens, prompt included, at which it ends."""
        params = group.request.params
        assert isinstance(params, SamplingParams)
        # Only sequence 0 reports the prompt's logprobs, so only it pays for the rows.
        scored = params.prompt_logprobs is not None and index == 0
        super().__init__(group, index, serial, table, 0 if scored else len(group.prompt) - 1)
        self._params = params
        self._generated = array("i")
        self.limit = limit if params.max_tokens is None else min(limit, self.prompt_len + params.max_tokens)
        self._eos = () if params.ignore_eos else model_info.eos_token_ids
        self._stop_ids: Collection[int] = params.stop_token_ids or ()
        self._sampler = RowSampler(
            params,
            seed=seed,
            index=index,
            prompt=group.seen,
            eos_ids=self._eos,
            vocab=model_info.vocab_size,
            scratch=scratch,
        )
        self._scratch = scratch
        self._tokenizer = tokenizer
        self._text: TextStream | None = None
        if tokenizer is not None and params.detokenize:
            self._text = TextStream(
                tokenizer,
                group.prompt[-CONTEXT:].tolist(),
                stops=params.stop_words or (),
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            )
        self._names: TokenNames | None = None
        if tokenizer is not None and self._text is not None and params.logprobs is not None:
            self._names = TokenNames(tokenizer)
        self._prompt_logprobs: list[LogprobDict | None] | None = [None] if scored else None
        self._reported = False

    @property
    def known(self) -> int:
        return self.prompt_len + len(self._generated)

    @property
    def generated(self) -> int:
        return len(self._generated)

    def token(self, position: int) -> int:
        """The token at a position below `known`."""
        at = position - self.prompt_len
        return int(self._generated[at] if at >= 0 else self.group.prompt[position])

    def span(self, low: int, high: int) -> NDArray[np.int32]:
        """The tokens at positions low .. high - 1: known ones, and behind them those of the draft."""
        if high <= self.prompt_len:
            return self.group.prompt[low:high]
        end = self.prompt_len
        rest = np.array(self._generated[max(0, low - end) : high - end], np.int32)
        expected = np.array(self.draft[: max(0, high - self.known)], np.int32)
        return np.concatenate([self.group.prompt[low:end], rest, expected])

    def take(self, first: int, outputs: Outputs, rows: range, draft: list[int], events: list[Output]) -> int:
        """The rows from the last known position on each give a token, as long as the tokens before were those of
        `draft`."""
        logits, maxima = outputs[LOGITS], block_maxima(outputs)
        accepted = 0
        for position, row in enumerate(rows, first):
            if position < self.known - 1:
                self.score_prompt(logits[row], position)
                self.first_row = position + 1
                continue
            if self.known >= self.limit:
                events.append(self.end("length"))  # max_tokens is 0: only the prompt's logprobs were wanted
                break
            event = self.sample(logits[row], maxima[row])
            events.append(event)
            self.computed = self.known - 1  # what was computed behind it is not part of the text
            if event.finish_reason is not None or accepted == len(draft) or event.token_ids[0] != draft[accepted]:
                break
            accepted += 1
        return accepted

    def score_prompt(self, row: F32, position: int) -> None:
        """Take the logits at `position`, which judge the prompt token after it."""
        count = self._params.prompt_logprobs
        assert self._prompt_logprobs is not None and count is not None
        row = self._scratch.take(row)
        raw = raw_logprobs(row, self.token(position + 1), count, self._scratch)
        self._prompt_logprobs.append(self._row(raw))

    def sample(self, row: F32, maxima: F32) -> Output:
        """Draw the next token from a row of logits, `maxima` of its blocks, and take it in. Raises XllmError."""
        token, raw = self._sampler.sample(row, maxima, self.known, self.generated)
        return self.accept(token, None if raw is None else self._row(raw))

    def accept(self, token: int, logprobs: LogprobDict | None = None) -> Output:
        """Append a token. The event of it, which says whether the sequence ended; `put_text` adds the text later."""
        self._generated.append(token)
        self.first_row = self.known - 1
        params = self._params
        enough = self.generated >= params.min_tokens
        event = self._event()
        event.token_ids.append(token)
        if logprobs is not None:
            event.logprobs = [logprobs]
        if enough and token in self._stop_ids:
            event.finish_reason, event.stop_reason = "stop", token
        elif enough and token in self._eos:
            event.finish_reason = "stop"
        if self._text is not None and params.stop_words is not None:
            # what the text says decides whether this is the end, so it cannot wait until it is told
            self._push(self._text, event, may_stop=enough)
            if self._text.stopped_by is not None and event.finish_reason is None:
                event.finish_reason, event.stop_reason = "stop", self._text.stopped_by
        if event.finish_reason is None and self.known >= self.limit:
            event.finish_reason = "length"
        return event

    def put_text(self, event: Output) -> None:
        """Add the text, which nobody else uses then."""
        params = self._params
        if event.prompt_logprobs is not None and self._tokenizer is not None:
            prompt = self.group.prompt.tolist()
            name_prompt(self._tokenizer, prompt, event.prompt_logprobs, params.skip_special_tokens)
        if self._text is None:
            return
        if params.stop_words is None:
            self._push(self._text, event)
        if event.finish_reason is not None:
            event.text += self._text.finish()
            if event.logprobs and self._text.added:
                append_rest(event.logprobs[-1][event.token_ids[-1]], self._text.added)

    def _push(self, text: TextStream, event: Output, may_stop: bool = True) -> None:
        if event.finish_reason == "stop" and not self._params.include_stop_str_in_output:
            self._name(event, None)
            return
        for token in event.token_ids:
            event.text += text.push(token, may_stop=may_stop)
            self._name(event, text.added)

    def _name(self, event: Output, added: str | None) -> None:
        """Name the log-probabilities of an event's one token, which added that to the text, or None of it."""
        if self._names is None or event.logprobs is None:
            return
        for token, row in zip(event.token_ids, event.logprobs, strict=True):
            self._names.name(row, token, added)

    def _event(self) -> Output:
        event = super()._event()
        if not self._reported and self._prompt_logprobs is not None and len(self._prompt_logprobs) == self.prompt_len:
            event.prompt_logprobs = self._prompt_logprobs
            self._reported = True
        return event

    def _row(self, raw: RawLogprobs) -> LogprobDict:
        return {
            token: Logprob(value, rank) for token, value, rank in zip(raw.tokens, raw.logprobs, raw.ranks, strict=True)
        }
