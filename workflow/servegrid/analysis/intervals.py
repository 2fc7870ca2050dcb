"""How sure a figure is that was measured several times. Pure.

A cell's figure is the median over its trials. Its 95% interval is Student's t on the trials'
logarithms: exp(mean ± t s / √k), with t the 97.5% quantile at k - 1 degrees of freedom. That takes
the logarithms to be normal, which suits times and rates: they are positive, and what disturbs them
makes them longer by a share. The geometric mean is then the median of what is measured. Without an
assumption no interval for a median reaches 95% from fewer than six trials: the lowest and the
highest of k have the median between them with a chance of 1 - 2^(1 - k), 75% of three.

Sources: J.-Y. Le Boudec, Performance Evaluation of Computer and Communication Systems (2010),
chapter 2, for intervals of the median and of transformed data; A. Georges, D. Buytaert and
L. Eeckhout, Statistically Rigorous Java Performance Evaluation (2007), for Student's t over few
runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5% quantiles of Student's t with 1 to 30 degrees of freedom, as in any table of it."""

_NORMAL_975 = statistics.NormalDist().inv_cdf(0.975)
_ROUNDING = 1e-9
"""Of trials that are alike, the logarithms' mean is their value but for the last digits."""

Interval = tuple[float, float]


def interval(values: Collection[float]) -> Interval | None:
    """The 95% interval of what `values` are trials of, in their unit; their median lies in it.

    None of fewer than two, and where the assumption cannot hold: where one is not positive, or
    where so many fall in two groups that their median is outside.
    """
    if len(values) < 2 or min(values) <= 0:
        return None
    logarithms = [math.log(value) for value in values]
    error = statistics.stdev(logarithms) / math.sqrt(len(values))
    centre, reach = statistics.fmean(logarithms), quantile(len(values) - 1) * error
    low, median, high = (
        math.exp(centre - reach),
        statistics.median(values),
        math.exp(centre + reach),
    )
    if not low * (1 - _ROUNDING) <= median <= high * (1 + _ROUNDING):
        return None
    return min(low, median), max(high, median)


def quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t; beyond the table by the first terms of its expansion in
    1 / degrees (Abramowitz and Stegun, 26.7.5)."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = _NORMAL_975
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2
