"""The part of a load in which nothing but chance changes, or why there is none. Pure.

A closed or an open loop begins with an idle server and ends with a server that runs dry: neither
says what it can do for long. What is left between them must not drift either, as it does where
more comes in than the server can answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.study.grid import Workload

BATCH = 5
"""Requests whose mean is one value of the series, as in MSER-5."""
LEAST = 20
"""Requests without which nothing can be said."""
SLIGHT = 0.01
"""By which share a transient may shift the mean before it is worth cutting."""
DRIFT = 0.10
"""By which share the second half's mean latency may differ from the first half's."""
STANDARD_ERRORS = 2.0
"""A difference that chance alone would often make is no drift."""

COLUMNS = ("user", "scheduled_ns", "sent_ns", "done_ns", "error")
"""The columns of `columns.REQUESTS` that `window_of` needs."""

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """From after `start_ns` to `end_ns`, in ns of CLOCK_MONOTONIC."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def has(self, times_ns: Any) -> Any:
        """Which of the times, an array of integers, lie in it."""
        return (times_ns > self.start_ns) & (times_ns <= self.end_ns)


def window_of(requests: pa.Table, workload: Workload) -> Window | str:
    """The stationary part of a steady or poisson load, or why there is none.

    It ends when the last request was due, for fewer are in flight from then on. It starts after
    the first answer to each user of a closed loop, who all began at once, and after the start
    transient of the end-to-end latencies in the order of their ends. That is what MSER-5 cuts: so
    many batch means x[0..d) that the sum of (x - mean)² over the n - d others, divided by
    (n - d)², is least (White, Cobb and Spratt, 2000), or less where that shifts the mean by no more
    than SLIGHT: of latencies that are all but alike, the least is anywhere. Where it would be more
    than half, or where the means of the two halves of the rest differ by more than DRIFT and
    STANDARD_ERRORS, there is no steady state.
    """
    served = requests.filter(pc.is_null(requests["error"]))
    begun = pc.drop_null(requests["scheduled_ns"]).to_numpy()
    if served.num_rows == 0 or begun.size == 0:
        return "no request was served"
    start, end = int(begun.min()), int(begun.max())
    done = served["done_ns"].to_numpy()
    scheduled = served["scheduled_ns"].to_numpy()
    if workload.protocol == "closed_loop":
        users = served["user"].to_numpy()
        start = max(int(done[users == user].min()) for user in np.unique(users))
    since = scheduled if workload.protocol == "poisson" else served["sent_ns"].to_numpy()
    order = np.argsort(done, kind="stable")
    order = order[(done[order] > start) & (done[order] <= end)]
    latencies, ends = (done - since)[order] / 1e9, done[order]
    if len(order) < LEAST:
        return (
            f"{len(order)} requests ended between the start transient and the end, and it takes "
            f"{LEAST} to tell"
        )
    cut = _transient(latencies)
    if cut > len(latencies) / 2:
        return "the latency has not settled in the first half of the load"
    if drift := _drift(latencies[cut:]):
        return drift
    return Window(int(ends[cut - 1]) if cut else start, end)


def _transient(latencies: _Floats) -> int:
    """How many values to cut: the fewest batches whose going does what MSER-5's cut does."""
    batches = latencies[: len(latencies) // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1)
    count = len(batches)
    # The last few batches alone would vary little by chance.
    candidates = range(max(count - BATCH, 1))
    errors = [batches[cut:].var() / (count - cut) for cut in candidates]
    longest = int(np.argmin(errors))
    settled = batches[longest:].mean()
    shifts = (abs(batches[cut:].mean() - settled) for cut in candidates)
    return BATCH * next(cut for cut, shift in enumerate(shifts) if shift <= SLIGHT * settled)


def _drift(latencies: _Floats) -> str | None:
    """What drift there is between the halves of a series, None where none."""
    first, second = np.array_split(latencies, 2)
    difference = float(second.mean() - first.mean())
    error = float(np.sqrt(first.var(ddof=1) / first.size + second.var(ddof=1) / second.size))
    share = difference / float(first.mean())
    if abs(share) <= DRIFT or abs(difference) <= STANDARD_ERRORS * error:
        return None
    return f"the latency went on to change, by {share:+.0%} between the halves of the load"
