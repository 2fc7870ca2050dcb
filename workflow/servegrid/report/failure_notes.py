"""Why cells have no figure, or one that may not be believed, in few lines of Markdown. Pure.

Cells share a line where the same verdict or rule of validity speaks against them, and are named
by rows and columns of their table where they fill these. All evidence stands in the table of cells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from servegrid.records.verdict import OK

Cell = tuple[float, int]
"""Concurrent requests, or requests per second, and prompt tokens."""

_LISTED = 3
"""Lines of one verdict or rule, and pieces of evidence in a line."""


@dataclass(frozen=True)
class Reason:
    """The verdict or rule that speaks against trials of a cell, with what each of them met.

    `share` tells how many trials these are; it is empty where they are all.
    """

    name: str
    evidence: tuple[str, ...]
    share: str


def failures(trials: pd.DataFrame) -> list[Reason]:
    """Why trials of one cell were not served."""
    failed = trials[trials["verdict"] != OK]
    told = [
        (verdict, reason if isinstance(reason, str) else None)
        for verdict, reason in zip(failed["verdict"], failed["verdict_detail"], strict=True)
    ]
    return _reasons(told, len(trials))


def doubts(trials: pd.DataFrame) -> list[Reason]:
    """Why trials of one cell were served and may not be believed."""
    told: list[tuple[str, str]] = []
    broken = trials[["invalid_rules", "invalid_evidence"]].dropna()
    for rules, evidence in broken.itertuples(index=False):
        told += zip(rules, evidence, strict=True)
    return _reasons(told, len(trials))


def listed(table: Mapping[Cell, Sequence[Reason]]) -> list[str]:
    """The lines of a Markdown list of the reasons of all cells of a table; none without any."""
    by_name: dict[str, dict[Reason, list[Cell]]] = {}
    for cell, against in table.items():
        for reason in against:
            by_name.setdefault(reason.name, {}).setdefault(reason, []).append(cell)
    lines: list[tuple[Reason, list[Cell]]] = []
    for alike in by_name.values():
        lines += (alike if len(alike) <= _LISTED else _as_one(alike)).items()
    return [f"- {_places(cells, table)}: {_text(reason)}" for reason, cells in lines]


def _reasons(told: Iterable[tuple[str, str | None]], trials: int) -> list[Reason]:
    by_name: dict[str, list[str | None]] = {}
    for name, evidence in told:
        by_name.setdefault(name, []).append(evidence)
    return [
        Reason(
            name,
            evidence=tuple(dict.fromkeys(each for each in met if each is not None)),
            share="" if len(met) == trials else f"{len(met)} of {trials} trials",
        )
        for name, met in by_name.items()
    ]


def _as_one(alike: Mapping[Reason, Sequence[Cell]]) -> dict[Reason, list[Cell]]:
    """Reasons of one name taken together."""
    shares = {reason.share for reason in alike}
    reason = Reason(
        name=next(iter(alike)).name,
        evidence=tuple(dict.fromkeys(each for reason in alike for each in reason.evidence)),
        share=shares.pop() if len(shares) == 1 else "some trials",
    )
    return {reason: [cell for cells in alike.values() for cell in cells]}


def _text(reason: Reason) -> str:
    evidence = "; ".join(map(_quoted, reason.evidence[:_LISTED]))
    more = len(reason.evidence) - _LISTED
    told = [reason.share, f"`{reason.name}`", evidence + (f" and {more} more" if more > 0 else "")]
    return ", ".join(filter(None, told))


def _quoted(text: str) -> str:
    """Text of a server on one line, as code: nothing in it is Markdown."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _places(cells: Collection[Cell], table: Collection[Cell]) -> str:
    """`64 × 31`, or `64 × all` where that is the whole row, and `all × 31` of a column."""
    left = set(cells)
    if len(left) > 1 and left == set(table):
        return "all"
    places = []
    for part, text in enumerate(("{:g} × all", "all × {:g}")):
        for level in sorted({cell[part] for cell in cells}):
            line = {cell for cell in table if cell[part] == level}
            if len(line) > 1 and line <= set(cells) and line & left:
                places.append(text.format(level))
                left -= line
    return ", ".join(
        [*places, *(f"{intensity:g} × {length}" for intensity, length in sorted(left))]
    )
