"""Finds the stationary part of a workload, or says why there is none. Pure.

A closed or an open loop starts with an idle server, and the server runs dry at the end.
Neither shows the long-term performance. The part in between must not drift either, as it does if
requests arrive faster than the server can answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from servegrid.study.few_requests import MIN_REQUESTS
from servegrid.study.grid import Workload

BATCH_SIZE = 5
"""Requests per batch; the series consists of batch means, as in MSER-5."""
NEGLIGIBLE_SHIFT = 0.01
"""A transient that shifts the mean by at most this fraction is not cut."""
MAX_CHANGE = 0.10
"""The mean latency of the second half may differ from the first by this fraction."""
STANDARD_ERRORS, OPEN_LOOP_STANDARD_ERRORS = 2.3, 4.0
"""A difference of at most this many standard errors is not drift, because chance can make it.

2.3 is Student's t for eight degrees of freedom. In an open loop near its capacity, latencies stay
alike for longer than a batch, so the standard error is too small."""
BATCHES = 5
"""Batches per half from which the standard error of its mean latency is estimated."""
WARM_UP = 0.2
"""This share of an open loop's arrivals comes before the stationary part: the server starts empty,
and the latencies of the first requests to end do not show that yet."""
MAX_GROWTH, GROWTH_DEVIATIONS = 0.03, 3.0
"""The number of requests in flight may grow by this fraction of the arrivals, and always by this
many square roots of its mean, as a Poisson number varies."""

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
    """The stationary part of a closed or an open loop, or why there is none.

    It ends when the last request is due, because fewer requests are in flight after that. It starts
    after the first response to every user of a closed loop, because all users start at the same
    time. It also starts after the initial transient of the end-to-end latencies (in the order of
    their ends), in an open loop not before WARM_UP. The transient is found with MSER-5 (White, Cobb
    and Spratt, 2000): cut d of the n batch means so that the sum of (x - mean)² over the others,
    divided by (n - d)², is minimal. If a shorter cut changes the mean by at most NEGLIGIBLE_SHIFT,
    it is used instead, because the minimum can be anywhere if all latencies are almost equal. At
    most half of the series of an open loop is cut.

    There is no stationary part if fewer than MIN_REQUESTS requests ended in between, in an open
    loop also if fewer than half as many ended after WARM_UP, if in an open loop the arrivals exceed
    the ends by more than MAX_GROWTH and GROWTH_DEVIATIONS allow, if the cut is longer than half of
    the series, or if the mean latencies of the two halves of the rest differ by more than
    MAX_CHANGE and by more than STANDARD_ERRORS. The latencies of neighbouring requests are
    correlated, so the standard error comes from the means of BATCHES batches (Law and Kelton,
    Simulation Modeling and Analysis, chapter 9).
    """
    served = requests.filter(pc.is_null(requests["error"]))
    due = pc.drop_null(requests["scheduled_ns"]).to_numpy()
    if served.num_rows == 0 or due.size == 0:
        return "no request was served"
    start, end = int(due.min()), int(due.max())
    is_open = workload.is_open_loop
    done = served["done_ns"].to_numpy()
    if workload.protocol == "closed_loop":
        users = served["user"].to_numpy()
        start = max(int(done[users == user].min()) for user in np.unique(users))
    begin = served["scheduled_ns" if is_open else "sent_ns"].to_numpy()
    order = np.argsort(done, kind="stable")
    order = order[(done[order] > start) & (done[order] <= end)]
    latencies, ends = (done - begin)[order] / 1e9, done[order]
    if len(order) < MIN_REQUESTS:
        return (
            f"{len(order)} requests ended between the initial transient and the end; at least "
            f"{MIN_REQUESTS} are needed"
        )
    cut = _transient(latencies, at_most=len(latencies) // 2 if is_open else len(latencies))
    if is_open:
        warm_up_ends = np.quantile(due, WARM_UP)
        cut = max(cut, int(np.searchsorted(ends, warm_up_ends, side="right")))
        # None is left if the server died early: what fails has no latency.
        if (left := len(ends) - cut) < MIN_REQUESTS // 2:
            return (
                f"{left} requests ended between the first {WARM_UP:.0%} of the arrivals and the "
                f"end; at least {MIN_REQUESTS // 2} are needed"
            )
    window = Window(int(ends[cut - 1]) if cut else start, end)
    if is_open and (growth := _describe_growth(requests, window)):
        return growth
    if not is_open and cut > len(latencies) / 2:
        return "the latency did not settle in the first half of the workload"
    allowed = OPEN_LOOP_STANDARD_ERRORS if is_open else STANDARD_ERRORS
    return _describe_drift(latencies[cut:], allowed) or window


def _describe_growth(requests: pa.Table, window: Window) -> str | None:
    """By how much more requests arrived in the window than ended; None if flow is balanced."""
    arrived, ended = (
        pc.drop_null(requests[name]).to_numpy() for name in ("scheduled_ns", "done_ns")
    )
    before = int((arrived <= window.start_ns).sum() - (ended <= window.start_ns).sum())
    arrivals, ends = (int(window.contains(times).sum()) for times in (arrived, ended))
    inside = (np.clip(times, window.start_ns, window.end_ns) for times in (arrived, ended))
    # Integrate the number in flight: each arrival adds one from then on, each end removes one.
    since_arrival, since_end = (float((window.end_ns - times).sum()) for times in inside)
    mean = (since_arrival - since_end) / 1e9 / window.seconds
    if arrivals - ends <= max(MAX_GROWTH * arrivals, GROWTH_DEVIATIONS * math.sqrt(max(mean, 0.0))):
        return None
    return (
        f"{arrivals} requests arrived and {ends} ended in {window.seconds:.0f} s, so the number in "
        f"flight grew from {before} to {before + arrivals - ends}. Either the request rate is more "
        "than the server can complete, or the run is too short for the number in flight to settle"
    )


def _transient(latencies: _Floats, at_most: int) -> int:
    """The number of values to cut: MSER-5's cut, or a shorter one with almost the same mean."""
    batches = latencies[: len(latencies) // BATCH_SIZE * BATCH_SIZE]
    batches = batches.reshape(-1, BATCH_SIZE).mean(axis=1)
    count = len(batches)
    # The last few batches alone can vary little by chance.
    candidates = range(max(min(count - BATCH_SIZE, at_most // BATCH_SIZE), 1))
    errors = [batches[cut:].var() / (count - cut) for cut in candidates]
    longest = int(np.argmin(errors))
    settled = batches[longest:].mean()
    shifts = (abs(batches[cut:].mean() - settled) for cut in candidates)
    return BATCH_SIZE * next(
        cut for cut, shift in enumerate(shifts) if shift <= NEGLIGIBLE_SHIFT * settled
    )


def _describe_drift(latencies: _Floats, standard_errors: float) -> str | None:
    """The drift between the halves of a series; None if there is none."""
    halves = np.array_split(latencies, 2)
    first, second = (float(half.mean()) for half in halves)
    error = math.hypot(*map(_standard_error, halves))
    change = (second - first) / first
    if abs(change) <= MAX_CHANGE or abs(second - first) <= standard_errors * error:
        return None
    return f"the mean latency changed by {change:+.0%} from the first half to the second"


def _standard_error(latencies: _Floats) -> float:
    """The standard error of the mean of a series whose neighbours are alike, by batch means."""
    batches = np.array_split(latencies, min(BATCHES, latencies.size))
    return float(np.std([batch.mean() for batch in batches], ddof=1) / math.sqrt(len(batches)))
