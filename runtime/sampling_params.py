"""What a request asks of the sampler. Owns the names, defaults and limits (vLLM's); must not know models or logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xllm_compiler.errors import XllmError

GREEDY_BELOW = 1e-5  # a temperature under this is greedy, as in vLLM
MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LISTED_IDS = 1 << 20


def _bad(field: str, value: object, rule: str) -> XllmError:
    shown = repr(value)
    return XllmError("request", f"{field} must be {rule}, got {shown[:80]}", where=field)


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


def _token_ids(field: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) > MAX_LISTED_IDS:
        raise _bad(field, value, "a list of token ids")
    for item in value:
        _integer(field, item, 0, (1 << 31) - 1)
    return tuple(value)


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
        self._check_stop()
        if self.stop_token_ids is not None:
            self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise _bad("allowed_token_ids", [], "a list with at least one token id")
        self._check_bias()

    def _check_stop(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(stop) > MAX_STOP_STRINGS:
            raise _bad("stop", f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise _bad("stop", text, f"a string, or a list of strings, of 1 to {MAX_STOP_LENGTH} characters")
        if stop and not self.detokenize:
            raise _bad("stop", stop, "empty when detokenize is false: stop strings are matched in text")
        self.stop = tuple(stop)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LISTED_IDS:
            raise _bad("logit_bias", self.logit_bias, "a mapping from token id to bias")
        bias: dict[int, float] = {}
        for token, value in self.logit_bias.items():
            # JSON objects have string keys, so "123" is how a client must spell the id.
            if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 12:
                token = int(token)
            _integer("logit_bias", token, 0, (1 << 31) - 1)
            _number("logit_bias", value, -100.0, 100.0)
            bias[token] = float(value)
        self.logit_bias = bias

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have. Raises XllmError("request")."""
        for field, ids in (
            ("logit_bias", self.logit_bias or ()),
            ("stop_token_ids", self.stop_token_ids or ()),
            ("allowed_token_ids", self.allowed_token_ids or ()),
        ):
            worst = max(ids, default=-1)
            if worst >= vocab_size:
                raise _bad(field, worst, f"token ids below the vocabulary size {vocab_size}")
