"""What guidellm saves (`benchmarks.json` of 0.8), read. Pure.

It keeps of each request when it began, its first and its last token; not those between, so that
times between tokens are not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from servegrid.errors import ExchangeError
from servegrid.exchange.foreign import Foreign, closed, lengths_of, ns, with_users
from servegrid.study.grid import Protocol

KEYS = ("metadata", "benchmarks")
"""By which a file of it is known."""


def read(report: Mapping[str, Any], source: str) -> list[Foreign]:
    """The loads of one report, one per benchmark. Raises ExchangeError, naming `source`.

    Requests that were cut off when the benchmark ended are left out, as guidellm itself does.
    """
    version = report["metadata"].get("guidellm_version", "")
    workloads = []
    for position, benchmark in enumerate(report["benchmarks"]):
        where = f"{source}, benchmarks[{position}]"
        if not isinstance(benchmark, Mapping):
            raise ExchangeError(f"{where}: holds nothing; was it saved whole?")
        workloads.append(_read(benchmark, where, f"guidellm {version}".strip()))
    if not workloads:
        raise ExchangeError(f"{source}: has no benchmarks.")
    return workloads


def _read(benchmark: Mapping[str, Any], where: str, origin: str) -> Foreign:
    successful, errored = (benchmark["requests"][kind] or [] for kind in ("successful", "errored"))
    sent = [each for each in errored if each["info"]["timings"]["request_start"] is not None]
    strategy, count = benchmark["config"]["strategy"], len(successful) + len(sent)
    protocol, concurrency, rate = _kind(strategy, count, where)
    requests = [
        _request(each, error, protocol == "poisson")
        for each, error in [
            *((each, None) for each in successful),
            *((each, _error(each)) for each in sent),
        ]
    ]
    served = [row for row in requests if row["error"] is None]
    lengths, notes = lengths_of(
        [row["prompt_tokens"] for row in served],
        [row["completion_tokens"] for row in served],
        where,
    )
    if len(sent) < len(errored):
        notes.append(f"{len(errored) - len(sent)} requests were never sent")
    started = datetime.fromtimestamp(benchmark["start_time"], UTC)
    return Foreign(
        source=where,
        origin=origin,
        model=str(benchmark["config"]["backend"].get("model") or ""),
        measured=started.isoformat(timespec="seconds"),
        protocol=protocol,
        concurrency=concurrency,
        request_rate=rate,
        lengths=lengths,
        requests=with_users(requests),
        figures={},
        notes=notes,
        gaps_known=False,
    )


def _kind(
    strategy: Mapping[str, Any], requests: int, where: str
) -> tuple[Protocol, int | None, float | None]:
    kind = strategy["type_"]
    if kind == "poisson":
        return "poisson", None, float(strategy["rate"])
    if kind == "synchronous":
        return "closed_loop", 1, None
    if kind in ("concurrent", "throughput"):
        return *closed(strategy.get("streams") or strategy.get("max_concurrency"), requests), None
    raise ExchangeError(
        f"{where}: its strategy is {kind!r}; synchronous, concurrent, throughput and poisson are "
        "what servegrid has protocols for."
    )


def _request(told: Mapping[str, Any], error: str | None, open_loop: bool) -> dict[str, Any]:
    timings = told["info"]["timings"]
    begun = timings["request_start"]
    first, last = timings["first_token_iteration"], timings["last_token_iteration"]
    tokens = (told.get("output_metrics") or {}).get("text_tokens") or 0
    stamps, counts = _stamps(first, last, tokens)
    return {
        "wave": 0,
        "scheduled_ns": ns(timings.get("targeted_start") or begun) if open_loop else ns(begun),
        "sent_ns": ns(begun),
        "first_token_ns": stamps[0] if stamps else None,
        "token_ns": stamps,
        "chunk_tokens": counts,
        "chunk_tokens_estimated": True,
        "done_ns": ns(timings["request_end"]),
        "error": error,
        "prompt_tokens": (told.get("input_metrics") or {}).get("text_tokens"),
        "completion_tokens": None if error else tokens,
        "asked_tokens": None if error else tokens,
    }


def _stamps(first: float | None, last: float | None, tokens: int) -> tuple[list[int], list[int]]:
    """When the first and the last chunk came, and the tokens that may be counted by then."""
    if first is None or math.isnan(first) or not tokens:
        return [], []
    if last is None or tokens == 1:
        return [ns(first)], [tokens]
    return [ns(first), ns(last)], [1, tokens - 1]


def _error(told: Mapping[str, Any]) -> str:
    return f"http_error: {told['info'].get('error') or 'no reason is given'}"
