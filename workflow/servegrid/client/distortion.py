"""How far the load client's times are from the truth, as a scripted server knows it. Pure.

The server says when it had read each request and when it sent each piece of its answer. What the
client adds of its own lies between that and what it reports.
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
class Distortion:
    """What the client did to the times of one load. Times in s; errors without their sign.

    `requests` that were sent, `lost`: of them, those that failed or have not a chunk for each
    piece that was sent; the figures are of the others. `token_events`: chunks with tokens.

    - `arrival_error_s_*`: a chunk's arrival by the client, minus the server's sending it
    - `ttft_error_s_*`: sent until first token by the client, minus what the script says
    - `reading_s_*`: sent by the client until read by the server, the part of that error which
      lies in the server: it reads requests that are sent at once one after another
    - `itl_error_s_p99`: between two chunks by the client, minus between the server's two sends;
      None where no request has two chunks
    - `send_lag_s_max`: from a request being due to its being sent
    - `cpu_s_per_1000_events`: CPU time of all processes of the client while its clock ran, per
      1000 token events
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
        """Token events per second that one process of the client can take in."""
        return 1000 / self.cpu_s_per_1000_events


def distortion_of(
    requests: pa.Table,
    sent: Mapping[str, Sequence[int]],
    read: Mapping[str, int],
    ttft_s: float,
    cpu_s: float,
) -> Distortion:
    """The distortion of `requests`, a row of `columns.REQUESTS` each.

    `sent` and `read` are the server's log by request, in ns of CLOCK_MONOTONIC: when each piece,
    with one chunk of tokens, was sent, and when the request had been read. `ttft_s` is what the
    script says, `cpu_s` what the client used while its clock ran. Raises RecordError where no
    request can be compared.
    """
    rows = requests.to_pylist()
    whole = [row for row in rows if _is_whole(row, sent)]
    if not whole:
        first = next((row["error"] for row in rows if row["error"]), "none failed")
        raise RecordError(
            f"none of {len(rows)} requests has the chunks that the scripted server has sent; the "
            f"first error is: {first}"
        )
    pairs = [(_ns(row["token_ns"]), _ns(sent[row["request_id"]])) for row in whole]
    arrival = _errors([told - true for told, true in pairs])
    itl = _errors([np.diff(told) - np.diff(true) for told, true in pairs])
    ttft = _errors([_ns([row["first_token_ns"] - row["sent_ns"] for row in whole])], ttft_s)
    reading = _errors([_ns([read[row["request_id"]] - row["sent_ns"] for row in whole])])
    return Distortion(
        requests=len(rows),
        lost=len(rows) - len(whole),
        token_events=arrival.size,
        arrival_error_s_p50=_percentile(arrival, 50),
        arrival_error_s_p99=_percentile(arrival, 99),
        ttft_error_s_p50=_percentile(ttft, 50),
        ttft_error_s_p99=_percentile(ttft, 99),
        reading_s_p50=_percentile(reading, 50),
        reading_s_p99=_percentile(reading, 99),
        itl_error_s_p99=_percentile(itl, 99) if itl.size else None,
        send_lag_s_max=max(row["sent_ns"] - row["scheduled_ns"] for row in whole) / 1e9,
        cpu_s_per_1000_events=1000 * cpu_s / arrival.size,
    )


def _is_whole(row: Mapping[str, Any], sent: Mapping[str, Sequence[int]]) -> bool:
    pieces = sent.get(row["request_id"], ())
    return row["error"] is None and len(row["token_ns"]) == len(pieces) > 0


def _ns(times: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.asarray(times, dtype=np.int64)


def _errors(ns: Sequence[npt.NDArray[np.int64]], expected_s: float = 0.0) -> _Errors:
    """How far these times are from the expected, in s."""
    errors: _Errors = np.abs(np.concatenate(ns) / 1e9 - expected_s)
    return errors


def _percentile(values: _Errors, percent: float) -> float:
    return float(np.percentile(values, percent))
