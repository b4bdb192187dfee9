"""The memory plan: how many bytes everything gets, decided once, before the first request.

Allocates nothing and does not look at the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.errors import XllmError

DEFAULT_UTILIZATION = 0.9


MOST_FOR_REQUESTS = 512 * 2**20
TEXT_FACTOR = 400  # bytes that the tokenizer takes for a byte of text, at its worst
_SHARE = 16


def for_requests(available: int, max_body_size: int) -> tuple[int, int]:
    """What a server gives to `Fixed.requests` and `Fixed.text` of the bytes that are available."""
    return min(MOST_FOR_REQUESTS, available // _SHARE), min(TEXT_FACTOR * max_body_size, available // _SHARE)


def show_bytes(count: int) -> str:
    """12.3 MiB, for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


@dataclass(frozen=True, slots=True)
class Fixed:
    """Bytes that do not depend on the size of the KV cache. `requests`: what those of a server may hold, answers
    included; `text`: what tokenizing one text may take beside them."""

    weights: int
    arena: int
    outputs: int
    host: int
    requests: int = 0
    text: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.arena + self.outputs + self.host + self.requests + self.text


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All sizes in bytes, except `pages` and `page_tokens`. `page_bytes` is a page over all layers.

    `available` is what the process could take when the plan was made. None: the size of the KV cache was given.
    """

    fixed: Fixed
    pages: int
    page_bytes: int
    page_tokens: int
    available: int | None

    @property
    def kv(self) -> int:
        return self.pages * self.page_bytes

    @property
    def kv_tokens(self) -> int:
        return self.pages * self.page_tokens

    @property
    def total(self) -> int:
        return self.fixed.total + self.kv

    def entries(self) -> list[tuple[str, int]]:
        """(class, bytes), for the start-up table and the metrics."""
        fixed = self.fixed
        return [
            ("weights", fixed.weights),
            ("arena", fixed.arena),
            ("outputs", fixed.outputs),
            ("host", fixed.host),
            ("requests", fixed.requests),
            ("text", fixed.text),
            ("kv", self.kv),
        ]


def decide(
    fixed: Fixed,
    *,
    page_bytes: int,
    page_tokens: int,
    max_model_len: int,
    max_num_seqs: int,
    max_pages: int,
    available: int | None,
    kv_bytes: int | None = None,
    utilization: float = DEFAULT_UTILIZATION,
) -> MemoryPlan:
    """How many KV pages there will be: what fits, and no more than `max_num_seqs` requests of `max_model_len` can use.

    With `kv_bytes` that is the KV cache's size, even when it holds less than one longest request (such requests are
    then refused one by one); otherwise `utilization` of `available` pays for everything, and a cache that could not
    hold one longest request is refused here. A model without KV has pages of no bytes. Raises XllmError("capacity").
    """
    most = min(max_pages, max_num_seqs * -(-max_model_len // page_tokens))
    if page_bytes == 0:
        return MemoryPlan(fixed, most, 0, page_tokens, available)
    if kv_bytes is not None:
        pages = min(most, kv_bytes // page_bytes)
        if pages < 1:
            raise XllmError(
                "capacity",
                f"a KV cache of {show_bytes(kv_bytes)} holds no page: one of {page_tokens} tokens takes "
                f"{show_bytes(page_bytes)}",
                help=f"give it at least {page_bytes} bytes",
            )
        return MemoryPlan(fixed, pages, page_bytes, page_tokens, available)
    assert available is not None
    budget = int(available * utilization) - fixed.total
    pages = min(most, max(0, budget) // page_bytes)
    need = -(-max_model_len // page_tokens)
    if pages < need:
        fits = f"{pages * page_tokens} tokens of KV cache" if pages else "no KV cache"
        raise XllmError(
            "capacity",
            f"a request of {max_model_len} tokens needs {show_bytes(need * page_bytes)} of KV cache; "
            f"{utilization:.0%} of {show_bytes(available)} available, less {show_bytes(fixed.total)} for weights and "
            f"buffers, leaves room for {fits}",
            help=(f"set --max-model-len to at most {pages * page_tokens}, or " if pages else "")
            + "use a machine with more memory",
        )
    return MemoryPlan(fixed, pages, page_bytes, page_tokens, available)
