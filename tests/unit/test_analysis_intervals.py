"""Intervals agree with tables of Student's t and with calculations by hand."""

import math

import numpy as np
import pytest

from servegrid.analysis.intervals import interval, t_quantile


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (30, 2.042)])
def test_quantiles_agree_with_a_table(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-4)


def test_three_trials() -> None:
    # Logarithms to base 10: 0, 1, 2. Mean 1, s 1, so the half width is 4.302653 / sqrt(3).
    half = 4.302653 / math.sqrt(3)
    assert interval([1.0, 10.0, 100.0]) == pytest.approx((10 ** (1 - half), 10 ** (1 + half)))


@pytest.mark.parametrize("value", [2.0, 3.0, 0.1])
def test_equal_trials_have_an_interval_that_contains_their_median(value: float) -> None:
    low, high = interval([value, value]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((value, value))
    assert low <= value <= high


def test_there_is_no_interval_if_it_would_not_contain_the_median() -> None:
    # Logarithms to base 10: five times 0, four times 1. Mean 4/9, s 0.527, t(8) = 2.306: the
    # interval starts at 0.039, above the median 0. With four and three, t(6) = 2.447: at -0.066.
    assert interval([1.0] * 5 + [10.0] * 4) is None
    low, _ = interval([1.0] * 4 + [10.0] * 3) or (0.0, 0.0)
    assert low == pytest.approx(10**-0.066, abs=1e-3)


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 1.0], [-1.0, 1.0]])
def test_too_few_or_non_positive_values_have_no_interval(values: list[float]) -> None:
    assert interval(values) is None


def test_95_percent_of_the_intervals_contain_the_true_median() -> None:
    rng = np.random.default_rng(7)
    samples = np.exp(rng.normal(math.log(20.0), 0.1, size=(2000, 3)))
    hits = sum(
        low <= 20.0 <= high
        for low, high in (interval(sample.tolist()) or (0.0, 0.0) for sample in samples)
    )
    # Binomial: 1900 of 2000, standard deviation 9.7.
    assert abs(hits - 1900) < 4 * 9.7
