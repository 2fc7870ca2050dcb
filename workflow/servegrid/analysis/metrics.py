"""Computes one trial's row of the table of cells from its raw rows. Pure.

Times come in as nanoseconds and go out as seconds. Unknown values are None: a mean over no request,
the time per output token of a single token, a metric of a cell that was not served.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.analysis import (
    buffering,
    client_error,
    energy,
    reasoning,
    server_metrics,
    stationarity,
)
from servegrid.analysis.energy import Power, gpu_columns, is_engine, mean_power
from servegrid.analysis.slo import DEFAULT_SLO, Slo
from servegrid.analysis.stationarity import Window, find_window
from servegrid.records.columns import CELLS, PERCENTILES
from servegrid.records.parquet import column_or_null
from servegrid.records.verdict import was_served
from servegrid.study.grid import Trial, Workload

REQUEST_COLUMNS = (
    *stationarity.REQUEST_COLUMNS,
    *buffering.REQUEST_COLUMNS,
    "wave",
    "first_token_ns",
    "token_ns",
    "chunk_tokens",
    "completion_tokens",
    *("prompt_tokens", "shared_tokens", "cached_tokens", "chunk_tokens_estimated"),
    *reasoning.REQUEST_COLUMNS,
    *("draft_tokens", "accepted_draft_tokens"),
)
"""The columns of `columns.REQUESTS` that `cell_row` needs."""

TELEMETRY_COLUMNS = (
    *energy.TELEMETRY_COLUMNS,
    *server_metrics.TELEMETRY_COLUMNS,
    "memory_bytes",
)
"""The columns of `columns.TELEMETRY` that `cell_row` needs."""

SERVEGRID_ORIGIN = "servegrid"
"""The `origin` of cells that servegrid measured itself."""

MAX_TOKENS_PER_CHUNK = 1.1
"""The mean tokens per chunk up to which an estimate of the tokens of each chunk is good enough: at
least 90% of the chunks then have exactly one token."""

_Floats = npt.NDArray[np.float64]


def cell_row(
    record: Mapping[str, Any],
    requests: pa.Table,
    telemetry: pa.Table,
    use_all_requests: bool | None = None,
    slo: Slo = DEFAULT_SLO,
) -> dict[str, Any]:
    """One row of `columns.CELLS`, without the columns about validity, drift and efficiency.

    `requests` and `telemetry` have one row per request and per sample, with at least
    REQUEST_COLUMNS and TELEMETRY_COLUMNS. Latencies and output tokens come from the successful
    requests: from all of them for a burst, or if `use_all_requests`; otherwise from those in the
    stationary part. The makespan always covers all requests. Goodput counts the requests that meet
    `slo`. If responses were held back on their way (see `buffering`), what depends on the arrival
    of single tokens is None. Raises KeyError if a column or a key of the record is missing.
    """
    workload = measured_workload(record)
    use_all = not workload.has_stationary_part if use_all_requests is None else use_all_requests
    part = _counted_part(requests, workload, use_all)
    samples = samples_in(telemetry, part.window)
    row = {
        **_identity(record, workload),
        "requests": requests.num_rows,
        "failed_requests": part.failed,
        "makespan_s": part.makespan_s,
        "window_s": part.seconds,
        "requests_in_window": None if part.seconds is None else part.requests.num_rows,
        "in_flight_mean": part.in_flight,
        **_latency_columns(record, workload, part, slo),
        "memory_peak_bytes": memory_peak_bytes(telemetry),
        **_rate_columns(workload, part, mean_power(samples)),
        **gpu_columns(samples),
        **server_metrics.server_columns(record, requests, samples),
        **client_error.client_columns(record),
        "prompt_tokens_mean": _mean(_floats(part.requests["prompt_tokens"])),
        **server_metrics.prefix_columns(record, requests),
        **reasoning.reasoning_columns(part.requests),
        **server_metrics.speculation_columns(record, requests),
    }
    if buffering.held_back(record, requests) is not None:
        row |= _withheld(row, slo)
    return {column.name: row[column.name] for column in CELLS if column.name in row}


@dataclass(frozen=True)
class _Part:
    """The part of a cell that its metrics come from.

    `requests` are the successful ones that count, `tokens` their output tokens in `seconds`: the
    time of the stationary part `window`, or the makespan if all requests count. `failed` and
    `waves` are those of the whole cell. None if it is not known.
    """

    requests: pa.Table
    window: Window | None
    seconds: float | None
    tokens: int | None
    in_flight: float | None
    makespan_s: float | None
    waves: int
    failed: int


def _counted_part(requests: pa.Table, workload: Workload, use_all: bool) -> _Part:
    served = requests.filter(pc.is_null(requests["error"]))
    makespan, waves = makespan_s(requests)
    window = None if use_all else stationary_window(requests, workload)
    return _Part(
        requests=served if use_all else completed_in(served, window),
        window=window,
        seconds=makespan if use_all else None if window is None else window.seconds,
        tokens=_total(served["completion_tokens"]) if use_all else _tokens_in(served, window),
        in_flight=in_flight_mean(requests, window, makespan if use_all else None),
        makespan_s=makespan,
        waves=waves,
        failed=requests.num_rows - served.num_rows,
    )


def _identity(record: Mapping[str, Any], workload: Workload) -> dict[str, Any]:
    """What was measured, where, and how it ended."""
    trial = Trial.from_spec(record["spec"])
    deployment = trial.deployment
    return {
        "deployment": deployment.name,
        "model": deployment.model,
        "quantization": deployment.quantization,
        "gpu": deployment.gpu,
        "gpu_count": deployment.gpu_count,
        "replicas": deployment.replicas,
        "engine": record["engine"]["engine"],
        "engine_version": record["engine"].get("version"),
        "origin": record.get("origin", SERVEGRID_ORIGIN),
        "time_scale": record["engine"].get("time_scale"),
        "allocation": allocation_id(record["environment"]),
        "protocol": workload.protocol,
        "concurrency": workload.concurrency,
        "request_rate": workload.request_rate,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "output_spread": workload.output_spread,
        "output_len_exact": deployment.output_len_exact,
        "prompts": workload.prompts,
        "think_time_s": workload.think_time_s,
        "trial": trial.number,
        "bring_up": trial.bring_up,
        "verdict": record["verdict"],
        "verdict_detail": record["verdict_detail"],
        "verdict_evidence": _as_json(record.get("verdict_evidence")),
        "spec_digest": record["spec_digest"],
        "burstiness": workload.burstiness,
        "rate_fraction": workload.rate_fraction,
        "source": "text" if workload.source is None else workload.source.label,
        "lora": ",".join(deployment.lora) or None,
    }


def _latency_columns(
    record: Mapping[str, Any], workload: Workload, part: _Part, slo: Slo
) -> dict[str, Any]:
    """The latencies of the requests that count, and how many of them meet the SLO."""
    inside = part.requests
    due = inside["scheduled_ns" if workload.is_open_loop else "sent_ns"]
    ttft = _seconds(due, inside["first_token_ns"])
    e2el = _seconds(due, last_token_ns(inside))
    ttfo = _seconds(due, column_or_null(inside, "first_output_token_ns"))
    is_known = knows_itl(inside)
    itl = _itl_s(inside.filter(pa.array(is_known)))[0]
    per_chunk, coalesced = _itl_s(inside)[1:]
    longest = longest_itl_s(inside)
    met = int(_meets(slo, inside, ttft, e2el, longest, time_scale(record)).sum())
    mean_tokens = _mean(_floats(inside["completion_tokens"]))
    is_burst = workload.protocol == "burst"
    response_s = _ratio(part.makespan_s, part.waves) if is_burst else _mean(e2el)
    exact = Trial.from_spec(record["spec"]).deployment.output_len_exact
    is_as_asked = exact and workload.has_fixed_lengths
    per_token_s = _ratio(response_s, workload.output_len if is_as_asked else mean_tokens)
    if not was_served(record["verdict"]):
        per_token_s = None
    asked = None if part.seconds is None else inside.num_rows + part.failed
    return {
        "completion_tokens_mean": mean_tokens,
        "seconds_per_100_tokens": None if per_token_s is None else 100 * per_token_s,
        **_latencies("ttft", ttft),
        **_latencies("ttft_from_sent", _seconds(inside["sent_ns"], inside["first_token_ns"])),
        **_latencies("tpot", _tpot_s(ttft, e2el, streamed_tokens(inside))),
        **_latencies("itl", itl),
        **_latencies("itl_per_chunk", per_chunk),
        "itl_max_s_p50": _median(longest[is_known]),
        **_latencies("e2el", e2el),
        **_latencies("ttfo", ttfo),
        "coalesced_chunk_fraction": coalesced,
        "goodput_requests_per_s": _ratio(met, part.seconds),
        "slo_attainment": _ratio(met, asked),
    }


def _rate_columns(workload: Workload, part: _Part, power: Power) -> dict[str, Any]:
    """Tokens per second, power and energy."""
    tokens_per_s = _ratio(part.tokens, part.seconds)
    # Users who think are not served, so their number says nothing about the speed of one.
    served_at_once = part.in_flight if workload.think_time_s else workload.concurrency
    return {
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_user": _ratio(tokens_per_s, served_at_once),
        "power_w_mean": power.mean_w,
        "energy_needs_s": power.needs_s,
        "power_disagreement": power.disagreement,
        "power_suspect": power.is_suspect,
        "energy_j_per_output_token": _ratio(power.mean_w, tokens_per_s),
    }


def measured_workload(record: Mapping[str, Any]) -> Workload:
    """The workload of a record, with the request rate that was used if it is a sweep's.

    A trial that was not tried has no rate: the rate at saturation was not needed, or is not known.
    """
    workload = Trial.from_spec(record["spec"]).workload
    if workload.rate_fraction is None or "saturation" not in record:
        return workload
    return replace(workload, request_rate=record["saturation"]["request_rate"])


def _withheld(row: Mapping[str, Any], slo: Slo) -> dict[str, None]:
    """Null for every metric that depends on when single tokens arrived."""
    prefixes = ("ttft_", "ttfo_", "tpot_", "itl_") + (
        ("goodput_requests_per_s", "slo_attainment") if slo.needs_arrivals else ()
    )
    return {name: None for name in row if name.startswith(prefixes)}


def stationary_window(requests: pa.Table, workload: Workload) -> Window | None:
    """The stationary part of a closed or an open loop; None if there is none."""
    window = find_window(requests, workload)
    return None if isinstance(window, str) else window


def completed_in(served: pa.Table, window: Window | None) -> pa.Table:
    """The requests that ended in the window; none if there is no window.

    The requests that end in a stationary part are a fair sample of all its requests.
    """
    if window is None:
        return served.slice(0, 0)
    return served.filter(pa.array(window.contains(served["done_ns"].to_numpy())))


def samples_in(telemetry: pa.Table, window: Window | None) -> pa.Table:
    """The samples in the window; all of them if there is no window."""
    if window is None:
        return telemetry
    return telemetry.filter(pa.array(window.contains(telemetry["time_ns"].to_numpy())))


def in_flight_mean(
    requests: pa.Table, window: Window | None, makespan: float | None
) -> float | None:
    """The mean number of requests in flight, over the window or else over the makespan in s.

    A request is in flight from being sent to its end. None if there is neither window nor makespan.
    """
    known = requests.filter(
        pc.and_(pc.is_valid(requests["sent_ns"]), pc.is_valid(requests["done_ns"]))
    )
    sent, done = known["sent_ns"].to_numpy(), known["done_ns"].to_numpy()
    if window is not None:
        sent, done = (np.clip(times, window.start_ns, window.end_ns) for times in (sent, done))
        return float((done - sent).sum() / 1e9 / window.seconds)
    return _ratio(float((done - sent).sum() / 1e9), makespan)


def _as_json(evidence: Mapping[str, Any] | None) -> str | None:
    return json.dumps(evidence, sort_keys=True, ensure_ascii=False) if evidence else None


def allocation_id(environment: Mapping[str, Any]) -> str | None:
    """Identifies one bring-up: the name of its allocation and the time of its start.

    None for a trial that was decided without an allocation.
    """
    if environment["allocation"] is None:
        return None
    return f"{environment['allocation']} {environment['started']}"


def makespan_s(requests: pa.Table) -> tuple[float | None, int]:
    """The makespan in seconds and the number of waves.

    The makespan is the time from the first due request to the last end, summed over the waves. It
    is None if there are no requests, or if the end of one is unknown.
    """
    waves = requests.group_by("wave").aggregate([("scheduled_ns", "min"), ("done_ns", "max")])
    if requests.num_rows == 0 or requests["done_ns"].null_count:
        return None, waves.num_rows
    spans = _seconds(waves["scheduled_ns_min"], waves["done_ns_max"])
    return float(spans.sum()), waves.num_rows


def last_token_ns(requests: pa.Table) -> pa.Array:
    """The time of each request's last chunk with tokens, in ns; null if there was none."""
    stamps = requests["token_ns"].combine_chunks()
    offsets = stamps.offsets.to_numpy()
    empty = offsets[1:] == offsets[:-1]
    if empty.all():
        return pa.nulls(len(stamps), pa.int64())
    last = stamps.values.to_numpy()[np.where(empty, offsets[0], offsets[1:] - 1)]
    return pa.array(last, mask=empty | stamps.is_null().to_numpy(zero_copy_only=False))


def memory_peak_bytes(telemetry: pa.Table) -> int | None:
    """The largest sum over the GPUs at one time; without GPUs, over the engine's nodes.

    The devices are sampled one after another. A sample counts until the next sample of its device,
    and the first one also counts for the time before it. None if a device has no sample with its
    memory, because the sum would be too small.
    """
    devices = set(telemetry["device"].to_pylist())
    times = np.unique(telemetry["time_ns"].to_numpy())
    total = np.zeros(len(times), dtype=np.int64)
    gpus = {device for device in devices if not is_engine(device)}
    if not devices:
        return None
    for device in sorted(gpus or devices):
        known = pc.and_(
            pc.equal(telemetry["device"], device), pc.is_valid(telemetry["memory_bytes"])
        )
        samples = telemetry.filter(known).sort_by("time_ns")
        if samples.num_rows == 0:
            return None
        latest = np.searchsorted(samples["time_ns"].to_numpy(), times, side="right") - 1
        total += samples["memory_bytes"].to_numpy()[np.maximum(latest, 0)]
    return int(total.max())


def time_scale(record: Mapping[str, Any]) -> float:
    """By which factor the times of a record differ from real time; 1 if measured."""
    return record["engine"].get("time_scale") or 1.0


def requests_met(
    record: Mapping[str, Any], requests: pa.Table, slos: Sequence[Slo]
) -> list[npt.NDArray[np.bool_]]:
    """For each of `slos`, which of the served `requests` meet it, in their order.

    Latencies of an open loop start when a request is due. Those of an emulated engine are taken in
    real time.
    """
    workload = Trial.from_spec(record["spec"]).workload
    due = requests["scheduled_ns" if workload.is_open_loop else "sent_ns"]
    ttft = _seconds(due, requests["first_token_ns"])
    e2el = _seconds(due, last_token_ns(requests))
    longest, scale = longest_itl_s(requests), time_scale(record)
    return [_meets(slo, requests, ttft, e2el, longest, scale) for slo in slos]


def _meets(
    slo: Slo, requests: pa.Table, ttft: _Floats, e2el: _Floats, longest: _Floats, scale: float
) -> npt.NDArray[np.bool_]:
    """Which of the served requests meet the SLO, in real time if they were emulated."""
    tokens = streamed_tokens(requests)
    met: npt.NDArray[np.bool_] = slo.is_met(ttft / scale, e2el / scale, tokens, longest / scale)
    return met


def knows_itl(requests: pa.Table) -> npt.NDArray[np.bool_]:
    """For which requests it is known how many tokens each chunk has, so that itl is known too.

    A server that reports no usage per chunk may still send several tokens per chunk, for example
    with speculative decoding. Their total is known, but not which chunk has how many.
    """
    chunks = pc.list_value_length(requests["token_ns"]).to_numpy()
    estimated = column_or_null(requests, "chunk_tokens_estimated")
    is_estimated = pc.fill_null(estimated.cast(pa.bool_()), False).to_numpy()
    tokens = _floats(requests["completion_tokens"])
    known: npt.NDArray[np.bool_] = ~(is_estimated & (tokens > MAX_TOKENS_PER_CHUNK * chunks))
    return known


def longest_itl_s(requests: pa.Table) -> _Floats:
    """The longest inter-token latency of each request in s; NaN if it has only one chunk.

    As for `itl`, the time before a chunk with several tokens is divided among them. If it is not
    known how many these are, all of it counts: the user has seen this pause.
    """
    stamps = requests["token_ns"].combine_chunks()
    longest = np.full(len(stamps), np.nan)
    times = stamps.flatten().to_numpy()
    counts = pc.fill_null(pc.list_value_length(stamps), 0).to_numpy()
    several = counts > 1
    if not several.any():
        return longest
    tokens = requests["chunk_tokens"].combine_chunks().flatten().to_numpy()
    tokens = np.where(np.repeat(knows_itl(requests), counts), tokens, 1)
    starts = np.cumsum(counts) - counts
    gaps = np.diff(times, prepend=times[0]) / np.maximum(tokens, 1) / 1e9
    gaps[starts[counts > 0]] = -math.inf
    longest[several] = np.maximum.reduceat(gaps, starts[counts > 0])[several[counts > 0]]
    return longest


def _tokens_in(served: pa.Table, window: Window | None) -> int | None:
    """The number of tokens that arrived in the window."""
    if window is None:
        return None
    arrived = window.contains(served["token_ns"].combine_chunks().flatten().to_numpy())
    return int(served["chunk_tokens"].combine_chunks().flatten().to_numpy()[arrived].sum())


def _itl_s(requests: pa.Table) -> tuple[_Floats, _Floats, float | None]:
    """Inter-token latencies and times between chunks in s, and the fraction of chunks that were
    read with the previous one.

    A chunk with several tokens is sent when all of them are ready, so the time since the previous
    chunk is divided evenly among them.
    """
    stamps = requests["token_ns"].combine_chunks()
    times = stamps.flatten().to_numpy()
    tokens = requests["chunk_tokens"].combine_chunks().flatten().to_numpy()
    if not times.size:
        return np.empty(0), np.empty(0), None
    first = np.zeros(times.size, dtype=bool)
    starts = stamps.offsets.to_numpy()[:-1] - stamps.offsets[0].as_py()
    first[starts[starts < times.size]] = True
    gaps = np.diff(times, prepend=times[0])[~first]
    counts = tokens[~first]
    seconds = gaps / 1e9
    # A client may report a chunk without tokens: it has no part in this.
    per_token = np.repeat(seconds, counts) / np.repeat(counts, counts)
    return per_token, seconds, float((gaps == 0).sum() / times.size)


def _latencies(name: str, values: _Floats) -> dict[str, float | None]:
    """Mean and percentiles. A percentile is None if there are too few samples for it."""
    known = values[~np.isnan(values)]
    # All percentiles in one call, because sorting the values is most of the work.
    found = np.percentile(known, list(PERCENTILES)) if known.size else [math.nan] * len(PERCENTILES)
    return {f"{name}_s_mean": _mean(known)} | {
        f"{name}_s_p{percentile}": float(value) if known.size >= minimum else None
        for (percentile, minimum), value in zip(PERCENTILES.items(), found, strict=True)
    }


def streamed_tokens(requests: pa.Table) -> _Floats:
    """The output tokens of each request that arrived: all but those of a hidden reasoning."""
    return _floats(requests["completion_tokens"]) - reasoning.hidden_tokens(requests)


def _tpot_s(ttft: _Floats, e2el: _Floats, tokens: _Floats) -> _Floats:
    gaps = tokens - 1
    tpot: _Floats = (e2el - ttft) / np.where(gaps > 0, gaps, np.nan)
    return tpot


def _seconds(start: Any, end: Any) -> _Floats:
    """`end` - `start`; NaN if one is null. The difference is of integers, which lose no ns."""
    return _floats(pc.subtract(end, start)) / 1e9


def _floats(column: Any) -> _Floats:
    """An integer column as floats, null as NaN."""
    values: _Floats = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _total(column: pa.ChunkedArray) -> int | None:
    total: int | None = pc.sum(column, skip_nulls=False).as_py()
    return total


def _ratio(value: float | None, divisor: float | None) -> float | None:
    return None if value is None or not divisor else value / divisor


def _median(values: _Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else None


def _mean(values: _Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
