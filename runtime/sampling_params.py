"""What a request asks of the sampler. Owns the names, defaults and limits (vLLM's); must not know models or logits."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.stops import StopWords
from xllm_compiler.runtime.token_set import MAX_LISTED_IDS, TokenBias, TokenSet
from xllm_compiler.step.interface import STEP

GREEDY_BELOW = 1e-5  # a temperature under this is greedy, as in vLLM
MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
_ID = re.compile(r"[0-9]{1,11}", re.ASCII)


def _bad(field: str, value: object, rule: str) -> XllmError:
    return XllmError("request", f"{field} must be {rule}, got {_shown(value)}", where=field)


def _shown(value: object) -> str:
    """A value in a message: its beginning, since a request may hold megabytes."""
    if isinstance(value, (str, bytes)):
        return repr(value[:80])[:80]
    if isinstance(value, int) and abs(value) > 1 << 256:
        return "a number of many digits"
    if isinstance(value, Sequence) and len(value) > 20:
        return f"a list of {len(value)} items"
    if isinstance(value, Mapping) and len(value) > 20:
        return f"a mapping of {len(value)} items"
    return repr(value)[:80] if not isinstance(value, (Sequence, Mapping)) else reprlib.repr(value)[:80]


def _number(field: str, value: object, lo: float, hi: float, *, above: bool = False) -> None:
    """A finite int or float in [lo, hi] (or (lo, hi] when `above`); bool is neither."""
    rule = f"a number {'above' if above else 'from'} {lo:g} {'up ' if above else ''}to {hi:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _bad(field, value, rule)
    if not (lo <= value <= hi) or (above and value == lo) or math.isnan(value):
        raise _bad(field, value, rule)


def _integer(field: str, value: object, lo: int, hi: int | None = None) -> None:
    rule = f"an integer of at least {lo}" if hi is None else f"an integer from {lo} to {hi}"
    if isinstance(value, bool) or not isinstance(value, int) or value < lo or (hi is not None and value > hi):
        raise _bad(field, value, rule)


def _token_ids(field: str, value: object) -> TokenSet:
    if isinstance(value, TokenSet):
        return value
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) > MAX_LISTED_IDS:
        raise _bad(field, value, "a list of token ids")
    try:
        return TokenSet(value)
    except ValueError as error:
        raise _bad(field, error.args[0], f"token ids from 0 to {(1 << 31) - 1}") from None


@dataclass(slots=True)
class SamplingParams:
    """Sampling settings of one request, under vLLM's names and defaults; checked when created.

    `top_k` 0 or -1 means all; `max_tokens` None means until the model's length; 0 is allowed with `prompt_logprobs`
    (score the prompt, generate nothing). `logprobs` and `prompt_logprobs` count the alternatives listed beside the
    chosen token, from the model's own distribution, before temperature and penalties.

    Raises XllmError("request") naming the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        _integer("min_tokens", self.min_tokens, 0)
        for field, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _integer(field, count, 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0 if self.prompt_logprobs is not None else 1)
            if self.min_tokens > self.max_tokens:
                raise _bad("min_tokens", self.min_tokens, f"no more than max_tokens, which is {self.max_tokens}")
        for field in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, field), bool):
                raise _bad(field, getattr(self, field), "true or false")
        self._check_lists()

    def _check_lists(self) -> None:
        """Check the lists and bring them into their compact form; those that are in it already cost nothing."""
        self._check_stop()
        if self.stop_token_ids is not None:
            self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise _bad("allowed_token_ids", [], "a list with at least one token id")
        self._check_bias()

    def _check_stop(self) -> None:
        if isinstance(self.stop, StopWords):
            return
        if self.stop is not None and not isinstance(self.stop, Sequence):
            raise _bad("stop", self.stop, "a string, or a list of strings")
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(stop) > MAX_STOP_STRINGS:
            raise _bad("stop", f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise _bad("stop", text, f"a string, or a list of strings, of 1 to {MAX_STOP_LENGTH} characters")
        if stop and not self.detokenize:
            raise _bad("stop", stop, "empty when detokenize is false: stop strings are matched in text")
        self.stop = StopWords(stop)

    def _check_bias(self) -> None:
        if self.logit_bias is None or isinstance(self.logit_bias, TokenBias):
            return
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LISTED_IDS:
            raise _bad("logit_bias", self.logit_bias, "a mapping from token id to bias")
        bias: Mapping[Any, float] = self.logit_bias
        if any(issubclass(kind, str) for kind in set(map(type, bias))):
            # JSON objects have string keys, so "123" is how a client must spell the id.
            bias = {int(t) if isinstance(t, str) and _ID.fullmatch(t) else t: value for t, value in bias.items()}
        numbers = list(bias.values())
        if not set(map(type, numbers)) <= {int, float} or (numbers and not -100 <= min(numbers) <= max(numbers) <= 100):
            for value in numbers:
                _number("logit_bias", value, -100.0, 100.0)
        try:
            self.logit_bias = TokenBias(list(bias), numbers)
        except ValueError as error:
            raise _bad("logit_bias", error.args[0], "a mapping from token id to bias") from None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have. Raises XllmError("request")."""
        self._check_lists()  # whoever made these may have set one since
        for field, ids in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids),
        ):
            if isinstance(ids, (TokenBias, TokenSet)) and ids.largest >= vocab_size:
                raise _bad(field, ids.largest, f"token ids below the vocabulary size {vocab_size}")

    @property
    def stop_words(self) -> StopWords | None:
        """What stop strings need, made once; None without any."""
        return self.stop if isinstance(self.stop, StopWords) and len(self.stop) else None

    @property
    def function(self) -> str:
        """The function that such a request runs."""
        return STEP

    @property
    def nbytes(self) -> int:
        """About what its lists hold, in bytes."""
        lists = (self.logit_bias, self.stop_token_ids, self.allowed_token_ids, self.stop)
        return sum(item.nbytes for item in lists if isinstance(item, (TokenBias, TokenSet, StopWords)))
