"""Workloads with too few requests for a stationary part, before they are measured. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from servegrid.study.grid import Workload

MIN_REQUESTS = 20
"""Minimum number of requests that end between the start and the end of a stationary part."""


def describe_few_requests(workloads: Iterable[Workload]) -> str | None:
    """Which workloads can hardly have valid results, and the remedy; None if there are none."""
    cells = list(dict.fromkeys(each.cell for each in workloads if _has_few(each)))
    if not cells:
        return None
    more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    return (
        f"Too few requests for valid results: {cells[0]}{more}. At least {MIN_REQUESTS} requests "
        "must end in the stationary part; the first and the last request of each user of a closed "
        "loop are not in it. Raise `requests_per_user` or `duration_s`."
    )


def _has_few(workload: Workload) -> bool:
    if not workload.has_stationary_part:
        return False
    if workload.concurrency is not None:
        return (
            workload.requests is not None
            and workload.requests - 2 * workload.concurrency < MIN_REQUESTS
        )
    if workload.request_rate is None or workload.duration_s is None:
        return False
    return workload.request_rate * workload.duration_s < MIN_REQUESTS
