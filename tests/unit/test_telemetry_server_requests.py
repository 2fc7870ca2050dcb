"""Parsing a server's /metrics page, and waiting until the server has counted all requests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from servegrid.study.endpoint import Endpoint
from servegrid.telemetry import server
from servegrid.telemetry.server import parse_metrics

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# HELP vllm:time_to_first_token_seconds Histogram of time to first token.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1"} 1.0
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 2.0
vllm:time_to_first_token_seconds_count 2.0
vllm:time_to_first_token_seconds_sum 0.25
# HELP vllm:prefix_cache_hits_total Prefix cache hits.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total 0.0
vllm:prefix_cache_hits_created 1.7e+09
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.75
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
# HELP vllm:iteration_tokens_total Histogram of number of tokens per engine_step.
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="1.0"} 4.0
vllm:iteration_tokens_total_count{engine="0"} 9.0
vllm:iteration_tokens_total_created{engine="0"} 1.7e+09
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 2
# HELP process_open_fds Number of open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 41.0
"""


def test_samples_are_added_over_labels_and_buckets_are_left_out() -> None:
    assert parse_metrics(PAGE) == {
        "vllm:num_requests_running": 7.0,
        "vllm:time_to_first_token_seconds_count": 2.0,
        "vllm:time_to_first_token_seconds_sum": 0.25,
        "vllm:prefix_cache_hits_total": 0.0,
        "vllm:kv_cache_usage_perc": 0.75,
        "vllm:iteration_tokens_total_count": 9.0,
        "llamacpp:requests_deferred": 2.0,
    }


ENDPOINT = Endpoint("http://127.0.0.1:1", "m")


def page(finished: int, running: int = 0) -> dict[str, float]:
    return {
        "vllm:num_requests_running": running,
        "vllm:e2e_request_latency_seconds_count": finished,
    }


def answers(monkeypatch: pytest.MonkeyPatch, *pages: Any) -> Iterator[Any]:
    """The server's answers, one after another; the last one repeats. Returns the remaining ones."""
    left = itertools.chain(pages, itertools.repeat(pages[-1]))
    monkeypatch.setattr(server, "read_metrics", lambda endpoint: next(left))
    return left


def test_counters_are_read_after_the_server_has_counted_all_finished_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = [page(3, running=1), page(4), page(5), page(6, running=1), page(6)]
    answers(monkeypatch, *pages)
    read = server.counter_reader(ENDPOINT)
    assert read(0) == page(4)
    assert read(2) == page(6)


def test_a_server_that_continues_an_abandoned_request_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "SETTLED_S", 0.05)
    answers(monkeypatch, page(0), page(1, running=1))
    read = server.counter_reader(ENDPOINT)
    assert read(0) == page(0)
    assert read(2) == page(1, running=1)


def test_a_server_without_metrics_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left = answers(monkeypatch, None, None, page(0))
    read = server.counter_reader(ENDPOINT)
    assert (read(0), read(2)) == (None, None)
    assert next(left) == page(0)
