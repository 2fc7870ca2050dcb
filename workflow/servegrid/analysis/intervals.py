"""The 95% interval of a figure that was measured several times. Pure.

If the trials come from several bring-ups, the unit is the bring-up: the trials of one share what
makes it differ from the next (node, memory layout, autotuning), so they say little about it. With a
single bring-up, the unit is the trial, and the interval holds within that bring-up only.

A cell's figure is the median over its trials. Its interval is Student's t on the trials'
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

import math
import statistics
from collections.abc import Collection, Hashable, Iterable

from scipy.special import stdtrit

_ROUNDING = 1e-9
"""If all trials are equal, the mean of the logarithms differs from them only in the last digits."""

Interval = tuple[float, float]


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
