"""The stationary part of workloads with given latencies."""

from collections.abc import Callable
from typing import Any

import pytest

from servegrid.analysis.stationarity import Window, find_window
from servegrid.records import columns, parquet
from servegrid.study.grid import Workload

MS = 1_000_000
CLOSED_LOOP = Workload("closed_loop", 2, 31, 4, 80)
POISSON = Workload("poisson", None, 31, 4, 60, request_rate=10.0)

Latency = Callable[[int], float]
"""The latency in ms of a user's request, by its number."""


def closed_loop(requests_per_user: int, latency: Latency, users: int = 2) -> Any:
    """Users without think time; the requests of user 1 take half a ms longer."""
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
    """Requests that are due every 100 ms and sent 1 ms later."""
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


def test_a_constant_latency_is_cut_only_after_the_first_responses_and_at_the_end() -> None:
    window = find_window(closed_loop(40, lambda number: 100.0), CLOSED_LOOP)
    # The first response to user 1 took 100.5 ms. It sent the last request after 39 responses.
    assert window == Window(int(100.5 * MS), int(39 * 100.5 * MS))


def test_almost_equal_latencies_are_not_cut() -> None:
    # As measured with a mock server: differences of up to 2%, then none.
    window = find_window(
        closed_loop(40, lambda number: 100.0 + number % 3 * (number < 24)), CLOSED_LOOP
    )
    assert isinstance(window, Window)
    assert window.start_ns < 110 * MS


def test_a_start_transient_is_cut() -> None:
    window = find_window(
        closed_loop(40, lambda number: 400.0 if number < 6 else 100.0), CLOSED_LOOP
    )
    assert isinstance(window, Window)
    # After the first response, each user has five slow ones: ten to cut, plus one batch at most.
    assert 2400 * MS <= window.start_ns <= 2750 * MS


@pytest.mark.parametrize("grows", [1.0, -1.0])
def test_a_latency_that_keeps_changing_has_no_steady_state(grows: float) -> None:
    reason = find_window(closed_loop(40, lambda number: 200.0 + 3 * grows * number), CLOSED_LOOP)
    assert isinstance(reason, str)
    assert "latency" in reason


def test_a_poisson_workload_above_the_capacity_has_no_steady_state() -> None:
    window = find_window(open_loop(lambda number: 50.0 + number % 3), POISSON)
    # A fifth of the arrivals come before it: the twelfth request ends 52 ms after its due time.
    assert window == Window(1152 * MS, 5900 * MS)
    reason = find_window(open_loop(lambda number: 50.0 + 20 * number), POISSON)
    assert isinstance(reason, str)


def test_latencies_of_poisson_start_at_the_due_time() -> None:
    # Requests are sent later and later, and answered within 50 ms: the server looks stationary.
    rows = open_loop(lambda number: 50.0 + 20 * number).to_pylist()
    late = [row | {"sent_ns": row["done_ns"] - 50 * MS} for row in rows]
    assert isinstance(find_window(parquet.arrow_table(columns.REQUESTS, late), POISSON), str)


def test_a_difference_by_chance_is_not_drift() -> None:
    # One in four takes 0.4 s, unevenly spread: the means of the halves differ by more than 10%.
    slow = {1, 7, 12, 18, 23, 25, 26, 34, 36, 38}
    window = find_window(
        closed_loop(40, lambda number: 400.0 if number in slow else 100.0), CLOSED_LOOP
    )
    assert isinstance(window, Window)


def test_too_few_requests_have_no_steady_state() -> None:
    # Of 12 per user, the first and the last are cut. The last ends when fewer are in flight.
    assert isinstance(find_window(closed_loop(12, lambda number: 100.0), CLOSED_LOOP), Window)
    reason = find_window(closed_loop(11, lambda number: 100.0), CLOSED_LOOP)
    assert reason == (
        "18 requests ended between the initial transient and the end; at least 20 are needed"
    )


def test_failed_requests_do_not_count() -> None:
    rows = closed_loop(40, lambda number: 100.0).to_pylist()
    failed = [row | {"error": "reset: gone"} for row in rows]
    assert find_window(parquet.arrow_table(columns.REQUESTS, failed), CLOSED_LOOP) == (
        "no request was served"
    )


@pytest.mark.parametrize(("served", "left"), [(30, 0), (40, 1), (48, 9), (49, None)])
def test_an_open_loop_whose_server_died_in_the_warm_up_has_no_steady_state(
    served: int, left: int | None
) -> None:
    # 200 requests, the last one due after 19.9 s, so the warm-up ends after 3.98 s. A request takes
    # 100 ms: number 39 is the first one that ends later. Those after the last served one fail.
    rows = open_loop(lambda number: 100.0, requests=200).to_pylist()
    rows[served:] = [row | {"error": "connect: refused"} for row in rows[served:]]
    found = find_window(parquet.arrow_table(columns.REQUESTS, rows), POISSON)
    if left is None:
        assert isinstance(found, Window)
    else:
        assert found == (
            f"{left} requests ended between the first 20% of the arrivals and the end; at least 10 "
            "are needed"
        )
