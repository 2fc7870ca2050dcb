"""The server's figures from its counters and gauges, calculated by hand."""

from __future__ import annotations

from typing import Any

import pytest

from servegrid.analysis.server_metrics import prefix_columns, server_columns, speculation_columns
from servegrid.records import columns, parquet
from servegrid.telemetry.counters import gauge_columns
from servegrid.telemetry.server import parse_metrics

MS = 1_000_000
VLLM = "vllm:{}_seconds_{}".format
BEFORE = {
    VLLM("time_to_first_token", "sum"): 10.0,
    VLLM("time_to_first_token", "count"): 5.0,
    VLLM("inter_token_latency", "sum"): 1.0,
    VLLM("inter_token_latency", "count"): 50.0,
    VLLM("request_queue_time", "sum"): 0.5,
    VLLM("request_queue_time", "count"): 5.0,
    VLLM("e2e_request_latency", "sum"): 20.0,
    VLLM("e2e_request_latency", "count"): 5.0,
    "vllm:num_preemptions_total": 1.0,
    "vllm:prefix_cache_hits_total": 32.0,
}
AFTER = {
    VLLM("time_to_first_token", "sum"): 10.3,  # two of 0.15 s
    VLLM("time_to_first_token", "count"): 7.0,
    VLLM("inter_token_latency", "sum"): 1.08,  # four of 0.02 s
    VLLM("inter_token_latency", "count"): 54.0,
    VLLM("request_queue_time", "sum"): 0.51,
    VLLM("request_queue_time", "count"): 7.0,
    VLLM("e2e_request_latency", "sum"): 20.5,
    VLLM("e2e_request_latency", "count"): 7.0,
    "vllm:num_preemptions_total": 4.0,
    "vllm:prefix_cache_hits_total": 32.0,
}
REQUESTS = [
    {"sent_ns": 100 * MS, "first_token_ns": 250 * MS},
    {"sent_ns": 100 * MS, "first_token_ns": 290 * MS},
]
"""Times to first token of 0.15 and 0.19 s: their mean is 0.02 s above the server's."""
SAMPLES = [
    {"running": 2, "waiting": 1, "kv_cache_usage": 0.25, "preemptions": 1},
    {"running": None},
    {"running": 1, "waiting": 0, "kv_cache_usage": 0.5, "preemptions": 2},
]


def columns_with(
    before: dict[str, float] | None = BEFORE,
    after: dict[str, float] | None = AFTER,
    requests: list[dict[str, Any]] = REQUESTS,
    samples: list[dict[str, Any]] = SAMPLES,
) -> dict[str, float | None]:
    return server_columns(
        {"metrics_before": before, "metrics_after": after},
        parquet.arrow_table(columns.REQUESTS, requests),
        parquet.arrow_table(columns.TELEMETRY, samples),
    )


def test_histograms_and_counters_cover_only_the_workload() -> None:
    assert columns_with() == {
        "server_ttft_s_mean": pytest.approx(0.15),
        "server_itl_s_mean": pytest.approx(0.02),
        "server_queue_s_mean": pytest.approx(0.005),
        "server_e2el_s_mean": pytest.approx(0.25),
        "ttft_client_overhead_s": pytest.approx(0.02),
        "running_mean": 1.5,
        "waiting_mean": 0.5,
        "waiting_max": 1,
        "kv_cache_usage_max": 0.5,
        "preemptions": 3,
        "prefix_hit_tokens": 0,
    }
    assert columns_with().keys() <= {column.name for column in columns.CELLS}


SPEC = "vllm:spec_decode_num_{}_total".format


@pytest.mark.parametrize(
    ("drafts", "drafted", "accepted", "rate", "length"),
    [
        # 40 steps with 4 drafted tokens each, of which 1.5 were accepted.
        (40.0, 160.0, 60.0, 0.375, 2.5),
        (40.0, 160.0, 0.0, 0.0, 1.0),
        (0.0, 0.0, 0.0, None, None),
    ],
)
def test_the_acceptance_of_drafted_tokens(
    drafts: float, drafted: float, accepted: float, rate: float | None, length: float | None
) -> None:
    names = [SPEC(each) for each in ("drafts", "draft_tokens", "accepted_tokens")]
    before = dict(zip(names, (5.0, 20.0, 7.0), strict=True))
    after = dict(zip(names, (5 + drafts, 20 + drafted, 7 + accepted), strict=True))
    record = {"metrics_before": before, "metrics_after": after}
    found = speculation_columns(record, parquet.arrow_table(columns.REQUESTS, []))
    assert list(found.values()) == [rate, length]


def test_drafted_tokens_of_llama_cpp_come_from_its_responses() -> None:
    record = {"metrics_before": None, "metrics_after": None}
    rows = [
        {"draft_tokens": 34, "accepted_draft_tokens": 30},
        {"draft_tokens": 6, "accepted_draft_tokens": 0},
        {},
    ]
    table = parquet.arrow_table(columns.REQUESTS, rows)
    assert list(speculation_columns(record, table).values()) == [0.75, None]
    older = table.drop_columns(["draft_tokens", "accepted_draft_tokens"])
    assert list(speculation_columns(record, older).values()) == [None, None]


def test_the_older_name_of_the_inter_token_latency_is_read() -> None:
    def renamed(counters: dict[str, float]) -> dict[str, float]:
        names = ("inter_token_latency", "time_per_output_token")
        return {name.replace(*names): value for name, value in counters.items()}

    assert columns_with(renamed(BEFORE), renamed(AFTER)) == columns_with()


@pytest.mark.parametrize(("before", "after"), [(None, AFTER), (BEFORE, None), ({}, {})])
def test_metrics_that_the_server_does_not_have_are_null(
    before: dict[str, float] | None, after: dict[str, float] | None
) -> None:
    assert set(columns_with(before, after, samples=[]).values()) == {None}


def test_a_mean_over_no_request_is_null() -> None:
    row = columns_with(AFTER, AFTER)
    assert (row["server_ttft_s_mean"], row["ttft_client_overhead_s"]) == (None, None)
    assert row["preemptions"] == 0


@pytest.mark.parametrize(
    "requests",
    [
        REQUESTS[:1],
        [REQUESTS[0], REQUESTS[1] | {"first_token_ns": None}],
        [*REQUESTS, REQUESTS[0]],
    ],
)
def test_there_is_no_overhead_if_the_server_counted_other_requests(
    requests: list[dict[str, Any]],
) -> None:
    row = columns_with(requests=requests)
    assert row["ttft_client_overhead_s"] is None
    assert row["server_ttft_s_mean"] == pytest.approx(0.15)


def test_requests_without_a_token_do_not_count_for_the_overhead() -> None:
    failed = {"sent_ns": 100 * MS, "first_token_ns": None}
    unsent = {"sent_ns": None, "first_token_ns": None}
    row = columns_with(requests=[*REQUESTS, failed, unsent])
    assert row["ttft_client_overhead_s"] == pytest.approx(0.02)


REPLICAS = """\
vllm:num_requests_running{{engine="0",model_name="m"}} {running[0]}
vllm:num_requests_running{{engine="1",model_name="m"}} {running[1]}
vllm:num_requests_waiting{{engine="0",model_name="m"}} 0.0
vllm:num_requests_waiting{{engine="1",model_name="m"}} 2.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
vllm:kv_cache_usage_perc{{engine="1",model_name="m"}} 0.75
vllm:num_preemptions_total{{engine="0",model_name="m"}} {preempted[0]}
vllm:num_preemptions_total{{engine="1",model_name="m"}} {preempted[1]}
vllm:prefix_cache_queries_total{{engine="0",model_name="m"}} {asked[0]}
vllm:prefix_cache_queries_total{{engine="1",model_name="m"}} {asked[1]}
vllm:prefix_cache_hits_total{{engine="0",model_name="m"}} {hits[0]}
vllm:prefix_cache_hits_total{{engine="1",model_name="m"}} {hits[1]}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="m"}} 9.0
vllm:time_to_first_token_seconds_count{{engine="0",model_name="m"}} {count[0]}
vllm:time_to_first_token_seconds_count{{engine="1",model_name="m"}} {count[1]}
vllm:time_to_first_token_seconds_sum{{engine="0",model_name="m"}} {total[0]}
vllm:time_to_first_token_seconds_sum{{engine="1",model_name="m"}} {total[1]}
"""
"""What vLLM with two replicas reports: each metric by `engine`."""


def page(**values: tuple[float, float]) -> dict[str, float]:
    return parse_metrics(REPLICAS.format(**values))


def test_the_metrics_of_all_replicas_are_one_figure() -> None:
    before = page(
        running=(0, 0), preempted=(1, 2), asked=(50, 0), hits=(10, 0), count=(1, 0), total=(5.0, 0)
    )
    after = page(
        running=(3, 4),
        preempted=(1, 5),
        asked=(150, 100),
        hits=(60, 0),
        count=(4, 1),
        total=(5.3, 0.5),
    )
    found = columns_with(before, after, samples=[gauge_columns(after)])
    # Three requests of 0.3 s in all on one replica, one of 0.5 s on the other.
    assert found["server_ttft_s_mean"] == pytest.approx(0.8 / 4)
    assert (found["running_mean"], found["waiting_max"]) == (7, 2)
    assert found["kv_cache_usage_max"] == 0.75  # of the fullest replica
    assert (found["preemptions"], found["prefix_hit_tokens"]) == (3, 50)
    prompts = [{"prompt_tokens": 100}, {"prompt_tokens": 100}]
    record = {"metrics_before": before, "metrics_after": after, "engine": {}}
    rates = prefix_columns(record, parquet.arrow_table(columns.REQUESTS, prompts))
    assert rates["prefix_hit_rate"] == pytest.approx(50 / 200)  # 50 of 100 + 100 looked up
