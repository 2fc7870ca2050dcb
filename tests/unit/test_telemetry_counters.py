"""What becomes of a server's metrics by the names of vLLM, old and new, and of llama.cpp."""

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

TODAYS = {
    "vllm:num_requests_running": 3.0,
    "vllm:num_requests_waiting": 2.0,
    "vllm:kv_cache_usage_perc": 0.25,
    "vllm:num_preemptions_total": 7.0,
    "vllm:e2e_request_latency_seconds_count": 40.0,
}
IDLE = TODAYS | {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0}


@pytest.mark.parametrize(
    ("counters", "told"),
    [
        (TODAYS, {"running": 3, "waiting": 2, "kv_cache_usage": 0.25, "preemptions": 7}),
        ({"vllm:gpu_cache_usage_perc": 0.5}, {"kv_cache_usage": 0.5}),
        (
            {"llamacpp:requests_processing": 0.0, "llamacpp:requests_deferred": 4.0},
            {"running": 0, "waiting": 4},
        ),
        ({"llamacpp:n_decode_total": 1.0}, {}),
        (None, {}),
    ],
)
def test_gauges_are_told_by_the_columns_names(counters: Counters, told: dict[str, float]) -> None:
    assert gauge_columns(counters) == told
    assert told.keys() <= {column.name for column in columns.TELEMETRY}


def test_a_counter_grows_by_the_difference() -> None:
    assert increase(TODAYS, TODAYS | {"vllm:num_preemptions_total": 9.0}, PREEMPTIONS) == 2
    assert increase(TODAYS, TODAYS, PREEMPTIONS) == 0
    old = {"vllm:gpu_prefix_cache_hits_total": 16.0}
    assert increase({"vllm:gpu_prefix_cache_hits_total": 0.0}, old, PREFIX_HITS) == 16


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, TODAYS),
        (TODAYS, None),
        ({}, TODAYS),
        (TODAYS, {}),
        (TODAYS, TODAYS | {"vllm:num_preemptions_total": 6.0}),  # it began anew
    ],
)
def test_what_a_counter_has_grown_by_may_not_be_known(before: Counters, after: Counters) -> None:
    assert increase(before, after, PREEMPTIONS) is None


@pytest.mark.parametrize(
    ("counters", "finished", "since", "settled"),
    [
        (IDLE, 0, None, True),
        (TODAYS, 0, None, False),
        (IDLE | {"vllm:num_requests_waiting": 1.0}, 0, None, False),
        (IDLE, 4, {"vllm:e2e_request_latency_seconds_count": 36.0}, True),
        (IDLE, 5, {"vllm:e2e_request_latency_seconds_count": 36.0}, False),
        ({"llamacpp:requests_processing": 1.0}, 0, None, False),
        ({"llamacpp:requests_processing": 0.0}, 5, {"llamacpp:requests_processing": 0.0}, True),
        ({}, 5, {}, True),
        (None, 5, None, True),
    ],
)
def test_a_server_has_settled_when_nothing_is_left_and_all_is_counted(
    counters: Counters, finished: int, since: Counters, settled: bool
) -> None:
    assert has_settled(counters, finished, since) is settled
