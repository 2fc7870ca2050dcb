"""Finds the stationary part of a workload, or says why there is none. Pure.

A closed loop or a poisson workload starts with an idle server, and the server runs dry at the end.
Neither shows the long-term performance. The part in between must not drift either, as it does if
requests arrive faster than the server can answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.study.grid import Workload

BATCH_SIZE = 5
"""Requests per batch; the series consists of batch means, as in MSER-5."""
MIN_REQUESTS = 20
"""Minimum number of requests that end between the start and the end."""
NEGLIGIBLE_SHIFT = 0.01
"""A transient that shifts the mean by at most this fraction is not cut."""
MAX_CHANGE = 0.10
"""The mean latency of the second half may differ from the first by this fraction."""
STANDARD_ERRORS = 2.0
"""A difference of at most this many standard errors is not drift, because chance can make it."""

REQUEST_COLUMNS = ("user", "scheduled_ns", "sent_ns", "done_ns", "error")
"""The columns of `columns.REQUESTS` that `find_window` needs."""

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """A time span after `start_ns`, up to and including `end_ns`, in ns of CLOCK_MONOTONIC."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """The length in s."""
        return (self.end_ns - self.start_ns) / 1e9

    def contains(self, times_ns: Any) -> Any:
        """A boolean array: which of the integers `times_ns` lie in the window."""
        return (times_ns > self.start_ns) & (times_ns <= self.end_ns)


def find_window(requests: pa.Table, workload: Workload) -> Window | str:
    """The stationary part of a closed loop or a poisson workload, or why there is none.

    It ends when the last request is due, because fewer requests are in flight after that. It starts
    after the first response to every user of a closed loop, because all users start at the same
    time, and after the start transient of the end-to-end latencies in the order of their ends. The
    transient is found with MSER-5 (White, Cobb and Spratt, 2000): cut d of the n batch means so
    that the sum of (x - mean)² over the others, divided by (n - d)², is minimal. If a shorter cut
    changes the mean by at most NEGLIGIBLE_SHIFT, it is used instead, because the minimum can be
    anywhere if all latencies are almost equal. There is no stationary part if the cut is longer
    than half of the series, or if the mean latencies of the two halves of the rest differ by more
    than MAX_CHANGE and by more than STANDARD_ERRORS.
    """
    served = requests.filter(pc.is_null(requests["error"]))
    due = pc.drop_null(requests["scheduled_ns"]).to_numpy()
    if served.num_rows == 0 or due.size == 0:
        return "no request was served"
    start, end = int(due.min()), int(due.max())
    done = served["done_ns"].to_numpy()
    scheduled = served["scheduled_ns"].to_numpy()
    if workload.protocol == "closed_loop":
        users = served["user"].to_numpy()
        start = max(int(done[users == user].min()) for user in np.unique(users))
    begin = scheduled if workload.protocol == "poisson" else served["sent_ns"].to_numpy()
    order = np.argsort(done, kind="stable")
    order = order[(done[order] > start) & (done[order] <= end)]
    latencies, ends = (done - begin)[order] / 1e9, done[order]
    if len(order) < MIN_REQUESTS:
        return (
            f"{len(order)} requests ended between the initial transient and the end; at least "
            f"{MIN_REQUESTS} are needed"
        )
    cut = _transient(latencies)
    if cut > len(latencies) / 2:
        return "the latency did not settle in the first half of the workload"
    if drift := _describe_drift(latencies[cut:]):
        return drift
    return Window(int(ends[cut - 1]) if cut else start, end)


def _transient(latencies: _Floats) -> int:
    """The number of values to cut: MSER-5's cut, or a shorter one with almost the same mean."""
    batches = latencies[: len(latencies) // BATCH_SIZE * BATCH_SIZE]
    batches = batches.reshape(-1, BATCH_SIZE).mean(axis=1)
    count = len(batches)
    # The last few batches alone can vary little by chance.
    candidates = range(max(count - BATCH_SIZE, 1))
    errors = [batches[cut:].var() / (count - cut) for cut in candidates]
    longest = int(np.argmin(errors))
    settled = batches[longest:].mean()
    shifts = (abs(batches[cut:].mean() - settled) for cut in candidates)
    return BATCH_SIZE * next(
        cut for cut, shift in enumerate(shifts) if shift <= NEGLIGIBLE_SHIFT * settled
    )


def _describe_drift(latencies: _Floats) -> str | None:
    """The drift between the halves of a series; None if there is none."""
    first, second = np.array_split(latencies, 2)
    difference = float(second.mean() - first.mean())
    error = float(np.sqrt(first.var(ddof=1) / first.size + second.var(ddof=1) / second.size))
    change = difference / float(first.mean())
    if abs(change) <= MAX_CHANGE or abs(difference) <= STANDARD_ERRORS * error:
        return None
    return f"the mean latency changed by {change:+.0%} from the first half to the second"
