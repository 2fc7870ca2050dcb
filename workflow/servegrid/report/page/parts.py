"""The sections of the page that are tables and sentences. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from servegrid.analysis.findings import Slo
from servegrid.analysis.titles import counted, deployment_titles
from servegrid.records.verdict import OK
from servegrid.report.findings_report import BESIDE, NOT_COMPARABLE
from servegrid.report.page import Part, Table

MOST_ROWS = 200
"""Of one table of the page; the files beside it have all."""


def counts_text(counts: Mapping[str, int], cells: pd.DataFrame) -> str:
    """What was done, in one sentence.

    `counts` are those of `payload.counts_of`.
    """
    if not counts["trials"]:
        return "Nothing has been measured yet."
    trials = counted(counts["trials"], "trial")
    kinds = cells["gpu"].nunique()
    return (
        f"{counted(counts['deployments'], 'deployment')} on {counted(kinds, 'kind')} of hardware, "
        f"{counted(counts['cells'], 'cell')} in {trials}, "
        f"{counts['requests']:,} requests: {counts['served']} cells served, "
        f"{counts['valid']} of them with figures that may be believed."
    )


def findings(told: Sequence[str], frontier: pd.DataFrame, slo: Slo) -> Part:
    """The statements of `findings.statements` and the frontier as texts."""
    if not told:
        return Part("findings", "Findings", ["It takes cells of a burst or a steady load."])
    caption = (
        f"Frontier: requests at once that were served, and with {slo} for each; linear from: "
        "from there on the time grows at least 1.8-fold per doubling of the requests."
    )
    return Part("findings", "Findings", points=told, tables=[table_of(caption, frontier)])


def beside(told: Sequence[str], differences: Sequence[str], nothing: bool) -> Part:
    """What `published.statements` says, and what differs beside the figures."""
    title = "Beside published figures"
    if nothing:
        return Part("published", title, [NOT_COMPARABLE])
    texts = [f"{BESIDE} The ratio can be chosen as the figure of the heat map above."]
    return Part("published", title, texts, [*told, *differences])


def engines(compared: pd.DataFrame) -> Part:
    """The table of `beside_engines.compared`."""
    title = "Engines beside each other"
    if compared.empty:
        return Part("engines", title, ["No model was served by two engines on the same hardware."])
    caption = (
        "Second deployment / first: the median over the cells that both served, and the least and "
        "the most. Times under 1 and tokens/s over 1 are better."
    )
    return Part("engines", title, tables=[table_of(caption, compared)])


def verdicts(cells: pd.DataFrame) -> Part:
    """How trials ended, and which rules of validity speak against them."""
    titles = deployment_titles(cells)
    ended = Counter(cells["verdict"])
    texts = [
        f"{counted(ended[OK], 'trial')} of {len(cells)} served; "
        f"{int(cells['valid'].eq(True).sum())} of them valid."
    ]
    failed = cells[cells["verdict"] != OK]
    rows = [
        (titles[str(name)], str(verdict), str(len(own)), _short(own["verdict_detail"]))
        for (name, verdict), own in failed.groupby(["deployment", "verdict"], sort=False)
    ]
    doubts = Counter(
        (str(name), rule)
        for name, rules in cells[["deployment", "invalid_rules"]].dropna().itertuples(index=False)
        for rule in rules
    )
    broken = [(titles[name], rule, str(count)) for (name, rule), count in doubts.items()]
    tables = []
    if rows:
        head = ("deployment", "verdict", "trials", "evidence of one")
        tables.append(_table("Trials that could not be served.", head, rows))
    if broken:
        head3 = ("deployment", "rule", "trials")
        tables.append(_table("Trials that may not be believed, by rule.", head3, broken))
    if not broken:
        texts.append("No rule of validity speaks against any trial that was served.")
    return Part("validity", "Verdicts and validity", texts, tables=tables)


def provenance(allocations: Sequence[Mapping[str, Any]]) -> Part:
    """What the figures were measured with, a row for each allocation."""
    head = (
        "deployment",
        "engine",
        "node",
        "processor",
        "GPUs",
        "driver",
        "Python",
        "servegrid",
        "begun",
    )
    rows = [[str(each.get(key) or "–") for key in head] for each in allocations]
    texts = [] if rows else ["No record says what it was measured with."]
    tables = [_table("What each allocation ran on.", head, rows)] if rows else []
    return Part("provenance", "Provenance", texts, tables=tables)


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    left = len(rows) - MOST_ROWS
    more = f"{left} more rows are in the tables below." if left > 0 else ""
    return Table(caption, head, rows[:MOST_ROWS], more)


def table_of(caption: str, frame: pd.DataFrame) -> Table:
    """A table of the page from a frame whose columns are texts already."""
    return _table(caption, list(frame.columns), [list(map(str, row)) for row in frame.to_numpy()])


def _short(reasons: pd.Series[Any]) -> str:
    known = reasons.dropna()
    text = "–" if known.empty else " ".join(str(known.iloc[0]).split())
    return text if len(text) <= 120 else text[:119] + "…"
