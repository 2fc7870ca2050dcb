"""Formats the comparison of clients as Markdown tables. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peer_results import ClientErrors

TARGET_RATIO = 0.1
TARGET_CONCURRENCY = (128, 512)
"""At these concurrencies, servegrid's ITL error should be at most this share of the best peer's."""


@dataclass(frozen=True)
class Outcome:
    """One client at one concurrency; `cpu_s` per 1000 token events."""

    client: str
    concurrency: int
    requests: int
    errors: ClientErrors
    cpu_s: float


@dataclass(frozen=True)
class Column:
    """A value of an outcome; smaller is better. None if the client does not report it."""

    title: str
    value: Callable[[Outcome], float | None]
    digits: int
    target_ratio: float | None = None


COLUMNS = (
    Column("TTFT, median", lambda outcome: _percentile_ms(outcome.errors.ttft, 50), 1),
    Column("TTFT, p99", lambda outcome: _percentile_ms(outcome.errors.ttft, 99), 1),
    Column("ITL, median", lambda outcome: _percentile_ms(outcome.errors.itl, 50), 4),
    Column("ITL, p99", lambda outcome: _percentile_ms(outcome.errors.itl, 99), 4, TARGET_RATIO),
    Column(
        "mean ITL, p99",
        lambda outcome: _percentile_ms(outcome.errors.mean_itl, 99),
        4,
        TARGET_RATIO,
    ),
    Column("CPU s", lambda outcome: outcome.cpu_s, 3),
    Column("lost", lambda outcome: outcome.errors.lost, 0),
)

LEGEND = """\
Errors in ms. TTFT: reported minus configured; it includes the time in which the server reads
simultaneous requests. ITL: per token, difference between the reported gap and that of the server's
two sends. Mean ITL: per request, difference between the reported mean and the server's. CPU s: of
all processes of the client per 1000 token events, from its first request to its end, minus the CPU
time of one wave at the lowest concurrency. Lost: requests without all of their tokens. `–`: not
reported."""


def format_comparison(
    ours: str,
    outcomes: Sequence[Outcome],
    versions: Mapping[str, str],
    failures: Mapping[str, str],
) -> str:
    """The values of all clients, and then the ratio of `ours` to the best peer.

    `versions` and `failures` (the reasons) are by client.
    """
    parts = [_format_outcomes(outcomes), LEGEND]
    parts += [f"{client} failed: {reason}." for client, reason in failures.items()]
    named = ", ".join(f"{client} {version}" for client, version in versions.items())
    parts += [f"Clients: {named}."]
    if comparison := _format_ratios(ours, outcomes):
        parts += [f"{ours} relative to the best peer in each column:"]
        parts += [comparison]
    return "\n\n".join(parts)


def _format_outcomes(outcomes: Sequence[Outcome]) -> str:
    header = ["concurrency", "requests", "client", *(column.title for column in COLUMNS)]
    rows = [
        [
            str(outcome.concurrency),
            str(outcome.requests),
            outcome.client,
            *(_format_value(column.value(outcome), column.digits) for column in COLUMNS),
        ]
        for outcome in outcomes
    ]
    return _format_table(header, rows)


def _format_ratios(ours: str, outcomes: Sequence[Outcome]) -> str | None:
    rows = []
    for our_outcome in outcomes:
        peers = [
            peer
            for peer in outcomes
            if peer.concurrency == our_outcome.concurrency and peer.client != ours
        ]
        if our_outcome.client == ours and peers:
            ratios = [_format_ratio(our_outcome, peers, column) for column in COLUMNS]
            rows.append([str(our_outcome.concurrency), *ratios])
    header = ["concurrency", *(column.title for column in COLUMNS)]
    return _format_table(header, rows) if rows else None


def _format_ratio(our_outcome: Outcome, peers: Sequence[Outcome], column: Column) -> str:
    our_value = column.value(our_outcome)
    peer_values = [
        (value, peer.client) for peer in peers if (value := column.value(peer)) is not None
    ]
    if our_value is None or not peer_values:
        return "–"
    best, peer = min(peer_values, key=lambda pair: abs(pair[0]))
    if our_value == best:
        return "equal"
    verdict = "better" if abs(our_value) < abs(best) else "worse"
    if best == 0:
        return f"{verdict}: {peer} has 0"
    ratio = abs(our_value / best)
    text = f"{verdict}: {ratio:.2g} × {peer}"
    if column.target_ratio is not None and our_outcome.concurrency in TARGET_CONCURRENCY:
        met = "met" if ratio <= column.target_ratio else "missed"
        text += f" (target ≤ {column.target_ratio:g}: {met})"
    return text


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format_value(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percentile_ms(seconds: Sequence[float] | None, percent: float) -> float | None:
    return None if seconds is None else float(np.percentile(seconds, percent)) * 1e3
