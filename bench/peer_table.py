"""The comparison of clients as Markdown tables: the figures, and where servegrid stands. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peer_results import Distances

WANTED = 0.1
WANTED_AT = (128, 512)
"""At most this share of the best peer's ITL error is wanted, at these numbers of streams."""


@dataclass(frozen=True)
class Outcome:
    """One client at one number of streams; `cpu_s` per 1000 token events."""

    client: str
    streams: int
    requests: int
    found: Distances
    cpu_s: float


@dataclass(frozen=True)
class Column:
    """A figure of an outcome, better where it is smaller; None where the client has no such."""

    title: str
    figure: Callable[[Outcome], float | None]
    digits: int
    wanted: float | None = None


COLUMNS = (
    Column("TTFT, median", lambda outcome: _ms(outcome.found.ttft, 50), 1),
    Column("TTFT, p99", lambda outcome: _ms(outcome.found.ttft, 99), 1),
    Column("ITL, median", lambda outcome: _ms(outcome.found.itl, 50), 4),
    Column("ITL, p99", lambda outcome: _ms(outcome.found.itl, 99), 4, WANTED),
    Column("mean ITL, p99", lambda outcome: _ms(outcome.found.mean_itl, 99), 4, WANTED),
    Column("CPU s", lambda outcome: outcome.cpu_s, 3),
    Column("lost", lambda outcome: outcome.found.lost, 0),
)

LEGEND = """\
Errors in ms. TTFT: reported minus scripted, so that it contains the time in which the server reads
what comes at once. ITL: of each token, between the reported gap and that of the server's two sends;
mean ITL: of each request, between the reported mean and the server's. CPU s: of all of the client's
processes per 1000 token events, from its first request to its end, less what a run of one wave at
the fewest streams takes. lost: requests without all of their tokens. `–`: not reported."""


def table_of(
    ours: str,
    outcomes: Sequence[Outcome],
    versions: Mapping[str, str],
    failures: Mapping[str, str],
) -> str:
    """The figures of all clients, then those of `ours` over the best peer's.

    `versions` and `failures` (the reasons) are by client.
    """
    parts = [_figures(outcomes), LEGEND]
    parts += [f"{client} gave no (further) figures: {why}." for client, why in failures.items()]
    named = ", ".join(f"{client} {version}" for client, version in versions.items())
    parts += [f"Clients: {named}."]
    if comparison := _comparison(ours, outcomes):
        parts += [f"{ours} over the best peer in each column:"]
        parts += [comparison]
    return "\n\n".join(parts)


def _figures(outcomes: Sequence[Outcome]) -> str:
    head = ["streams", "requests", "client", *(column.title for column in COLUMNS)]
    rows = [
        [
            str(outcome.streams),
            str(outcome.requests),
            outcome.client,
            *(_shown(column.figure(outcome), column.digits) for column in COLUMNS),
        ]
        for outcome in outcomes
    ]
    return _markdown(head, rows)


def _comparison(ours: str, outcomes: Sequence[Outcome]) -> str | None:
    rows = []
    for mine in outcomes:
        peers = [each for each in outcomes if each.streams == mine.streams and each.client != ours]
        if mine.client == ours and peers:
            shown = [_against(mine, peers, column) for column in COLUMNS]
            rows.append([str(mine.streams), *shown])
    return _markdown(["streams", *(column.title for column in COLUMNS)], rows) if rows else None


def _against(mine: Outcome, peers: Sequence[Outcome], column: Column) -> str:
    own = column.figure(mine)
    figures = [
        (figure, peer.client) for peer in peers if (figure := column.figure(peer)) is not None
    ]
    if own is None or not figures:
        return "–"
    best, peer = min(figures, key=lambda each: abs(each[0]))
    if own == best:
        return "equal"
    verdict = "better" if abs(own) < abs(best) else "worse"
    if best == 0:
        return f"{verdict}: {peer} has 0"
    ratio = abs(own / best)
    text = f"{verdict}: {ratio:.2g} × {peer}"
    if column.wanted is not None and mine.streams in WANTED_AT:
        met = "met" if ratio <= column.wanted else "missed"
        text += f" (wanted ≤ {column.wanted:g}: {met})"
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(figure: float | None, digits: int) -> str:
    return "–" if figure is None else f"{figure:.{digits}f}"


def _ms(seconds: Sequence[float] | None, percent: float) -> float | None:
    return None if seconds is None else float(np.percentile(seconds, percent)) * 1e3
