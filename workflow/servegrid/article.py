"""A deployment's table in the article's shape: seconds per 100 tokens over load and prompt.

The shape is that of "Deploying Open-Source Large Language Models: A Performance Analysis"
(Bendi-Ouis, Dutarte, Hinaut, 2024): a row per number of concurrent requests, a column per
number of prompt tokens, `-` where the cell was not served. Of several trials the median is shown
with its 95% interval; rates take the place of concurrent requests where a load has one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid import records
from servegrid.labels import (
    INTERVAL_TITLE,
    PROTOCOLS,
    axis_title,
    counted,
    deployment_title,
    doubtful,
    emulation_notes,
    with_intensity,
)
from servegrid.summary import median
from servegrid.verdict import OK

NOT_SERVED = "-"
NOT_IN_STUDY = ""
NO_FIGURE = "?"
"""Of a load that was served and has no steady state."""

Cell = tuple[Any, int]
"""Concurrent requests, or requests per second, and prompt tokens."""


@dataclass(frozen=True)
class ArticleTable:
    """One deployment under one protocol and output length.

    `seconds` is indexed by concurrent requests or by rates, with a column per number of prompt
    tokens; its entries are text: a number or one of the signs above. `intervals` has the ends of
    the interval around those that have one. `failures` says, in Markdown, why the trials that
    failed were not served, for each cell that has any; `doubts`, why those that were served may
    not be believed.
    """

    protocol: str
    output_len: int
    trials: int
    seconds: pd.DataFrame
    intervals: dict[Cell, str]
    failures: dict[Cell, str]
    doubts: dict[Cell, str]


def article_tables(cells: pd.DataFrame, deployment: str) -> list[ArticleTable]:
    """The tables of `deployment`: one for each protocol and output length, in study order.

    `cells` has the columns of `records.CELLS`. A cell with several trials shows the median of
    those that were served.
    """
    own = cells[cells["deployment"] == deployment]
    loads = own[["protocol", "output_len"]].drop_duplicates()
    return [
        _table(
            with_intensity(own[(own["protocol"] == protocol) & (own["output_len"] == output_len)])
        )
        for protocol, output_len in loads.itertuples(index=False)
    ]


def as_markdown(title: str, tables: Sequence[ArticleTable], notes: Sequence[str] = ()) -> str:
    """A Markdown page: title, notes, and each table with the reasons for its gaps below."""
    blocks = [f"# {title}", *notes]
    for table in tables:
        if len(tables) > 1:
            tokens = counted(table.output_len, "output token")
            blocks.append(f"## {table.protocol.capitalize()}, {tokens}")
        blocks += [
            f"Seconds per 100 tokens; rows are {axis_title(table.protocol)}, columns prompt "
            "tokens.",
            _grid(table),
            _load_note(table),
            *_gap_notes(table),
        ]
    return "\n\n".join(blocks) + "\n"


def as_csv(tables: Sequence[ArticleTable]) -> str:
    """The same numbers as CSV: the article's columns after protocol, output_len and requests."""
    frames = [
        table.seconds.rename_axis("requests")
        .reset_index()
        .assign(protocol=table.protocol, output_len=table.output_len)
        for table in tables
    ]
    keys = ["protocol", "output_len", "requests"]
    joined = pd.concat(frames).set_index(keys)
    csv: str = joined[sorted(joined.columns)].to_csv(lineterminator="\n", na_rep=NOT_IN_STUDY)
    return csv


def write_article(cells: pd.DataFrame, deployment: str, markdown: Path, csv: Path) -> None:
    """Write the tables of `deployment` as one Markdown page and one CSV file."""
    own = cells[cells["deployment"] == deployment]
    tables = article_tables(own, deployment)
    texts = {
        markdown: as_markdown(deployment_title(own), tables, emulation_notes(own)),
        csv: as_csv(tables),
    }
    for path, text in texts.items():
        with records.written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def number(seconds: float) -> str:
    """One decimal as in the article, or two significant digits where that says too little.

    >>> [number(each) for each in (12.34, 0.84, 0.996, 0.0123)]
    ['12.3', '0.84', '1.0', '0.012']
    """
    magnitude = math.floor(math.log10(float(f"{seconds:.1e}")))
    return f"{seconds:.{max(1, 1 - magnitude)}f}"


def _table(rows: pd.DataFrame) -> ArticleTable:
    requests = sorted(rows["intensity"].unique())
    if rows.iloc[0]["protocol"] != "poisson":
        requests = [int(each) for each in requests]
    lengths = sorted(rows["input_len"].unique())
    seconds = pd.DataFrame(NOT_IN_STUDY, index=requests, columns=lengths)
    intervals: dict[Cell, str] = {}
    failures: dict[Cell, str] = {}
    doubts: dict[Cell, str] = {}
    for cell in itertools.product(requests, lengths):
        trials = rows[(rows["intensity"] == cell[0]) & (rows["input_len"] == cell[1])]
        served = trials[trials["verdict"] == OK]
        if not trials.empty:
            seconds.loc[cell] = NOT_SERVED if served.empty else NO_FIGURE
        value, around = median(trials, "seconds_per_100_tokens")
        if value is not None:
            seconds.loc[cell] = number(value)
        if around is not None:
            intervals[cell] = "[{}, {}]".format(*map(number, around))
        if len(served) < len(trials):
            failures[cell] = _failure(trials)
        if doubtful(trials).any():
            doubts[cell] = "; ".join(
                _quoted(reason) for reason in dict.fromkeys(trials["invalid_reason"].dropna())
            )
    first = rows.iloc[0]
    return ArticleTable(
        protocol=first["protocol"],
        output_len=int(first["output_len"]),
        trials=rows["trial"].nunique(),
        seconds=seconds,
        intervals=intervals,
        failures=failures,
        doubts=doubts,
    )


def _failure(trials: pd.DataFrame) -> str:
    failed = trials[trials["verdict"] != OK]
    share = "" if len(failed) == len(trials) else f"{len(failed)} of {len(trials)} trials, "
    told = dict.fromkeys(
        f"`{verdict}`, {_quoted(reason)}" if isinstance(reason, str) else f"`{verdict}`"
        for verdict, reason in zip(failed["verdict"], failed["reason"], strict=True)
    )
    return share + "; ".join(told)


def _quoted(text: str) -> str:
    """Text of a server on one line, as code: nothing in it is Markdown."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _grid(table: ArticleTable) -> str:
    lengths = [int(length) for length in table.seconds.columns]
    lines = [["Requests/s" if table.protocol == "poisson" else "Requests", *map(str, lengths)]]
    for requests in table.seconds.index.tolist():
        cells = [(requests, length) for length in lengths]
        marks = ["*" * _partly_served(table, cell) + "!" * (cell in table.doubts) for cell in cells]
        texts = [
            " ".join(filter(None, [str(table.seconds.loc[cell]), table.intervals.get(cell)]))
            for cell in cells
        ]
        lines.append([f"{requests:g}", *map("".join, zip(texts, marks, strict=True))])
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join("| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines)


def _partly_served(table: ArticleTable, cell: Cell) -> bool:
    return cell in table.failures and str(table.seconds.loc[cell]) != NOT_SERVED


def _load_note(table: ArticleTable) -> str:
    trials = ", 1 trial"
    if table.trials > 1:
        trials = f", median of {table.trials} trials [{INTERVAL_TITLE}]"
    protocol = f"{table.protocol.capitalize()} ({PROTOCOLS[table.protocol]})"
    return f"{protocol}, {counted(table.output_len, 'output token')} per request{trials}."


def _gap_notes(table: ArticleTable) -> list[str]:
    notes = []
    if (table.seconds == NOT_IN_STUDY).to_numpy().any():
        notes.append("Empty: not part of the study.")
    if (table.seconds == NO_FIGURE).to_numpy().any():
        notes.append("`?`: served, but no figure can be given.")
    partly = {
        cell: reason for cell, reason in table.failures.items() if _partly_served(table, cell)
    }
    not_at_all = {cell: why for cell, why in table.failures.items() if cell not in partly}
    for mark, reasons in {
        "`-`: not served": not_at_all,
        "\\*: not served in every trial": partly,
        "!: not valid": table.doubts,
    }.items():
        by_reason: dict[str, list[str]] = {}
        for (concurrency, length), reason in reasons.items():
            by_reason.setdefault(reason, []).append(f"{concurrency:g} × {length}")
        if by_reason:
            lines = [f"- {', '.join(where)}: {reason}" for reason, where in by_reason.items()]
            notes.append(f"{mark} (requests × prompt tokens):\n\n" + "\n".join(lines))
    return notes
