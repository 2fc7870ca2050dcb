"""The client's timing error, calculated by hand from the times of both sides."""

from typing import Any

import pytest

from servegrid.analysis.client_error import client_columns
from servegrid.client.timing_error import TimingError, measure_timing_error
from servegrid.errors import RecordError
from servegrid.records import columns, parquet

MS = 1_000_000


def row(name: str, user: int, sent: int, *stamps: float, **other: Any) -> dict[str, Any]:
    """One request, due at 0. All times in ms."""
    return {
        "request_id": name,
        "user": user,
        "scheduled_ns": 0,
        "sent_ns": sent * MS,
        "first_token_ns": int(stamps[0] * MS) if stamps else None,
        "token_ns": [int(stamp * MS) for stamp in stamps],
        "error": None,
    } | other


ROWS = [row("a", 0, 1, 103, 124, 143), row("b", 1, 2, 104, 124.5, 150)]
READ = {"a": 2 * MS, "b": 5 * MS}
SENT = {
    "a": [102 * MS, 123 * MS, 143 * MS],  # the client is 1, 1 and 0 ms later
    "b": [104 * MS, 124 * MS, 144 * MS],  # the client is 0, 0.5 and 6 ms later
}


def timing_error(rows: list[dict[str, Any]]) -> TimingError:
    table = parquet.arrow_table(columns.REQUESTS, rows)
    return measure_timing_error(table, SENT, READ, ttft_s=0.1, cpu_s=0.03)


def test_client_times_are_compared_with_server_times() -> None:
    error = timing_error(ROWS)
    assert (error.requests, error.lost, error.token_events) == (2, 0, 6)
    # Arrivals: 0, 0, 0.5, 1, 1, 6; the 99th percentile lies at 4.95 steps of the five between.
    assert error.arrival_error_s_p50 == pytest.approx(0.00075)
    assert error.arrival_error_s_p99 == pytest.approx(0.001 + 0.95 * 0.005)
    # ttft: 102 and 102, each 2 ms more than configured. The server had read after 1 and 3 ms.
    assert error.ttft_error_s_p50 == pytest.approx(0.002)
    assert error.ttft_error_s_p99 == pytest.approx(0.002)
    assert error.reading_s_p50 == pytest.approx(0.002)
    assert error.reading_s_p99 == pytest.approx(0.001 + 0.99 * 0.002)
    # Between tokens, client and server: 21 and 21, 19 and 20; 20.5 and 20, 25.5 and 20.
    assert error.itl_error_s_p99 == pytest.approx(0.001 + 0.97 * 0.0045)
    assert error.send_lag_s_max == pytest.approx(0.002)
    assert error.cpu_s_per_1000_events == pytest.approx(5.0)
    assert error.events_per_s == pytest.approx(200.0)


@pytest.mark.parametrize(
    "broken",
    [
        row("b", 1, 2, error="reset: gone"),
        row("b", 1, 2, 104, 124),  # the server sent three
        row("c", 1, 2, 104),  # unknown to the server
    ],
)
def test_incomplete_requests_are_counted_as_lost_and_left_out(broken: dict[str, Any]) -> None:
    error = timing_error([ROWS[0], broken])
    assert (error.requests, error.lost, error.token_events) == (2, 1, 3)
    assert error.arrival_error_s_p50 == pytest.approx(0.001)


def test_no_complete_request_is_an_error() -> None:
    with pytest.raises(RecordError, match="the first error is: reset: gone"):
        timing_error([row("b", 1, 2, error="reset: gone")])


@pytest.mark.parametrize("check", [None, {"concurrency": 8, "error": "no connection"}])
def test_without_a_calibration_the_columns_are_null(check: dict[str, Any] | None) -> None:
    record = {"calibration": check, "client": {"window_ns": [0, 1], "token_chunks": 1}}
    assert set(client_columns(record).values()) == {None}
