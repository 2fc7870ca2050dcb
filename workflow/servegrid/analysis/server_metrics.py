"""What the server says of a load, beside what its client saw. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.telemetry.counters import (
    E2EL,
    ITL,
    PREEMPTIONS,
    PREFIX_HITS,
    QUEUE,
    TTFT,
    Counters,
    Names,
    increase,
)

REQUEST_COLUMNS = ("sent_ns", "first_token_ns")
"""The columns of `columns.REQUESTS` that `columns_of` needs."""

TELEMETRY_COLUMNS = ("running", "waiting", "kv_cache_usage")
"""The columns of `columns.TELEMETRY` that `columns_of` needs."""


def columns_of(
    record: Mapping[str, Any], requests: pa.Table, telemetry: pa.Table
) -> dict[str, float | None]:
    """The columns of `columns.CELLS` that come from the server.

    `requests` are all requests of the load, for the server's histograms know no window, with at
    least REQUEST_COLUMNS; `telemetry` the samples of the time that the cell's figures are of,
    with at least TELEMETRY_COLUMNS. Times are in seconds.
    """
    before, after = record["metrics_before"], record["metrics_after"]
    ttft, answered = _mean(before, after, TTFT)
    return {
        "server_ttft_s_mean": ttft,
        "server_itl_s_mean": _mean(before, after, ITL)[0],
        "server_queue_s_mean": _mean(before, after, QUEUE)[0],
        "server_e2el_s_mean": _mean(before, after, E2EL)[0],
        "ttft_client_overhead_s": _beyond(requests, ttft, answered),
        "running_mean": pc.mean(telemetry["running"]).as_py(),
        "waiting_mean": pc.mean(telemetry["waiting"]).as_py(),
        "waiting_max": pc.max(telemetry["waiting"]).as_py(),
        "kv_cache_usage_max": pc.max(telemetry["kv_cache_usage"]).as_py(),
        "preemptions": increase(before, after, PREEMPTIONS),
        "prefix_hit_tokens": increase(before, after, PREFIX_HITS),
    }


def _mean(before: Counters, after: Counters, names: Names) -> tuple[float | None, float | None]:
    """Mean and number of a histogram's values since `before`."""
    total = increase(before, after, tuple(f"{name}_sum" for name in names))
    count = increase(before, after, tuple(f"{name}_count" for name in names))
    return (None if total is None or not count else total / count), count


def _beyond(requests: pa.Table, ttft: float | None, answered: float | None) -> float | None:
    """How much later the client had the first tokens; None where it saw others than the server."""
    waits = pc.drop_null(pc.subtract(requests["first_token_ns"], requests["sent_ns"])).to_numpy()
    if ttft is None or answered != len(waits):
        return None
    return float(np.mean(waits) / 1e9 - ttft)
