"""What is random in a load, drawn before the clock starts: the same load, the same draws. Pure."""

from __future__ import annotations

import itertools
import operator
import random
from functools import partial

from servegrid.study.grid import Load


def arrivals(load: Load, salt: str) -> list[float] | None:
    """When the requests of an open loop are due, in s after its start; None for any other load.

    A Poisson process: the times between arrivals are independent and exponential, with the mean
    1 / `load.rate_per_s`.
    """
    if load.rate_per_s is None:
        return None
    rng = random.Random(f"{load.seed}/{salt}/arrivals")
    times = itertools.accumulate(rng.expovariate(load.rate_per_s) for _ in itertools.count())
    if load.duration_s is None:
        return list(itertools.islice(times, load.requests))
    # The first may lie beyond: a load of no request would say nothing.
    return list(itertools.takewhile(partial(operator.gt, load.duration_s), times)) or [0.0]


def rests(load: Load, count: int, salt: str) -> list[float] | None:
    """How long the user of each of `count` requests rests after its answer, in s.

    Exponential with the mean `load.think_s`; None where users don't rest.
    """
    if not load.think_s:
        return None
    rng = random.Random(f"{load.seed}/{salt}/rests")
    return [rng.expovariate(1 / load.think_s) for _ in range(count)]


def lengths(load: Load, count: int, salt: str) -> list[int]:
    """The output tokens that each of `count` requests asks for, evenly spread around their mean."""
    spread = load.longest_output - load.output_len
    rng = random.Random(f"{load.seed}/{salt}/lengths")
    return [load.output_len + rng.randint(-spread, spread) for _ in range(count)]
