"""From one trial's raw rows to its row in the table of cells. Pure: no file is touched.

Times come in as nanoseconds and go out as seconds. What is not known is None: a mean over no
request, the time per token of a single token, the figure of a cell that was not served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from servegrid import energy
from servegrid.energy import ENGINE_DEVICE, power_of
from servegrid.grid import Load, Trial
from servegrid.verdict import OK

REQUEST_COLUMNS = (
    "wave",
    "scheduled_ns",
    "sent_ns",
    "first_token_ns",
    "token_ns",
    "done_ns",
    "error",
    "completion_tokens",
)
"""The columns of `records.REQUESTS` that `row_of` needs."""

TELEMETRY_COLUMNS = (*energy.COLUMNS, "memory_bytes")
"""The columns of `records.TELEMETRY` that `row_of` needs."""

_Floats = npt.NDArray[np.float64]


def row_of(record: Mapping[str, Any], requests: pa.Table, telemetry: pa.Table) -> dict[str, Any]:
    """One row of `records.CELLS`.

    `requests` and `telemetry` have one row per request and per sample, with at least
    REQUEST_COLUMNS and TELEMETRY_COLUMNS. Latencies and output tokens are those of the requests
    that succeeded; the makespan is that of all of them.
    Raises KeyError where a column or a key of the record is missing.
    """
    trial = Trial.from_spec(record["spec"])
    deployment, load = trial.deployment, trial.load
    served = requests.filter(pc.is_null(requests["error"]))
    makespan, waves = makespan_s(requests)
    ttft = _seconds(served["sent_ns"], served["first_token_ns"])
    e2el = _seconds(served["sent_ns"], last_token_ns(served))
    tokens_per_s = _ratio(_total(served["completion_tokens"]), makespan)
    power = power_of(telemetry)
    ok = record["verdict"] == OK
    return {
        "deployment": deployment.name,
        "model": deployment.model,
        "quantization": deployment.quantization,
        "gpu": deployment.gpu,
        "gpu_count": deployment.gpu_count,
        "engine": record["engine"]["engine"],
        "engine_version": record["engine"].get("version"),
        "time_scale": record["engine"].get("time_scale"),
        "protocol": load.protocol,
        "concurrency": load.concurrency,
        "input_len": load.input_len,
        "output_len": load.output_len,
        "trial": trial.number,
        "verdict": record["verdict"],
        "reason": record["reason"],
        "requests": requests.num_rows,
        "failed_requests": requests.num_rows - served.num_rows,
        "makespan_s": makespan,
        "seconds_per_100_tokens": _per_100_tokens(load, makespan, waves, e2el) if ok else None,
        "ttft_s_mean": _mean(ttft),
        "ttft_s_p50": _median(ttft),
        "tpot_s_mean": _mean(_tpot_s(ttft, e2el, served["completion_tokens"])),
        "e2el_s_mean": _mean(e2el),
        "e2el_s_p50": _median(e2el),
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_user": _ratio(tokens_per_s, load.concurrency),
        "memory_peak_bytes": memory_peak_bytes(telemetry),
        "power_w_mean": power.mean_w,
        "power_disagreement": power.disagreement,
        "energy_j_per_output_token": _ratio(power.mean_w, tokens_per_s),
        "spec_digest": record["spec_digest"],
    }


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


def _per_100_tokens(load: Load, makespan: float | None, waves: int, e2el: _Floats) -> float | None:
    seconds = _ratio(makespan, waves) if load.protocol == "burst" else _mean(e2el)
    return None if seconds is None else seconds / load.output_len * 100


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


def _median(values: _Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else None
