"""Reads the JSON that guidellm 0.8 saves (`benchmarks.json`). Pure.

guidellm keeps the start, the first token and the last token of each request, but not the tokens in
between, so inter-token latencies are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from servegrid.errors import ExchangeError
from servegrid.exchange.imported import (
    ImportedResult,
    assign_users,
    closed_protocol,
    limit_notes,
    mean_lengths,
    to_ns,
)
from servegrid.study.grid import OPEN_LOOPS, Protocol
from servegrid.study.text import pluralize

KEYS = ("metadata", "benchmarks")
"""The keys that identify such a file."""


def find_benchmarks(
    report: Mapping[str, Any], source: str
) -> Iterator[tuple[str, Callable[[], ImportedResult]]]:
    """Each benchmark of a report: its place, and a function that parses it.

    A report of the profile `sweep` has about ten. The function raises ExchangeError, which names
    the place. So does this one, if there are no benchmarks.
    """
    if not isinstance(report["metadata"], Mapping) or not isinstance(report["benchmarks"], list):
        raise ExchangeError(
            f"{source}: `metadata` must be a mapping and `benchmarks` a list. servegrid reads the "
            "JSON of guidellm 0.8."
        )
    if not report["benchmarks"]:
        raise ExchangeError(f"{source}: has no benchmarks. Leave this file out.")
    origin = f"guidellm {report['metadata'].get('guidellm_version', '')}".strip()
    for position, benchmark in enumerate(report["benchmarks"]):
        where = f"{source}, benchmarks[{position}]"
        yield where, partial(_parse_benchmark, benchmark, where, origin)


def _parse_benchmark(benchmark: Any, where: str, origin: str) -> ImportedResult:
    """A benchmark. Requests that were cut off at its end are left out, as guidellm does."""
    if not isinstance(benchmark, Mapping):
        raise ExchangeError(f"{where}: is empty. Check that guidellm finished writing the file.")
    successful, errored, cut_off = (
        benchmark["requests"].get(kind) or [] for kind in ("successful", "errored", "incomplete")
    )
    sent, started = _sent(errored), len(_sent(cut_off))
    strategy, count = benchmark["config"]["strategy"], len(successful) + len(sent) + started
    protocol, concurrency, rate = _parse_strategy(strategy, count, where)
    requests = [
        _request_row(request, error, protocol in OPEN_LOOPS)
        for request, error in [
            *((request, None) for request in successful),
            *((request, _format_error(request)) for request in sent),
        ]
    ]
    served = [row for row in requests if row["error"] is None]
    input_len, output_len, notes = mean_lengths(
        [row["prompt_tokens"] for row in served],
        [row["completion_tokens"] for row in served],
        where,
    )
    if len(sent) < len(errored):
        notes.append(f"{pluralize(len(errored) - len(sent), 'request')} never sent")
    if started:
        notes.append(f"{pluralize(started, 'request')} cut off at the end and left out")
    if ramp_up := strategy.get("rampup_duration"):
        notes.append(f"the load rose during the first {ramp_up:g} s")
    if protocol in OPEN_LOOPS:
        notes += limit_notes(requests, strategy.get("max_concurrency"))
    began = datetime.fromtimestamp(benchmark["start_time"], UTC)
    return ImportedResult(
        source=where,
        origin=origin,
        model=str(benchmark["config"]["backend"].get("model") or ""),
        started=began.isoformat(timespec="seconds"),
        protocol=protocol,
        concurrency=concurrency,
        request_rate=rate,
        input_len=input_len,
        output_len=output_len,
        requests=assign_users(requests),
        metrics={},
        notes=notes,
        itl_known=False,
    )


def _sent(requests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [each for each in requests if each["info"]["timings"]["request_start"] is not None]


def _parse_strategy(
    strategy: Mapping[str, Any], requests: int, where: str
) -> tuple[Protocol, int | None, float | None]:
    """Protocol, concurrency and request rate."""
    kind = strategy["type_"]
    if kind in ("poisson", "constant"):
        return kind, None, float(strategy["rate"])
    if kind == "synchronous":
        return "closed_loop", 1, None
    if kind in ("concurrent", "throughput"):
        limit = strategy.get("streams") or strategy.get("max_concurrency")
        if strategy.get("rampup_duration"):  # The first requests do not start together.
            return "closed_loop", min(limit or requests, requests), None
        return *closed_protocol(limit, requests), None
    raise ExchangeError(
        f"{where}: the strategy {kind!r} has no equivalent in servegrid. Import a benchmark with "
        "the strategy synchronous, concurrent, throughput, constant or poisson."
    )


def _request_row(request: Mapping[str, Any], error: str | None, open_loop: bool) -> dict[str, Any]:
    timings = request["info"]["timings"]
    start = timings["request_start"]
    first, last = timings["first_token_iteration"], timings["last_token_iteration"]
    tokens = (request.get("output_metrics") or {}).get("text_tokens") or 0
    token_ns, chunk_tokens = _chunks(first, last, tokens)
    return {
        "wave": 0,
        "scheduled_ns": to_ns(timings.get("targeted_start") or start)
        if open_loop
        else to_ns(start),
        "sent_ns": to_ns(start),
        "first_token_ns": token_ns[0] if token_ns else None,
        "token_ns": token_ns,
        "chunk_tokens": chunk_tokens,
        "chunk_tokens_estimated": True,
        "done_ns": to_ns(timings["request_end"]),
        "error": error,
        "prompt_tokens": (request.get("input_metrics") or {}).get("text_tokens"),
        "completion_tokens": None if error else tokens,
        "requested_tokens": None if error else tokens,
    }


def _chunks(first: float | None, last: float | None, tokens: int) -> tuple[list[int], list[int]]:
    """The arrivals of the first and the last chunk, and the tokens in each."""
    if first is None or math.isnan(first) or not tokens:
        return [], []
    if last is None or tokens == 1:
        return [to_ns(first)], [tokens]
    return [to_ns(first), to_ns(last)], [1, tokens - 1]


def _format_error(request: Mapping[str, Any]) -> str:
    return f"http_error: {request['info'].get('error') or 'no reason is given'}"
