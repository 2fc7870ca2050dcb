"""The random parts of a workload, drawn before the measurement starts. Pure.

The same workload and salt give the same values.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Iterator
from functools import partial

from servegrid.study.grid import Workload


def arrival_times(workload: Workload, salt: str) -> list[float] | None:
    """When the requests of an open loop are due, in s after the start; None for other workloads.

    A Poisson process: the times between arrivals are independent and exponentially distributed,
    with mean 1 / `workload.request_rate`. For `gamma` they have the same mean and the gamma
    distribution of the shape `workload.burstiness`, as in `vllm bench serve`, which then also
    scales them to end at the expected time. For `profile` the rate changes with the time.
    """
    if workload.request_rate is None:
        return None
    rng = random.Random(f"{workload.seed}/{salt}/arrivals")
    if workload.rate_profile is not None:
        return _profile_times(workload, rng) or [0.0]
    times = itertools.accumulate(_interval(workload, rng) for _ in itertools.count())
    if workload.duration_s is None:
        return list(itertools.islice(times, workload.requests))
    # If the first arrival is after the end, send one request anyway: none would measure nothing.
    return list(itertools.takewhile(partial(operator.gt, workload.duration_s), times)) or [0.0]


def _interval(workload: Workload, rng: random.Random) -> float:
    """The time between two arrivals, in s."""
    rate, shape = workload.request_rate, workload.burstiness
    assert rate is not None
    if shape is None:
        return rng.expovariate(rate)
    return rng.gammavariate(shape, 1 / (rate * shape))


def _profile_times(workload: Workload, rng: random.Random) -> list[float]:
    """The arrivals of a Poisson process whose rate changes, by inversion.

    The expected number of arrivals up to the times of such a process is a Poisson process of rate 1
    (E. Çinlar, Introduction to Stochastic Processes, 1975, chapter 4). Within a segment of the
    profile, in which the rate goes from a to b in d seconds, the expected number after t seconds is
    a t + (b - a) t² / 2d.
    """
    assert workload.request_rate and workload.rate_profile and workload.duration_s
    rates = [factor * workload.request_rate for factor in workload.rate_profile]
    length = workload.duration_s / (len(rates) - 1)
    times: list[float] = []
    expected, wanted = 0.0, rng.expovariate(1.0)
    for index, (a, b) in enumerate(itertools.pairwise(rates)):
        inside = (a + b) / 2 * length
        while wanted < expected + inside:
            left = wanted - expected
            slope = (b - a) / length
            # The root of slope t² / 2 + a t - left; this form holds for a slope of 0 too.
            t = 2 * left / (a + math.sqrt(max(0.0, a * a + 2 * slope * left)))
            times.append(index * length + t)
            wanted += rng.expovariate(1.0)
        expected += inside
    return times


def think_times(workload: Workload, salt: str) -> Iterator[float] | None:
    """How long the user thinks after the response to each request, in s, without an end.

    Exponentially distributed with mean `workload.think_time_s`. None if users don't think.
    """
    if not workload.think_time_s:
        return None
    # "rests" is part of the seed: another word would change the values.
    rng = random.Random(f"{workload.seed}/{salt}/rests")
    return (rng.expovariate(1 / workload.think_time_s) for _ in itertools.count())


def output_lengths(workload: Workload, salt: str) -> Iterator[int]:
    """Output tokens of each request, uniformly distributed around their mean, without an end."""
    spread = round(workload.output_len * workload.output_spread)
    rng = random.Random(f"{workload.seed}/{salt}/lengths")
    return (workload.output_len + rng.randint(-spread, spread) for _ in itertools.count())
