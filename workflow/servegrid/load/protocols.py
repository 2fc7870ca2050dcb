"""A load put on an endpoint: what is sent when, and what is kept of it.

burst: waves of `concurrency` requests, all of a wave at once, each wave when the one before has
ended. steady: a closed loop, in which `concurrency` users each send another request as soon as
their last has ended, until `requests` have been sent.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa

from servegrid import records
from servegrid.endpoint import Endpoint
from servegrid.errors import LoadError
from servegrid.grid import Load
from servegrid.load import prompts
from servegrid.load.request import Writer, accepted, headers
from servegrid.load.stream import Asked, row_of
from servegrid.load.transport import Exchanged, MeasuringTransport


@dataclass(frozen=True)
class Measurement:
    """What one load gave: `requests` has the schema of records.REQUESTS, a row per request.

    `facts` say how it was measured:

    - `started_at`: UTC, ISO 8601; `window_ns`: start of the first wave and end of the last
      request, CLOCK_MONOTONIC; `salt`: what the prompts were drawn with besides the load
    - `stamps`: whose clock the arrivals are from, `kernel` or `reader`;
      `clock_offset_before_ns`, `clock_offset_after_ns`: CLOCK_REALTIME minus CLOCK_MONOTONIC
    - `send_lag_ns_p50`, `send_lag_ns_max`: from a request being due to its first byte being
      sent, None where none was; `resent`: requests sent again on a new connection because the
      server was just closing the old one
    - `cpu_s`: CPU time of this process while the clock ran, `parse_cpu_s`: afterwards;
      `reads`: reads with data; `token_chunks`: chunks with tokens
    - `continuous_usage`: whether usage per chunk was asked for
    - `warmup_s`: duration of the warm-up; `warmup_errors`: its failures, with their number
    """

    requests: pa.Table
    facts: dict[str, Any]

    @property
    def errors(self) -> list[str | None]:
        """One entry per request: None for a success, else `kind: detail`."""
        errors: list[str | None] = self.requests["error"].to_pylist()
        return errors


def measure(endpoint: Endpoint, load: Load, tokenizer: Path | None, salt: str) -> Measurement:
    """Put `load` on `endpoint` and keep one row per request, failures included.

    Before the clock starts, a request of one token shows whether the server takes such requests
    at all, and `load.warmup_waves` waves of `load.concurrency` requests warm it up. The limits
    `timeout_s` and `stall_s` hold for the warm-up and for the measured load, each by itself.
    `salt` makes the prompts (see `prompts.make`) and begins every X-Request-Id.

    Raises LoadError where the server cannot be reached or refuses the key, the model or a part
    of the request, where the prompts cannot be made, and where `load.requests` do not fill it.
    """
    _refuse_partly_filled(load)
    warming = load.warmup_waves * load.concurrency
    prepared = prompts.make(load, load.requests + warming, tokenizer, salt)
    measured, warmup = prepared[: load.requests], prepared[load.requests :]
    transport = MeasuringTransport(endpoint.socket)
    with httpx.Client(
        base_url=endpoint.base_url, headers=headers(endpoint), transport=transport
    ) as client:
        writer = accepted(Writer(client, endpoint.model, salt), prepared[0][0], load.stall_s)
        sender = _Sender(transport, writer, load)
        warmed = sender.send("warmup/", _in_waves(warmup, load.concurrency))
        wave = load.concurrency if load.protocol == "burst" else load.requests
        started_at = datetime.now(UTC)
        sent = sender.send("", _in_waves(measured, wave))
    before_parsing = time.process_time()
    rows = sent.rows()
    facts = {
        "started_at": started_at.isoformat(),
        "salt": salt,
        "continuous_usage": writer.continuous_usage,
        **_facts_of(sent.waves),
        **_send_lag(rows),
        "token_chunks": sum(len(row["token_ns"]) for row in rows),
        "parse_cpu_s": time.process_time() - before_parsing,
        "warmup_s": warmed.duration_s,
        "warmup_errors": dict(Counter(row["error"] for row in warmed.rows() if row["error"])),
    }
    return Measurement(records.table_of(records.REQUESTS, rows), facts)


def _refuse_partly_filled(load: Load) -> None:
    whole_waves = load.requests % load.concurrency == 0 or load.protocol == "steady"
    if load.requests < load.concurrency or not whole_waves:
        wanted = "a multiple of" if load.protocol == "burst" else "at least"
        raise LoadError(
            f"requests {load.requests}: a {load.protocol} load of concurrency {load.concurrency} "
            f"needs {wanted} {load.concurrency}, or fewer would be in flight than it says."
        )


_Prompts = Sequence[list[int]]


def _in_waves(prepared: _Prompts, size: int) -> list[_Prompts]:
    return [prepared[start : start + size] for start in range(0, len(prepared), size)]


@dataclass(frozen=True)
class _Sent:
    """Waves that are over, with what their requests asked for."""

    waves: list[Exchanged]
    asked: list[list[Asked]]
    duration_s: float

    def rows(self) -> list[dict[str, Any]]:
        return [
            row_of(exchange, asked)
            for wave, asked_of_wave in zip(self.waves, self.asked, strict=True)
            for exchange, asked in zip(wave.exchanges, asked_of_wave, strict=True)
        ]


@dataclass(frozen=True)
class _Sender:
    transport: MeasuringTransport
    writer: Writer
    load: Load

    def send(self, prefix: str, waves: list[_Prompts]) -> _Sent:
        """Send the waves one after another, all of them within the load's limit."""
        started = time.monotonic()
        exchanged, asked, number = [], [], 0
        for wave, prepared in enumerate(waves):
            names = [f"{prefix}{number + place}" for place in range(len(prepared))]
            number += len(prepared)
            left_s = started + self.load.timeout_s - time.monotonic()
            exchanged.append(self._exchange(names, prepared, left_s))
            asked.append([self._asked(name, wave) for name in names])
        return _Sent(exchanged, asked, time.monotonic() - started)

    def _exchange(self, names: list[str], prepared: _Prompts, left_s: float) -> Exchanged:
        output_len = self.load.output_len
        requests = [
            self.writer.completion(name, prompt, output_len)
            for name, prompt in zip(names, prepared, strict=True)
        ]
        users, stall_s = self.load.concurrency, self.load.stall_s
        return self.transport.exchange(requests, users, timeout_s=left_s, stall_s=stall_s)

    def _asked(self, name: str, wave: int) -> Asked:
        request_id = self.writer.request_id(name)
        return Asked(request_id, wave, self.load.input_len, self.load.output_len)


def _facts_of(waves: list[Exchanged]) -> dict[str, Any]:
    exchanges = [exchange for wave in waves for exchange in wave.exchanges]
    return {
        "window_ns": [waves[0].start_ns, max(exchange.done_ns for exchange in exchanges)],
        "stamps": waves[0].stamps,
        "clock_offset_before_ns": waves[0].offset_before_ns,
        "clock_offset_after_ns": waves[-1].offset_after_ns,
        "resent": sum(exchange.resent for exchange in exchanges),
        "cpu_s": sum(wave.cpu_s for wave in waves),
        "reads": sum(len(exchange.arrivals) for exchange in exchanges),
    }


def _send_lag(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    lags = [row["sent_ns"] - row["scheduled_ns"] for row in rows if row["sent_ns"] is not None]
    return {
        "send_lag_ns_p50": int(statistics.median(lags)) if lags else None,
        "send_lag_ns_max": max(lags, default=None),
    }
