"""One row of the table of cells, compared with calculations by hand."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from helpers.deployments import SMALL_VLLM
from servegrid.analysis import efficiency, reasoning, server_metrics
from servegrid.analysis.metrics import cell_row
from servegrid.analysis.slo import DEFAULT_SLO, Slo
from servegrid.records import columns, parquet
from servegrid.study.grid import Trial, Workload
from servegrid.study.source import FileFacts, Source

START = 2**53 + 1
"""A float cannot represent these nanoseconds exactly, so a subtraction of floats would fail."""
MS = 1_000_000


def make_trial(**workload: Any) -> Trial:
    deployment = replace(
        SMALL_VLLM,
        name="d",
        model="m",
        quantization="awq",
        gpu="a100-40gb",
        gpu_count=2,
        max_model_len=512,
        max_num_seqs=64,
    )
    defaults = {"protocol": "burst", "concurrency": 2, "input_len": 31, "output_len": 4}
    if workload.get("protocol") == "poisson":
        workload["concurrency"] = None
    return Trial(deployment, Workload(**{**defaults, "requests": 2, **workload}), number=3)


def request(
    sent: int, stamps: list[int], tokens: list[int], done: int, **other: Any
) -> dict[str, Any]:
    """A successful request. All times are in ms after START."""
    return {
        "wave": 0,
        "user": sent,
        "scheduled_ns": START,
        "sent_ns": START + sent * MS,
        "first_token_ns": START + stamps[0] * MS if stamps else None,
        "token_ns": [START + stamp * MS for stamp in stamps],
        "chunk_tokens": tokens,
        "done_ns": START + done * MS,
        "status": 200,
        "completion_tokens": sum(tokens),
    } | other


TWO = [
    request(1, [101, 201, 401], [1, 2, 1], 402),  # ttft 0.1, e2el 0.4, tpot 0.3 / 3
    request(2, [202, 802], [1, 3], 1000),  # ttft 0.2, e2el 0.8, tpot 0.6 / 3
]
FAILED = request(1, [], [], 1500, error="stalled: no byte for 1 s", completion_tokens=None)


def cell(
    rows: list[dict[str, Any]],
    samples: list[Mapping[str, Any]] | None = None,
    verdict: str = "ok",
    slo: Slo = DEFAULT_SLO,
    **workload: Any,
) -> dict[str, Any]:
    trial = make_trial(**workload)
    record = {
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": verdict,
        "verdict_detail": None if verdict == "ok" else "the evidence",
        "engine": {"engine": "emulated", "version": "0.32.0"},
        "client": {"window_ns": [START, START + 1000 * MS], "token_chunks": 5, "processes": 1},
        "calibration": {
            "arrival_error_s_p99": 1e-5,
            "ttft_error_s_p50": 1e-3,
            "itl_error_s_p99": 2e-5,
            "cpu_s_per_1000_events": 0.01,
        },
        "environment": {"allocation": "d.1234", "started": "2026-11-23T01:02:03+00:00"},
        "metrics_before": None,
        "metrics_after": None,
    }
    return cell_row(
        record,
        parquet.arrow_table(columns.REQUESTS, rows),
        parquet.arrow_table(columns.TELEMETRY, samples or []),
        slo=slo,
    )


UNKNOWN = (
    *("gpu_utilization_mean", "gpu_temperature_c_max", "sm_clock_mhz_min", "sm_clock_mhz_max"),
    *("server_ttft_s_mean", "server_itl_s_mean", "server_queue_s_mean", "server_e2el_s_mean"),
    *(
        "ttft_client_overhead_s",
        "running_mean",
        "waiting_mean",
        "waiting_max",
        "kv_cache_usage_max",
    ),
    *("preemptions", "prefix_hit_tokens"),
)
"""Columns that are null without samples of GPUs and without metrics of the server."""


def latencies(name: str, mean: float, median: float) -> dict[str, Any]:
    rare = {f"{name}_s_p{each}": None for each in (90, 95, 99)}
    known = {f"{name}_s_mean": mean, f"{name}_s_p50": median}
    return {key: pytest.approx(value, rel=1e-12) for key, value in known.items()} | rare


def test_a_burst_of_two() -> None:
    row = cell(TWO)
    known = [column.name for column in columns.CELLS]
    validity = ("valid", "invalid_rules", "invalid_evidence", "allocation_drift")
    elsewhere = (*validity, *efficiency.COLUMNS)
    assert list(row) == [name for name in known if name not in elsewhere]
    digest = row.pop("spec_digest")
    assert digest == make_trial().digest
    assert row == {
        "deployment": "d",
        "model": "m",
        "quantization": "awq",
        "gpu": "a100-40gb",
        "gpu_count": 2,
        "replicas": 1,
        "engine": "emulated",
        "engine_version": "0.32.0",
        "origin": "servegrid",
        "time_scale": None,
        "allocation": "d.1234 2026-11-23T01:02:03+00:00",
        "protocol": "burst",
        "concurrency": 2,
        "request_rate": None,
        "input_len": 31,
        "output_len": 4,
        "output_spread": 0.0,
        "output_len_exact": True,
        "prompts": "distinct",
        "think_time_s": 0.0,
        "trial": 3,
        "bring_up": 1,
        "verdict": "ok",
        "verdict_detail": None,
        "verdict_evidence": None,
        "requests": 2,
        "failed_requests": 0,
        "makespan_s": 1.0,
        "completion_tokens_mean": 4.0,
        "seconds_per_100_tokens": 25.0,
        "window_s": 1.0,
        "requests_in_window": 2,
        "in_flight_mean": pytest.approx(0.401 + 0.998),
        **latencies("ttft", 0.15, 0.15),
        **latencies("ttft_from_sent", 0.15, 0.15),
        **latencies("tpot", 0.15, 0.15),
        **latencies("itl", 0.15, 0.2),  # 0.05 twice, 0.2; 0.2 three times
        **latencies("itl_per_chunk", 0.3, 0.2),  # 0.1, 0.2 and 0.6
        **latencies("e2el", 0.6, 0.6),
        "itl_max_s_p50": pytest.approx(0.2),  # 0.2 / 1 and 0.6 / 3
        "burstiness": None,
        "rate_fraction": None,
        "coalesced_chunk_fraction": 0.0,
        "output_tokens_per_s": 8.0,
        "output_tokens_per_s_per_user": 4.0,
        # 4 tokens in 0.4 s and in 0.8 s: both more than 5 tokens/s.
        "goodput_requests_per_s": 2.0,
        "slo_attainment": 1.0,
        "memory_peak_bytes": None,
        "power_w_mean": None,
        "energy_needs_s": None,
        "power_disagreement": None,
        "power_suspect": None,
        "energy_j_per_output_token": None,
        **dict.fromkeys(UNKNOWN),
        "client_arrival_error_s_p99": 1e-5,
        "client_ttft_error_s_p50": 1e-3,
        "client_itl_error_s_p99": 2e-5,
        "client_headroom": 20000.0,  # 100,000 chunks/s, and 5 in 1 s
        "source": "text",
        "prompt_tokens_mean": None,
        "prefix_hit_rate": None,
        "expected_prefix_hit_rate": None,
        **dict.fromkeys(latencies("ttfo", 0, 0)),
        **dict.fromkeys(("reasoning_tokens_mean", "responses_without_answer")),
        **dict.fromkeys(("spec_decode_acceptance_rate", "spec_decode_acceptance_length")),
        "lora": None,
    }


def answered(at: int | None, reasoning: int | None) -> dict[str, Any]:
    """What is known of a reasoning model's response; the time is in ms after START."""
    return {
        "first_output_token_ns": None if at is None else START + at * MS,
        "reasoning_tokens": reasoning,
    }


def test_the_time_to_first_output_token_starts_after_the_reasoning() -> None:
    row = cell([TWO[0] | answered(201, 1), TWO[1] | answered(802, 1)])
    assert row["ttft_s_mean"] == pytest.approx(0.15)  # 0.1 and 0.2: the first token of any kind
    assert row["ttfo_s_mean"] == pytest.approx(0.5)  # 0.2 and 0.8
    assert (row["reasoning_tokens_mean"], row["responses_without_answer"]) == (1.0, 0)
    assert row["tpot_s_mean"] == pytest.approx(0.15)  # the reasoning arrived, so its tokens count


def test_a_response_that_ends_within_its_reasoning_has_no_first_output_token() -> None:
    row = cell([TWO[0] | answered(201, 1), TWO[1] | answered(None, 4)])
    assert row["ttfo_s_mean"] == pytest.approx(0.2)
    assert (row["reasoning_tokens_mean"], row["responses_without_answer"]) == (2.5, 1)


def test_tokens_of_a_reasoning_that_never_arrived_do_not_shorten_tpot() -> None:
    """Six tokens, two of them hidden: 0.3 s and 0.6 s for three gaps between four tokens."""
    hidden = [
        each | answered(at, 2) | {"completion_tokens": 6}
        for each, at in zip(TWO, (101, 202), strict=True)
    ]
    row = cell(hidden)
    assert row["tpot_s_mean"] == pytest.approx(0.15)
    assert row["ttfo_s_mean"] == row["ttft_s_mean"]
    # 0.15 s per token is met by the first request only, 0.4 s by both.
    assert cell(hidden, slo=Slo(1.0, tpot_s=0.15))["slo_attainment"] == 0.5
    assert cell(hidden, slo=Slo(1.0, tpot_s=0.4))["slo_attainment"] == 1.0


def test_records_from_before_reasoning_was_told_apart_have_none() -> None:
    later = ("first_output_token_ns", "reasoning_tokens", "reasoning_tokens_estimated")
    table = parquet.arrow_table(columns.REQUESTS, TWO).drop_columns(list(later))
    assert reasoning.hidden_tokens(table).tolist() == [0, 0]
    assert set(reasoning.reasoning_columns(table).values()) == {None}


SPECULATIVE = [1, 3, 2, 4]
"""Tokens of four steps of speculative decoding, at 100, 140, 180 and 220 ms."""
STEPS = [101, 141, 181, 221]


def test_tpot_and_itl_are_per_token_if_a_chunk_has_several() -> None:
    row = cell([request(1, STEPS, SPECULATIVE, 221, chunk_tokens_estimated=False)])
    assert row["tpot_s_mean"] == pytest.approx(0.12 / 9)  # nine tokens after the first
    # 40 ms among 3, 2 and 4 tokens: the sum is 0.12 s, for nine tokens.
    assert row["itl_s_mean"] == pytest.approx(0.12 / 9)
    assert row["itl_s_p50"] == pytest.approx(0.04 / 3)
    assert row["itl_max_s_p50"] == pytest.approx(0.04 / 2)
    assert row["itl_per_chunk_s_mean"] == pytest.approx(0.04)


def test_itl_is_unknown_if_only_the_total_of_several_tokens_per_chunk_is_known() -> None:
    estimated = request(1, STEPS, [3, 2, 3, 2], 221, chunk_tokens_estimated=True)
    row = cell([estimated])
    assert {row[f"itl_s_{each}"] for each in ("mean", "p50")} == {None}
    assert row["itl_max_s_p50"] is None
    assert row["tpot_s_mean"] == pytest.approx(0.12 / 9)
    assert row["itl_per_chunk_s_mean"] == pytest.approx(0.04)
    # No pause was longer than 40 ms. Whether tokens were 20 ms apart is not known.
    assert cell([estimated], slo=Slo(1.0, itl_s=0.041))["slo_attainment"] == 1.0
    assert cell([estimated], slo=Slo(1.0, itl_s=0.039))["slo_attainment"] == 0.0
    known = request(1, STEPS, SPECULATIVE, 221, chunk_tokens_estimated=False)
    assert cell([estimated, known])["itl_s_mean"] == pytest.approx(0.12 / 9)


def test_an_estimate_of_fewer_tokens_than_chunks_has_one_latency_per_token() -> None:
    # Three tokens in four chunks: by the estimate, the last chunk has none.
    row = cell([request(1, STEPS, [1, 1, 1, 0], 221, chunk_tokens_estimated=True)])
    assert row["itl_s_mean"] == pytest.approx(0.04)
    assert row["itl_per_chunk_s_mean"] == pytest.approx(0.04)


def test_an_estimate_is_good_enough_if_nearly_all_chunks_have_one_token() -> None:
    """Eleven tokens in ten chunks, 10 ms apart: nine or more chunks have one token."""
    stamps = [101 + 10 * number for number in range(10)]
    row = cell([request(1, stamps, [2, *[1] * 9], 191, chunk_tokens_estimated=True)])
    assert row["itl_s_p50"] == pytest.approx(0.01)


def test_hit_rates_of_the_prefix_cache() -> None:
    rows = [
        {"prompt_tokens": 300, "shared_tokens": 0, "cached_tokens": 0},
        {"prompt_tokens": 300, "shared_tokens": 300, "cached_tokens": 256},
        {"prompt_tokens": 200, "shared_tokens": 150, "cached_tokens": 128},
    ]
    table = parquet.arrow_table(columns.REQUESTS, rows)
    before = {"vllm:prefix_cache_hits_total": 10.0, "vllm:prefix_cache_queries_total": 100.0}
    after = {"vllm:prefix_cache_hits_total": 330.0, "vllm:prefix_cache_queries_total": 900.0}
    engine = {"prefix_caching": True, "kv_block_tokens": 128}
    record = {"engine": engine, "metrics_before": before, "metrics_after": after}
    # 320 of 800 at the server. Expected: of 299 shared tokens 2 blocks of 128, of 150 one.
    assert server_metrics.prefix_columns(record, table) == {
        "prefix_hit_rate": 0.4,
        "expected_prefix_hit_rate": 0.48,
    }
    by_usage = record | {"metrics_before": None, "metrics_after": None}
    assert server_metrics.prefix_columns(by_usage, table)["prefix_hit_rate"] == 0.48
    off = record | {"engine": engine | {"prefix_caching": False}}
    assert server_metrics.prefix_columns(off, table)["expected_prefix_hit_rate"] is None
    older = table.drop_columns(["shared_tokens", "cached_tokens"])
    assert server_metrics.prefix_columns(record, older)["expected_prefix_hit_rate"] is None


def test_latencies_of_a_trace_start_when_requests_are_due_and_all_count() -> None:
    row = cell(
        [each | {"prompt_tokens": number} for number, each in enumerate(TWO, 7)],
        protocol="trace",
        concurrency=None,
        request_rate=2.0,
        source=Source("trace", file=FileFacts("ab" * 32, 2)),
    )
    # From START: the first tokens come after 101 and 202 ms, the last ones after 401 and 802 ms.
    assert row["ttft_s_mean"] == pytest.approx(0.1515)
    assert row["e2el_s_mean"] == pytest.approx(0.6015)
    assert (row["requests_in_window"], row["source"]) == (2, "trace abababab")
    assert row["prompt_tokens_mean"] == 7.5
    # Four tokens each, whatever the workload's mean is.
    assert row["seconds_per_100_tokens"] == pytest.approx(100 * 0.6015 / 4)


def test_goodput_counts_the_requests_that_meet_every_limit() -> None:
    # Four tokens each, in 0.4 s and 0.8 s after 0.1 s and 0.2 s, and one that failed; 1.5 s in all.
    requests = [*TWO, FAILED]
    for slo, met in (
        (Slo(5.0), 2),
        (Slo(10.0), 1),  # 10 and 5 tokens/s
        (Slo(11.0), 0),
        (Slo(1.0, ttft_s=0.1), 1),
        (Slo(1.0, e2el_s=0.5), 1),
        (Slo(1.0, ttft_s=0.05), 0),
    ):
        row = cell(requests, slo=slo, verdict="timeout")
        assert row["goodput_requests_per_s"] == pytest.approx(met / 1.5), slo
        assert row["slo_attainment"] == pytest.approx(met / 3), slo


def test_the_median_is_not_the_mean() -> None:
    row = cell([request(0, [t], [1], 900) for t in (100, 200, 600)], output_len=1)
    assert row["ttft_s_mean"] == pytest.approx(0.3)
    assert row["ttft_s_p50"] == pytest.approx(0.2)
    assert row["e2el_s_p50"] == pytest.approx(0.2)


def test_times_are_exact_to_the_nanosecond() -> None:
    late = request(0, [0], [1], 0) | {"first_token_ns": START + 1, "done_ns": START + 1}
    row = cell([late])
    assert row["ttft_s_mean"] == 1e-9
    assert row["makespan_s"] == 1e-9


def test_an_output_of_one_token_has_no_tpot() -> None:
    assert cell([request(0, [100], [1], 100)], output_len=1)["tpot_s_mean"] is None
    both = cell([request(0, [100], [1], 100), request(0, [100, 300], [1, 1], 300)])
    assert both["tpot_s_mean"] == pytest.approx(0.2)


def test_failed_requests_are_counted_but_not_in_latencies() -> None:
    row = cell([*TWO, FAILED], verdict="timeout")
    assert (row["requests"], row["failed_requests"]) == (3, 1)
    assert row["ttft_s_mean"] == pytest.approx(0.15)
    assert row["e2el_s_p50"] == pytest.approx(0.6)
    assert row["makespan_s"] == 1.5
    assert row["output_tokens_per_s"] == pytest.approx(8 / 1.5)
    assert row["seconds_per_100_tokens"] is None
    assert (row["verdict"], row["verdict_detail"]) == ("timeout", "the evidence")


def test_latencies_are_null_if_all_requests_failed() -> None:
    row = cell([FAILED], verdict="timeout")
    speeds = ("ttft", "tpot", "itl", "e2el", "output_tok", "coalesced")
    latencies = [name for name in row if name.startswith(speeds)]
    assert len(latencies) == 6 * 5 + 5
    assert [row[name] for name in latencies] == [None] * len(latencies)
    assert row["makespan_s"] == 1.5


def test_tokens_of_a_broken_response_do_not_count() -> None:
    broken = request(1, [50, 60], [1, 1], 70, error="broken: end of stream")
    assert cell([*TWO, broken], verdict="http_error")["output_tokens_per_s"] == 8.0


def test_figures_are_null_without_requests() -> None:
    row = cell([], verdict="server_died")
    assert row["requests"] == 0
    assert row["makespan_s"] is None
    assert row["output_tokens_per_s"] is None


def test_an_unknown_end_makes_the_makespan_unknown() -> None:
    row = cell([*TWO, FAILED | {"done_ns": None}], verdict="server_died")
    assert row["makespan_s"] is None
    assert row["output_tokens_per_s"] is None


def test_the_makespan_is_the_sum_of_the_waves_without_pauses() -> None:
    second = {"wave": 1, "scheduled_ns": START + 5000 * MS}
    waves = [*TWO, request(5000, [5100, 5400], [2, 2], 5500, **second)]
    row = cell(waves)
    assert row["makespan_s"] == 1.5
    assert row["seconds_per_100_tokens"] == pytest.approx(1.5 / 2 / 4 * 100)
    assert row["output_tokens_per_s"] == pytest.approx(12 / 1.5)


def loop(count: int, **workload: Any) -> dict[str, Any]:
    """The row of one user's `count` requests: 0.1 s each, 4 tokens, ttft 0.04 s."""
    requests = [
        request(
            100 * n,
            [100 * n + t for t in (40, 60, 60, 100)],
            [1, 1, 1, 1],
            100 * n + 100,
            user=0,
            scheduled_ns=START + (100 * n - 5) * MS,
        )
        for n in range(count)
    ]
    return cell(requests, concurrency=1, **workload)


def test_figures_of_a_closed_loop_come_from_its_stationary_part() -> None:
    row = loop(30, protocol="closed_loop")
    # From the end of the first request to the due time of the last, 5 ms before it was sent.
    assert row["window_s"] == pytest.approx(2.795)
    assert row["requests_in_window"] == 27  # the 2nd to the 28th; the 29th ends 5 ms later
    # Tokens in (100, 2895]: 28 times at +40, 28 times two at +60, 27 times at +100.
    assert row["output_tokens_per_s"] == pytest.approx((28 + 56 + 27) / 2.795)
    assert row["in_flight_mean"] == pytest.approx(1.0)
    assert row["ttft_s_mean"] == pytest.approx(0.04)
    assert row["itl_s_mean"] == pytest.approx(0.06 / 3)
    assert row["itl_s_p50"] == pytest.approx(0.02)
    assert row["coalesced_chunk_fraction"] == pytest.approx(1 / 4)
    assert row["seconds_per_100_tokens"] == pytest.approx(0.1 / 4 * 100)


def test_latencies_of_poisson_start_at_the_due_time() -> None:
    row = loop(30, protocol="poisson", request_rate=10.0) | {"spec_digest": ""}
    assert row["ttft_s_mean"] == pytest.approx(0.045)
    assert row["ttft_from_sent_s_mean"] == pytest.approx(0.04)
    assert row["e2el_s_p50"] == pytest.approx(0.105)
    assert row["request_rate"] == 10.0


def test_without_a_steady_state_there_are_no_figures() -> None:
    row = cell(TWO, protocol="closed_loop")
    known = {name for name, value in row.items() if value is not None}
    latencies = ("ttft_", "tpot_s", "itl_", "e2el_s", "output_tokens")
    assert not [name for name in known if name.startswith(latencies)]
    for name in ("window_s", "requests_in_window", "in_flight_mean", "seconds_per_100_tokens"):
        assert row[name] is None
    assert row["makespan_s"] == 1.0


@pytest.mark.parametrize(("percentile", "least"), [(90, 64), (95, 130), (99, 662)])
def test_a_percentile_needs_enough_samples(percentile: int, least: int) -> None:
    def ttft(count: int) -> Any:
        requests = [request(0, [n + 1], [1], 900) for n in range(count)]
        return cell(requests, output_len=1)[f"ttft_s_p{percentile}"]

    assert ttft(least - 1) is None
    # The q-quantile of 1, 2, … n ms is 1 + q (n - 1), interpolated between two of them.
    assert ttft(least) == pytest.approx((1 + percentile / 100 * (least - 1)) / 1e3)


def test_a_request_without_chunks_has_no_last_token() -> None:
    empty = request(0, [], [], 900, completion_tokens=4)
    null = empty | {"token_ns": None}
    assert cell([empty, null])["e2el_s_mean"] is None
    for rows in ([empty, TWO[0], null], [null, TWO[0], empty]):
        assert cell(rows)["e2el_s_mean"] == pytest.approx(0.4)


def sample(time: int, device: str, memory: int | None) -> dict[str, Any]:
    return {"time_ns": START + time * MS, "device": device, "memory_bytes": memory}


def test_the_memory_peak_is_the_peak_of_the_sum() -> None:
    gpus = [
        sample(10, "GPU-a", 5),
        sample(20, "GPU-b", 1),
        sample(30, "GPU-a", 1),
        sample(40, "GPU-b", 6),
        sample(40, "engine", 1000),
    ]
    assert cell(TWO, gpus)["memory_peak_bytes"] == 1 + 6
    assert cell(TWO, gpus[::-1])["memory_peak_bytes"] == 1 + 6


def test_without_gpus_the_memory_peak_is_the_sum_of_the_nodes() -> None:
    samples = [sample(10, "engine", 5), sample(20, "engine.1", 3), sample(30, "engine", 1)]
    assert cell(TWO, samples)["memory_peak_bytes"] == 5 + 3
    gpu = sample(15, "GPU-a", 2)
    assert cell(TWO, [*samples, gpu])["memory_peak_bytes"] == 2


def test_energy_per_token_is_power_divided_by_tokens_per_second() -> None:
    def reading(number: int) -> dict[str, Any]:
        energy = {"power_w": 110.0, "energy_j": 500.0 + 10 * number}
        return {"time_ns": number * 10**8, "device": "GPU-a", **energy}

    row = cell(TWO, [reading(number) for number in range(61)])  # 10 J in 0.1 s
    assert row["power_w_mean"] == pytest.approx(100.0)
    assert row["energy_needs_s"] == pytest.approx(5.0)
    assert row["power_disagreement"] == pytest.approx(0.1)
    assert row["energy_j_per_output_token"] == pytest.approx(100.0 / row["output_tokens_per_s"])
    short = cell(TWO, [reading(number) for number in range(21)])
    assert (short["power_w_mean"], short["energy_j_per_output_token"]) == (None, None)
    assert short["energy_needs_s"] == pytest.approx(5.0)


def test_samples_outside_the_stationary_part_do_not_count() -> None:
    def gpu(time: int, watts: float, joules: float, clock: int) -> dict[str, Any]:
        reading = {"power_w": watts, "energy_j": joules, "sm_clock_mhz": clock}
        return sample(time, "GPU-a", 1) | reading

    samples = [
        gpu(50, 900.0, 0.0, 300),
        # 0.5 J in 5 ms.
        *(gpu(each, 100.0, 1000.0 + each / 10, 1400) for each in range(200, 2600, 5)),
        gpu(2700, 100.0, 1270.0, 1410),
        gpu(2950, 900.0, 5000.0, 300),
        sample(50, "engine", 1) | {"running": 0, "waiting": 8, "kv_cache_usage": 0.9},
        sample(1200, "engine", 1) | {"running": 1, "waiting": 0, "kv_cache_usage": 0.1},
    ]
    row = loop(30, protocol="closed_loop", samples=samples)  # from 100 ms to 2895 ms
    assert row["power_w_mean"] is None  # the last step may have happened 105 ms before it was seen
    assert row["power_disagreement"] == pytest.approx(0.0, abs=1e-6)
    assert row["power_suspect"] is False
    assert (row["sm_clock_mhz_min"], row["sm_clock_mhz_max"]) == (1400, 1410)
    assert (row["running_mean"], row["waiting_max"], row["kv_cache_usage_max"]) == (1.0, 0, 0.1)


def test_the_first_sample_of_a_device_counts_for_the_time_before_it() -> None:
    gpus = [sample(10, "GPU-a", 5), sample(20, "GPU-a", 1), sample(25, "GPU-b", 3)]
    assert cell(TWO, gpus)["memory_peak_bytes"] == 5 + 3


def test_without_a_gpu_the_memory_peak_is_that_of_the_engine() -> None:
    samples = [sample(10, "engine", 7), sample(20, "engine", 9), sample(30, "engine", 8)]
    assert cell(TWO, samples)["memory_peak_bytes"] == 9


@pytest.mark.parametrize("unknown", ["GPU-a", "GPU-b"])
def test_the_memory_peak_is_null_if_one_gpu_is_unknown(unknown: str) -> None:
    samples = [
        sample(10, device, None if device == unknown else 5) for device in ("GPU-a", "GPU-b")
    ]
    assert cell(TWO, [*samples, sample(10, "engine", 9)])["memory_peak_bytes"] is None


def test_expected_hits_of_a_conversation_are_whole_blocks_of_its_history() -> None:
    """Turns of 100 tokens and answers of 30: the server has the KV of 129 and 259 tokens."""
    rows = [
        {"prompt_tokens": 100, "shared_tokens": 0, "cached_tokens": 0},
        {"prompt_tokens": 230, "shared_tokens": 129, "cached_tokens": 128},
        {"prompt_tokens": 360, "shared_tokens": 259, "cached_tokens": 256},
    ]
    table = parquet.arrow_table(columns.REQUESTS, rows)
    for block, expected in ((16, 128 + 256), (32, 128 + 256), (100, 100 + 200)):
        record = {
            "engine": {"prefix_caching": True, "kv_block_tokens": block},
            "metrics_before": {},
            "metrics_after": {},
        }
        rates = server_metrics.prefix_columns(record, table)
        assert rates["expected_prefix_hit_rate"] == pytest.approx(expected / 690)
