"""Summarises the trials of each cell: medians with 95% intervals. Pure, except `write_summary`."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.intervals import Interval, interval
from servegrid.records import columns
from servegrid.records.verdict import OK


def summarise(cells: pd.DataFrame) -> pd.DataFrame:
    """A table of `columns.SUMMARY`, one row per cell, in the order of `cells`.

    `cells` is a table of `columns.CELLS`. The figures come from the valid trials, or from all
    served trials if none is valid.
    """
    keys = [column.name for column in columns.SUMMARY_KEYS]
    metrics = (
        cells[list(columns.SUMMARY_METRICS)].astype("Float64").to_numpy(float, na_value=math.nan)
    )
    is_served = (cells["verdict"] == OK).to_numpy(bool)
    is_valid = is_served & cells["valid"].eq(True).fillna(False).to_numpy(bool)
    first_rows, figures = [], []
    row_groups: Any = cells.groupby(keys, sort=False, dropna=False).indices.values()
    for trials in sorted(row_groups, key=lambda rows: int(rows[0])):
        served, valid = trials[is_served[trials]], trials[is_valid[trials]]
        first_rows.append(trials[0])
        counts = {"trials": len(trials), "trials_served": len(served), "trials_valid": len(valid)}
        figures.append(counts | _medians(metrics[valid if valid.size else served]))
    names = [column.name for column in columns.SUMMARY[len(keys) :]]
    key_values = cells[keys].iloc[first_rows].reset_index(drop=True)
    table = pd.concat([key_values, pd.DataFrame(figures, columns=names)], axis=1)
    return tables.cast_columns(table, columns.SUMMARY)


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
    values = usable_trials(trials)[column].dropna().astype(float).tolist()
    if not values:
        return None, None
    return float(pd.Series(values).median()), interval(values)


def write_summary(summary: pd.DataFrame, parquet: Path, csv: Path) -> None:
    """Write a table of `columns.SUMMARY` as Parquet, with units and meanings, and as CSV."""
    tables.save_table(summary, columns.SUMMARY, parquet, csv)


def _medians(trials: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The medians and intervals of one cell.

    `trials` has one row per trial and one column per metric of SUMMARY_METRICS; NaN is unknown.
    """
    row: dict[str, Any] = {}
    for name, column in zip(columns.SUMMARY_METRICS, trials.T, strict=True):
        values = column[~np.isnan(column)].tolist()
        low, high = interval(values) or (None, None)
        median = statistics.median(values) if values else None
        row |= {name: median, f"{name}_low": low, f"{name}_high": high}
    return row
