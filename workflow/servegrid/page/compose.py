"""The page of a study from its tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from servegrid.labels import deployment_titles
from servegrid.page import Answer, parts, render
from servegrid.page.payload import counts_of, payload_of

FILES = (
    ("../tables/cells.parquet", "one row per cell and trial, with units and meanings"),
    ("../tables/cells.csv", "the same as text"),
    ("../tables/summary.parquet", "one row per cell: medians over trials with 95% intervals"),
    ("../tables/summary.csv", "the same as text"),
    ("../tables/sentinels.csv", "the load that was repeated to watch each node"),
)


def page(
    name: str,
    cells: pd.DataFrame,
    summary: pd.DataFrame,
    allocations: Sequence[Mapping[str, Any]],
) -> str:
    """The page as text, of tables of `records.CELLS` and `records.SUMMARY`.

    `allocations` are those of `provenance.allocations`.
    """
    counts = counts_of(summary, cells)
    tables = [
        (f"../tables/{deployment}.md", f"seconds per 100 tokens of {title}")
        for deployment, title in deployment_titles(cells).items()
    ]
    return render(
        payload_of(name, summary, cells, allocations),
        parts.counts_text(counts, cells),
        Answer(""),
        [parts.verdicts(cells), parts.provenance(allocations)],
        [*FILES, *tables],
    )
