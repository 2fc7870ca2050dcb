"""The random parts of a workload, drawn before the measurement starts. Pure.

The same workload and salt give the same values.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterator
from functools import partial

from servegrid.study.grid import Workload


def arrival_times(workload: Workload, salt: str) -> list[float] | None:
    """When the requests of an open loop are due, in s after the start; None for other workloads.

    A Poisson process: the times between arrivals are independent and exponentially distributed,
    with mean 1 / `workload.request_rate`.
    """
    if workload.request_rate is None:
        return None
    rng = random.Random(f"{workload.seed}/{salt}/arrivals")
    times = itertools.accumulate(rng.expovariate(workload.request_rate) for _ in itertools.count())
    if workload.duration_s is None:
        return list(itertools.islice(times, workload.requests))
    # If the first arrival is after the end, send one request anyway: none would measure nothing.
    return list(itertools.takewhile(partial(operator.gt, workload.duration_s), times)) or [0.0]


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
