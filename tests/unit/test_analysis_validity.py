"""Each rule of validity, broken separately, and cells that break none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from servegrid.analysis.validity import RULES, Evidence, Validity, check_validity
from servegrid.records import columns, parquet
from servegrid.study.config import parse_study
from servegrid.study.source import Distribution, Source

TRIAL = parse_study(
    {
        "study": "s",
        "workload": {"concurrency": 2, "input_len": 7, "output_len": 3},
        "deployments": [
            {
                "model": "m",
                "checkpoint": "c",
                "quantization": "fp16",
                "engine": "vllm",
                "gpu": "a100",
                "max_model_len": 64,
                "max_num_seqs": 2,
            }
        ],
    }
).trials[0]

MS = 1_000_000
COUNTERS = {
    "vllm:prefix_cache_hits_total": 5.0,
    "vllm:num_preemptions_total": 1.0,
    "vllm:e2e_request_latency_seconds_count": 10.0,
    "llamacpp:prompt_tokens_total": 100.0,
    "vllm:generation_tokens_total": 1000.0,
}
ROW = {
    "scheduled_ns": 0,
    "sent_ns": 1 * MS,
    "first_token_ns": 101 * MS,
    "token_ns": [101 * MS, 301 * MS],
    "chunk_tokens": [1, 2],
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "requested_tokens": 3,
    "reasoning_tokens": 3,
    "user": 0,
    "done_ns": 301 * MS,
    "error": None,
}


def evidence(
    row: dict[str, Any] | None = None,
    client: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    after: dict[str, float] | None = None,
    check: dict[str, Any] | None = None,
    reasons: list[int | None] | None = None,
    **record: Any,
) -> Evidence:
    """Two requests with a ttft of 100 ms. `row` changes the second one."""
    facts = {
        "spec": TRIAL.spec,
        "verdict": "ok",
        "engine": {"max_num_seqs": 2, "prefix_caching": False} | (engine or {}),
        "client": {
            "window_ns": [0, 1000 * MS],
            "cpu_s_busiest": 0.1,
            "token_chunks": 100,
            "processes": 1,
            "clock_offset_before_ns": 0,
            "clock_offset_after_ns": 0,
        }
        | (client or {}),
        "calibration": {
            "arrival_error_s_p99": 0.01,
            "ttft_error_s_p50": 0.02,
            "itl_error_s_p99": 0.001,
            "cpu_s_per_1000_events": 5.0,  # 200 events/s
            "requests": 2,
            "lost": 0,
        }
        | (check or {}),
        "metrics_before": COUNTERS,
        "metrics_after": COUNTERS | (after or {}),
    }
    samples = telemetry([{"time_ns": 0, "throttle_reasons": each} for each in reasons or [None, 4]])
    return Evidence(facts | record, pa.Table.from_pylist([ROW, ROW | (row or {})]), samples)


def telemetry(samples: list[dict[str, Any]]) -> pa.Table:
    return parquet.arrow_table(columns.TELEMETRY, samples)


def alone() -> Evidence:
    """The server counted the cell's own 2 requests with 7 prompt tokens and 3 output tokens."""
    return evidence(
        after={
            "vllm:e2e_request_latency_seconds_count": 12.0,
            "llamacpp:prompt_tokens_total": 114.0,
            "vllm:generation_tokens_total": 1006.0,
        }
    )


@pytest.mark.parametrize(
    "make", [evidence, alone, lambda: closed_loop(), lambda: closed_loop(waiting=(0, 0))]
)
def test_a_cell_that_breaks_no_rule_is_valid(make: Callable[[], Evidence]) -> None:
    assert check_validity(make()) == Validity(True, [], [])


def closed_loop(
    count: int = 40, pause: int = 1, lag: int = 0, waiting: tuple[int, ...] = ()
) -> Evidence:
    """Two users who send `pause` ms after each response of 100 ms; requests are `lag` ms late.

    From 2.5 s on, the server reports the requests that are `waiting`, every 100 ms.
    """
    workload = replace(TRIAL.workload, protocol="closed_loop", requests=2 * count)
    rows = [
        ROW
        | {
            "user": user,
            "scheduled_ns": ((100 + pause) * number - lag) * MS,
            "sent_ns": (100 + pause) * number * MS,
            "first_token_ns": ((100 + pause) * number + 50) * MS,
            "done_ns": ((100 + pause) * number + 100) * MS,
        }
        for user in (0, 1)
        for number in range(count)
    ]
    given = evidence(spec=replace(TRIAL, workload=workload).spec)
    gauges = [
        {"time_ns": (2500 + 100 * number) * MS, "waiting": each}
        for number, each in enumerate(waiting)
    ]
    # Both users start at the same time, so requests wait before the stationary part.
    samples = telemetry([{"time_ns": 0, "waiting": 2}, {"time_ns": 2550 * MS}, *gauges])
    return replace(given, requests=pa.Table.from_pylist(rows), telemetry=samples)


def as_text(server_counts: tuple[int, int], added: int | None, cached: float = 0.0) -> Evidence:
    """Two prompts sent as text: 7 tokens for the tokenizer, `server_counts` for the server."""
    given = evidence(
        client={"prompt_form": "messages", "prompt_tokens_added": added},
        after={"vllm:prefix_cache_hits_total": 5.0 + cached},
    )
    rows = [ROW | {"prompt_tokens": each} for each in server_counts]
    return replace(given, requests=pa.Table.from_pylist(rows))


BROKEN: dict[str, tuple[Callable[[], Evidence], str]] = {
    "more reasoning tokens than output tokens": (
        lambda: evidence(row={"reasoning_tokens": 4}),
        "tokens: 1 of 2 responses have more reasoning tokens than output tokens",
    ),
    "too few output tokens": (
        lambda: evidence(row={"completion_tokens": 2, "chunk_tokens": [1, 1]}),
        "tokens: 1 of 2 responses have a wrong number of tokens, by the server's count",
    ),
    "a prompt with another length": (
        lambda: evidence(row={"prompt_tokens": 8}),
        "tokens: prompt_tokens are [7, 8], expected 7",
    ),
    "a server that adds a varying number of tokens to texts": (
        lambda: as_text((37, 38), None),
        "tokens: prompt_tokens are [37, 38], expected one value of at least 7",
    ),
    "a server that removes tokens from texts": (
        lambda: as_text((6, 6), -1),
        "tokens: prompt_tokens are [6], expected one value of at least 7",
    ),
    "a prefix cache with more than the tokens of a template": (
        lambda: as_text((37, 37), 30, cached=61.0),
        "prefix_cache: 61 prompt tokens came from the prefix cache",
    ),
    "chunks that do not add up": (
        lambda: evidence(row={"chunk_tokens": [1, 1]}),
        "tokens: 1 of 2 responses have a wrong number of tokens, by the count of the chunks",
    ),
    "a workload that is too short for a steady state": (
        lambda: closed_loop(count=11),
        "no_steady_state: 18 requests ended between the initial transient and the end; at least "
        "20 are needed",
    ),
    "users who send their next request late": (
        lambda: closed_loop(pause=15),
        "too_few_in_flight: on average, 1.7 requests were in flight, at concurrency 2",
    ),
    "a prefix cache": (
        lambda: evidence(after={"vllm:prefix_cache_hits_total": 21.0}),
        "prefix_cache: 16 prompt tokens came from the prefix cache",
    ),
    "preemptions": (
        lambda: evidence(after={"vllm:num_preemptions_total": 3.0}),
        "preempted: 2 preemptions",
    ),
    "a finished request of somebody else": (
        lambda: evidence(after={"vllm:e2e_request_latency_seconds_count": 13.0}),
        "foreign_load: the server finished 3 requests, but only 2 were for this cell",
    ),
    "a prompt of somebody else": (
        lambda: evidence(after={"llamacpp:prompt_tokens_total": 115.0}),
        "foreign_load: the server processed 15 prompt tokens, but only 14 were for this cell",
    ),
    "a request of somebody else that has not finished": (
        lambda: evidence(after={"vllm:generation_tokens_total": 1007.0}),
        "foreign_load: the server generated 7 tokens, but only 6 were for this cell",
    ),
    "a concurrency above max_num_seqs": (
        lambda: evidence(engine={"max_num_seqs": 1}),
        "server_queueing: max_num_seqs 1 is less than concurrency 2",
    ),
    "requests that wait in the server": (
        lambda: closed_loop(waiting=(0, 1, 0, 0, 0, 0)),
        "server_queueing: on average, 0.2 of 2 requests waited in the server",
    ),
    "a late request": (
        lambda: evidence(row={"sent_ns": 11 * MS, "first_token_ns": 111 * MS}),
        "sent_late: requests were sent up to 11.0 ms late, with a median ttft of 100 ms",
    ),
    "late users": (
        lambda: closed_loop(lag=11),
        "sent_late: requests were sent on average 11.0 ms late, with a median e2el of 100 ms",
    ),
    "a busy client": (
        lambda: evidence(client={"cpu_s_busiest": 0.71}),
        "client_busy: a client process used 71% of a core",
    ),
    "wrong arrival times": (
        lambda: evidence(check={"arrival_error_s_p99": 0.0101}),
        "client_timing_error: 1% of the arrival times in the calibration are wrong by 10.1 ms or "
        "more",
    ),
    "wrong inter-token latencies": (  # itl is 100 ms, so the limit is 5 ms
        lambda: evidence(check={"itl_error_s_p99": 0.0051}),
        "client_timing_error: 1% of the inter-token latencies in the calibration are wrong by "
        "5.1 ms or more",
    ),
    "a client at its limit": (
        lambda: evidence(client={"token_chunks": 101}),
        "client_timing_error: the client can receive only 2.0 times the chunks/s of this cell",
    ),
    "a client that loses responses": (
        lambda: evidence(check={"lost": 1}),
        "client_timing_error: 1 of 2 calibration requests failed",
    ),
    "a failed calibration": (
        lambda: evidence(check={"error": "no connection"}),
        "client_timing_error: the calibration failed: no connection",
    ),
    "a gateway that holds responses back": (
        lambda: evidence(row={"token_ns": [301 * MS] * 4}),
        "buffered: 50% of the chunks with tokens were read together with the previous one",
    ),
    "a clock that was changed": (
        lambda: evidence(client={"clock_offset_after_ns": -2 * MS}),
        "clock_step: the system clock moved by 2.0 ms",
    ),
    "drift of the node": (
        lambda: replace(evidence(), drift=0.101),
        "drifted: output tokens/s of the drift checks differ by 10%",
    ),
    "a hot GPU": (
        lambda: evidence(reasons=[0, 0x20, 0x40 | 0x04]),
        "gpu_throttled: GPUs were throttled in 2 samples",
    ),
}


def demanding(engine: dict[str, Any]) -> Evidence:
    """The study demands InfiniBand; `engine` is what the record says about the engine."""
    trial = replace(TRIAL, deployment=replace(TRIAL.deployment, network="infiniband"))
    return evidence(engine=engine, spec=trial.spec)


def over(*links: tuple[str, str]) -> dict[str, Any]:
    """An engine on two nodes that used these transports and interfaces."""
    listed = [{"transport": one, "interface": two, "gpu_direct": False} for one, two in links]
    return {"nodes": 2, "network": {"library": "nccl", "links": listed}}


BROKEN |= {
    "the wrong network": (
        lambda: demanding(over(("infiniband", "mlx5_0"), ("tcp", "eth0"))),
        "wrong_network: the nodes used tcp (eth0), not infiniband only",
    ),
    "an unknown network": (
        lambda: demanding({"nodes": 2, "network": None}),
        "wrong_network: it is not known which network the nodes used; the study demands infiniband",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_broken_rule_is_named_with_evidence(what: str) -> None:
    make, reason = BROKEN[what]
    rule, _, detail = reason.partition(": ")
    assert check_validity(make()) == Validity(False, [rule], [detail])


def test_every_copy_of_the_model_runs_max_num_seqs_requests() -> None:
    copies = {"max_num_seqs": 1, "data_parallel_size": 2}
    assert check_validity(evidence(engine=copies)).valid


def test_every_rule_has_a_case() -> None:
    assert {reason.partition(":")[0] for _, reason in BROKEN.values()} == set(RULES)


def test_all_broken_rules_are_named() -> None:
    found = check_validity(evidence(client={"cpu_s_busiest": 1.0}, engine={"max_num_seqs": 1}))
    assert found.valid is False
    assert found.invalid_rules == ["server_queueing", "client_busy"]


def test_a_cell_at_the_limits_is_valid() -> None:
    late = {"sent_ns": 10 * MS, "first_token_ns": 110 * MS}
    within = replace(evidence(row=late, client={"cpu_s_busiest": 0.7}), drift=0.10)
    assert check_validity(within) == Validity(True, [], [])


def test_a_long_ttft_allows_more_lateness() -> None:
    late = {"sent_ns": 14 * MS, "first_token_ns": 1014 * MS}
    first = {"first_token_ns": 601 * MS}  # the median of 600 and 1000 ms is 800; 5% are 40 ms
    both = evidence(row=late)
    rows = pa.Table.from_pylist([ROW | first, ROW | late])
    assert check_validity(replace(both, requests=rows)) == Validity(True, [], [])


def test_a_prefix_cache_that_the_study_enables_is_allowed() -> None:
    cached = evidence(engine={"prefix_caching": True}, after={"vllm:prefix_cache_hits_total": 9.0})
    assert check_validity(cached) == Validity(True, [], [])


def test_a_template_may_add_tokens_to_every_prompt_and_they_may_be_cached() -> None:
    assert check_validity(as_text((37, 37), 30, cached=60.0)) == Validity(True, [], [])


def test_a_cell_without_a_calibration_can_be_valid() -> None:
    assert check_validity(evidence(calibration=None)) == Validity(True, [], [])


def test_a_cell_of_a_server_without_counters_can_be_valid() -> None:
    assert check_validity(evidence(metrics_before=None, metrics_after=None)) == Validity(
        True, [], []
    )


@pytest.mark.parametrize(
    "measured",
    [
        demanding(over(("infiniband", "mlx5_0"), ("infiniband", "mlx5_1"))),
        demanding({}),  # one node: there is no network between nodes
        evidence(engine=over(("tcp", "eth0"))),  # the study demands nothing
    ],
)
def test_a_network_is_demanded_only_between_nodes_and_by_the_study(measured: Evidence) -> None:
    assert check_validity(measured) == Validity(True, [], [])


def test_a_cell_that_was_not_served_has_no_validity() -> None:
    assert check_validity(evidence(verdict="timeout")) == Validity(None, None, None)


def shared(hits: int, block: int | None = 4) -> Evidence:
    """Two prompts of 7 tokens, the second of which shares 6 tokens with the first."""
    found = evidence(
        engine={"prefix_caching": True, "kv_block_tokens": block},
        after={"vllm:prefix_cache_hits_total": 5.0 + hits},
    )
    requests = found.requests.append_column("shared_tokens", pa.array([0, 6]))
    return replace(found, requests=requests)


def test_hits_that_the_shared_starts_explain_are_no_fault() -> None:
    # One whole block of 4 tokens fits into the 6 shared ones; without blocks all 6 count.
    assert check_validity(shared(4)).valid
    assert check_validity(shared(6, block=None)).valid
    assert check_validity(shared(5)).invalid_evidence == [
        "5 prompt tokens came from the prefix cache, but prompts share only 4"
    ]


def drawn(second: dict[str, Any], form: str = "ids") -> Evidence:
    """Two prompts of 7 and 9 tokens, as a source draws them."""
    source = Source("text", input_lens=Distribution("uniform", 0.2, 100))
    trial = replace(TRIAL, workload=replace(TRIAL.workload, source=source))
    found = evidence(spec=trial.spec, client={"prompt_form": form})
    rows = [ROW | {"sent_tokens": 7}, ROW | {"sent_tokens": 9, "prompt_tokens": 9} | second]
    return replace(found, requests=pa.Table.from_pylist(rows))


def test_prompts_of_drawn_lengths_have_the_tokens_that_were_sent() -> None:
    assert check_validity(drawn({})).valid
    assert check_validity(drawn({"prompt_tokens": 11}, form="text")).valid
    for form, tokens in (("ids", 11), ("ids", 8), ("text", 8)):
        (problem,) = check_validity(drawn({"prompt_tokens": tokens}, form)).invalid_evidence or [""]
        assert problem.startswith("1 of 2 prompts have a wrong number of tokens: the server")


def test_a_trace_needs_no_stationary_part() -> None:
    workload = replace(TRIAL.workload, protocol="trace", concurrency=None, request_rate=1.0)
    found = evidence(spec=replace(TRIAL, workload=workload).spec)
    assert "no_steady_state" not in (check_validity(found).invalid_rules or [])
    as_poisson = replace(TRIAL, workload=replace(workload, protocol="poisson"))
    assert "no_steady_state" in (check_validity(evidence(spec=as_poisson.spec)).invalid_rules or [])
