"""What the client distorts, worked out by hand from stamps of both sides."""

from typing import Any

import pytest

from servegrid.analysis.client_error import columns_of
from servegrid.client.distortion import Distortion, distortion_of
from servegrid.errors import RecordError
from servegrid.records import columns, parquet

MS = 1_000_000


def row(name: str, user: int, sent: int, *stamps: float, **other: Any) -> dict[str, Any]:
    """All times in ms; due at 0."""
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
    "a": [102 * MS, 123 * MS, 143 * MS],  # seen 1, 1 and 0 ms later
    "b": [104 * MS, 124 * MS, 144 * MS],  # seen 0, 0.5 and 6 ms later
}


def told_of(rows: list[dict[str, Any]]) -> Distortion:
    table = parquet.table_of(columns.REQUESTS, rows)
    return distortion_of(table, SENT, READ, ttft_s=0.1, cpu_s=0.03)


def test_the_clients_times_against_the_servers() -> None:
    told = told_of(ROWS)
    assert (told.requests, told.lost, told.token_events) == (2, 0, 6)
    # Arrivals: 0, 0, 0.5, 1, 1, 6; the 99th percentile lies at 4.95 steps of the five between.
    assert told.arrival_error_s_p50 == pytest.approx(0.00075)
    assert told.arrival_error_s_p99 == pytest.approx(0.001 + 0.95 * 0.005)
    # ttft: 102 and 102, each 2 ms more than asked for. The server had read after 1 and 3 ms.
    assert told.ttft_error_s_p50 == pytest.approx(0.002)
    assert told.ttft_error_s_p99 == pytest.approx(0.002)
    assert told.reading_s_p50 == pytest.approx(0.002)
    assert told.reading_s_p99 == pytest.approx(0.001 + 0.99 * 0.002)
    # Between tokens: 21 for 21, 19 for 20; 20.5 for 20, 25.5 for 20.
    assert told.itl_error_s_p99 == pytest.approx(0.001 + 0.97 * 0.0045)
    assert told.send_lag_s_max == pytest.approx(0.002)
    assert told.cpu_s_per_1000_events == pytest.approx(5.0)
    assert told.events_per_s == pytest.approx(200.0)


@pytest.mark.parametrize(
    "broken",
    [
        row("b", 1, 2, error="reset: gone"),
        row("b", 1, 2, 104, 124),  # three were sent
        row("c", 1, 2, 104),  # unknown to the server
    ],
)
def test_what_was_lost_is_counted_and_left_out(broken: dict[str, Any]) -> None:
    told = told_of([ROWS[0], broken])
    assert (told.requests, told.lost, told.token_events) == (2, 1, 3)
    assert told.arrival_error_s_p50 == pytest.approx(0.001)


def test_where_all_is_lost_nothing_is_told() -> None:
    with pytest.raises(RecordError, match="the first error is: reset: gone"):
        told_of([row("b", 1, 2, error="reset: gone")])


@pytest.mark.parametrize("check", [None, {"concurrency": 8, "error": "no connection"}])
def test_without_a_self_check_nothing_is_known(check: dict[str, Any] | None) -> None:
    record = {"self_check": check, "client": {"window_ns": [0, 1], "token_chunks": 1}}
    assert set(columns_of(record).values()) == {None}
