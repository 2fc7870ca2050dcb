"""How hard a workload was for the server, by the server's own metrics. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from servegrid.telemetry.counters import E2EL, PREEMPTIONS, QUEUE, Counters, Names, increase


def measure_strain(
    before: Counters, after: Counters, samples: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """The numbers that decide between `ok`, `queued` and `preempted`, without unknown ones.

    `before` and `after` are the server's metrics around the workload, and `samples` are rows of
    `columns.TELEMETRY` during it. `preemptions` is an increase. `waiting_share` is the share of
    their time that requests spent in the queue: from the server's histograms, or else waiting /
    (waiting + running) requests, which is the same by Little's law. `waiting_max` is in requests,
    `kv_cache_usage_max` from 0 to 1.
    """
    rows = list(samples)
    share = _share_of_time(before, after)
    found = {
        "preemptions": increase(before, after, PREEMPTIONS),
        "waiting_share": _share_of_requests(rows) if share is None else share,
        "waiting_max": _maximum(rows, "waiting"),
        "kv_cache_usage_max": _maximum(rows, "kv_cache_usage"),
    }
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def _share_of_time(before: Counters, after: Counters) -> float | None:
    queued, whole = (increase(before, after, _sums(names)) for names in (QUEUE, E2EL))
    return None if queued is None or not whole else queued / whole


def _share_of_requests(rows: Iterable[Mapping[str, Any]]) -> float | None:
    known = [row for row in rows if row.get("waiting") is not None]
    waiting = sum(row["waiting"] for row in known)
    present = waiting + sum(row.get("running") or 0 for row in known)
    return waiting / present if present else None


def _maximum(rows: Iterable[Mapping[str, Any]], name: str) -> float | None:
    return max((float(row[name]) for row in rows if row.get(name) is not None), default=None)


def _sums(names: Names) -> Names:
    return tuple(f"{name}_sum" for name in names)
