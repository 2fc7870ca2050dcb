"""The client timing error of a cell, from the calibration on its node. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def client_columns(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The columns of `columns.CELLS` about the client timing error on the cell's node.

    The errors are those of the calibration before the engine started. All values are None if there
    was no calibration, as with an emulated engine, or if it failed.
    """
    calibration = record["calibration"] or {}
    return {
        "client_arrival_error_s_p99": calibration.get("arrival_error_s_p99"),
        "client_ttft_error_s_p50": calibration.get("ttft_error_s_p50"),
        "client_itl_error_s_p99": calibration.get("itl_error_s_p99"),
        "client_headroom": client_headroom(record),
    }


def client_headroom(record: Mapping[str, Any]) -> float | None:
    """Token events per second that the client could receive / those that it received in this cell.

    The maximum assumes that all processes of the client work without a pause. None if there is no
    successful calibration, or if the cell received no chunk, as when it was not run.
    """
    calibration, client = record["calibration"] or {}, record["client"]
    if "cpu_s_per_1000_events" not in calibration or not client.get("token_chunks"):
        return None
    start_ns, end_ns = client["window_ns"]
    maximum = client["processes"] * 1000 / calibration["cpu_s_per_1000_events"]
    return float(maximum * (end_ns - start_ns) / 1e9 / client["token_chunks"])
