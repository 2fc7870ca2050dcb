"""Summarises the trials of each cell: medians with 95% intervals. Pure, except `write_summary`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.intervals import Interval, bring_up_medians, interval
from servegrid.analysis.slo import Slo
from servegrid.records import columns
from servegrid.records.verdict import NOT_RUN, SERVED

CELL_KEYS = ("protocol", "concurrency", "request_rate", "input_len", "output_len")
"""The columns that identify a cell of a deployment."""


def summarise(cells: pd.DataFrame) -> pd.DataFrame:
    """A table of `columns.SUMMARY`, one row per cell, in the order of `cells`.

    `cells` is a table of `columns.CELLS`. The values come from the valid trials, or from all
    served trials if none is valid. Trials that were not run do not count as trials.
    """
    keys = [column.name for column in columns.SUMMARY_KEYS]
    metrics = (
        cells[list(columns.SUMMARY_METRICS)].astype("Float64").to_numpy(float, na_value=math.nan)
    )
    allocations = _allocations(cells)
    is_served = cells["verdict"].isin(SERVED).to_numpy(bool)
    is_run = (cells["verdict"] != NOT_RUN).to_numpy(bool)
    is_valid = is_served & cells["valid"].eq(True).fillna(False).to_numpy(bool)
    first_rows, figures = [], []
    for trials in rows_by_cell(cells, keys):
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


def rows_by_cell(cells: pd.DataFrame, keys: Sequence[str]) -> list[npt.NDArray[np.intp]]:
    """The row numbers of each cell's trials, in the order of `cells`; `keys` identify a cell."""
    groups: Any = cells.groupby(list(keys), sort=False, dropna=False).indices.values()
    return sorted(groups, key=lambda rows: int(rows[0]))


def count_trials(cells: pd.DataFrame) -> tuple[int, int]:
    """The largest numbers of trials and of bring-ups of a cell in a table of `columns.CELLS`.

    Trials of a sweep that were not tried do not count: without a rate, they look like one cell.
    """
    if "verdict" in cells:
        cells = run_trials(cells)
    cells = cells[cells["concurrency"].notna() | cells["request_rate"].notna()]
    if cells.empty:
        return 0, 0
    groups = cells.groupby(["deployment", *CELL_KEYS], sort=False, dropna=False)
    bring_ups = groups["allocation"].nunique().max() if "allocation" in cells else 1
    return int(groups.size().max()), max(1, int(bring_ups))


def run_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials that were tried: all but those with the verdict not_run."""
    return trials[trials["verdict"] != NOT_RUN]


def tried_cells(summary: pd.DataFrame, slo: Slo) -> pd.DataFrame:
    """The rows of `columns.SUMMARY` that say how much load meets the SLO.

    Cells that were not run are left out. So is a prompt length with such cells if its lowest load
    was not run and no valid cell has the token rate of the SLO: a search has decided it by other
    lengths, and its curve would begin above the SLO. If no length would be left, all stay.
    """
    skipped = summary["trials"].eq(0).fillna(False).astype(bool)
    if not skipped.any():
        return summary
    scale = summary["time_scale"].astype(float).fillna(1.0)
    per_token = summary["seconds_per_100_tokens"].astype(float) / scale / 100
    valid = summary["trials_valid"].fillna(0) > 0
    keys = ["deployment", "protocol", "output_len"]
    loads = summary["concurrency"].astype(float)
    lowest = summary.assign(load=loads).groupby([*keys, "input_len"], sort=False)["load"]
    bounds = valid & (
        (per_token * slo.tokens_per_s_per_user <= 1) | (loads == lowest.transform("min"))
    )
    marked = summary.assign(skipped=skipped, bounds=bounds)
    by_length = marked.groupby([*keys, "input_len"], sort=False)
    known = by_length["bounds"].transform("any") | ~by_length["skipped"].transform("any")
    known |= ~marked.assign(known=known).groupby(keys, sort=False)["known"].transform("any")
    return summary[~skipped & known.astype(bool)]


def lacks_low_loads(summary: pd.DataFrame) -> list[str]:
    """The deployments of which a prompt length was run only above a load that was not run.

    `summary` is a table of `columns.SUMMARY`. Below its lowest measured load, a prompt length has
    the times of this load, so the capacity plan has too few users rather than too many.
    """
    loads = summary["concurrency"].astype(float).fillna(summary["request_rate"].astype(float))
    skipped = summary["trials"].eq(0).fillna(False).astype(bool)
    keys = ["deployment", "protocol", "output_len", "input_len"]
    lowest = loads.where(~skipped).groupby([summary[key] for key in keys]).transform("min")
    found: list[str] = summary["deployment"][skipped & (loads < lowest)].unique().tolist()
    return found


@dataclass(frozen=True)
class TrialMedian:
    """The median of a metric over one cell's trials, and its 95% interval.

    It comes from the valid trials, or from all served ones if none is valid. None if unknown.
    """

    value: float | None
    interval: Interval | None
    is_served: bool
    is_valid: bool


def trial_medians(trials: pd.DataFrame, keys: Any, column: str) -> dict[Any, TrialMedian]:
    """The `TrialMedian` of a column for each cell; `keys` are the columns that identify a cell."""
    # Arrays, because a selection of rows of a table takes a millisecond, and a study has many.
    values = trials[column].astype("Float64").to_numpy(float, na_value=math.nan)
    is_served = trials["verdict"].isin(SERVED).to_numpy(bool)
    is_valid = trials["valid"].eq(True).fillna(False).to_numpy(bool)
    allocations = _allocations(trials)

    def of_cell(rows: npt.NDArray[np.intp]) -> TrialMedian:
        served, valid = rows[is_served[rows]], rows[is_valid[rows]]
        used = valid if valid.size else served
        known = used[~np.isnan(values[used])]
        found = bring_up_medians(values[known].tolist(), [allocations[row] for row in known])
        median = statistics.median(found) if found else None
        return TrialMedian(median, interval(found), bool(served.size), bool(valid.size))

    cells: Any = trials.groupby(keys).indices.items()
    return {key: of_cell(rows) for key, rows in cells}


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
        if high is not None and name == "slo_attainment":
            high = min(high, 1.0)  # a share; the interval is that of a positive number
        median = statistics.median(values) if values else None
        row |= {name: median, f"{name}_low": low, f"{name}_high": high}
    return row
