"""How hard a workload was for the server, from its metrics."""

from __future__ import annotations

from servegrid.telemetry.strain import measure_strain

BEFORE = {
    "vllm:request_queue_time_seconds_sum": 10.0,
    "vllm:e2e_request_latency_seconds_sum": 100.0,
    "vllm:num_preemptions_total": 2.0,
}
AFTER = {
    "vllm:request_queue_time_seconds_sum": 13.0,
    "vllm:e2e_request_latency_seconds_sum": 112.0,
    "vllm:num_preemptions_total": 5.0,
}
SAMPLES = [
    {"running": 4, "waiting": 12, "kv_cache_usage": 0.97},
    {"power_w": 300.0},
    {"running": 4, "waiting": 0, "kv_cache_usage": 0.5},
]


def test_the_server_s_histograms_count_every_request() -> None:
    assert measure_strain(BEFORE, AFTER, SAMPLES) == {
        "preemptions": 3.0,
        "waiting_share": 0.25,  # 3 s of 12 s
        "waiting_max": 12.0,
        "kv_cache_usage_max": 0.97,
    }


def test_requests_that_never_waited_outweigh_the_samples() -> None:
    """A sample may fall into the moment of their arrival."""
    after = AFTER | {"vllm:request_queue_time_seconds_sum": 10.0}
    assert measure_strain(BEFORE, after, SAMPLES)["waiting_share"] == 0.0


def test_without_histograms_the_samples_decide() -> None:
    """llama.cpp has gauges only. 12 of 20 requests waited."""
    assert measure_strain(None, None, SAMPLES)["waiting_share"] == 0.6


def test_unknown_is_left_out() -> None:
    assert measure_strain(None, None, []) == {}
    assert measure_strain(None, None, [{"running": 0, "waiting": 0}]) == {"waiting_max": 0.0}
