"""Short Markdown notes: why cells have no value, or why a value is not valid. Pure.

Cells that share a verdict or a broken rule of validity share a line. A full row or column of the
table is named as one. The table of cells contains all evidence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from servegrid.records.verdict import OK, SERVED

CellKey = tuple[float, int]
"""Concurrency or request rate, and prompt tokens."""

_MAX_SHOWN = 3
"""Maximum lines per verdict or rule, and maximum pieces of evidence per line."""


@dataclass(frozen=True)
class Reason:
    """A verdict or a broken rule of some trials of a cell, with the evidence.

    `share` says how many trials are affected. It is empty if all are.
    """

    name: str
    evidence: tuple[str, ...]
    share: str


def serving_failures(trials: pd.DataFrame) -> list[Reason]:
    """Why trials of one cell were not served."""
    return _verdicts(trials, ~trials["verdict"].isin(SERVED))


def serving_remarks(trials: pd.DataFrame) -> list[Reason]:
    """How hard trials of one cell were for the server that served them: queued or preempted."""
    return _verdicts(trials, trials["verdict"].isin(SERVED - {OK}))


def _verdicts(trials: pd.DataFrame, chosen: pd.Series[bool]) -> list[Reason]:
    failed = trials[chosen]
    found = [
        (verdict, detail if isinstance(detail, str) else None)
        for verdict, detail in zip(failed["verdict"], failed["verdict_detail"], strict=True)
    ]
    return _group(found, len(trials))


def validity_failures(trials: pd.DataFrame) -> list[Reason]:
    """Which rules of validity the served trials of one cell break."""
    found: list[tuple[str, str]] = []
    broken = trials[["invalid_rules", "invalid_evidence"]].dropna()
    for rules, evidence in broken.itertuples(index=False):
        found += zip(rules, evidence, strict=True)
    return _group(found, len(trials))


def format_reasons(table: Mapping[CellKey, Sequence[Reason]]) -> list[str]:
    """The reasons of all cells of a table as Markdown list items. Empty if there are no reasons."""
    by_name: dict[str, dict[Reason, list[CellKey]]] = {}
    for cell, reasons in table.items():
        for reason in reasons:
            by_name.setdefault(reason.name, {}).setdefault(reason, []).append(cell)
    lines: list[tuple[Reason, list[CellKey]]] = []
    for same_name in by_name.values():
        lines += (same_name if len(same_name) <= _MAX_SHOWN else _merge(same_name)).items()
    return [f"- {_format_cells(cells, table)}: {_format_reason(reason)}" for reason, cells in lines]


def _group(found: Iterable[tuple[str, str | None]], trials: int) -> list[Reason]:
    by_name: dict[str, list[str | None]] = {}
    for name, evidence in found:
        by_name.setdefault(name, []).append(evidence)
    return [
        Reason(
            name,
            evidence=tuple(dict.fromkeys(each for each in evidence if each is not None)),
            share="" if len(evidence) == trials else f"{len(evidence)} of {trials} trials",
        )
        for name, evidence in by_name.items()
    ]


def _merge(same_name: Mapping[Reason, Sequence[CellKey]]) -> dict[Reason, list[CellKey]]:
    """Several reasons of one name as one reason."""
    shares = {reason.share for reason in same_name}
    reason = Reason(
        name=next(iter(same_name)).name,
        evidence=tuple(dict.fromkeys(each for reason in same_name for each in reason.evidence)),
        share=shares.pop() if len(shares) == 1 else "some trials",
    )
    return {reason: [cell for cells in same_name.values() for cell in cells]}


def _format_reason(reason: Reason) -> str:
    evidence = "; ".join(map(_quote, reason.evidence[:_MAX_SHOWN]))
    more = len(reason.evidence) - _MAX_SHOWN
    parts = [reason.share, f"`{reason.name}`", evidence + (f" and {more} more" if more > 0 else "")]
    return ", ".join(filter(None, parts))


def _quote(text: str) -> str:
    """A server's text as code on one line, so that nothing in it acts as Markdown."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _format_cells(cells: Collection[CellKey], table: Collection[CellKey]) -> str:
    """`64 × 31`; `64 × all` for a full row; `all × 31` for a full column; `all`."""
    left = set(cells)
    if len(left) > 1 and left == set(table):
        return "all"
    texts = []
    for axis, text in enumerate(("{:g} × all", "all × {:g}")):
        for level in sorted({cell[axis] for cell in cells}):
            line = {cell for cell in table if cell[axis] == level}
            if len(line) > 1 and line <= set(cells) and line & left:
                texts.append(text.format(level))
                left -= line
    return ", ".join([*texts, *(f"{intensity:g} × {length}" for intensity, length in sorted(left))])
