"""What Prometheus reads, checked with Prometheus' own parser."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from xllm_compiler.runtime.server import engine_metrics
from xllm_compiler.runtime.server.metrics import Histogram


def scrape(served: Any) -> dict[tuple[str, str], float]:
    """(sample name, its labels but the model's) -> value."""
    text = served.ask("GET", "/metrics").text
    out = {}
    for family in parse(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            out[sample.name, ",".join(f"{k}={v}" for k, v in sorted(labels.items()))] = sample.value
    return out


def test_counts_follow_requests(fake: Any) -> None:
    fake.ctx.metrics.sources.append(engine_metrics.engine_samples(fake.engine))
    fake.ctx.metrics.sources.append(engine_metrics.connection_samples(fake.guard))
    at_start = engine_metrics.start_samples(fake.ctx.model_info, [("weights", 5)], 64, {"listen": 0.5})
    fake.ctx.metrics.sources.append(at_start)
    fake.post("/v1/completions", prompt="abc", max_tokens=4)
    fake.post("/v1/completions", prompt="x", max_tokens=9, n=2)
    fake.post("/v1/completions", prompt="x", max_tokens=-9)
    got = scrape(fake)
    assert got["vllm:prompt_tokens_total", ""] == 4
    assert got["vllm:generation_tokens_total", ""] == 4 + 2 * 3
    assert got["vllm:request_success_total", "finished_reason=length"] == 1
    assert got["vllm:request_success_total", "finished_reason=stop"] == 1
    assert got["vllm:time_to_first_token_seconds_count", ""] == 2
    assert got["vllm:inter_token_latency_seconds_count", ""] == 3 + 2 * 2
    assert got["vllm:e2e_request_latency_seconds_count", ""] == 2
    assert got["vllm:request_generation_tokens_sum", ""] == 10
    assert got["vllm:request_generation_tokens_bucket", "le=5.0"] == 1
    assert got["vllm:request_generation_tokens_bucket", "le=+Inf"] == 2
    assert got["vllm:num_requests_running", ""] == got["vllm:num_requests_waiting", ""] == 0
    assert got["vllm:kv_cache_usage_perc", ""] == 0
    assert got["vllm:num_preemptions_total", ""] == 0
    assert got["xllm:memory_bytes", "class=weights"] == 5
    assert got["xllm:startup_phase_seconds", "phase=listen"] == 0.5
    assert got["http_requests_total", "handler=/v1/completions,method=POST,status=200"] == 2
    assert got["http_requests_total", "handler=/v1/completions,method=POST,status=400"] == 1


def test_gauges_move_while_requests_run(live: Any, until: Any) -> None:
    live.ctx.metrics.sources.append(engine_metrics.engine_samples(live.engine))
    live.executor.delay = 0.02
    ask = {"prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", live.url + "/v1/completions", json=ask) as answer:
        lines = answer.iter_lines()  # kept: dropping the generator would close the connection
        next(lines)
        text = httpx.get(live.url + "/metrics").text
        values = {s.name: s.value for family in parse(text) for s in family.samples}
    assert values["vllm:num_requests_running"] == 1 and values["vllm:kv_cache_usage_perc"] > 0


def test_openmetrics_on_request(fake: Any) -> None:
    answer = fake.ask("GET", "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in openmetrics(answer.text)} >= {"vllm:request_success"}


def test_a_scanner_makes_no_labels(fake: Any) -> None:
    for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
        fake.ask("GET", path)
    handlers = {key[1] for key in scrape(fake) if key[0] == "http_requests_total"}
    assert handlers == {
        "handler=none,method=GET,status=404",
        "handler=/v1/models/{model:path},method=GET,status=404",
    }


@pytest.mark.parametrize(("value", "bucket"), [(0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (9.0, 2)])
def test_a_bucket_holds_what_is_no_larger_than_its_bound(value: float, bucket: int) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value)
    assert histogram.counts.index(1) == bucket
    assert histogram.cumulative()[-1] == ("+Inf", 1.0)
