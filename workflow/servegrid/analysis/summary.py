"""Summarises the trials of each cell: medians with 95% intervals. Pure, except `write_summary`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.intervals import Interval, bring_up_medians, interval
from servegrid.records import columns
from servegrid.records.verdict import NOT_RUN, OK

CELL_KEYS = ("protocol", "concurrency", "request_rate", "input_len", "output_len")
"""The columns that identify a cell of a deployment."""


def summarise(cells: pd.DataFrame) -> pd.DataFrame:
    """A table of `columns.SUMMARY`, one row per cell, in the order of `cells`.

    `cells` is a table of `columns.CELLS`. The figures come from the valid trials, or from all
    served trials if none is valid. Trials that were not run do not count as trials.
    """
    keys = [column.name for column in columns.SUMMARY_KEYS]
    metrics = (
        cells[list(columns.SUMMARY_METRICS)].astype("Float64").to_numpy(float, na_value=math.nan)
    )
    allocations = _allocations(cells)
    is_served = (cells["verdict"] == OK).to_numpy(bool)
    is_run = (cells["verdict"] != NOT_RUN).to_numpy(bool)
    is_valid = is_served & cells["valid"].eq(True).fillna(False).to_numpy(bool)
    first_rows, figures = [], []
    row_groups: Any = cells.groupby(keys, sort=False, dropna=False).indices.values()
    for trials in sorted(row_groups, key=lambda rows: int(rows[0])):
        served, valid = trials[is_served[trials]], trials[is_valid[trials]]
        first_rows.append(trials[0])
        used = valid if valid.size else served
        counts = {
            "trials": int(is_run[trials].sum()),
            "trials_served": len(served),
            "trials_valid": len(valid),
            "bring_ups": len({allocations[row] for row in used}),
        }
        figures.append(counts | _medians(metrics[used], [allocations[row] for row in used]))
    names = [column.name for column in columns.SUMMARY[len(keys) :]]
    key_values = cells[keys].iloc[first_rows].reset_index(drop=True)
    table = pd.concat([key_values, pd.DataFrame(figures, columns=names)], axis=1)
    return tables.cast_columns(table, columns.SUMMARY)


def count_trials(cells: pd.DataFrame) -> tuple[int, int]:
    """The largest numbers of trials and of bring-ups of a cell in a table of `columns.CELLS`."""
    if "verdict" in cells:
        cells = run_trials(cells)
    if cells.empty:
        return 0, 0
    groups = cells.groupby(["deployment", *CELL_KEYS], sort=False, dropna=False)
    bring_ups = groups["allocation"].nunique().max() if "allocation" in cells else 1
    return int(groups.size().max()), max(1, int(bring_ups))


def run_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that were tried: all but those with the verdict not_run."""
    return trials[trials["verdict"] != NOT_RUN]


def tried_cells(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of `columns.SUMMARY` that say something about loads.

    Without the cells that were not run, and without prompt lengths where some were not run and
    none that was is valid: a search has decided those by other lengths. If no length would be left,
    all stay.
    """
    skipped = summary["trials"] == 0
    if not skipped.any():
        return summary
    keys = ["deployment", "protocol", "output_len"]
    marked = summary.assign(skipped=skipped)
    by_length = marked.groupby([*keys, "input_len"], sort=False)
    searched = by_length["skipped"].transform("any").astype(bool)
    known = by_length["trials_valid"].transform("max") > 0
    nothing = marked.groupby(keys, sort=False)["trials_valid"].transform("max") == 0
    return summary[~skipped & (known | ~searched | nothing)]


def served_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials with the verdict ok."""
    return trials[trials["verdict"] == OK]


def valid_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that are valid."""
    return trials[trials["valid"].eq(True).fillna(False).astype(bool)]


def usable_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that a cell's figures come from: the valid ones, or all served ones if none is."""
    valid = valid_trials(trials)
    return served_trials(trials) if valid.empty else valid


def trial_median(trials: pd.DataFrame, column: str) -> tuple[float | None, Interval | None]:
    """The median of a column over one cell's usable trials, and its 95% interval."""
    known = usable_trials(trials).dropna(subset=column)
    values = bring_up_medians(known[column].astype(float), _allocations(known))
    return (statistics.median(values), interval(values)) if values else (None, None)


def write_summary(summary: pd.DataFrame, parquet: Path, csv: Path) -> None:
    """Write a table of `columns.SUMMARY` as Parquet, with units and meanings, and as CSV."""
    tables.save_table(summary, columns.SUMMARY, parquet, csv)


def _allocations(trials: pd.DataFrame) -> list[Any]:
    """The allocation of each trial; the same for all if the table has no such column."""
    return trials["allocation"].tolist() if "allocation" in trials else [None] * len(trials)


def _medians(trials: npt.NDArray[np.float64], allocations: Sequence[Any]) -> dict[str, Any]:
    """The medians and intervals of one cell, over bring-ups if there are several.

    `trials` has one row per trial and one column per metric of SUMMARY_METRICS; NaN is unknown.
    `allocations` has the allocation of each trial.
    """
    row: dict[str, Any] = {}
    for name, column in zip(columns.SUMMARY_METRICS, trials.T, strict=True):
        known = np.flatnonzero(~np.isnan(column))
        values = bring_up_medians(column[known].tolist(), [allocations[index] for index in known])
        low, high = interval(values) or (None, None)
        median = statistics.median(values) if values else None
        row |= {name: median, f"{name}_low": low, f"{name}_high": high}
    return row
