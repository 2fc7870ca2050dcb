"""How far the load client's times are off in a cell, by the self-check on its node. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def columns_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The columns of `columns.CELLS` that say how far the client distorts on the cell's node.

    They are of the self-check before the sweep, and the head-room compares it with this cell. All
    are None where there was no self-check, as beside an emulated engine, or where it has failed.
    """
    check = record["self_check"] or {}
    return {
        "client_arrival_error_s_p99": check.get("arrival_error_s_p99"),
        "client_ttft_error_s_p50": check.get("ttft_error_s_p50"),
        "client_itl_error_s_p99": check.get("itl_error_s_p99"),
        "client_headroom": client_headroom(record),
    }


def client_headroom(record: Mapping[str, Any]) -> float | None:
    """How many times as many token events per second the client could have taken in.

    With as many processes as it had, none of them pausing; None where no self-check tells.
    """
    check, client = record["self_check"] or {}, record["client"]
    if "cpu_s_per_1000_events" not in check or not client["token_chunks"]:
        return None
    start_ns, end_ns = client["window_ns"]
    possible = client["processes"] * 1000 / check["cpu_s_per_1000_events"]
    return float(possible * (end_ns - start_ns) / 1e9 / client["token_chunks"])
