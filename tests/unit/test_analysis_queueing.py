"""The number of users agrees with calculations by hand and with a simulation."""

import heapq
import math
import random

import pytest

from servegrid.analysis.queueing import (
    Curve,
    in_flight_distribution,
    isotonic_fit,
    max_in_flight,
    mean_in_flight,
    open_distribution,
    open_mean_in_flight,
    rate_carried,
    requests_per_s,
    slo_probability,
    split_dispersion,
    users_carried,
)

MIXTRAL = Curve((1, 2, 4, 8, 16, 32, 64, 128), (3.6, 3.5, 3.5, 4.0, 4.9, 7.6, 11.6, 21.5))
"""Seconds per 100 tokens from the article: Mixtral 8x7B AWQ on two A100, prompts of 119 tokens."""


def test_a_curve_is_linear_between_measured_points_and_ends_at_the_last() -> None:
    assert MIXTRAL.at(1) == 3.6
    assert MIXTRAL.at(24) == pytest.approx((4.9 + 7.6) / 2)
    assert MIXTRAL.at(128) == 21.5
    with pytest.raises(ValueError, match="129 requests in flight were not measured"):
        MIXTRAL.at(129)
    assert Curve((4, 8), (1.0, 2.0)).interpolated() == [1.0, 1.0, 1.0, 1.0, 1.25, 1.5, 1.75, 2.0]


def test_the_isotonic_fit_pools_values_that_fall() -> None:
    assert isotonic_fit([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert isotonic_fit([3.6, 3.5, 3.5, 4.0]) == pytest.approx([10.6 / 3] * 3 + [4.0])
    # 4 and 1 are pooled to 2.5, which is less than 3, so all three are pooled to 8/3.
    assert isotonic_fit([3.0, 4.0, 1.0]) == pytest.approx([8 / 3] * 3)


def test_the_maximum_in_flight_within_a_limit() -> None:
    # 100 tokens at 5 tokens/s take 20 s: 64 + 64 (20 - 11.6) / 9.9 = 118.3.
    assert max_in_flight(MIXTRAL.interpolated(), 20.0) == 118
    assert max_in_flight(MIXTRAL.interpolated(), 30.0) == 128
    assert max_in_flight(MIXTRAL.interpolated(), 1.0) == 0


def test_a_server_for_one_request_at_a_time_is_the_machine_repairmans_model() -> None:
    # Two users think for 1 s, requests take 1 s and 2 s: births 2 and 1, deaths 1 and 1.
    assert in_flight_distribution([1.0, 2.0], 2, 1.0) == pytest.approx([1 / 5, 2 / 5, 2 / 5])
    assert mean_in_flight([1.0, 2.0], 2, 1.0) == pytest.approx(1.2)
    assert requests_per_s([1.0, 2.0], 2, 1.0) == pytest.approx(0.8)


def test_above_the_measured_range_the_throughput_stays_the_same() -> None:
    # Measured for one in flight: 1 s. A second request waits: births 2 and 1, deaths 1 and 1.
    assert in_flight_distribution([1.0], 2, 1.0) == pytest.approx([1 / 5, 2 / 5, 2 / 5])
    # A request meets a limit of 1 s only if the other user thinks, in 1 of 2 cases.
    assert slo_probability([1.0], [(1, 1.0)], 2, 1.0) == pytest.approx(0.5)


def test_each_kind_of_request_has_a_separate_limit() -> None:
    # A request is alone in half of the cases: half of the 20% that must be alone meet the SLO, and
    # all of the others.
    assert slo_probability([1.0, 1.0], [(1, 0.2), (2, 0.8)], 2, 1.0) == pytest.approx(0.9)


def test_the_published_deployment_carries_437_users_who_think_for_a_minute() -> None:
    # The expected values come from other code for the same formula.
    seconds = MIXTRAL.interpolated()
    assert users_carried(seconds, [(118, 1.0)], 60.0, 0.95) == 437
    assert slo_probability(seconds, [(118, 1.0)], 437, 60.0) == pytest.approx(0.954, abs=0.0005)
    assert mean_in_flight(seconds, 437, 60.0) == pytest.approx(91.8, abs=0.05)
    # Thinking users send as many requests per second as are completed: the mean of n / T(n), with
    # the rate at 128 for n above 128.
    probabilities = in_flight_distribution(seconds, 437, 60.0)
    rates = (min(n, 128) / MIXTRAL.at(min(n, 128)) for n in range(1, 438))
    completed = sum(p * rate for p, rate in zip(probabilities[1:], rates, strict=True))
    assert requests_per_s(seconds, 437, 60.0) == pytest.approx(completed)


def test_a_deployment_that_is_too_slow_for_one_request_carries_no_users() -> None:
    assert users_carried([30.0, 31.0], [(0, 1.0)], 60.0, 0.95) == 0


def test_users_are_carried_without_think_time_if_all_may_be_in_flight() -> None:
    # Two requests in flight meet the SLO, so two users always do.
    assert users_carried([1.0, 1.0, 9.0], [(2, 1.0)], 1e-6, 0.95) == 2


def test_the_slo_probability_agrees_with_a_simulation() -> None:
    seconds, users, think_time_s = MIXTRAL.interpolated(), 437, 60.0
    share = simulated(seconds, users, think_time_s, allowed=118, requests=1_000_000, seed=0)
    assert share == pytest.approx(
        slo_probability(seconds, [(118, 1.0)], users, think_time_s), abs=0.01
    )


def simulated(
    seconds: list[float], users: int, think_time_s: float, allowed: int, requests: int, seed: int
) -> float:
    """The share of requests that arrive when fewer than `allowed` are in flight.

    Think times are exponential. Each request is one unit of work, and all requests in flight
    progress at the same speed.
    """
    generator = random.Random(seed)
    thinking = [generator.expovariate(1 / think_time_s) for _ in range(users)]
    heapq.heapify(thinking)
    ends_at: list[float] = []  # the value of `work` at which each request in flight is complete
    now, work, arrivals, met = 0.0, 0.0, 0, 0
    while arrivals < requests:
        speed = 1 / seconds[min(len(ends_at), len(seconds)) - 1] if ends_at else 0.0
        if len(ends_at) > len(seconds):
            speed = len(seconds) / seconds[-1] / len(ends_at)
        next_end = now + (ends_at[0] - work) / speed if ends_at else math.inf
        if next_end <= thinking[0]:
            now, work = next_end, heapq.heappop(ends_at)
            heapq.heappush(thinking, now + generator.expovariate(1 / think_time_s))
            continue
        arrival = heapq.heappop(thinking)
        work += (arrival - now) * speed
        now = arrival
        arrivals += 1
        if arrivals > 1000:  # until then, the system fills up
            met += len(ends_at) < allowed
        heapq.heappush(ends_at, work + 1.0)
    return met / (requests - 1000)


def test_an_open_loop_is_known_from_queueing_theory() -> None:
    # One request at a time (M/M/1) at a load of 1/4: p(n) = 3/4 × 1/4^n, 1/3 in flight on average.
    assert open_distribution([1.0], 0.25) == pytest.approx([3 / 4, 1 / 4])
    assert open_mean_in_flight([1.0], 0.25) == pytest.approx(1 / 3)
    # Two at a time (M/M/2) at a load of 1/2: Erlang's C gives 1/3 that wait, and 4/3 in the system.
    assert open_distribution([1.0, 1.0], 1.0) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert open_mean_in_flight([1.0, 1.0], 1.0) == pytest.approx(4 / 3)
    # As many as come (M/G/∞): a Poisson distribution, here with the mean 5 × 2.
    seen = open_distribution([2.0] * 200, 5.0)
    assert seen[10] == pytest.approx(math.exp(-10) * 10**10 / math.factorial(10))
    assert open_mean_in_flight([2.0] * 200, 5.0) == pytest.approx(10)


def test_without_a_steady_state_all_requests_wait() -> None:
    assert open_distribution([1.0, 1.0], 2.0) == [0.0, 0.0, 1.0]
    assert open_mean_in_flight([1.0, 1.0], 2.0) == math.inf
    assert open_distribution([1.0], 0.0) == [1.0, 0.0]


def test_the_rate_that_a_server_carries() -> None:
    # A request meets a limit of 1 s if it finds none: in 1 - rate of the cases.
    assert rate_carried([1.0], [(1, 1.0)], 0.75) == pytest.approx(0.25)
    # A tenth never does, so 0.9 (1 - rate) must be 0.75.
    assert rate_carried([1.0], [(1, 0.9), (0, 0.1)], 0.75) == pytest.approx(1 / 6)
    assert rate_carried([1.0], [(1, 0.75), (0, 0.25)], 0.75) == 0
    assert rate_carried([1.0], [(0, 1.0)], 0.75) == 0


def test_many_users_who_think_for_long_are_a_poisson_process() -> None:
    seconds = MIXTRAL.interpolated()
    closed = in_flight_distribution(seconds, 400_000, 400_000 / 4.0)[:100]
    assert open_distribution(seconds, 4.0)[:100] == pytest.approx(closed, rel=0.01, abs=1e-5)


def test_bursty_arrivals_are_groups() -> None:
    # Two at a time, and groups of two: one group at a time, which is M/M/1 at a rate of 1/4.
    assert rate_carried([1.0, 1.0], [(2, 1.0)], 0.75, dispersion=2.0) == pytest.approx(2 * 0.25)
    assert open_mean_in_flight([1.0, 1.0], 0.5, dispersion=2.0) == pytest.approx(2 / 3)
    # 1.5 requests take 2 s, between 1 s and 3 s.
    assert open_mean_in_flight([1.0, 3.0], 0.3, 1.5) == pytest.approx(1.5 * 0.4 / 0.6)
    # Of a group of two, half meets the SLO if it finds no other one: half of 1 - rate / 2 in all.
    assert rate_carried([1.0, 1.0], [(1, 1.0)], 0.75, dispersion=2.0) == 0
    assert rate_carried([1.0, 1.0], [(1, 1.0)], 0.375, dispersion=2.0) == pytest.approx(0.5)
    # Measured for three in flight, which all meet the SLO: one group of two, and no half of one.
    assert rate_carried([1.0] * 3, [(3, 1.0)], 0.75, dispersion=2.0) == pytest.approx(0.5)
    # Measured for one in flight: a group of two takes 2 s.
    assert open_mean_in_flight([1.0], 0.5, dispersion=2.0) == pytest.approx(2.0)
    assert open_mean_in_flight([1.0], 1.0, dispersion=2.0) == math.inf
    assert open_mean_in_flight([1.0], 0.0, dispersion=2.0) == 0
    assert split_dispersion(3.0, 4) == 1.5
