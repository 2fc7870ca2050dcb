"""What is random in a load, drawn before the clock starts: the same load, the same draws. Pure."""

from __future__ import annotations

import itertools
import operator
import random
from functools import partial

from servegrid.study.grid import Workload


def arrivals(workload: Workload, salt: str) -> list[float] | None:
    """When the requests of an open loop are due, in s after its start; None for any other load.

    A Poisson process: the times between arrivals are independent and exponential, with the mean
    1 / `load.request_rate`.
    """
    if workload.request_rate is None:
        return None
    rng = random.Random(f"{workload.seed}/{salt}/arrivals")
    times = itertools.accumulate(rng.expovariate(workload.request_rate) for _ in itertools.count())
    if workload.duration_s is None:
        return list(itertools.islice(times, workload.requests))
    # The first may lie beyond: a load of no request would say nothing.
    return list(itertools.takewhile(partial(operator.gt, workload.duration_s), times)) or [0.0]


def rests(workload: Workload, count: int, salt: str) -> list[float] | None:
    """How long the user of each of `count` requests rests after its answer, in s.

    Exponential with the mean `load.think_time_s`; None where users don't rest.
    """
    if not workload.think_time_s:
        return None
    rng = random.Random(f"{workload.seed}/{salt}/rests")
    return [rng.expovariate(1 / workload.think_time_s) for _ in range(count)]


def lengths(workload: Workload, count: int, salt: str) -> list[int]:
    """The output tokens that each of `count` requests asks for, evenly spread around their mean."""
    spread = workload.longest_output - workload.output_len
    rng = random.Random(f"{workload.seed}/{salt}/lengths")
    return [workload.output_len + rng.randint(-spread, spread) for _ in range(count)]
