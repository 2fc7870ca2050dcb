"""Intervals against numbers from the definition of Student's t and worked out by hand."""

import math

import numpy as np
import pytest

from servegrid.intervals import interval, quantile


def distribution(t: float, degrees: int) -> float:
    """P(T <= t), the density integrated numerically from its definition."""
    x = np.linspace(0.0, t, 200_001)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    return 0.5 + math.exp(log_scale) / math.sqrt(degrees * math.pi) * float(
        np.trapezoid(density, x)
    )


@pytest.mark.parametrize("degrees", [*range(1, 31), 31, 40, 120, 1000])
def test_quantiles_leave_two_and_a_half_percent_above(degrees: int) -> None:
    assert distribution(quantile(degrees), degrees) == pytest.approx(0.975, abs=5e-5)


def test_three_trials() -> None:
    # Logarithms to base 10: 0, 1, 2. Mean 1, s 1, so that the half width is 4.303 / sqrt(3).
    half = 4.303 / math.sqrt(3)
    assert interval([1.0, 10.0, 100.0]) == pytest.approx((10 ** (1 - half), 10 ** (1 + half)))


def test_two_trials_that_agree_leave_no_doubt() -> None:
    assert interval([2.0, 2.0]) == pytest.approx((2.0, 2.0))


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
