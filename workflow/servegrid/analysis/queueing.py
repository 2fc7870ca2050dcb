"""How many users one deployment can carry, from measured latencies. Pure.

The page computes the same in planner.js; a test compares the two.

N users each think for Z seconds on average, send one request and wait for the response: the
machine repairman's model with a server whose speed depends on its load. With n requests in flight,
the server completes X(n) = n / T(n) requests per second. The number in flight is a birth-death
chain with births (N - n) / Z and deaths X(n), so p(n) is proportional to the product over k < n of
[(N - k) / Z] / X(k + 1) (Kleinrock, Queueing Systems I, 1975, section 3.8). An arriving request
sees the chain of N - 1 users (Lavenberg and Reiser, Stationary state probabilities at arrival
instants for closed queueing networks, 1980) and then adds itself. All requests in flight share the
server, so only the mean of their sizes matters, not the distribution.

Without a number of users there is a request rate λ. Requests of many independent users are nearly a
Poisson process, so births are λ, whatever the number in flight: p(n) is proportional to the product
over k <= n of λ / X(k), and an arriving request sees p(n) (Wolff, Poisson arrivals see time
averages, 1982). Only the mean size matters here too (Cohen, The multiple phase service network with
generalized processor sharing, 1979). This is the limit of many users who think for long, and needs
no think time. Users who wait for a slow server send fewer requests; here they do not, so the server
carries a little less than with the same rate from few users.

Arrivals can be burstier: their counts have a dispersion (variance / mean) of z instead of 1. By
Hayward's approximation they then load the server like a Poisson process of groups of z requests
(Fredericks, Congestion in blocking systems - a simple approximation technique, 1980). A simulation
shows how far that holds (docs/statistics.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import isotonic_regression

MAX_USERS = 1_000_000
"""The search for the number of users stops near this number."""


@dataclass(frozen=True)
class Curve:
    """A measured value, such as seconds per request, by the number of requests in flight.

    `in_flight` is ascending; `values` has the same length.
    """

    in_flight: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, requests: int) -> float:
        """The value at this number of requests in flight.

        Interpolated linearly between measured numbers; below the lowest, the value at the lowest.
        Raises ValueError above the highest measured number.
        """
        if requests > self.in_flight[-1]:
            raise ValueError(f"{requests} requests in flight were not measured")
        if requests <= self.in_flight[0]:
            return self.values[0]
        above = next(index for index, n in enumerate(self.in_flight) if n >= requests)
        (n, m), (s, t) = (x[above - 1 : above + 1] for x in (self.in_flight, self.values))
        return s + (t - s) * (requests - n) / (m - n)

    def interpolated(self) -> list[float]:
        """The values at 1, 2, … requests in flight, up to the highest measured number."""
        return [self.at(requests) for requests in range(1, math.floor(self.in_flight[-1]) + 1)]


def isotonic_fit(seconds: Sequence[float]) -> list[float]:
    """The non-decreasing times that are nearest to `seconds` by least squares.

    More requests in flight cannot make a request faster. A measurement that says so is noise.
    """
    return [float(fitted) for fitted in isotonic_regression(seconds).x]


def max_in_flight(seconds: Sequence[float], limit_s: float) -> int:
    """The highest number of requests in flight up to which the times meet the limit; 0 if none.

    `seconds` are the times of a request at 1, 2, … in flight.
    """
    return next((n for n, each in enumerate(seconds) if each > limit_s), len(seconds))


def in_flight_distribution(
    seconds: Sequence[float], users: int, think_time_s: float
) -> list[float]:
    """The probabilities of 0, 1, … `users` requests in flight.

    `seconds` are the times of a request at 1, 2, … in flight. Above the highest measured number,
    requests wait first come, first served, and the server keeps the throughput of that number.
    """
    logarithms = [0.0]
    last_rate = len(seconds) / seconds[-1]
    for n in range(users):
        rate = (n + 1) / seconds[n] if n < len(seconds) else last_rate
        logarithms.append(logarithms[-1] + math.log((users - n) / think_time_s) - math.log(rate))
    largest = max(logarithms)
    weights = [math.exp(each - largest) for each in logarithms]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


AllowedInFlight = Sequence[tuple[int, float]]
"""One pair per kind of request: the highest number of requests in flight, itself included, at which
it meets the SLO, and its share of all requests. The shares sum up to 1."""


def slo_probability(
    seconds: Sequence[float], allowed: AllowedInFlight, users: int, think_time_s: float
) -> float:
    """The probability that a request of one of `users` meets the SLO."""
    seen = in_flight_distribution(seconds, users - 1, think_time_s)
    return math.fsum(share * math.fsum(seen[:limit]) for limit, share in allowed)


ROUNDING = 1e-9
"""More than the rounding errors of a probability. If half of the requests can never meet the SLO,
the others must all do so for 50%, and the last bits would decide."""


def users_carried(
    seconds: Sequence[float], allowed: AllowedInFlight, think_time_s: float, slo_attainment: float
) -> int:
    """The highest number of users whose requests meet the SLO with the probability
    `slo_attainment`; 0 if there is none.

    The other arguments are those of `slo_probability`.
    """

    def meets_slo(users: int) -> bool:
        probability = slo_probability(seconds, allowed, users, think_time_s)
        return probability >= slo_attainment - ROUNDING

    if not meets_slo(1):
        return 0
    low, high = 1, 2
    while high <= MAX_USERS and meets_slo(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets_slo(middle) else (low, middle)
    return low


def mean_in_flight(seconds: Sequence[float], users: int, think_time_s: float) -> float:
    """The mean number of requests in flight."""
    distribution = in_flight_distribution(seconds, users, think_time_s)
    return math.fsum(n * probability for n, probability in enumerate(distribution))


def requests_per_s(seconds: Sequence[float], users: int, think_time_s: float) -> float:
    """Completed requests per second: each thinking user sends one per think time on average."""
    return (users - mean_in_flight(seconds, users, think_time_s)) / think_time_s


def open_distribution(seconds: Sequence[float], rate: float) -> list[float]:
    """The probabilities of 0, 1, … requests in flight, at a Poisson process of `rate` requests/s.

    `seconds` are the times of a request at 1, 2, … in flight. The last probability is that of the
    highest measured number or more: there, requests wait first come, first served, and the server
    keeps the throughput of that number. Without a steady state, it is 1.
    """
    highest = len(seconds)
    load = rate * seconds[-1] / highest
    if load >= 1:
        return [0.0] * highest + [1.0]
    if not rate:
        return [1.0] + [0.0] * highest
    logarithms = [0.0]
    for n, each in enumerate(seconds, 1):
        logarithms.append(logarithms[-1] + math.log(rate) + math.log(each / n))
    largest = max(logarithms)
    weights = [math.exp(each - largest) for each in logarithms]
    weights[-1] /= 1 - load  # a geometric series
    total = math.fsum(weights)
    return [weight / total for weight in weights]


_HALVINGS = 50
_NO_RATE = 1e-6
"""Of the highest throughput: a smaller rate is none. Only if all requests but those that can never
meet the SLO must do so, it is between."""


def rate_carried(
    seconds: Sequence[float],
    allowed: AllowedInFlight,
    slo_attainment: float,
    dispersion: float = 1.0,
) -> float:
    """The highest rate of arrivals whose requests meet the SLO with the probability
    `slo_attainment`; 0 if there is none.

    `dispersion` is at least 1. The other arguments are those of `slo_probability`.
    """
    groups = _by_groups(seconds, dispersion)
    low, high = 0.0, len(groups) / groups[-1]
    least = _NO_RATE * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        seen = open_distribution(groups, middle)
        probability = math.fsum(
            share * _up_to(seen, limit / dispersion) for limit, share in allowed
        )
        low, high = (middle, high) if probability >= slo_attainment - ROUNDING else (low, middle)
    return dispersion * low if low > least else 0.0


def _up_to(seen: Sequence[float], limit: float) -> float:
    """The probability that fewer groups are seen than `limit`, interpolated between whole ones.

    The last of `seen` is all that wait or more, which are too many.
    """
    limit = min(limit, len(seen) - 1)
    whole = math.floor(limit)
    return math.fsum(seen[:whole]) + (limit - whole) * seen[whole]


def open_mean_in_flight(seconds: Sequence[float], rate: float, dispersion: float = 1.0) -> float:
    """The mean number of requests in flight or waiting, of arrivals with a rate and a dispersion.

    Infinite without a steady state.
    """
    groups = _by_groups(seconds, dispersion)
    load = rate / dispersion * groups[-1] / len(groups)
    if load >= 1:
        return math.inf
    distribution = open_distribution(groups, rate / dispersion)
    waiting = distribution[-1] * load / (1 - load)
    mean = math.fsum(n * probability for n, probability in enumerate(distribution)) + waiting
    return dispersion * mean


def split_dispersion(dispersion: float, replicas: int) -> float:
    """The dispersion on one replica, if each request goes to a random one.

    Of independent points that are kept with the probability p, counts have the dispersion
    1 + p (z - 1) (Cox and Isham, Point processes, 1980).
    """
    return 1 + (dispersion - 1) / replicas


def _by_groups(seconds: Sequence[float], size: float) -> list[float]:
    """`seconds` at 1, 2, … groups of `size` requests in flight, interpolated linearly.

    Of a group that is larger than what was measured, some requests wait.
    """
    if size > len(seconds):
        return [seconds[-1] * size / len(seconds)]
    groups = []
    for number in range(1, math.floor(len(seconds) / size) + 1):
        position = number * size
        before = math.floor(position)
        low, high = seconds[before - 1], seconds[min(before, len(seconds) - 1)]
        groups.append(low + (high - low) * (position - before))
    return groups
