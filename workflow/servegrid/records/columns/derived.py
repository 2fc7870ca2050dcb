"""The columns of the tables that are computed from the table of cells."""

from __future__ import annotations

import pyarrow as pa

from servegrid.records.columns.cells import CELLS
from servegrid.records.columns.column import Column

_CELL_COLUMNS = {column.name: column for column in CELLS}


def _from_cells(*names: str) -> tuple[Column, ...]:
    """The columns of CELLS with these names."""
    return tuple(_CELL_COLUMNS[name] for name in names)


_EMULATED = Column("emulated", pa.bool_(), "", "True if the engine is emulated")

SUMMARY_KEYS = _from_cells(
    *("deployment", "model", "quantization", "gpu", "gpu_count", "replicas", "engine"),
    "time_scale",
    *("protocol", "concurrency", "request_rate", "input_len", "output_len", "output_len_exact"),
)
"""The columns that identify a cell."""

SUMMARY_METRICS = (
    *("output_tokens_per_s", "output_tokens_per_s_per_user", "seconds_per_100_tokens"),
    *("completion_tokens_mean", "in_flight_mean"),
    *("ttft_s_p50", "tpot_s_p50", "itl_s_p50", "itl_max_s_p50", "e2el_s_p50"),
    *("goodput_requests_per_s", "slo_attainment"),
    *("memory_peak_bytes", "power_w_mean", "energy_j_per_output_token"),
)
"""The columns of CELLS that a summary contains as median over the trials with an interval."""


def _with_interval(name: str) -> list[Column]:
    unit, number = _CELL_COLUMNS[name].unit, pa.float64()
    interval = (
        "end of the 95% interval over the bring-ups, or over the trials of a single one; null for "
        "a single trial"
    )
    return [
        Column(
            name,
            number,
            unit,
            "Median over the valid trials (if none, over the served ones); with several bring-ups, "
            "the median of their medians",
        ),
        Column(f"{name}_low", number, unit, f"Lower {interval}"),
        Column(f"{name}_high", number, unit, f"Upper {interval}"),
    ]


SUMMARY = (
    *SUMMARY_KEYS,
    Column("trials", pa.int32(), "", "Trials of the cell that were run; 0 if all are `not_run`"),
    Column("trials_served", pa.int32(), "", "Trials that were served"),
    Column("trials_valid", pa.int32(), "", "Valid trials; if 0, the values are not valid"),
    Column(
        "bring_ups",
        pa.int32(),
        "",
        "Bring-ups whose trials the values come from. With several, an interval covers what "
        "differs between bring-ups; with 1, only what differs within it",
    ),
    *(column for name in SUMMARY_METRICS for column in _with_interval(name)),
)
"""One row per cell."""

SATURATION = (
    *_from_cells("deployment", "protocol", "input_len", "output_len"),
    Column(
        "rate_followed",
        pa.float64(),
        "requests/s",
        "Largest measured rate with which the server kept up, as with all lower ones: "
        "requests_per_s was at least 95% of offered_requests_per_s; null if there is none. Rates "
        "with fewer than 20 requests do not count",
    ),
    Column(
        "rate_not_followed",
        pa.float64(),
        "requests/s",
        "The next higher measured rate. Saturation lies below it; null if no higher rate was "
        "measured",
    ),
    Column(
        "highest_requests_per_s",
        pa.float64(),
        "requests/s",
        "Highest requests_per_s of these cells",
    ),
)
"""One row per deployment, open loop, prompt and output length."""

_SHARE_END = "end of the 95% interval of slo_attainment: Wilson's, with the number of requests "
_GOODPUT_END = "end of the 95% interval of goodput_requests_per_s over bring-ups or trials"

SLO = (
    *SUMMARY_KEYS,
    Column("slo_class", pa.string(), "", "Class of users; `all` if the study has no classes"),
    Column("slo", pa.string(), "", "The limits of the class"),
    Column("trials", pa.int32(), "", "Trials that the values come from: the valid ones, else all"),
    Column("valid", pa.bool_(), "", "True if these trials are valid"),
    Column(
        "whole_run",
        pa.bool_(),
        "",
        "True if a trial has no stationary part. Then all its requests count, over the time from "
        "when the first request was due to the end of the last one, as in `vllm bench`; if "
        "requests arrive faster than the server can answer, the values depend on the length of "
        "the run",
    ),
    Column("requests", pa.int32(), "requests", "Requests that ended in the window, or failed"),
    Column("requests_met", pa.int32(), "requests", "Of these, requests that met the SLO"),
    Column(
        "slo_attainment",
        pa.float64(),
        "0 to 1",
        "requests_met / requests, over all trials. A failed request misses the SLO",
    ),
    Column(
        "slo_attainment_low",
        pa.float64(),
        "0 to 1",
        f"Lower {_SHARE_END}reduced by the design effect (docs/statistics.md)",
    ),
    Column(
        "slo_attainment_high", pa.float64(), "0 to 1", f"Upper {_SHARE_END}reduced in the same way"
    ),
    Column(
        "goodput_requests_per_s",
        pa.float64(),
        "requests/s",
        "Requests that met the SLO / time of the window; median over the trials (of the bring-ups' "
        "medians, if there are several). `request_goodput` of `vllm bench`, goodput of DistServe",
    ),
    Column("goodput_requests_per_s_low", pa.float64(), "requests/s", f"Lower {_GOODPUT_END}"),
    Column("goodput_requests_per_s_high", pa.float64(), "requests/s", f"Upper {_GOODPUT_END}"),
    Column(
        "requests_per_s",
        pa.float64(),
        "requests/s",
        "Requests that were answered in the window / its time: the throughput in requests; median "
        "over the trials (of the bring-ups' medians, if there are several)",
    ),
    Column(
        "offered_requests_per_s",
        pa.float64(),
        "requests/s",
        "Requests that were due in the window / its time; with whole_run, all requests / the time "
        "from the first due one to the last. It varies by chance around request_rate; median as "
        "for requests_per_s",
    ),
    Column("reason", pa.string(), "", "Why there are no values; null if there are"),
)
"""One row per cell and SLO class."""

PUBLISHED_COMPARISON = (
    *_from_cells("deployment", "model", "quantization", "gpu", "gpu_count"),
    _EMULATED,
    *_from_cells("protocol", "concurrency", "input_len", "output_len"),
    Column(
        "measured_s",
        pa.float64(),
        "s",
        "seconds_per_100_tokens of `summary`, divided by time_scale if emulated",
    ),
    Column("published_s", pa.float64(), "s", "Published seconds_per_100_tokens"),
    Column("ratio", pa.float64(), "", "measured_s / published_s"),
    Column(
        "ratio_low",
        pa.float64(),
        "",
        "Lowest ratio within the rounding of published_s and the 95% interval of measured_s; "
        "within the rounding alone if there is no interval, as with one trial",
    ),
    Column("ratio_high", pa.float64(), "", "Highest ratio within the same limits"),
)
"""One row per cell that was both measured and published."""

FRONTIER = (
    *_from_cells("deployment", "engine", "protocol", "output_len", "input_len"),
    Column("max_served", pa.int32(), "requests", "Highest concurrency that was served"),
    Column(
        "max_served_is_lower_bound",
        pa.bool_(),
        "",
        "True if it could be higher: no higher concurrency was measured",
    ),
    Column(
        "max_within_slo",
        pa.int32(),
        "requests",
        "Highest number of requests in flight that meets the SLO, interpolated between measured "
        "loads; null if the lowest load does not meet it, or if it is unknown",
    ),
    Column("reason", pa.string(), "", "Why max_within_slo is unknown; null if it is known"),
    Column(
        "max_within_slo_low",
        pa.int32(),
        "requests",
        "max_within_slo with all times at the slow end of their 95% intervals; null if an interval "
        "is unknown",
    ),
    Column(
        "max_within_slo_high",
        pa.int32(),
        "requests",
        "max_within_slo with all times at the fast end of their 95% intervals; null if an interval "
        "is unknown",
    ),
    Column(
        "max_within_slo_is_lower_bound",
        pa.bool_(),
        "",
        "True if it could be higher: no higher concurrency was measured",
    ),
    Column(
        "n_half",
        pa.float64(),
        "requests",
        "Hockney's n½ = a / b of the line time = a + b × requests in flight: there, the throughput "
        "is half of its limit; null if no line with a > 0 and b > 0 fits",
    ),
    Column("n_half_low", pa.float64(), "requests", "Lower end of the 95% interval of n_half"),
    Column(
        "n_half_high",
        pa.float64(),
        "requests",
        "Upper end of the 95% interval of n_half; infinite if the slope may be 0",
    ),
    Column(
        "linear_fit_residual",
        pa.float64(),
        "",
        "Largest relative difference between a measured time and the line; the line fits up to 0.1",
    ),
)
"""One row per deployment, protocol (burst or closed_loop), output length and prompt length."""

_MONEY = "currency of config/hardware.yaml"

CAPACITY_PLAN = (
    *_from_cells("deployment", "gpu", "gpu_count"),
    _EMULATED,
    *_from_cells("protocol", "output_len", "output_len_exact"),
    Column("prompt_tokens", pa.string(), "tokens", "Range of the prompt lengths in the plan"),
    Column(
        "max_in_flight",
        pa.int32(),
        "requests",
        "Highest number of requests in flight on one replica at which requests of every prompt "
        "length meet the SLO",
    ),
    Column(
        "max_in_flight_is_lower_bound",
        pa.bool_(),
        "",
        "True if it could be higher: no higher concurrency was measured",
    ),
    Column(
        "users_carried",
        pa.int32(),
        "users",
        "Highest number of logged-in users on one replica at which the fraction "
        "`slo_attainment` of the requests meets the SLO",
    ),
    Column(
        "users_carried_low",
        pa.int32(),
        "users",
        "users_carried with all times at the slow end of their 95% intervals; null if an interval "
        "is unknown",
    ),
    Column(
        "users_carried_high",
        pa.int32(),
        "users",
        "users_carried with all times at the fast end of their 95% intervals; null if an interval "
        "is unknown",
    ),
    Column(
        "users_at_50pct_slo",
        pa.int32(),
        "users",
        "Highest number of users at which 50% of the requests meet the SLO",
    ),
    Column(
        "users_per_replica",
        pa.int32(),
        "users",
        "Users that the plan puts on one replica: 90% of users_carried_low, or of users_carried "
        "if that is null; 85% with prompts of several lengths",
    ),
    Column(
        "replicas",
        pa.int32(),
        "",
        "Copies of the whole deployment for all users, who are split evenly. If the deployment "
        "itself has several replicas, each copy has as many",
    ),
    Column("gpus", pa.int32(), "", "GPUs of all copies of the deployment"),
    Column("in_flight_mean", pa.float64(), "requests", "Mean requests in flight on all replicas"),
    Column("output_tokens_per_s", pa.float64(), "tokens/s", "Mean output tokens/s of all users"),
    Column("purchase", pa.float64(), _MONEY, "Price of all GPUs"),
    Column(
        "purchase_per_token_per_s",
        pa.float64(),
        _MONEY,
        "purchase / output tokens/s of all replicas with max_in_flight requests each",
    ),
    Column(
        "purchase_per_million_tokens",
        pa.float64(),
        _MONEY,
        "purchase / millions of output tokens in `years_in_use`, at `load_factor` × "
        "output_tokens_per_s on average",
    ),
    Column(
        "purchase_per_million_tokens_at_peak",
        pa.float64(),
        _MONEY,
        "The same, as if the busiest time lasted all week",
    ),
    Column(
        "energy_j_per_output_token",
        pa.float64(),
        "J/token",
        "Energy of the GPUs per output token, at in_flight_mean",
    ),
    Column(
        "energy_cost_per_million_tokens",
        pa.float64(),
        _MONEY,
        "Price of the energy for a million output tokens",
    ),
    Column(
        "users_logged_in",
        pa.int32(),
        "users",
        "Users at the busiest time. With a trace, modelled: requests/s × (think time + "
        "response_s_mean)",
    ),
    Column(
        "response_s_mean",
        pa.float64(),
        "s",
        "Mean response time at the busiest time: modelled from measured times",
    ),
    Column(
        "requests_per_s_carried",
        pa.float64(),
        "requests/s",
        "Highest request rate on one of the replicas at which the fraction `slo_attainment` of the "
        "requests meets the SLO; only with a trace in `users_from`. users_carried and the other "
        "numbers of users then follow by Little's law",
    ),
    Column(
        "requests_per_s_carried_low",
        pa.float64(),
        "requests/s",
        "requests_per_s_carried with all times at the slow end of their 95% intervals",
    ),
    Column(
        "requests_per_s_per_replica",
        pa.float64(),
        "requests/s",
        "Request rate that the plan puts on one replica at most: the same share of the rate that "
        "it carries as users_per_replica is of users",
    ),
    Column(
        "prompt_tokens_mean",
        pa.float64(),
        "tokens",
        "Mean prompt length in the plan, of the measured lengths that stand for those of "
        "`users_from`",
    ),
    Column(
        "requests_not_covered",
        pa.float64(),
        "",
        "Share of the requests of `users_from` whose prompts are longer than the longest measured "
        "one. They load the server like this one, and count as if they missed the SLO",
    ),
    Column(
        "prompt_tokens_not_covered",
        pa.float64(),
        "",
        "Share of the prompt tokens of `users_from` beyond the longest measured prompt",
    ),
    Column("reason", pa.string(), "", "Why there is no plan; null if there is one"),
    Column(
        "slo_class",
        pa.string(),
        "",
        "SLO class of all users in this row; `all` if the study has no classes",
    ),
)
"""One row per deployment, protocol (burst or closed_loop) and output length."""
