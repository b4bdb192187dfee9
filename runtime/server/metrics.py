"""Counts what the server does, under vLLM's metric names. Not to be called from the engine's threads.

Counting is plain arithmetic on the event loop's thread. prometheus_client makes text of the counts at a scrape, and is
imported then: at the start it would cost a tenth of a second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# vLLM's buckets, in seconds and tokens.
_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_ITL = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000)
_N = (1, 2, 5, 10, 20)

HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From the request's arrival to its first token.", _TTFT),
    "inter_token_latency_seconds": ("Between two tokens of a choice.", _ITL),
    "request_time_per_output_token_seconds": ("Mean time per token after the first, per request.", _ITL),
    "e2e_request_latency_seconds": ("From the request's arrival to its last token.", _REQUEST),
    "request_queue_time_seconds": ("From arrival at the engine to the first step.", _REQUEST),
    "request_prefill_time_seconds": ("From the first step to the first token.", _REQUEST),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST),
    "request_inference_time_seconds": ("From the first step to the last token.", _REQUEST),
    "request_prompt_tokens": ("Prompt tokens per request.", _COUNT),
    "request_generation_tokens": ("Generated tokens per request.", _COUNT),
    "request_params_n": ("The request's n.", _N),
    "request_params_max_tokens": ("The request's max_tokens.", _COUNT),
}
COUNTERS: dict[str, str] = {
    "prompt_tokens": "Prompt tokens taken in.",
    "generation_tokens": "Tokens generated.",
}


@dataclass
class Histogram:
    """Counts per bucket (`le`), the last one unbounded, and the sum."""

    bounds: tuple[float, ...]
    total: float = 0.0
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus buckets: (upper bound, how many are no larger)."""
        out, seen = [], 0
        for bound, count in zip([*map(_bound, self.bounds), "+Inf"], self.counts, strict=True):
            seen += count
            out.append((bound, float(seen)))
        return out


def _bound(value: float) -> str:
    return repr(float(value))


@dataclass(frozen=True)
class Sample:
    """One number that somebody else counts, at the moment of a scrape. `kind` is "gauge" or "counter"."""

    kind: str
    name: str
    help: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


class Metrics:
    """All counts of one server. `sources` are asked for more at every scrape."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self.counters: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.http: Counter[tuple[str, str, int]] = Counter()
        self.sources: list[Callable[[], Iterable[Sample]]] = []

    def observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)

    def _samples(self) -> Iterator[Sample]:
        for name, text in COUNTERS.items():
            yield Sample("counter", f"vllm:{name}", text, self.counters[name])
        for source in self.sources:
            yield from source()

    def collect(self) -> Iterator[Metric]:
        """prometheus_client's collector protocol."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        names, values = ["model_name", "engine"], [self.model_name, "0"]
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for sample in self._samples():
            family = families.get(sample.name)
            if family is None:
                make = GaugeMetricFamily if sample.kind == "gauge" else CounterMetricFamily
                family = families[sample.name] = make(sample.name, sample.help, labels=[*names, *sample.labels])
            family.add_metric([*values, *sample.labels.values()], sample.value)
        yield from families.values()
        success = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by why.", labels=[*names, "finished_reason"]
        )
        for reason in ("stop", "length", "abort", "error"):
            success.add_metric([*values, reason], self.finished[reason])
        yield success
        for name, (text, _) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"vllm:{name}", text, labels=names)
            data = self.histograms[name]
            histogram.add_metric(values, buckets=data.cumulative(), sum_value=data.total)
            yield histogram
        http = CounterMetricFamily("http_requests", "HTTP requests answered.", labels=["method", "handler", "status"])
        for (method, handler, status), count in sorted(self.http.items()):
            http.add_metric([method, handler, str(status)], count)
        yield http

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition text for an Accept header, and its content type."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        registry: Any = CollectorRegistry(auto_describe=False)
        registry.register(self)
        encoder, content_type = choose_encoder(accept)
        return encoder(registry), content_type
