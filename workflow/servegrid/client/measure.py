"""Measures one workload on an endpoint: sends the requests and keeps one row per request.

burst: waves of `concurrency` simultaneous requests; a wave starts when the one before has ended.
closed_loop: `concurrency` users, who each send the next request when the last one has ended and
their think time is over; it may be the next turn of a conversation. poisson: an open loop, in which
requests are due at random times with a given rate, independent of the responses.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa

from servegrid.client import schedule
from servegrid.client.content import Content, Conversations, RequestLengths, open_content
from servegrid.client.conversations import Composed, Dialogues
from servegrid.client.inflight import Turn
from servegrid.client.parse import ParsedExchange, RequestSpec, parse_answer, parse_exchange
from servegrid.client.prompts import Prompt
from servegrid.client.requests import Probe, RequestBuilder, http_client, negotiate, sent_key
from servegrid.client.transport import ConversationLoad, MeasuringTransport, WaveResult
from servegrid.errors import LoadError
from servegrid.node.network import find_proxy, tls_context
from servegrid.records import columns, parquet
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload
from servegrid.study.tokenizer import open_tokenizer

MIN_AHEAD = 1000
"""Requests that are prepared before the start of a load by time; more for more users."""
Counters = Mapping[str, float] | None
"""The counters of a server, by name; None if it has none."""
Progress = Callable[[int, int], None]
"""Takes the number of requests that have ended, and their total; the total is 0 if unknown."""


@dataclass(frozen=True)
class Measurement:
    """The result of one workload: `requests` has the schema of columns.REQUESTS.

    `facts` say how it was measured:

    - `started_at`: UTC, ISO 8601; `window_ns`: start of the first wave and end of the last
      request, CLOCK_MONOTONIC; `salt`: with the workload, it determines the prompts
    - `proxy`: host and port of the proxy, None without one; `tls_verified`: whether the server's
      certificate was checked, None without TLS
    - `stamps`: who took the arrival timestamps, `kernel` or `reader`;
      `clock_offset_before_ns`, `clock_offset_after_ns`: CLOCK_REALTIME minus CLOCK_MONOTONIC
    - `send_lag_ns_p50`, `send_lag_ns_max`: from the time a request is due until its first byte is
      sent, None if none was sent; `resent`: requests sent again on a new connection, because the
      server was just closing the old one
    - `processes` of the client; `cpu_s`: CPU time of all of them during the measurement,
      `cpu_s_busiest`: of the one that used most, `parse_cpu_s`: of parsing the responses
      afterwards; `reads`: reads with data; `token_chunks`: chunks with tokens
    - `stopped_early`: served responses with fewer tokens than requested
    - `events_skipped`: events of the streams that are no chunks, for example pings of a gateway
    - `continuous_usage`: whether usage per chunk was requested; `keys_refused`: keys that the
      server refuses and that the requests therefore omit; `length_key`: the key with the number of
      output tokens, `max_tokens`, or `max_completion_tokens` if the server refuses it
    - `prompt_form`: how prompts were sent, `ids`, `text` or `messages`; `prompt_tokens_added`: by
      how many the server's count of prompt tokens exceeds `input_len`, because its template adds
      tokens to a text; None if requests differ in this
    - `rows_left_out`: rows of the workload's file that were drawn and were too long
    - `conversations_cut`: conversations that ended early, because the next prompt was too long
    - `warmup_s`: duration of the warm-up; `warmup_errors`: its failures, with their number
    - `left`: prepared requests that were not sent within the workload's duration, 0 if there are
      no further distinct prompts of this length;
      `prepare_waits`: how often a request was due and none was prepared

    `counters_before` and `counters_after`: the server's counters at the start and after the end.
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
    cpu_sets: Sequence[Collection[int]] = (),
    progress: Progress | None = None,
    source_file: Path | None = None,
) -> Measurement:
    """Send `workload` to `endpoint` and keep one row per request, also of failed ones.

    First, a request with the workload's largest output shows what the server accepts. Then
    `workload.warmup_waves` waves warm it up. A wave has `workload.concurrency` requests, or as
    many as an open loop sends in a second. `timeout_s` and `idle_timeout_s` apply to the warm-up
    and to the measurement separately; with a duration, `timeout_s` starts at its end. Prompts are
    sent as token ids, or as text if the API is chat or the server accepts no ids.

    `salt` seeds the prompts (see `prompts.make_token_prompts`) and starts every X-Request-Id.
    `counters` is called just before the start, with 0, and after the end, with the number of
    requests that the server has completed in between. With several `cpu_sets`, one process per
    CPU set sends its share. `progress` is called after the warm-up and after each wave, never
    while requests are in flight. A closed loop and an open loop are one single wave each.
    `source_file` is the file of the workload's source, if it has one.

    Raises LoadError if the server cannot be reached, if it refuses the key, the model or a part
    of the request, if the prompts cannot be made, or if `workload.requests` do not fill the waves.
    """
    _validate_requests(workload)
    content = open_content(
        workload, tokenizer, salt, source_file, workload.warmup_waves * _users(workload)
    )
    arrivals = content.arrivals()
    encrypted = endpoint.base_url.startswith("https:")
    tls = tls_context(endpoint.ca_file, endpoint.verify_tls) if encrypted else None
    proxy = None if endpoint.socket is not None else find_proxy(endpoint.base_url)
    transport = MeasuringTransport(endpoint.socket, tls)
    with http_client(endpoint, transport) as client:
        more = content.keys if isinstance(content, Conversations) else {}
        builder = RequestBuilder(client, endpoint, salt, more=more)
        sender = _Sender(transport, builder, workload, content, cpu_sets)
        sender, warmup = _warm_up(sender, endpoint)
        total = len(arrivals or ()) or workload.requests
        send = _prepare_load(
            sender,
            arrivals,
            total,
            None if progress is None else lambda ended: progress(ended, total or 0),
        )
        if progress is not None:
            progress(0, total or 0)
        counters_before = counters(0)
        started_at = datetime.now(UTC)
        sent = send()
    before_parsing = time.process_time()
    parsed = sent.parse()
    rows = [exchange.row for exchange in parsed]
    parse_cpu_s = time.process_time() - before_parsing
    omitted = sender.builder.omitted_keys
    facts = {
        "started_at": started_at.isoformat(),
        "salt": salt,
        "proxy": None if proxy is None else str(proxy),
        "tls_verified": endpoint.verify_tls if encrypted else None,
        "continuous_usage": "continuous_usage_stats" not in omitted,
        "keys_refused": sorted(omitted),
        "length_key": sender.builder.length_key,
        "prompt_form": sender.builder.form,
        "prompt_tokens_added": _prompt_tokens_added(rows),
        "rows_left_out": content.rows_left_out + sum(wave.rows_left_out for wave in sent.waves),
        "conversations_cut": sum(wave.conversations_cut for wave in sent.waves),
        **_wave_facts(sent.waves),
        **_send_lag(rows),
        "stopped_early": sum(
            row["completion_tokens"] < row["requested_tokens"]
            for row in rows
            if row["error"] is None
        ),
        "events_skipped": sum(exchange.events_skipped for exchange in parsed),
        "token_chunks": sum(len(row["token_ns"]) for row in rows),
        "parse_cpu_s": parse_cpu_s,
        "warmup_s": warmup.duration_s,
        "warmup_errors": warmup.errors(),
        "left": sum(wave.left for wave in sent.waves),
        "prepare_waits": sum(wave.waits for wave in sent.waves),
    }
    completed = sum(row["error"] is None for row in rows)
    return Measurement(
        parquet.arrow_table(columns.REQUESTS, rows), facts, counters_before, counters(completed)
    )


def _prepare_load(
    sender: _Sender,
    arrivals: list[float] | None,
    total: int | None,
    after_wave: Callable[[int], None] | None,
) -> Callable[[], _Sent]:
    """Make the prompts that are known before the start. Returns what sends the load.

    `total` is the number of requests; None if the workload has a duration instead.
    """
    workload, content = sender.workload, sender.content
    timeout_s = workload.timeout_s + (workload.duration_s or 0.0)
    if isinstance(content, Conversations):
        return partial(sender.converse, content, timeout_s, after_wave)
    waves: list[_Prompts]
    ahead = None
    if workload.duration_s is None:
        assert total is not None
        prepared = sender.make_prompts(total)
        waves = _split_into_waves(prepared, sender.users if workload.protocol == "burst" else total)
    else:
        ahead = max(MIN_AHEAD, 2 * sender.users)
        waves = [content.prompts(sender.builder.form)]
    return partial(
        sender.send,
        "",
        waves,
        timeout_s,
        due_s=arrivals,
        think_s=schedule.think_times(workload, content.salt),
        after_wave=after_wave,
        ahead=ahead,
    )


def _validate_requests(workload: Workload) -> None:
    if workload.concurrency is None or workload.requests is None:
        return
    fills_waves = (
        workload.requests % workload.concurrency == 0 or workload.protocol == "closed_loop"
    )
    if workload.requests < workload.concurrency or not fills_waves:
        needed = "a multiple of" if workload.protocol == "burst" else "at least"
        raise LoadError(
            f"requests {workload.requests}: a {workload.protocol} workload of concurrency "
            f"{workload.concurrency} needs {needed} {workload.concurrency} requests. With this "
            "number, fewer requests than the concurrency would be in flight."
        )


def _users(workload: Workload) -> int:
    """The concurrency; in an open loop, as many users as requests arrive in a second."""
    return workload.concurrency or math.ceil(workload.intensity)


def _warm_up(sender: _Sender, endpoint: Endpoint) -> tuple[_Sender, _Sent]:
    """Negotiate the requests with the server and send the warm-up waves.

    Returns the sender of the requests that the server accepts, and the warm-up.
    """
    workload, builder = sender.workload, sender.builder
    count = workload.warmup_waves * sender.users
    warming = replace(sender, content=sender.content.warm_up())
    chat = endpoint.api == "chat"
    ids = [] if chat else warming.make_prompts(count or 1)
    accepted = negotiate(
        replace(builder, form="messages" if chat else "ids"),
        Probe(
            token=_first_token(ids),
            output_len=1 if endpoint.started_here else workload.max_output_len,
            timeout_s=workload.idle_timeout_s,
        ),
        allow_text=sender.content.tokenizer is not None,
    )
    warming = replace(warming, builder=accepted)
    prepared = ids if accepted.form == "ids" else warming.make_prompts(count or 1)
    waves = _split_into_waves(prepared[:count], sender.users)
    sent = warming.send("warmup/", waves, workload.timeout_s)
    return replace(sender, builder=accepted), sent


def _first_token(prompts: Sequence[Prompt]) -> int:
    token = prompts[0][0] if prompts else 0
    return token if isinstance(token, int) else 0


_Prompts = Iterable[Prompt]


def _split_into_waves(prepared: Sequence[Prompt], size: int) -> list[_Prompts]:
    return [prepared[start : start + size] for start in range(0, len(prepared), size)]


@dataclass(frozen=True)
class _Sent:
    """Finished waves, with what their requests asked for."""

    waves: list[WaveResult]
    specs: Sequence[Mapping[int, RequestSpec]]
    duration_s: float
    client: httpx.Client

    def errors(self) -> dict[str, int]:
        """The failures, with their number."""
        rows = (exchange.row for exchange in self.parse())
        return dict(Counter(row["error"] for row in rows if row["error"]))

    def parse(self) -> list[ParsedExchange]:
        """The requests that were due, in the order in which they were prepared."""
        key = sent_key(self.client)
        return [
            parse_exchange(exchange, specs[exchange.number], key)
            for wave, specs in zip(self.waves, self.specs, strict=True)
            for exchange in wave.exchanges
        ]


@dataclass(frozen=True)
class _Sender:
    transport: MeasuringTransport
    builder: RequestBuilder
    workload: Workload
    content: Content
    cpu_sets: Sequence[Collection[int]]

    @property
    def users(self) -> int:
        return _users(self.workload)

    def make_prompts(self, count: int) -> Sequence[Prompt]:
        return list(islice(self.content.prompts(self.builder.form), count))

    def send(
        self,
        prefix: str,
        waves: list[_Prompts],
        timeout_s: float,
        due_s: list[float] | None = None,
        think_s: Iterator[float] | None = None,
        after_wave: Callable[[int], None] | None = None,
        ahead: int | None = None,
    ) -> _Sent:
        """Send the waves one after another, all of them within `timeout_s`.

        `after_wave` takes the number of requests that have ended. With `ahead`, there is one wave,
        and only so many requests are prepared before its start.
        """
        started = time.monotonic()
        results: list[WaveResult] = []
        specs: list[Mapping[int, RequestSpec]] = []
        lengths = self.content.lengths(self.builder.form)
        # The same lengths again, for those requests that were sent.
        asked = enumerate(self.content.lengths(self.builder.form))
        numbered = count()
        for wave, prepared in enumerate(waves):
            requests = (
                self.builder.completion(f"{prefix}{number}", prompt, length.output_len, number)
                for prompt, number, length in zip(prepared, numbered, lengths, strict=False)
            )
            left_s = started + timeout_s - time.monotonic()
            results.append(
                self.transport.send_wave(
                    requests,
                    self.users,
                    timeout_s=left_s,
                    idle_timeout_s=self.workload.idle_timeout_s,
                    send_duration_s=self.workload.duration_s or math.inf,
                    due_s=due_s,
                    think_s=think_s,
                    cpu_sets=self.cpu_sets,
                    ahead=ahead,
                )
            )
            sent = 1 + max((each.number for each in results[-1].exchanges), default=-1)
            specs.append(
                {
                    position: self._spec(f"{prefix}{number}", number, wave, length)
                    for position, (number, length) in enumerate(islice(asked, sent))
                }
            )
            if after_wave is not None:
                after_wave(sum(len(result.exchanges) for result in results))
        return _Sent(results, specs, time.monotonic() - started, self.builder.client)

    def converse(
        self, content: Conversations, timeout_s: float, after_wave: Callable[[int], None] | None
    ) -> _Sent:
        """Let the users play conversations, all of them within `timeout_s`."""
        started = time.monotonic()
        form, builder = self.builder.form, self.builder
        tokenizer = None if content.tokenizer is None else open_tokenizer(content.tokenizer)

        def dialogues(share: tuple[int, int]) -> Dialogues:
            scripts = islice(content.scripts(form), share[0], None, share[1])
            return Dialogues(scripts, form, tokenizer, content.longest, share, content.staggered)

        def build(composed: Composed) -> httpx.Request:
            turn = composed.turn
            return builder.completion(
                turn.name, composed.prompt, turn.output_len, turn.conversation
            )

        first = dialogues((0, 1)).begin(0, 0)
        if first is None:
            raise LoadError(
                f"`{self.workload.cell}`: the file has no conversation that is short enough. Raise "
                "`input_len` or `output_len`."
            )
        load = ConversationLoad(
            dialogues=dialogues,
            build=build,
            read=partial(parse_answer, chat=form == "messages"),
            first=build(first),
            most=self.workload.requests,
        )
        result = self.transport.send_conversations(
            load,
            self.users,
            timeout_s=started + timeout_s - time.monotonic(),
            idle_timeout_s=self.workload.idle_timeout_s,
            send_duration_s=self.workload.duration_s or math.inf,
            cpu_sets=self.cpu_sets,
        )
        specs = {
            each.number: self._turn_spec(each.turn)
            for each in result.exchanges
            if each.turn is not None
        }
        if after_wave is not None:
            after_wave(len(result.exchanges))
        return _Sent([result], [specs], time.monotonic() - started, builder.client)

    def _turn_spec(self, turn: Turn) -> RequestSpec:
        lengths = RequestLengths(turn.input_len, turn.output_len, turn.shared_len)
        spec = self._spec(turn.name, turn.conversation, 0, lengths)
        return replace(spec, conversation=turn.conversation, turn=turn.number)

    def _spec(self, name: str, number: int, wave: int, lengths: RequestLengths) -> RequestSpec:
        return RequestSpec(
            request_id=self.builder.request_id(name),
            wave=wave,
            prompt_tokens=lengths.input_len,
            completion_tokens=lengths.output_len,
            shared_tokens=lengths.shared_len,
            form=self.builder.form,
            may_stop_early=not self.builder.endpoint.output_len_exact,
            adapter=self.builder.endpoint.adapter(number),
        )


def _wave_facts(waves: list[WaveResult]) -> dict[str, Any]:
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
        "reads": sum(len(exchange.arrival_ns) for exchange in exchanges),
    }


def _prompt_tokens_added(rows: list[dict[str, Any]]) -> int | None:
    # A template also adds tokens to each later turn of a conversation.
    served = (row for row in rows if row["error"] is None and row["turn"] in (None, 1))
    added = {row["prompt_tokens"] - row["sent_tokens"] for row in served}
    return added.pop() if len(added) == 1 else None


def _send_lag(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    lags = [row["sent_ns"] - row["scheduled_ns"] for row in rows if row["sent_ns"] is not None]
    return {
        "send_lag_ns_p50": int(statistics.median(lags)) if lags else None,
        "send_lag_ns_max": max(lags, default=None),
    }
