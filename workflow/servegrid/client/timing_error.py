"""The load client's timing error, from a measurement of a mock server with known times. Pure.

The mock server logs when it read each request and when it sent each chunk. The client's times are
compared with these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from servegrid.errors import RecordError

_Errors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TimingError:
    """The client's timing error in one measurement. Times in s; errors are absolute values.

    `requests`: requests sent. `lost`: those that failed or lack a chunk that the server sent; the
    other values leave them out. `token_events`: chunks with tokens.

    - `arrival_error_s_*`: arrival of a chunk at the client, minus the time the server sent it
    - `ttft_error_s_*`: time to first token at the client, minus the server's configured one
    - `reading_s_*`: from the client sending a request until the server has read it. This part of
      the ttft error is the server's: it reads simultaneous requests one after another
    - `itl_error_s_p99`: time between two chunks at the client, minus the time between the
      server's two sends; None if no request has two chunks
    - `send_lag_s_max`: from the time a request is due until it is sent
    - `cpu_s_per_1000_events`: CPU time of all client processes during the measurement, per 1000
      token events
    """

    requests: int
    lost: int
    token_events: int
    arrival_error_s_p50: float
    arrival_error_s_p99: float
    ttft_error_s_p50: float
    ttft_error_s_p99: float
    reading_s_p50: float
    reading_s_p99: float
    itl_error_s_p99: float | None
    send_lag_s_max: float
    cpu_s_per_1000_events: float

    @property
    def events_per_s(self) -> float:
        """Token events per second that one client process can handle."""
        return 1000 / self.cpu_s_per_1000_events


def measure_timing_error(
    requests: pa.Table,
    sent: Mapping[str, Sequence[int]],
    read: Mapping[str, int],
    ttft_s: float,
    cpu_s: float,
) -> TimingError:
    """Compare `requests`, one row of `columns.REQUESTS` per request, with the server's log.

    `sent` and `read` are the server's log by request, in ns of CLOCK_MONOTONIC: when it sent each
    chunk, and when it had read the request. `ttft_s` is the server's configured time to first
    token. `cpu_s` is the client's CPU time during the measurement. Raises RecordError if no
    request is complete.
    """
    rows = requests.to_pylist()
    complete = [row for row in rows if _is_complete(row, sent)]
    if not complete:
        first = next((row["error"] for row in rows if row["error"]), "none failed")
        raise RecordError(
            f"None of {len(rows)} requests got all chunks that the mock server sent; the first "
            f"error is: {first}"
        )
    pairs = [(_ns(row["token_ns"]), _ns(sent[row["request_id"]])) for row in complete]
    arrival = _errors([client_ns - server_ns for client_ns, server_ns in pairs])
    itl = _errors([np.diff(client_ns) - np.diff(server_ns) for client_ns, server_ns in pairs])
    ttft = _errors([_ns([row["first_token_ns"] - row["sent_ns"] for row in complete])], ttft_s)
    reading = _errors([_ns([read[row["request_id"]] - row["sent_ns"] for row in complete])])
    return TimingError(
        requests=len(rows),
        lost=len(rows) - len(complete),
        token_events=arrival.size,
        arrival_error_s_p50=_percentile(arrival, 50),
        arrival_error_s_p99=_percentile(arrival, 99),
        ttft_error_s_p50=_percentile(ttft, 50),
        ttft_error_s_p99=_percentile(ttft, 99),
        reading_s_p50=_percentile(reading, 50),
        reading_s_p99=_percentile(reading, 99),
        itl_error_s_p99=_percentile(itl, 99) if itl.size else None,
        send_lag_s_max=max(row["sent_ns"] - row["scheduled_ns"] for row in complete) / 1e9,
        cpu_s_per_1000_events=1000 * cpu_s / arrival.size,
    )


def _is_complete(row: Mapping[str, Any], sent: Mapping[str, Sequence[int]]) -> bool:
    chunks = sent.get(row["request_id"], ())
    return row["error"] is None and len(row["token_ns"]) == len(chunks) > 0


def _ns(times: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.asarray(times, dtype=np.int64)


def _errors(ns: Sequence[npt.NDArray[np.int64]], expected_s: float = 0.0) -> _Errors:
    """Absolute differences between these times and the expected one, in s."""
    errors: _Errors = np.abs(np.concatenate(ns) / 1e9 - expected_s)
    return errors


def _percentile(values: _Errors, percent: float) -> float:
    return float(np.percentile(values, percent))
