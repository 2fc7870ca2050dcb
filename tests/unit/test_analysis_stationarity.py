"""The stationary part of a load, on loads whose course is given."""

from collections.abc import Callable
from typing import Any

import pytest

from servegrid.analysis.stationarity import Window, window_of
from servegrid.records import columns, parquet
from servegrid.study.grid import Workload

MS = 1_000_000
STEADY = Workload("closed_loop", 2, 31, 4, 80)
POISSON = Workload("poisson", None, 31, 4, 60, request_rate=10.0)

Latency = Callable[[int], float]
"""Of a user's request with that number, in ms."""


def closed_loop(requests_per_user: int, latency: Latency, users: int = 2) -> Any:
    """Users who send again at once; user 1 is slower by half a ms."""
    rows = []
    for user in range(users):
        now = 0.0
        for number in range(requests_per_user):
            took = latency(number) + user / 2
            rows.append(
                {
                    "user": user,
                    "scheduled_ns": int(now * MS),
                    "sent_ns": int(now * MS),
                    "done_ns": int((now + took) * MS),
                }
            )
            now += took
    return parquet.arrow_table(columns.REQUESTS, rows)


def open_loop(latency: Latency, requests: int = 60) -> Any:
    """Due every 100 ms, sent 1 ms later."""
    rows = [
        {
            "user": 0,
            "scheduled_ns": number * 100 * MS,
            "sent_ns": (number * 100 + 1) * MS,
            "done_ns": int((number * 100 + latency(number)) * MS),
        }
        for number in range(requests)
    ]
    return parquet.arrow_table(columns.REQUESTS, rows)


def test_nothing_but_the_first_answers_and_the_end_is_cut_of_a_load_that_never_changes() -> None:
    window = window_of(closed_loop(40, lambda number: 100.0), STEADY)
    # User 1 had its first answer after 100.5 ms; the last request was sent by it after 39 of them.
    assert window == Window(int(100.5 * MS), int(39 * 100.5 * MS))


def test_latencies_that_are_all_but_alike_are_not_cut_where_chance_has_them_least_apart() -> None:
    # As measured on a scripted server: all alike from one place on, 2% apart at most before it.
    window = window_of(closed_loop(40, lambda number: 100.0 + number % 3 * (number < 24)), STEADY)
    assert isinstance(window, Window)
    assert window.start_ns < 110 * MS


def test_a_start_transient_is_cut() -> None:
    window = window_of(closed_loop(40, lambda number: 400.0 if number < 6 else 100.0), STEADY)
    assert isinstance(window, Window)
    # Five slow answers of each user are left after its first: all ten must go, and no batch more.
    assert 2400 * MS <= window.start_ns <= 2750 * MS


@pytest.mark.parametrize("grows", [1.0, -1.0])
def test_a_load_that_goes_on_to_change_has_no_steady_state(grows: float) -> None:
    told = window_of(closed_loop(40, lambda number: 200.0 + 3 * grows * number), STEADY)
    assert isinstance(told, str)
    assert "latency" in told


def test_an_open_loop_that_cannot_keep_up_has_no_steady_state() -> None:
    kept_up = window_of(open_loop(lambda number: 50.0 + number % 3), POISSON)
    assert kept_up == Window(0, 5900 * MS)
    told = window_of(open_loop(lambda number: 50.0 + 20 * number), POISSON)
    assert isinstance(told, str)


def test_latencies_of_an_open_loop_count_from_when_requests_were_due() -> None:
    # Sent ever later, answered 50 ms after that: the server looks steady, its queue is not.
    rows = open_loop(lambda number: 50.0 + 20 * number).to_pylist()
    late = [row | {"sent_ns": row["done_ns"] - 50 * MS} for row in rows]
    assert isinstance(window_of(parquet.arrow_table(columns.REQUESTS, late), POISSON), str)


def test_a_difference_that_chance_makes_is_no_drift() -> None:
    # 0.4 s once in five, but not in the same places: halves of 35 differ by more than a tenth.
    slow = {1, 7, 12, 18, 23, 25, 26, 34, 36, 38}
    window = window_of(closed_loop(40, lambda number: 400.0 if number in slow else 100.0), STEADY)
    assert isinstance(window, Window)


def test_too_few_requests_tell_nothing() -> None:
    # Of 12 per user the first is cut, and the last, which ends when fewer are in flight.
    assert isinstance(window_of(closed_loop(12, lambda number: 100.0), STEADY), Window)
    told = window_of(closed_loop(11, lambda number: 100.0), STEADY)
    assert told == (
        "18 requests ended between the start transient and the end, and it takes 20 to tell"
    )


def test_failures_are_left_out() -> None:
    rows = closed_loop(40, lambda number: 100.0).to_pylist()
    failed = [row | {"error": "reset: gone"} for row in rows]
    assert window_of(parquet.arrow_table(columns.REQUESTS, failed), STEADY) == (
        "no request was served"
    )
