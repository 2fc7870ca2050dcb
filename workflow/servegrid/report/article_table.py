"""A deployment's table in the article's shape: seconds per 100 tokens over load and prompt.

The shape is that of "Deploying Open-Source Large Language Models: A Performance Analysis"
(Bendi-Ouis, Dutarte, Hinaut, 2024): a row per number of concurrent requests, a column per
number of prompt tokens, `-` where the cell was not served. Of several trials the median is shown
with its 95% interval; rates take the place of concurrent requests where a load has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from servegrid.analysis.summary import median, served, valid
from servegrid.analysis.titles import (
    INTERVAL_TITLE,
    PROTOCOLS,
    axis_title,
    counted,
    deployment_title,
    emulation_notes,
    protocol_title,
    with_intensity,
)
from servegrid.records import parquet
from servegrid.report import markup
from servegrid.report.failure_notes import Cell, Reason, doubts, failures, listed

NOT_SERVED = "-"
NOT_IN_STUDY = ""
NO_FIGURE = "?"
"""Of a load that was served and has no steady state."""


@dataclass(frozen=True)
class Entry:
    """What the table shows of one cell: a number of seconds, with its interval, or a sign.

    The reasons say why it was not served, why its figure is without some of its trials, and why
    none of them is valid.
    """

    seconds: str
    interval: str | None
    not_served: Sequence[Reason] = ()
    left_out: Sequence[Reason] = ()
    not_valid: Sequence[Reason] = ()

    @property
    def text(self) -> str:
        marks = "*" * bool(self.left_out) + "!" * bool(self.not_valid)
        return " ".join(filter(None, (self.seconds, self.interval))) + marks


@dataclass(frozen=True)
class ArticleTable:
    """One deployment under one protocol and output length."""

    protocol: str
    output_len: int
    trials: int
    entries: Mapping[Cell, Entry]

    @property
    def intensities(self) -> list[float]:
        return sorted({intensity for intensity, _ in self.entries})

    @property
    def input_lens(self) -> list[int]:
        return sorted({input_len for _, input_len in self.entries})


def article_tables(cells: pd.DataFrame, deployment: str) -> list[ArticleTable]:
    """The tables of `deployment`: one for each protocol and output length, in study order.

    `cells` has the columns of `columns.CELLS`. A cell with several trials shows the median of
    those that are valid, or of those that were served where none is.
    """
    own = cells[cells["deployment"] == deployment]
    workloads = own[["protocol", "output_len"]].drop_duplicates()
    return [
        _table(
            with_intensity(own[(own["protocol"] == protocol) & (own["output_len"] == output_len)])
        )
        for protocol, output_len in workloads.itertuples(index=False)
    ]


def as_markdown(title: str, tables: Sequence[ArticleTable], notes: Sequence[str] = ()) -> str:
    """A Markdown page: title, notes, and each table with the reasons for its gaps below."""
    blocks = [f"# {title}", *notes]
    for table in tables:
        if len(tables) > 1:
            tokens = counted(table.output_len, "output token")
            blocks.append(f"## {protocol_title(table.protocol).capitalize()}, {tokens}")
        blocks += [
            f"Seconds per 100 tokens; rows are {axis_title(table.protocol)}, columns prompt "
            "tokens.",
            _grid(table),
            _load_note(table),
            *_gap_notes(table),
        ]
    return "\n\n".join(blocks) + "\n"


def as_frame(tables: Sequence[ArticleTable]) -> pd.DataFrame:
    """The same numbers as texts: the article's columns after protocol, output_len and requests."""
    rows = [
        {"protocol": table.protocol, "output_len": table.output_len, "requests": f"{intensity:g}"}
        | {
            str(length): table.entries[intensity, length].seconds
            for length in table.input_lens
            if (intensity, length) in table.entries
        }
        for table in tables
        for intensity in table.intensities
    ]
    lengths = sorted({length for table in tables for length in table.input_lens})
    return pd.DataFrame(
        rows, columns=["protocol", "output_len", "requests", *map(str, lengths)]
    ).fillna(NOT_IN_STUDY)


def as_csv(tables: Sequence[ArticleTable]) -> str:
    """The frame as CSV."""
    csv: str = as_frame(tables).to_csv(index=False, lineterminator="\n")
    return csv


def as_parquet(tables: Sequence[ArticleTable]) -> pa.Table:
    """The frame with numbers in place of texts; what has no figure is null."""
    frame = as_frame(tables)
    lengths = {
        name: pd.to_numeric(frame[name], errors="coerce")
        for name in frame.columns
        if name not in ("protocol", "output_len")
    }
    return pa.Table.from_pandas(frame.assign(**lengths), preserve_index=False)


def as_latex(title: str, tables: Sequence[ArticleTable], label: str) -> str:
    """The frame as a LaTeX table."""
    return markup.as_latex(as_frame(tables), f"Seconds per 100 tokens of {title}.", label)


def write_article(cells: pd.DataFrame, deployment: str, paths: Mapping[str, Path]) -> None:
    """Write the tables of `deployment` to `paths`, by the keys markdown, csv, latex and parquet."""
    own = cells[cells["deployment"] == deployment]
    tables, title = article_tables(own, deployment), deployment_title(own)
    markup.write(
        {
            paths["markdown"]: as_markdown(title, tables, emulation_notes(own)),
            paths["csv"]: as_csv(tables),
            paths["latex"]: as_latex(title, tables, f"tab:{deployment}"),
        }
    )
    parquet.write(as_parquet(tables), paths["parquet"])


def number(seconds: float) -> str:
    """One decimal as in the article, or two significant digits where that says too little.

    >>> [number(each) for each in (12.34, 0.84, 0.996, 0.0123)]
    ['12.3', '0.84', '1.0', '0.012']
    """
    magnitude = math.floor(math.log10(float(f"{seconds:.1e}")))
    return f"{seconds:.{max(1, 1 - magnitude)}f}"


def _table(rows: pd.DataFrame) -> ArticleTable:
    cells: Any = rows.groupby(["intensity", "input_len"])
    return ArticleTable(
        protocol=rows["protocol"].iloc[0],
        output_len=int(rows["output_len"].iloc[0]),
        trials=rows["trial"].nunique(),
        entries={(float(level), int(length)): _entry(own) for (level, length), own in cells},
    )


def _entry(trials: pd.DataFrame) -> Entry:
    if served(trials).empty:
        return Entry(NOT_SERVED, None, not_served=failures(trials))
    value, around = median(trials, "seconds_per_100_tokens")
    believable = not valid(trials).empty
    return Entry(
        seconds=NO_FIGURE if value is None else number(value),
        interval=around and "[{}, {}]".format(*map(number, around)),
        left_out=failures(trials) + (doubts(trials) if believable else []),
        not_valid=[] if believable else doubts(trials),
    )


def _grid(table: ArticleTable) -> str:
    lines = [[_rows_title(table), *map(str, table.input_lens)]]
    for intensity in table.intensities:
        entries = [table.entries.get((intensity, length)) for length in table.input_lens]
        texts = [NOT_IN_STUDY if entry is None else entry.text for entry in entries]
        lines.append([f"{intensity:g}", *texts])
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join("| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines)


def _rows_title(table: ArticleTable) -> str:
    return "Requests/s" if table.protocol == "poisson" else "Requests"


def _load_note(table: ArticleTable) -> str:
    trials = ", 1 trial"
    if table.trials > 1:
        trials = f", median of {table.trials} trials [{INTERVAL_TITLE}]"
    protocol = f"{protocol_title(table.protocol).capitalize()} ({PROTOCOLS[table.protocol]})"
    return f"{protocol}, {counted(table.output_len, 'output token')} per request{trials}."


def _gap_notes(table: ArticleTable) -> list[str]:
    notes = []
    if len(table.entries) < len(table.intensities) * len(table.input_lens):
        notes.append("Empty: not part of the study.")
    if any(entry.seconds == NO_FIGURE for entry in table.entries.values()):
        notes.append("`?`: served, but no figure can be given.")
    where = f"({_rows_title(table).lower()} × prompt tokens)"
    for mark, reasons_of in (
        ("`-`: not served", attrgetter("not_served")),
        ("\\*: without the trials that were not served or not valid", attrgetter("left_out")),
        ("!: not valid", attrgetter("not_valid")),
    ):
        lines = listed({cell: reasons_of(entry) for cell, entry in table.entries.items()})
        if lines:
            notes.append(f"{mark} {where}:\n\n" + "\n".join(lines))
    return notes
