"""How many users one deployment can carry, from measured times. Pure.

The page computes the same in planner.js; a test compares the two.

N users each think for Z seconds on average, then send one request, and wait for its answer: the
machine-repairman model with a server whose speed depends on its load. With n requests in flight it
completes X(n) = n / T(n) of them per second. The number in flight is a birth-death chain with
births (N - n) / Z and deaths X(n), so that p(n) is proportional to the product over k < n of
[(N - k) / Z] / X(k + 1) (Kleinrock, Queueing Systems I, 1975, section 3.8). A request that comes
sees the chain of N - 1 users (Lavenberg and Reiser, Stationary state probabilities at arrival
instants for closed queueing networks, 1980), and is itself the one more in flight. All requests in
flight share the server, so only the mean of their sizes matters, not the distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import isotonic_regression

MOST_USERS = 1_000_000


@dataclass(frozen=True)
class Curve:
    """Seconds that a request takes, over the number of requests in flight; both ascending."""

    in_flight: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, requests: int) -> float:
        """Linear between what was measured, and the first time below it.

        Raises ValueError above the most that was measured: nothing is known there.
        """
        if requests > self.in_flight[-1]:
            raise ValueError(f"{requests} requests in flight were not measured")
        if requests <= self.in_flight[0]:
            return self.seconds[0]
        above = next(place for place, n in enumerate(self.in_flight) if n >= requests)
        (n, m), (s, t) = (x[above - 1 : above + 1] for x in (self.in_flight, self.seconds))
        return s + (t - s) * (requests - n) / (m - n)

    def each(self) -> list[float]:
        """The times at 1, 2, … requests in flight, as far as was measured."""
        return [self.at(requests) for requests in range(1, self.in_flight[-1] + 1)]


def isotonic_fit(seconds: Sequence[float]) -> list[float]:
    """The non-decreasing times that are nearest to `seconds` by least squares.

    More requests in flight cannot make a request faster. A measurement that says so is noise.
    """
    return [float(each) for each in isotonic_regression(seconds).x]


def max_in_flight(seconds: Sequence[float], limit_s: float) -> int:
    """The highest number of requests in flight at which each meets the limit; 0 if none.

    `seconds` are the times at 1, 2, … in flight; all up to that number keep the limit.
    """
    return next((n for n, each in enumerate(seconds) if each > limit_s), len(seconds))


def in_flight(seconds: Sequence[float], users: int, think_time_s: float) -> list[float]:
    """The probabilities of 0, 1, … `users` requests in flight.

    `seconds` are the times at 1, 2, … in flight. Above the last of them nothing was measured:
    requests wait there, first come first served, and the server goes on at the rate of the last.
    """
    logarithms = [0.0]
    last = len(seconds) / seconds[-1]
    for n in range(users):
        rate = (n + 1) / seconds[n] if n < len(seconds) else last
        logarithms.append(logarithms[-1] + math.log((users - n) / think_time_s) - math.log(rate))
    most = max(logarithms)
    weights = [math.exp(each - most) for each in logarithms]
    whole = math.fsum(weights)
    return [weight / whole for weight in weights]


Allowed = Sequence[tuple[int, float]]
"""For each kind of request the most in flight, itself among them, with which it keeps its limit,
and the share of all requests that is of this kind; shares sum up to 1."""


def slo_probability(
    seconds: Sequence[float], allowed: Allowed, users: int, think_time_s: float
) -> float:
    """The probability that a request of one of `users` meets the SLO."""
    seen = in_flight(seconds, users - 1, think_time_s)
    return math.fsum(share * math.fsum(seen[:most]) for most, share in allowed)


def users_carried(
    seconds: Sequence[float], allowed: Allowed, think_time_s: float, slo_attainment: float
) -> int:
    """The highest number of users whose requests meet the SLO with that probability; 0 if none.

    Arguments as for `slo_probability`.
    """

    def kept(users: int) -> bool:
        return slo_probability(seconds, allowed, users, think_time_s) >= slo_attainment

    if not kept(1):
        return 0
    low, high = 1, 2
    while high <= MOST_USERS and kept(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low


def mean_in_flight(seconds: Sequence[float], users: int, think_time_s: float) -> float:
    """Requests in flight on average."""
    return math.fsum(n * p for n, p in enumerate(in_flight(seconds, users, think_time_s)))


def requests_per_s(seconds: Sequence[float], users: int, think_time_s: float) -> float:
    """Requests completed per second: those who think send the next after Z seconds."""
    return (users - mean_in_flight(seconds, users, think_time_s)) / think_time_s
