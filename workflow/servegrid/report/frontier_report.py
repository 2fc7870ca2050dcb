"""The frontier of a search as text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from servegrid.analysis.search import FrontierEntry, Search
from servegrid.analysis.titles import intensity_title, workload_title
from servegrid.study.grid import Trial
from servegrid.study.text import pluralize

_HEAD = ("prompt tokens", "largest load that meets the SLO", "smallest that misses it", "")


def render_frontier(search: Search, upcoming: Trial | None) -> str:
    """The largest load that meets the SLO, per prompt length of one deployment and bring-up.

    `upcoming` is the trial that the search would measure next; None if it is complete.
    """
    first = search.trials[0]
    bring_up = f", bring-up {first.bring_up}" if first.bring_up > 1 else ""
    cells = {trial.cell for trial in search.trials}
    measured = {trial.cell for trial in search.trials if trial.id in search.measured}
    lines = [
        f"{first.deployment.name}{bring_up}: {len(measured)} of {pluralize(len(cells), 'cell')} "
        f"measured, {pluralize(len(search.measured), 'trial')}. SLO: {search.slo}."
    ]
    for (protocol, output_len), group in groupby(
        search.frontier(), lambda entry: (entry.protocol, entry.output_len)
    ):
        title = f"{workload_title(protocol, output_len)}; {intensity_title(protocol)}:"
        lines += ["", title[:1].upper() + title[1:], *_table(list(group))]
    if broken := sum(each.breaks_rules for each in search.measured.values()):
        lines += [
            "",
            f"Not valid: {broken} of {pluralize(len(search.measured), 'trial')}. They count here, "
            "but not in the findings and in the capacity plan. Why: invalid_rules in "
            "results/tables/cells.csv. To measure a cell again, delete its folder in "
            "results/cells.",
        ]
    if upcoming is not None:
        lines += ["", f"Next: {upcoming.cell}, trial {upcoming.number}."]
    return "\n".join(lines) + "\n"


def _table(entries: Sequence[FrontierEntry]) -> list[str]:
    rows = [_HEAD, *(_row(entry) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(map(str.rjust, row[:3], widths)) + f"  {row[3]}".rstrip() for row in rows
    ]


def _row(entry: FrontierEntry) -> tuple[str, str, str, str]:
    note = "open: too close to the SLO for its trials" if entry.is_open else ""
    note = note if entry.is_complete else "not known yet"
    largest, missing = (
        "–" if load is None else f"{load:g}" for load in (entry.largest, entry.smallest_missing)
    )
    return str(entry.input_len), largest, missing, note
