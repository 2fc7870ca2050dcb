"""From one trial's raw rows to its row in the table of cells. Pure: no file is touched.

Times come in as nanoseconds and go out as seconds. What is not known is None: a mean over no
request, the time per token of a single token, the figure of a cell that was not served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.analysis import client_error, energy, server_metrics, stationarity
from servegrid.analysis.energy import ENGINE_DEVICE, power_of, state_of
from servegrid.analysis.stationarity import Window, window_of
from servegrid.records.columns import PERCENTILES
from servegrid.records.verdict import OK
from servegrid.study.grid import Trial, Workload

REQUEST_COLUMNS = (
    *stationarity.COLUMNS,
    "wave",
    "first_token_ns",
    "token_ns",
    "chunk_tokens",
    "completion_tokens",
)
"""The columns of `columns.REQUESTS` that `row_of` needs."""

TELEMETRY_COLUMNS = (*energy.COLUMNS, *server_metrics.TELEMETRY_COLUMNS, "memory_bytes")
"""The columns of `columns.TELEMETRY` that `row_of` needs."""

OWN = "servegrid"
"""The origin of what servegrid has measured itself."""

_Floats = npt.NDArray[np.float64]


def row_of(
    record: Mapping[str, Any],
    requests: pa.Table,
    telemetry: pa.Table,
    whole: bool | None = None,
) -> dict[str, Any]:
    """One row of `columns.CELLS`.

    `requests` and `telemetry` have one row per request and per sample, with at least
    REQUEST_COLUMNS and TELEMETRY_COLUMNS. Latencies and output tokens are those of the requests
    that succeeded, of a burst (or if `whole`) all of them, else those in its stationary part; the
    makespan is that of all. Raises KeyError where a column or a key of the record is missing.
    """
    trial = Trial.from_spec(record["spec"])
    deployment, workload = trial.deployment, trial.workload
    served = requests.filter(pc.is_null(requests["error"]))
    makespan, waves = makespan_s(requests)
    whole = workload.protocol == "burst" if whole is None else whole
    window = None if whole else stationary(requests, workload)
    inside = served if whole else within(served, window)
    window_s = makespan if whole else None if window is None else window.seconds
    due = inside["scheduled_ns" if workload.protocol == "poisson" else "sent_ns"]
    ttft = _seconds(due, inside["first_token_ns"])
    e2el = _seconds(due, last_token_ns(inside))
    itl, shared = _itl_s(inside)
    tokens = _total(served["completion_tokens"]) if whole else _tokens_in(served, window)
    tokens_per_s = _ratio(tokens, window_s)
    samples = during(telemetry, window)
    power = power_of(samples)
    ok = record["verdict"] == OK
    return {
        "deployment": deployment.name,
        "model": deployment.model,
        "quantization": deployment.quantization,
        "gpu": deployment.gpu,
        "gpu_count": deployment.gpu_count,
        "engine": record["engine"]["engine"],
        "engine_version": record["engine"].get("version"),
        "origin": record.get("origin", OWN),
        "time_scale": record["engine"].get("time_scale"),
        "allocation": allocation_of(record["environment"]),
        "protocol": workload.protocol,
        "concurrency": workload.concurrency,
        "request_rate": workload.request_rate,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "output_spread": workload.output_spread,
        "prompts": workload.prompts,
        "think_time_s": workload.think_time_s,
        "trial": trial.number,
        "verdict": record["verdict"],
        "verdict_detail": record["verdict_detail"],
        "requests": requests.num_rows,
        "failed_requests": requests.num_rows - served.num_rows,
        "makespan_s": makespan,
        "seconds_per_100_tokens": _per_100_tokens(workload, makespan, waves, e2el) if ok else None,
        "window_s": window_s,
        "requests_in_window": None if window_s is None else inside.num_rows,
        "in_flight_mean": in_flight_mean(requests, window, makespan if whole else None),
        **_latencies("ttft", ttft),
        **_latencies("tpot", _tpot_s(ttft, e2el, inside["completion_tokens"])),
        **_latencies("itl", itl),
        **_latencies("e2el", e2el),
        "coalesced_chunk_fraction": shared,
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_user": _ratio(tokens_per_s, workload.concurrency),
        "memory_peak_bytes": memory_peak_bytes(telemetry),
        "power_w_mean": power.mean_w,
        "power_disagreement": power.disagreement,
        "power_suspect": power.is_suspect,
        "energy_j_per_output_token": _ratio(power.mean_w, tokens_per_s),
        **state_of(samples),
        **server_metrics.columns_of(record, requests, samples),
        **client_error.columns_of(record),
        "spec_digest": record["spec_digest"],
    }


def stationary(requests: pa.Table, workload: Workload) -> Window | None:
    """The stationary part of a steady or poisson load; None where there is none."""
    window = window_of(requests, workload)
    return None if isinstance(window, str) else window


def within(served: pa.Table, window: Window | None) -> pa.Table:
    """The requests that ended in the window; none without one.

    Those that end in a stretch of a stationary load are a fair sample of all its requests.
    """
    if window is None:
        return served.slice(0, 0)
    return served.filter(pa.array(window.has(served["done_ns"].to_numpy())))


def during(telemetry: pa.Table, window: Window | None) -> pa.Table:
    """The samples of the window; all of them without one."""
    if window is None:
        return telemetry
    return telemetry.filter(pa.array(window.has(telemetry["time_ns"].to_numpy())))


def in_flight_mean(
    requests: pa.Table, window: Window | None, makespan: float | None
) -> float | None:
    """Requests in flight, sent and not ended, as a mean over the window or else the makespan.

    None where neither is known.
    """
    known = requests.filter(
        pc.and_(pc.is_valid(requests["sent_ns"]), pc.is_valid(requests["done_ns"]))
    )
    sent, done = known["sent_ns"].to_numpy(), known["done_ns"].to_numpy()
    if window is not None:
        sent, done = (np.clip(each, window.start_ns, window.end_ns) for each in (sent, done))
        return float((done - sent).sum() / 1e9 / window.seconds)
    return _ratio(float((done - sent).sum() / 1e9), makespan)


def allocation_of(environment: Mapping[str, Any]) -> str:
    """What tells one bring-up from another: the allocation's name and when it was up."""
    return f"{environment['allocation']} {environment['started']}"


def makespan_s(requests: pa.Table) -> tuple[float | None, int]:
    """Seconds from the first request being due to the last one's end, summed over the waves.

    Also the number of waves. The time is None without requests, or where the end of one is
    not known.
    """
    waves = requests.group_by("wave").aggregate([("scheduled_ns", "min"), ("done_ns", "max")])
    if requests.num_rows == 0 or requests["done_ns"].null_count:
        return None, waves.num_rows
    spans = _seconds(waves["scheduled_ns_min"], waves["done_ns_max"])
    return float(spans.sum()), waves.num_rows


def last_token_ns(requests: pa.Table) -> pa.Array:
    """When each request's last chunk with tokens arrived; null where none did."""
    stamps = requests["token_ns"].combine_chunks()
    offsets = stamps.offsets.to_numpy()
    empty = offsets[1:] == offsets[:-1]
    if empty.all():
        return pa.nulls(len(stamps), pa.int64())
    last = stamps.values.to_numpy()[np.where(empty, offsets[0], offsets[1:] - 1)]
    return pa.array(last, mask=empty | stamps.is_null().to_numpy(zero_copy_only=False))


def memory_peak_bytes(telemetry: pa.Table) -> int | None:
    """The largest sum over the GPUs at one time, or the engine's largest where no GPU is known.

    The devices are sampled one after another: a sample stands for its device until that
    device's next one, and the first also for the time before. None where a device has no
    sample with its memory, as the sum would then be too small.
    """
    devices = set(telemetry["device"].to_pylist())
    times = np.unique(telemetry["time_ns"].to_numpy())
    total = np.zeros(len(times), dtype=np.int64)
    for device in sorted(devices - {ENGINE_DEVICE}) or [ENGINE_DEVICE]:
        known = pc.and_(
            pc.equal(telemetry["device"], device), pc.is_valid(telemetry["memory_bytes"])
        )
        samples = telemetry.filter(known).sort_by("time_ns")
        if samples.num_rows == 0:
            return None
        latest = np.searchsorted(samples["time_ns"].to_numpy(), times, side="right") - 1
        total += samples["memory_bytes"].to_numpy()[np.maximum(latest, 0)]
    return int(total.max())


def _per_100_tokens(
    workload: Workload, makespan: float | None, waves: int, e2el: _Floats
) -> float | None:
    seconds = _ratio(makespan, waves) if workload.protocol == "burst" else _mean(e2el)
    return None if seconds is None else seconds / workload.output_len * 100


def _tokens_in(served: pa.Table, window: Window | None) -> int | None:
    """The tokens that arrived in the window."""
    if window is None:
        return None
    arrived = window.has(served["token_ns"].combine_chunks().flatten().to_numpy())
    return int(served["chunk_tokens"].combine_chunks().flatten().to_numpy()[arrived].sum())


def _itl_s(requests: pa.Table) -> tuple[_Floats, float | None]:
    """Seconds between tokens, and the share of chunks that were read with the one before.

    A chunk of several tokens came once all of them were there: the time since the one before is
    shared evenly among them.
    """
    stamps = requests["token_ns"].combine_chunks()
    times = stamps.flatten().to_numpy()
    tokens = requests["chunk_tokens"].combine_chunks().flatten().to_numpy()
    if not times.size:
        return np.empty(0), None
    first = np.zeros(times.size, dtype=bool)
    starts = stamps.offsets.to_numpy()[:-1] - stamps.offsets[0].as_py()
    first[starts[starts < times.size]] = True
    gaps = np.diff(times, prepend=times[0])[~first]
    counts = tokens[~first]
    return np.repeat(gaps / 1e9 / counts, counts), float((gaps == 0).sum() / times.size)


def _latencies(name: str, values: _Floats) -> dict[str, float | None]:
    """Mean and percentiles, None where there are fewer samples than one needs."""
    known = values[~np.isnan(values)]
    # All at once: sorting the values is most of the work.
    found = np.percentile(known, list(PERCENTILES)) if known.size else [math.nan] * len(PERCENTILES)
    return {f"{name}_s_mean": _mean(known)} | {
        f"{name}_s_p{each}": float(value) if known.size >= least else None
        for (each, least), value in zip(PERCENTILES.items(), found, strict=True)
    }


def _tpot_s(ttft: _Floats, e2el: _Floats, tokens: pa.ChunkedArray) -> _Floats:
    gaps = _floats(tokens) - 1
    tpot: _Floats = (e2el - ttft) / np.where(gaps > 0, gaps, np.nan)
    return tpot


def _seconds(start: Any, end: Any) -> _Floats:
    """`end` - `start`, NaN where one is null. Subtracted as integers: floats hold no such ns."""
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


def _mean(values: _Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
