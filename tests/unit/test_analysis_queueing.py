"""How many users a deployment carries, against hand calculation and a simulation."""

import heapq
import math
import random

import pytest

from servegrid.analysis.queueing import (
    Curve,
    in_flight,
    isotonic_fit,
    max_in_flight,
    mean_in_flight,
    requests_per_s,
    slo_probability,
    users_carried,
)

MIXTRAL = Curve((1, 2, 4, 8, 16, 32, 64, 128), (3.6, 3.5, 3.5, 4.0, 4.9, 7.6, 11.6, 21.5))
"""The article's Mixtral 8x7B AWQ on two A100, prompts of 119 tokens: seconds per 100 tokens."""


def test_the_curve_is_linear_between_what_was_measured_and_ends_there() -> None:
    assert MIXTRAL.at(1) == 3.6
    assert MIXTRAL.at(24) == pytest.approx((4.9 + 7.6) / 2)
    assert MIXTRAL.at(128) == 21.5
    with pytest.raises(ValueError, match="129 requests in flight were not measured"):
        MIXTRAL.at(129)
    assert Curve((4, 8), (1.0, 2.0)).each() == [1.0, 1.0, 1.0, 1.0, 1.25, 1.5, 1.75, 2.0]


def test_what_falls_is_pooled_with_what_it_falls_below() -> None:
    assert isotonic_fit([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert isotonic_fit([3.6, 3.5, 3.5, 4.0]) == pytest.approx([10.6 / 3] * 3 + [4.0])
    # 4 and 1 pool to 2.5, which is under 3: all three are 8/3.
    assert isotonic_fit([3.0, 4.0, 1.0]) == pytest.approx([8 / 3] * 3)


def test_the_most_in_flight_within_a_limit() -> None:
    # 100 tokens at 5 per second may take 20 s: 64 + 64 (20 - 11.6) / 9.9 = 118.3.
    assert max_in_flight(MIXTRAL.each(), 20.0) == 118
    assert max_in_flight(MIXTRAL.each(), 30.0) == 128
    assert max_in_flight(MIXTRAL.each(), 1.0) == 0


def test_one_request_at_a_time_is_the_model_of_the_textbooks() -> None:
    # Two users who think 1 s each, a server that takes 1 s and 2 s: births 2 and 1, deaths 1 and 1.
    assert in_flight([1.0, 2.0], 2, 1.0) == pytest.approx([1 / 5, 2 / 5, 2 / 5])
    assert mean_in_flight([1.0, 2.0], 2, 1.0) == pytest.approx(1.2)
    assert requests_per_s([1.0, 2.0], 2, 1.0) == pytest.approx(0.8)


def test_above_what_was_measured_the_rate_stays() -> None:
    # Known up to one in flight, 1 s: the second waits; deaths are 1 and 1, births 2 and 1.
    assert in_flight([1.0], 2, 1.0) == pytest.approx([1 / 5, 2 / 5, 2 / 5])
    # Its request keeps a limit of 1 s only if it comes alone: the other user thinks, 1 of 2.
    assert slo_probability([1.0], [(1, 1.0)], 2, 1.0) == pytest.approx(0.5)


def test_each_kind_of_request_has_a_limit_of_its_own() -> None:
    # With two users one comes alone in half of the cases: half of the fifth that must be alone, and
    # all of those that need not.
    assert slo_probability([1.0, 1.0], [(1, 0.2), (2, 0.8)], 2, 1.0) == pytest.approx(0.9)


def test_the_published_deployment_carries_437_users_who_think_for_a_minute() -> None:
    # Worked out before by other code, from the same formula.
    seconds = MIXTRAL.each()
    assert users_carried(seconds, [(118, 1.0)], 60.0, 0.95) == 437
    assert slo_probability(seconds, [(118, 1.0)], 437, 60.0) == pytest.approx(0.954, abs=0.0005)
    assert mean_in_flight(seconds, 437, 60.0) == pytest.approx(91.8, abs=0.05)
    # What is sent per second, by those who think, is what is completed: the mean of n / T(n), with
    # the rate of the last above 128.
    chances = in_flight(seconds, 437, 60.0)
    rates = (min(n, 128) / MIXTRAL.at(min(n, 128)) for n in range(1, 438))
    completed = sum(p * rate for p, rate in zip(chances[1:], rates, strict=True))
    assert requests_per_s(seconds, 437, 60.0) == pytest.approx(completed)


def test_a_deployment_that_is_too_slow_alone_carries_nobody() -> None:
    assert users_carried([30.0, 31.0], [(0, 1.0)], 60.0, 0.95) == 0


def test_few_users_are_carried_whatever_they_do() -> None:
    # With as many users as may be in flight, all of them are served in time.
    assert users_carried([1.0, 1.0, 9.0], [(2, 1.0)], 1e-6, 0.95) == 2


def test_a_simulation_agrees() -> None:
    seconds, users, think_time_s = MIXTRAL.each(), 437, 60.0
    share = simulated(seconds, users, think_time_s, allowed=118, requests=1_000_000, seed=0)
    assert share == pytest.approx(
        slo_probability(seconds, [(118, 1.0)], users, think_time_s), abs=0.01
    )


def simulated(
    seconds: list[float], users: int, think_time_s: float, allowed: int, requests: int, seed: int
) -> float:
    """The share of requests that come when fewer than `allowed` are in flight.

    Users think for exponential times; each request asks for one unit of work, and all in flight
    get work at equal speed.
    """
    chances = random.Random(seed)
    thinking = [chances.expovariate(1 / think_time_s) for _ in range(users)]
    heapq.heapify(thinking)
    done: list[float] = []  # how much work each in flight has been promised to have had at its end
    now, work, came, kept = 0.0, 0.0, 0, 0
    while came < requests:
        speed = 1 / seconds[min(len(done), len(seconds)) - 1] if done else 0.0
        if len(done) > len(seconds):
            speed = len(seconds) / seconds[-1] / len(done)
        ends = now + (done[0] - work) / speed if done else math.inf
        if ends <= thinking[0]:
            now, work = ends, heapq.heappop(done)
            heapq.heappush(thinking, now + chances.expovariate(1 / think_time_s))
            continue
        came_at = heapq.heappop(thinking)
        work += (came_at - now) * speed
        now = came_at
        # Of the first thousand the system is still filling.
        came += 1
        if came > 1000:
            kept += len(done) < allowed
        heapq.heappush(done, work + 1.0)
    return kept / (requests - 1000)
