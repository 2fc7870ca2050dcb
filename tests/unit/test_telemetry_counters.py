"""Metrics of old and new versions of vLLM, and of llama.cpp, under one name."""

from __future__ import annotations

import pytest

from servegrid.records import columns
from servegrid.telemetry.counters import (
    PREEMPTIONS,
    PREFIX_HITS,
    Counters,
    gauge_columns,
    has_settled,
    increase,
)

CURRENT = {
    "vllm:num_requests_running": 3.0,
    "vllm:num_requests_waiting": 2.0,
    "vllm:kv_cache_usage_perc": 0.25,
    "vllm:num_preemptions_total": 7.0,
    "vllm:e2e_request_latency_seconds_count": 40.0,
}
IDLE = CURRENT | {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0}


@pytest.mark.parametrize(
    ("counters", "expected"),
    [
        (CURRENT, {"running": 3, "waiting": 2, "kv_cache_usage": 0.25, "preemptions": 7}),
        ({"vllm:gpu_cache_usage_perc": 0.5}, {"kv_cache_usage": 0.5}),
        (
            {"llamacpp:requests_processing": 0.0, "llamacpp:requests_deferred": 4.0},
            {"running": 0, "waiting": 4},
        ),
        ({"llamacpp:n_decode_total": 1.0}, {}),
        (None, {}),
    ],
)
def test_gauges_have_the_names_of_the_telemetry_columns(
    counters: Counters, expected: dict[str, float]
) -> None:
    assert gauge_columns(counters) == expected
    assert expected.keys() <= {column.name for column in columns.TELEMETRY}


def test_the_increase_of_a_counter_is_the_difference() -> None:
    assert increase(CURRENT, CURRENT | {"vllm:num_preemptions_total": 9.0}, PREEMPTIONS) == 2
    assert increase(CURRENT, CURRENT, PREEMPTIONS) == 0
    old = {"vllm:gpu_prefix_cache_hits_total": 16.0}
    assert increase({"vllm:gpu_prefix_cache_hits_total": 0.0}, old, PREFIX_HITS) == 16


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, CURRENT),
        (CURRENT, None),
        ({}, CURRENT),
        (CURRENT, {}),
        (CURRENT, CURRENT | {"vllm:num_preemptions_total": 6.0}),  # it was reset
    ],
)
def test_the_increase_is_unknown_if_the_counter_is_missing_or_was_reset(
    before: Counters, after: Counters
) -> None:
    assert increase(before, after, PREEMPTIONS) is None


@pytest.mark.parametrize(
    ("counters", "finished", "since", "settled"),
    [
        (IDLE, 0, None, True),
        (CURRENT, 0, None, False),
        (IDLE | {"vllm:num_requests_waiting": 1.0}, 0, None, False),
        (IDLE, 4, {"vllm:e2e_request_latency_seconds_count": 36.0}, True),
        (IDLE, 5, {"vllm:e2e_request_latency_seconds_count": 36.0}, False),
        ({"llamacpp:requests_processing": 1.0}, 0, None, False),
        ({"llamacpp:requests_processing": 0.0}, 5, {"llamacpp:requests_processing": 0.0}, True),
        ({}, 5, {}, True),
        (None, 5, None, True),
    ],
)
def test_a_server_has_settled_if_it_is_idle_and_has_counted_all_requests(
    counters: Counters, finished: int, since: Counters, settled: bool
) -> None:
    assert has_settled(counters, finished, since) is settled
