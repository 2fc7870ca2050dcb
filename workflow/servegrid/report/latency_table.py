"""The latency table of a deployment: seconds per 100 tokens, concurrency × prompt length.

One row per concurrency (or request rate), one column per prompt length, `-` for a cell that was not
served. This is the shape of the tables in "Deploying Open-Source Large Language Models: A
Performance Analysis" (Bendi-Ouis, Dutarte, Hinaut, 2024). A cell with several trials shows their
median with its 95% interval.
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

from servegrid.analysis.summary import TrialMedian, count_trials, run_trials, trial_medians
from servegrid.analysis.titles import (
    PROTOCOL_DESCRIPTIONS,
    deployment_title,
    figure_notes,
    intensity_title,
    interval_title,
    protocol_title,
    with_intensity,
)
from servegrid.records import parquet
from servegrid.report import markup
from servegrid.report.failure_notes import (
    CellKey,
    Reason,
    format_reasons,
    serving_failures,
    serving_remarks,
    validity_failures,
)
from servegrid.study.grid import OPEN_LOOPS
from servegrid.study.text import pluralize

NOT_SERVED = "-"
NOT_IN_STUDY = ""
NO_FIGURE = "?"
"""A cell that was served but has no steady state."""


@dataclass(frozen=True)
class Entry:
    """One cell of the table: seconds with their interval, or a sign.

    `not_served` says why the cell has no value, `left_out` why some of its trials do not count,
    and `not_valid` why none of its trials is valid. `remarks` say that requests waited in the
    server or were preempted.
    """

    seconds: str
    interval: str | None
    not_served: Sequence[Reason] = ()
    left_out: Sequence[Reason] = ()
    not_valid: Sequence[Reason] = ()
    remarks: Sequence[Reason] = ()

    @property
    def text(self) -> str:
        marks = "~" * bool(self.remarks) + "*" * bool(self.left_out) + "!" * bool(self.not_valid)
        return " ".join(filter(None, (self.seconds, self.interval))) + marks


@dataclass(frozen=True)
class LatencyTable:
    """The table of one deployment, protocol and output length."""

    protocol: str
    output_len: int
    trials: int
    bring_ups: int
    entries: Mapping[CellKey, Entry]

    @property
    def intensities(self) -> list[float]:
        return sorted({intensity for intensity, _ in self.entries})

    @property
    def input_lens(self) -> list[int]:
        return sorted({input_len for _, input_len in self.entries})


def latency_tables(cells: pd.DataFrame, deployment: str) -> list[LatencyTable]:
    """The tables of `deployment`: one per protocol and output length, in study order.

    `cells` has the columns of `columns.CELLS`. A cell with several trials shows the median of its
    valid trials, or of its served trials if none is valid.
    """
    selected = with_intensity(cells[cells["deployment"] == deployment])
    workloads = selected[["protocol", "output_len"]].drop_duplicates()
    return [
        _table(
            selected[(selected["protocol"] == protocol) & (selected["output_len"] == output_len)]
        )
        for protocol, output_len in workloads.itertuples(index=False)
    ]


def latency_markdown(title: str, tables: Sequence[LatencyTable], notes: Sequence[str] = ()) -> str:
    """A Markdown page: title, notes, and each table followed by the reasons for its gaps."""
    blocks = [f"# {title}", *notes]
    for table in tables:
        if len(tables) > 1:
            tokens = pluralize(table.output_len, "output token")
            blocks.append(f"## {protocol_title(table.protocol).capitalize()}, {tokens}")
        blocks += [
            f"Seconds per 100 tokens. Rows: {intensity_title(table.protocol)}. "
            "Columns: prompt tokens.",
            _format_grid(table),
            _workload_note(table),
            *_gap_notes(table),
        ]
    return "\n\n".join(blocks) + "\n"


def latency_frame(tables: Sequence[LatencyTable]) -> pd.DataFrame:
    """The seconds as texts: columns protocol, output_len, requests, and one per prompt length."""
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


def latency_csv(tables: Sequence[LatencyTable]) -> str:
    """The frame as CSV."""
    csv: str = latency_frame(tables).to_csv(index=False, lineterminator="\n")
    return csv


def write_latency_tables(cells: pd.DataFrame, deployment: str, paths: Mapping[str, Path]) -> None:
    """Write the tables of `deployment` to `paths` (keys: markdown, csv, latex, parquet).

    Raises RecordError if a file cannot be written.
    """
    selected = cells[cells["deployment"] == deployment]
    tables, title = latency_tables(selected, deployment), deployment_title(selected)
    latex = markup.as_latex(
        latency_frame(tables), f"Seconds per 100 tokens of {title}.", f"tab:{deployment}"
    )
    markup.write_texts(
        {
            paths["markdown"]: latency_markdown(title, tables, figure_notes(selected)),
            paths["csv"]: latency_csv(tables),
            paths["latex"]: latex,
        }
    )
    parquet.write_table(_as_arrow(tables), paths["parquet"])


def format_seconds(seconds: float) -> str:
    """One decimal, or two significant digits if one decimal is too coarse.

    >>> [format_seconds(each) for each in (12.34, 0.84, 0.996, 0.0123)]
    ['12.3', '0.84', '1.0', '0.012']
    """
    magnitude = math.floor(math.log10(float(f"{seconds:.1e}")))
    return f"{seconds:.{max(1, 1 - magnitude)}f}"


def _as_arrow(tables: Sequence[LatencyTable]) -> pa.Table:
    """The frame with numbers instead of texts. A cell without a value is null."""
    frame = latency_frame(tables)
    lengths = {
        name: pd.to_numeric(frame[name], errors="coerce")
        for name in frame.columns
        if name not in ("protocol", "output_len")
    }
    return pa.Table.from_pandas(frame.assign(**lengths), preserve_index=False)


def _table(rows: pd.DataFrame) -> LatencyTable:
    keys = ["intensity", "input_len"]
    # Only the columns of the reasons: a selection of rows copies all columns.
    reasons = ["verdict", "verdict_detail", "invalid_rules", "invalid_evidence"]
    cells: Any = rows[keys + reasons].groupby(keys)
    medians = trial_medians(rows, keys, "seconds_per_100_tokens")
    trials_per_cell, bring_ups = count_trials(rows)
    return LatencyTable(
        protocol=rows["protocol"].iloc[0],
        output_len=int(rows["output_len"].iloc[0]),
        trials=trials_per_cell,
        bring_ups=bring_ups,
        entries={
            (float(level), int(length)): _entry(trials, medians[level, length])
            for (level, length), trials in cells
        },
    )


def _entry(trials: pd.DataFrame, median: TrialMedian) -> Entry:
    tried = run_trials(trials)
    trials = trials if tried.empty else tried  # a cell may need fewer trials than the study allows
    if not median.is_served:
        return Entry(NOT_SERVED, None, not_served=serving_failures(trials))
    interval, not_valid = median.interval, validity_failures(trials)
    return Entry(
        seconds=NO_FIGURE if median.value is None else format_seconds(median.value),
        interval=interval and "[{}, {}]".format(*map(format_seconds, interval)),
        left_out=serving_failures(trials) + (not_valid if median.is_valid else []),
        not_valid=[] if median.is_valid else not_valid,
        remarks=serving_remarks(trials),
    )


def _format_grid(table: LatencyTable) -> str:
    lines = [[_row_title(table), *map(str, table.input_lens)]]
    for intensity in table.intensities:
        entries = [table.entries.get((intensity, length)) for length in table.input_lens]
        texts = [NOT_IN_STUDY if entry is None else entry.text for entry in entries]
        lines.append([f"{intensity:g}", *texts])
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join("| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines)


def _row_title(table: LatencyTable) -> str:
    return "Requests/s" if table.protocol in OPEN_LOOPS else "Concurrency"


def _workload_note(table: LatencyTable) -> str:
    trials = ", 1 trial"
    if table.trials > 1:
        trials = f", median of {table.trials} trials [{interval_title(table.bring_ups)}]"
    protocol = protocol_title(table.protocol).capitalize()
    description = PROTOCOL_DESCRIPTIONS[table.protocol]
    tokens = pluralize(table.output_len, "output token")
    return f"{protocol} ({description}), {tokens} per request{trials}."


def _gap_notes(table: LatencyTable) -> list[str]:
    notes = []
    if len(table.entries) < len(table.intensities) * len(table.input_lens):
        notes.append("Empty: not part of the study.")
    if any(entry.seconds == NO_FIGURE for entry in table.entries.values()):
        notes.append("`?`: served, but without a stationary part and therefore without a value.")
    axes = f"({_row_title(table).lower()} × prompt tokens)"
    for mark, reasons in (
        ("`-`: not served", attrgetter("not_served")),
        ("\\~: served, but requests waited or were preempted", attrgetter("remarks")),
        (
            "\\*: median without the trials that were not served or not valid",
            attrgetter("left_out"),
        ),
        ("!: not valid", attrgetter("not_valid")),
    ):
        lines = format_reasons({cell: reasons(entry) for cell, entry in table.entries.items()})
        if lines:
            notes.append(f"{mark} {axes}:\n\n" + "\n".join(lines))
    return notes
