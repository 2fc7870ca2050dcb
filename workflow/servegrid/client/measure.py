"""A load put on an endpoint: what is sent when, and what is kept of it.

burst: waves of `concurrency` requests, all of a wave at once, each wave when the one before has
ended. steady: a closed loop, in which `concurrency` users each send another request when their
last has ended and they have rested. poisson: an open loop, in which requests are due at random
times of a given rate, whatever has become of those before.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa

from servegrid.client import prompts, schedule
from servegrid.client.parse import Asked, row_of
from servegrid.client.prompts import Prompt
from servegrid.client.requests import Writer, accepted_in_some_form, headers, without_key
from servegrid.client.transport import Exchanged, MeasuringTransport
from servegrid.errors import LoadError
from servegrid.records import columns, parquet
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload

Counters = Mapping[str, float] | None
"""What a server counts, by name; None where it does not tell."""


@dataclass(frozen=True)
class Measurement:
    """What one load gave: `requests` has the schema of columns.REQUESTS, a row per request.

    `facts` say how it was measured:

    - `started_at`: UTC, ISO 8601; `window_ns`: start of the first wave and end of the last
      request, CLOCK_MONOTONIC; `salt`: what the prompts were drawn with besides the load
    - `stamps`: whose clock the arrivals are from, `kernel` or `reader`;
      `clock_offset_before_ns`, `clock_offset_after_ns`: CLOCK_REALTIME minus CLOCK_MONOTONIC
    - `send_lag_ns_p50`, `send_lag_ns_max`: from a request being due to its first byte being
      sent, None where none was; `resent`: requests sent again on a new connection because the
      server was just closing the old one
    - `processes` of the client; `cpu_s`: CPU time of all of them while the clock ran,
      `cpu_s_busiest`: of the one that used most, `parse_cpu_s`: of parsing, afterwards;
      `reads`: reads with data; `token_chunks`: chunks with tokens
    - `continuous_usage`: whether usage per chunk was asked for; `keys_refused`: the keys of a
      request that the server refuses and that were left out
    - `prompt_form`: how prompts were sent, `ids`, `text` or `messages`; `prompt_tokens_added`: by
      how many tokens the server counted more than were asked for, as its template adds them to a
      text; None where that is not the same for all requests
    - `warmup_s`: duration of the warm-up; `warmup_errors`: its failures, with their number
    - `left`: requests held ready that were not begun in the load's duration; 0 means, where there
      is a duration, that more would have been sent

    `counters_before` and `counters_after`: what the server had counted when the clock started,
    and after its end.
    """

    requests: pa.Table
    facts: dict[str, Any]
    counters_before: Counters
    counters_after: Counters

    @property
    def errors(self) -> list[str | None]:
        """One entry per request: None for a success, else `kind: detail`."""
        errors: list[str | None] = self.requests["error"].to_pylist()
        return errors


def measure(
    endpoint: Endpoint,
    workload: Workload,
    tokenizer: Path | None,
    salt: str,
    counters: Callable[[int], Counters] = lambda finished: None,
    places: Sequence[Collection[int]] = (),
) -> Measurement:
    """Put `load` on `endpoint` and keep one row per request, failures included.

    Before the clock starts, a request of one token shows whether the server takes such requests
    at all, and `load.warmup_waves` waves warm it up: of `load.concurrency` requests, or of as many
    as an open loop sends in a second. The limits `timeout_s` and `idle_timeout_s` hold for the warm-up
    and for the measured load, each by itself; with a duration, `timeout_s` begins after it.
    Prompts are sent as token ids, or as text where the API is chat or the server takes no ids.
    `salt` makes the prompts (see `prompts.make`) and begins every X-Request-Id. `counters` is
    asked just before the clock starts, with 0, and after its end, with the number of requests
    that the server has completed in between. With several `places`, sets of cores, the load comes
    from a process on each of them.

    Raises LoadError where the server cannot be reached or refuses the key, the model or a part
    of the request, where the prompts cannot be made, and where `load.requests` do not fill it.
    """
    _refuse_partly_filled(workload)
    users = workload.concurrency or math.ceil(workload.intensity)
    arrivals = schedule.arrivals(workload, salt)
    warming = workload.warmup_waves * users
    warmup = f"{salt}/warmup"
    chat = endpoint.api == "chat"
    ids = [] if chat else prompts.make(workload, warming or 1, tokenizer, warmup)
    transport = MeasuringTransport(endpoint.socket)
    with httpx.Client(
        base_url=endpoint.base_url, headers=headers(endpoint), transport=transport
    ) as client:
        writer = accepted_in_some_form(
            Writer(client, endpoint.model, salt, "messages" if chat else "ids"),
            token=ids[0][0] if ids else 0,
            limit_s=workload.idle_timeout_s,
            as_text=tokenizer is not None,
        )
        prepare = prompts.make if writer.form == "ids" else prompts.make_texts
        first = ids if writer.form == "ids" else prepare(workload, warming or 1, tokenizer, warmup)
        sender = _Sender(transport, writer, workload, users, places)
        warmed = sender.send("warmup/", _in_waves(first[:warming], users), workload.timeout_s)
        count = len(arrivals or ()) or workload.requests or _enough(workload, users, warmed)
        prepared = prepare(workload, count, tokenizer, salt)
        wave = users if workload.protocol == "burst" else count
        counted_before = counters(0)
        started_at = datetime.now(UTC)
        sent = sender.send(
            "",
            _in_waves(prepared, wave),
            workload.timeout_s + (workload.duration_s or 0.0),
            due_s=arrivals,
            rest_s=schedule.rests(workload, count, salt),
        )
    before_parsing = time.process_time()
    rows = sent.rows()
    parse_cpu_s = time.process_time() - before_parsing
    facts = {
        "started_at": started_at.isoformat(),
        "salt": salt,
        "continuous_usage": "continuous_usage_stats" not in writer.left_out,
        "keys_refused": sorted(writer.left_out),
        "prompt_form": writer.form,
        "prompt_tokens_added": _added(rows, workload),
        **_facts_of(sent.waves),
        **_send_lag(rows),
        "token_chunks": sum(len(row["token_ns"]) for row in rows),
        "parse_cpu_s": parse_cpu_s,
        "warmup_s": warmed.duration_s,
        "warmup_errors": dict(Counter(row["error"] for row in warmed.rows() if row["error"])),
        "left": count - len(rows),
    }
    completed = sum(row["error"] is None for row in rows)
    return Measurement(
        parquet.table_of(columns.REQUESTS, rows), facts, counted_before, counters(completed)
    )


def _refuse_partly_filled(workload: Workload) -> None:
    if workload.concurrency is None or workload.requests is None:
        return
    whole_waves = (
        workload.requests % workload.concurrency == 0 or workload.protocol == "closed_loop"
    )
    if workload.requests < workload.concurrency or not whole_waves:
        wanted = "a multiple of" if workload.protocol == "burst" else "at least"
        raise LoadError(
            f"requests {workload.requests}: a {workload.protocol} load of concurrency {workload.concurrency} "
            f"needs {wanted} {workload.concurrency}, or fewer would be in flight than it says."
        )


def _enough(workload: Workload, users: int, warmed: _Sent) -> int:
    """Requests for all of the duration, judged by the fastest of the warm-up.

    A wave is warmed up with all its prompts at once: its fastest request may have been slower
    than one in the closed loop will be.
    """
    assert workload.duration_s is not None
    times = [
        exchange.done_ns - exchange.sent_ns
        for wave in warmed.waves
        for exchange in wave.exchanges
        if exchange.sent_ns is not None and exchange.failure is None
    ]
    fastest_s = min(times, default=1e9 * workload.duration_s) / 1e9
    return users * (1 + math.ceil(_MARGIN * workload.duration_s / fastest_s))


_MARGIN = 3
_Prompts = Sequence[Prompt]


def _in_waves(prepared: _Prompts, size: int) -> list[_Prompts]:
    return [prepared[start : start + size] for start in range(0, len(prepared), size)]


@dataclass(frozen=True)
class _Sent:
    """Waves that are over, with what their requests asked for."""

    waves: list[Exchanged]
    asked: list[list[Asked]]
    duration_s: float
    client: httpx.Client

    def rows(self) -> list[dict[str, Any]]:
        """A row for each request that was due."""
        rows = [
            row_of(exchange, asked[exchange.number])
            for wave, asked in zip(self.waves, self.asked, strict=True)
            for exchange in wave.exchanges
        ]
        for row in rows:
            row["error"] = row["error"] and without_key(row["error"], self.client)
        return rows


@dataclass(frozen=True)
class _Sender:
    transport: MeasuringTransport
    writer: Writer
    workload: Workload
    users: int
    places: Sequence[Collection[int]]

    def send(
        self,
        prefix: str,
        waves: list[_Prompts],
        timeout_s: float,
        due_s: list[float] | None = None,
        rest_s: list[float] | None = None,
    ) -> _Sent:
        """Send the waves one after another, all of them within `timeout_s`."""
        started = time.monotonic()
        exchanged, asked = [], []
        lengths = schedule.lengths(
            self.workload, sum(map(len, waves)), f"{self.writer.salt}/{prefix}"
        )
        numbered = enumerate(lengths)
        for wave, prepared in enumerate(waves):
            named = [
                (f"{prefix}{number}", length) for number, length in islice(numbered, len(prepared))
            ]
            requests = [
                self.writer.completion(name, prompt, length)
                for (name, length), prompt in zip(named, prepared, strict=True)
            ]
            left_s = started + timeout_s - time.monotonic()
            exchanged.append(
                self.transport.exchange(
                    requests,
                    self.users,
                    timeout_s=left_s,
                    idle_timeout_s=self.workload.idle_timeout_s,
                    sending_s=self.workload.duration_s or math.inf,
                    due_s=due_s,
                    rest_s=rest_s,
                    places=self.places,
                )
            )
            asked.append([self._asked(name, wave, length) for name, length in named])
        return _Sent(exchanged, asked, time.monotonic() - started, self.writer.client)

    def _asked(self, name: str, wave: int, length: int) -> Asked:
        return Asked(
            request_id=self.writer.request_id(name),
            wave=wave,
            prompt_tokens=self.workload.input_len,
            completion_tokens=length,
            form=self.writer.form,
        )


def _facts_of(waves: list[Exchanged]) -> dict[str, Any]:
    exchanges = [exchange for wave in waves for exchange in wave.exchanges]
    return {
        "window_ns": [waves[0].start_ns, max(exchange.done_ns for exchange in exchanges)],
        "stamps": waves[0].stamps,
        "clock_offset_before_ns": waves[0].offset_before_ns,
        "clock_offset_after_ns": waves[-1].offset_after_ns,
        "resent": sum(exchange.resent for exchange in exchanges),
        "processes": len(waves[0].cpu_s),
        "cpu_s": sum(sum(wave.cpu_s) for wave in waves),
        "cpu_s_busiest": max(map(sum, zip(*(wave.cpu_s for wave in waves), strict=True))),
        "reads": sum(len(exchange.arrivals) for exchange in exchanges),
    }


def _added(rows: list[dict[str, Any]], workload: Workload) -> int | None:
    counted = {row["prompt_tokens"] for row in rows if row["error"] is None}
    return counted.pop() - workload.input_len if len(counted) == 1 else None


def _send_lag(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    lags = [row["sent_ns"] - row["scheduled_ns"] for row in rows if row["sent_ns"] is not None]
    return {
        "send_lag_ns_p50": int(statistics.median(lags)) if lags else None,
        "send_lag_ns_max": max(lags, default=None),
    }
