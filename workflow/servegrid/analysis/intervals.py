"""The 95% interval of a metric that was measured several times. Pure.

If the trials come from several bring-ups, the unit is the bring-up: the trials of one share what
makes it differ from the next (node, memory layout, autotuning), so they say little about it. With a
single bring-up, the unit is the trial, and the interval holds within that bring-up only.

A cell's value is the median over its trials. Its interval is Student's t on the trials'
logarithms: exp(mean ± t s / √k), with t the 97.5% quantile at k - 1 degrees of freedom. This
assumes normally distributed logarithms. That suits times and rates: they are positive, and
disturbances change them by a factor. The geometric mean is then the median of the distribution.
Without this assumption, no interval for a median reaches 95% from fewer than six trials: the median
lies between the lowest and the highest of k trials with probability 1 - 2^(1 - k), 75% for three.

Sources: J.-Y. Le Boudec, Performance Evaluation of Computer and Communication Systems (2010),
chapter 2, for intervals of the median and of transformed data; A. Georges, D. Buytaert and
L. Eeckhout, Statistically Rigorous Java Performance Evaluation (2007), for Student's t over few
runs.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Hashable, Iterable, Sequence

from scipy.special import stdtrit

_ROUNDING = 1e-9
"""If all trials are equal, the mean of the logarithms differs from them only in the last digits."""

Interval = tuple[float, float]
Outcomes = Sequence[bool]
"""Whether each request of a trial was good, in the order of time."""
BATCHES = 10
"""Parts of a trial whose shares of good requests show how alike neighbouring requests are."""


def bring_up_medians(values: Iterable[float], bring_ups: Iterable[Hashable]) -> list[float]:
    """The median of the values of each bring-up; the values themselves if there is only one."""
    groups: dict[Hashable, list[float]] = {}
    for value, bring_up in zip(values, bring_ups, strict=True):
        groups.setdefault(bring_up, []).append(value)
    if len(groups) < 2:
        return [value for group in groups.values() for value in group]
    return [statistics.median(group) for group in groups.values()]


def interval(values: Collection[float]) -> Interval | None:
    """The 95% interval of the median of `values`, in their unit.

    None for fewer than two values, and if the assumption cannot hold: a value is not positive, or
    the median of the values lies outside the interval.
    """
    if len(values) < 2 or min(values) <= 0:
        return None
    logarithms = [math.log(value) for value in values]
    error = statistics.stdev(logarithms) / math.sqrt(len(values))
    centre, reach = statistics.fmean(logarithms), t_quantile(len(values) - 1) * error
    low, median, high = (
        math.exp(centre - reach),
        statistics.median(values),
        math.exp(centre + reach),
    )
    if not low * (1 - _ROUNDING) <= median <= high * (1 + _ROUNDING):
        return None
    return min(low, median), max(high, median)


def t_quantile(degrees: float) -> float:
    """The 97.5% quantile of Student's t. `degrees` of freedom may be a fraction."""
    return float(stdtrit(degrees, 0.975))


def wilson(share: float, count: float, z: float = 1.959964) -> Interval:
    """Wilson's score interval of a proportion, from `share` of `count` independent trials.

    It is never outside 0 to 1, and not empty if all or none were good (E. B. Wilson, Probable
    inference, the law of succession, and statistical inference, 1927).
    """
    squared = z * z / count
    centre = share + squared / 2
    reach = math.sqrt(share * (1 - share) * squared + squared * squared / 4)
    return max(0.0, (centre - reach) / (1 + squared)), min(1.0, (centre + reach) / (1 + squared))


def share_interval(trials: Sequence[Outcomes], bring_ups: Sequence[Hashable]) -> Interval | None:
    """The 95% interval of the share of good requests over all `trials`; None without requests.

    Neighbouring requests are good or bad together, so they count less than as many independent
    ones. Wilson's interval gets the effective number, the count divided by the design effect: the
    variance of the share between clusters, divided by that of independent requests, at least 1
    (E. L. Korn and B. I. Graubard, Confidence intervals for proportions with small expected number
    of positive counts estimated from survey data, 1998). Clusters are BATCHES parts of each trial,
    the trials, and the bring-ups; the largest effect counts. The quantile is Student's t over the
    bring-ups, or over the parts if there is only one bring-up.
    """
    count = sum(map(len, trials))
    if not count:
        return None
    share = sum(map(sum, trials)) / count
    parts = [part for trial in trials for part in _parts(trial)]
    groups: dict[Hashable, list[bool]] = {}
    for trial, bring_up in zip(trials, bring_ups, strict=True):
        groups.setdefault(bring_up, []).extend(trial)
    units: Sequence[Outcomes] = list(groups.values()) if len(groups) > 1 else parts
    effect = max(_design_effect(each, share) for each in (parts, trials, list(groups.values())))
    quantile = t_quantile(len(units) - 1) if len(units) > 1 else 1.959964
    return wilson(share, count / effect, quantile)


def _parts(trial: Outcomes) -> list[Outcomes]:
    """BATCHES parts of at least two requests each; one part if there are fewer requests."""
    if len(trial) < 2 * BATCHES:
        return [trial]
    edges = [len(trial) * index // BATCHES for index in range(BATCHES + 1)]
    return [trial[start:end] for start, end in itertools.pairwise(edges)]


def _design_effect(clusters: Sequence[Outcomes], share: float) -> float:
    """The variance of a share between clusters / its variance with independent outcomes, or 1."""
    clusters = [each for each in clusters if len(each)]
    count, number = sum(map(len, clusters)), len(clusters)
    if number < 2 or not 0 < share < 1:
        return 1.0
    squares = sum((sum(each) - share * len(each)) ** 2 for each in clusters)
    between = number / (number - 1) * squares / count**2
    return max(1.0, between / (share * (1 - share) / count))
