"""The columns of all tables: the single source of their schemas, metadata and documentation.

Each tuple of `Column` is the only place where a column's name, type, unit and meaning are said: the
Arrow schemas, the metadata in the Parquet files and docs/columns.md come from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column of one table: the single source of its schema and documentation."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type, metadata={"unit": self.unit, "meaning": self.meaning})


_TIME = "ns of CLOCK_MONOTONIC"

REQUESTS = (
    Column("request_id", pa.string(), "", "Sent as X-Request-Id; unique within the trial"),
    Column("user", pa.int32(), "", "Which of the concurrent streams sent it, from 0"),
    Column("wave", pa.int32(), "", "Which wave of a burst it belongs to, from 0; 0 when steady"),
    Column("scheduled_ns", pa.int64(), _TIME, "When the request was due"),
    Column("sent_ns", pa.int64(), _TIME, "When its first byte was handed to the kernel"),
    Column("first_token_ns", pa.int64(), _TIME, "Arrival of the first chunk with a token"),
    Column("token_ns", pa.list_(pa.int64()), _TIME, "Arrival of each chunk with tokens"),
    Column("chunk_tokens", pa.list_(pa.int32()), "tokens", "Tokens in each of those chunks"),
    Column(
        "chunk_tokens_estimated",
        pa.bool_(),
        "",
        "True where the server gave no usage per chunk and its final count was shared out",
    ),
    Column("done_ns", pa.int64(), _TIME, "Arrival of the end of the response, or of the failure"),
    Column("status", pa.int32(), "", "HTTP status; null where no response came"),
    Column("error", pa.string(), "", "`kind: detail` of the failure; null where it succeeded"),
    Column("prompt_tokens", pa.int32(), "tokens", "Prompt tokens as counted by the server"),
    Column("completion_tokens", pa.int32(), "tokens", "Output tokens as counted by the server"),
    Column("asked_tokens", pa.int32(), "tokens", "Output tokens asked for"),
)
"""One row per request."""

TELEMETRY = (
    Column("time_ns", pa.int64(), _TIME, "When the sample was taken"),
    Column(
        "device",
        pa.string(),
        "",
        "`engine` for the engine's processes, else the GPU's UUID, or its index where it could "
        "not be opened",
    ),
    Column(
        "memory_bytes",
        pa.int64(),
        "bytes",
        "Memory in use on the GPU, without what its driver reserves where that can be told apart; "
        "for `engine` anonymous and shared memory of its processes "
        "plus the mapped files of the one that has most",
    ),
    Column("cpu_s", pa.float64(), "s", "CPU time used so far by the engine's processes"),
    Column("utilization", pa.float64(), "0 to 1", "Share of time with a kernel running on the GPU"),
    Column(
        "power_w",
        pa.float64(),
        "W",
        "Power drawn by the GPU, of the moment where the driver tells that, else as it averages it",
    ),
    Column("energy_j", pa.float64(), "J", "The GPU's energy counter"),
    Column("sm_clock_mhz", pa.int32(), "MHz", "Clock of the GPU's multiprocessors"),
    Column("memory_clock_mhz", pa.int32(), "MHz", "Clock of the GPU's memory"),
    Column("temperature_c", pa.int32(), "°C", "Temperature of the GPU"),
    Column("throttle_reasons", pa.int64(), "bit mask", "NVML's reasons for reduced clocks"),
    Column(
        "running",
        pa.int32(),
        "requests",
        "Requests that the server works on; it is asked about once a second, and this is null in "
        "between, as are the next three",
    ),
    Column("waiting", pa.int32(), "requests", "Requests that wait in the server's queue"),
    Column("kv_cache_usage", pa.float64(), "0 to 1", "Share of the server's KV cache in use"),
    Column("preemptions", pa.int64(), "", "Preemptions since the server came up"),
)
"""One row per device and sample; unknown is null, never 0."""

PERCENTILES = {50: 1, 90: 64, 95: 130, 99: 662}
"""The percentiles that are published, and the samples that each needs. With so many, the chance
that fewer than two of them lie above the true percentile is under 1%: n is the least for which
q^n + n (1 - q) q^(n - 1) <= 0.01. MLPerf Inference asks for the same before it stops early."""


def _latencies(name: str, meaning: str) -> list[Column]:
    """Mean and percentiles of one kind of latency."""
    return [
        Column(f"{name}_s_mean", pa.float64(), "s", f"{meaning}; mean"),
        *(
            Column(
                f"{name}_s_p{each}",
                pa.float64(),
                "s",
                f"The same, {each}th percentile; null under {least} samples"
                if least > 1
                else "The same, median",
            )
            for each, least in PERCENTILES.items()
        ),
    ]


CELLS = (
    Column("deployment", pa.string(), "", "Name of the deployment"),
    Column("model", pa.string(), "", "Name of the model"),
    Column("quantization", pa.string(), "", "How the weights are stored"),
    Column("gpu", pa.string(), "", "Kind of GPU, or `cpu`"),
    Column("gpu_count", pa.int32(), "", "GPUs of the deployment"),
    Column("engine", pa.string(), "", "Engine that served"),
    Column("engine_version", pa.string(), "", "Its version"),
    Column(
        "origin", pa.string(), "", "The client that measured it; others than servegrid are imported"
    ),
    Column(
        "time_scale",
        pa.float64(),
        "",
        "Emulated time per time that the emulation stands for; null where an engine was measured",
    ),
    Column("allocation", pa.string(), "", "The allocation that measured it, and when it was up"),
    Column("protocol", pa.string(), "", "burst, steady or poisson"),
    Column(
        "concurrency",
        pa.int32(),
        "requests",
        "Requests in flight at once; null when poisson, where that follows from the rate",
    ),
    Column("request_rate", pa.float64(), "requests/s", "Rate of a poisson load; null otherwise"),
    Column("input_len", pa.int32(), "tokens", "Prompt tokens of each request"),
    Column("output_len", pa.int32(), "tokens", "Output tokens asked of each request"),
    Column("output_spread", pa.float64(), "0 to 1", "By up to which share each asks more or less"),
    Column("prompts", pa.string(), "", "`distinct`, or `identical` in all requests"),
    Column("think_time_s", pa.float64(), "s", "A user's mean pause before the next request"),
    Column("trial", pa.int32(), "", "Repeat of the cell, from 1"),
    Column("verdict", pa.string(), "", "ok, or why the cell could not be served"),
    Column("verdict_detail", pa.string(), "", "The verdict's evidence; null when ok"),
    Column(
        "valid",
        pa.bool_(),
        "",
        "Whether the cell may be believed; null where its verdict says that it was not served",
    ),
    Column(
        "invalid_rules",
        pa.list_(pa.string()),
        "",
        "The rules of validity that it breaks; empty where valid, null where not served",
    ),
    Column(
        "invalid_evidence",
        pa.list_(pa.string()),
        "",
        "What broke each of invalid_rules, in the same order",
    ),
    Column(
        "allocation_drift",
        pa.float64(),
        "",
        "Output tokens/s of the allocation's sentinels: (highest - lowest) / median; null under "
        "two of them",
    ),
    Column("requests", pa.int32(), "requests", "Requests sent"),
    Column("failed_requests", pa.int32(), "requests", "Requests that failed"),
    Column(
        "makespan_s",
        pa.float64(),
        "s",
        "Clock start until the last request has ended, summed over the waves of a burst",
    ),
    Column(
        "seconds_per_100_tokens",
        pa.float64(),
        "s",
        "The article's figure: a wave's makespan (burst) or the mean e2el (steady), "
        "per output token asked, times 100; null unless ok",
    ),
    Column(
        "window_s",
        pa.float64(),
        "s",
        "Time that the figures are of: the makespan of a burst, else the stationary part; "
        "null where there is none",
    ),
    Column(
        "requests_in_window",
        pa.int32(),
        "requests",
        "Requests that the latencies are of: all that succeeded in a burst, else those of them "
        "that ended in the window",
    ),
    Column("in_flight_mean", pa.float64(), "requests", "Requests in flight, mean over the window"),
    *_latencies("ttft", "Time to first token: due (poisson) or sent until first token"),
    *_latencies("tpot", "Time per output token after the first, (e2el - ttft) / (tokens - 1)"),
    *_latencies(
        "itl",
        "Inter-token latency: time between two chunks with tokens, shared among the later "
        "one's tokens",
    ),
    *_latencies("e2el", "End-to-end latency: due (poisson) or sent until last token"),
    Column(
        "coalesced_chunk_fraction",
        pa.float64(),
        "0 to 1",
        "Chunks with tokens that were read together with the one before and bear its time",
    ),
    Column(
        "output_tokens_per_s",
        pa.float64(),
        "tokens/s",
        "Output tokens of all users that came in the window / window_s",
    ),
    Column(
        "output_tokens_per_s_per_user",
        pa.float64(),
        "tokens/s",
        "output_tokens_per_s / concurrency: what a user sees, the prompt's time included; "
        "null when poisson",
    ),
    Column("memory_peak_bytes", pa.int64(), "bytes", "Peak memory: GPUs summed, else the engine's"),
    Column(
        "power_w_mean",
        pa.float64(),
        "W",
        "Mean power of all GPUs by their energy counters, else as sampled",
    ),
    Column(
        "power_disagreement",
        pa.float64(),
        "",
        "Sampled power / power by the energy counters - 1; null where one is unknown",
    ),
    Column(
        "power_suspect",
        pa.bool_(),
        "",
        "Whether power_disagreement is more than 10% either way: the counters are kept, but power "
        "and energy are to be quoted with care; null where one is unknown",
    ),
    Column(
        "energy_j_per_output_token",
        pa.float64(),
        "J/token",
        "power_w_mean / output_tokens_per_s",
    ),
    Column("gpu_utilization_mean", pa.float64(), "0 to 1", "Utilization, mean of all GPUs"),
    Column("gpu_temperature_c_max", pa.int32(), "°C", "Temperature of the hottest GPU"),
    Column("sm_clock_mhz_min", pa.int32(), "MHz", "Lowest clock of any GPU's multiprocessors"),
    Column("sm_clock_mhz_max", pa.int32(), "MHz", "Highest clock of any GPU's multiprocessors"),
    Column(
        "server_ttft_s_mean",
        pa.float64(),
        "s",
        "Time to first token by the server's own clock, mean over all requests of the load",
    ),
    Column(
        "server_itl_s_mean",
        pa.float64(),
        "s",
        "Inter-token latency by the server's clock, likewise",
    ),
    Column("server_queue_s_mean", pa.float64(), "s", "Time in the server's queue, likewise"),
    Column(
        "server_e2el_s_mean",
        pa.float64(),
        "s",
        "End-to-end latency by the server's clock, likewise",
    ),
    Column(
        "ttft_client_overhead_s",
        pa.float64(),
        "s",
        "Sent until first token as the client saw it, mean over all requests of the load, minus "
        "server_ttft_s_mean: network, HTTP and what the client itself adds; null where the server "
        "counted other requests",
    ),
    Column(
        "running_mean",
        pa.float64(),
        "requests",
        "Requests that the server worked on, mean over its answers in the window",
    ),
    Column("waiting_mean", pa.float64(), "requests", "Requests in its queue, likewise"),
    Column("waiting_max", pa.int32(), "requests", "The same, the most"),
    Column("kv_cache_usage_max", pa.float64(), "0 to 1", "Share of its KV cache in use, the most"),
    Column("preemptions", pa.int64(), "", "Preemptions during the load"),
    Column(
        "prefix_hit_tokens", pa.int64(), "tokens", "Prompt tokens that the server had in a cache"
    ),
    Column(
        "client_arrival_error_s_p99",
        pa.float64(),
        "s",
        "Self-check before the engine came up: a chunk's arrival as stamped, from when a scripted "
        "server sent it; 99th percentile",
    ),
    Column(
        "client_ttft_error_s_p50",
        pa.float64(),
        "s",
        "Self-check: ttft from what the scripted server was to take, median; it holds the "
        "server's reading of all the requests that come at once",
    ),
    Column(
        "client_itl_error_s_p99",
        pa.float64(),
        "s",
        "Self-check: time between two tokens, from the true one; 99th percentile",
    ),
    Column(
        "client_headroom",
        pa.float64(),
        "",
        "Chunks/s that the client can take in by the self-check / those of this cell",
    ),
    Column("spec_digest", pa.string(), "", "Digest of the specification that was measured"),
)
"""One row per cell and trial."""


_OF_CELLS = {column.name: column for column in CELLS}

SUMMARY_KEYS = tuple(
    _OF_CELLS[name]
    for name in (
        *("deployment", "model", "quantization", "gpu", "gpu_count", "engine", "time_scale"),
        *("protocol", "concurrency", "request_rate", "input_len", "output_len"),
    )
)
"""What tells one cell from another."""

SUMMARISED = (
    *("output_tokens_per_s", "output_tokens_per_s_per_user", "seconds_per_100_tokens"),
    *("ttft_s_p50", "tpot_s_p50", "itl_s_p50", "e2el_s_p50"),
    *("memory_peak_bytes", "power_w_mean", "energy_j_per_output_token"),
)
"""The columns of CELLS of which a summary has the median over the trials and its interval."""


def _with_interval(name: str) -> list[Column]:
    of, number = _OF_CELLS[name], pa.float64()
    return [
        Column(name, number, of.unit, "Median over the trials that are valid, else served"),
        Column(f"{name}_low", number, of.unit, "Lower end of its 95% interval; null of one trial"),
        Column(f"{name}_high", number, of.unit, "Upper end of it"),
    ]


SUMMARY = (
    *SUMMARY_KEYS,
    Column("trials", pa.int32(), "", "Trials of the cell"),
    Column("trials_served", pa.int32(), "", "Those of them with the verdict ok"),
    Column("trials_valid", pa.int32(), "", "Those that may be believed; 0: the figures may not"),
    *(column for name in SUMMARISED for column in _with_interval(name)),
)
"""One row per cell."""

BESIDE = (
    *(_OF_CELLS[name] for name in ("deployment", "model", "quantization", "gpu", "gpu_count")),
    Column("emulated", pa.bool_(), "", "Whether no hardware was measured for it"),
    *(_OF_CELLS[name] for name in ("protocol", "concurrency", "input_len", "output_len")),
    Column("measured_s", pa.float64(), "s", "seconds_per_100_tokens, in time that is not scaled"),
    Column("published_s", pa.float64(), "s", "The published figure, to 0.1 s"),
    Column("ratio", pa.float64(), "", "measured_s / published_s"),
    Column(
        "ratio_low",
        pa.float64(),
        "",
        "The least that the published figure's rounding and the measured one's 95% interval allow",
    ),
    Column("ratio_high", pa.float64(), "", "The most that they allow"),
)
"""One row per cell that was both measured and published."""

FRONTIER = (
    *(_OF_CELLS[name] for name in ("deployment", "engine", "protocol", "output_len", "input_len")),
    Column("max_served", pa.int32(), "requests", "Most requests at once that were served"),
    Column("max_served_is_lower_bound", pa.bool_(), "", "Whether nothing above it was tried"),
    Column(
        "max_within_slo",
        pa.int32(),
        "requests",
        "Most requests at once that keep the limits, as all measured numbers below it do; null "
        "where not even the fewest keep them",
    ),
    Column("max_within_slo_is_lower_bound", pa.bool_(), "", "Whether nothing above it was tried"),
    Column(
        "knee",
        pa.int32(),
        "requests",
        "Requests at once from which on time grows like their number: each further step by at "
        "least 1.8 per doubling; null where the last step does not",
    ),
)
"""One row per deployment, closed-loop load and prompt length."""

_MONEY = "as config/hardware.yaml says"

PLAN = (
    *(_OF_CELLS[name] for name in ("deployment", "gpu", "gpu_count")),
    Column("emulated", pa.bool_(), "", "Whether no hardware was measured for it"),
    *(_OF_CELLS[name] for name in ("protocol", "output_len")),
    Column("prompt_tokens", pa.string(), "tokens", "The prompt lengths that it is made from"),
    Column(
        "max_in_flight",
        pa.int32(),
        "requests",
        "Requests at once that one replica gives the wanted speed, whatever their prompt length",
    ),
    Column("is_lower_bound", pa.bool_(), "", "Whether it could be more: nothing above was tried"),
    Column(
        "users_carried",
        pa.int32(),
        "users",
        "Logged-in users whose requests get the speed with the wanted probability on one replica",
    ),
    Column(
        "users_carried_low",
        pa.int32(),
        "users",
        "The same where all times are at the slow end of their 95% intervals; null of one trial",
    ),
    Column("users_carried_high", pa.int32(), "users", "The same at their fast end"),
    Column(
        "users_at_50pct_slo",
        pa.int32(),
        "users",
        "The most of whom half of the requests get the speed: how near the fall is",
    ),
    Column(
        "users_per_replica",
        pa.int32(),
        "users",
        "Nine tenths of users_carried_low, or of users_carried where that is not known",
    ),
    Column("replicas", pa.int32(), "", "Replicas that carry all users, split evenly among them"),
    Column("gpus", pa.int32(), "", "Their GPUs"),
    Column("in_flight_mean", pa.float64(), "requests", "Requests in flight on all, mean"),
    Column("output_tokens_per_s", pa.float64(), "tokens/s", "Output tokens of all users, mean"),
    Column("purchase", pa.float64(), _MONEY, "Price of all GPUs"),
    Column(
        "purchase_per_token_per_s",
        pa.float64(),
        _MONEY,
        "The same per output token/s that they give at max_in_flight",
    ),
    Column(
        "purchase_per_million_tokens",
        pa.float64(),
        _MONEY,
        "The same spread over the years of use, at output_tokens_per_s all the time",
    ),
    Column("energy_j_per_output_token", pa.float64(), "J/token", "Energy of the GPUs at that load"),
    Column("energy_cost_per_million_tokens", pa.float64(), _MONEY, "What that energy costs"),
    Column("reason", pa.string(), "", "Why nothing can be said; null where something is"),
)
"""One row per deployment and closed-loop load: what the wanted users need."""
