"""Intervals against numbers from the definition of Student's t and worked out by hand."""

import math

import numpy as np
import pytest

from servegrid.analysis.intervals import interval, t_quantile


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (30, 2.042)])
def test_quantiles_are_those_of_any_table(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-4)


def test_three_trials() -> None:
    # Logarithms to base 10: 0, 1, 2. Mean 1, s 1, so that the half width is 4.302653 / sqrt(3).
    half = 4.302653 / math.sqrt(3)
    assert interval([1.0, 10.0, 100.0]) == pytest.approx((10 ** (1 - half), 10 ** (1 + half)))


@pytest.mark.parametrize("value", [2.0, 3.0, 0.1])
def test_trials_that_agree_leave_no_doubt_and_their_median_is_not_outside(value: float) -> None:
    low, high = interval([value, value]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((value, value))
    assert low <= value <= high


def test_trials_in_two_groups_have_no_interval_where_it_would_leave_out_their_median() -> None:
    # Logarithms to base 10: 0 five times, 1 four times. Mean 4/9, s 0.527, t 2.306 of 8 degrees:
    # from 0.039, above the median of 0. Of four and three with t 2.447 it is from -0.066.
    assert interval([1.0] * 5 + [10.0] * 4) is None
    low, _ = interval([1.0] * 4 + [10.0] * 3) or (0.0, 0.0)
    assert low == pytest.approx(10**-0.066, abs=1e-3)


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 1.0], [-1.0, 1.0]])
def test_where_nothing_can_be_said_nothing_is(values: list[float]) -> None:
    assert interval(values) is None


def test_it_holds_what_it_should_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(7)
    samples = np.exp(rng.normal(math.log(20.0), 0.1, size=(2000, 3)))
    held = sum(
        low <= 20.0 <= high
        for low, high in (interval(sample.tolist()) or (0.0, 0.0) for sample in samples)
    )
    # Binomial: 1900 of 2000, standard deviation 9.7.
    assert abs(held - 1900) < 4 * 9.7
