"""One row per cell: the median over its trials and how sure it is. Pure but for `write`."""

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
    """One row of `columns.SUMMARY` per cell, in the order of `cells`, a table of `columns.CELLS`.

    Figures are of the valid trials, or of all served trials if none is valid.
    """
    keys = [column.name for column in columns.SUMMARY_KEYS]
    figures = (
        cells[list(columns.SUMMARY_METRICS)].astype("Float64").to_numpy(float, na_value=math.nan)
    )
    is_served = (cells["verdict"] == OK).to_numpy(bool)
    is_valid = is_served & cells["valid"].eq(True).fillna(False).to_numpy(bool)
    firsts, rows = [], []
    of_cell: Any = cells.groupby(keys, sort=False, dropna=False).indices.values()
    for trials in sorted(of_cell, key=lambda places: int(places[0])):
        own_served, own_valid = trials[is_served[trials]], trials[is_valid[trials]]
        firsts.append(trials[0])
        counts = {
            "trials": len(trials),
            "trials_served": len(own_served),
            "trials_valid": len(own_valid),
        }
        rows.append(counts | _figures(figures[own_valid if own_valid.size else own_served]))
    frame = pd.DataFrame(rows, columns=[column.name for column in columns.SUMMARY[len(keys) :]])
    of_cells = cells[keys].iloc[firsts].reset_index(drop=True)
    return tables.typed(pd.concat([of_cells, frame], axis=1), columns.SUMMARY)


def served(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials with the verdict ok."""
    return trials[trials["verdict"] == OK]


def valid(trials: pd.DataFrame) -> pd.DataFrame:
    """Those of them that are valid."""
    return trials[trials["valid"].eq(True).fillna(False).astype(bool)]


def usable(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials of one cell that its figures are of: the valid ones, or all served without any."""
    return served(trials) if valid(trials).empty else valid(trials)


def median(trials: pd.DataFrame, figure: str) -> tuple[float | None, Interval | None]:
    """The median of a column over one cell's trials, and its 95% interval."""
    values = usable(trials)[figure].dropna().astype(float).tolist()
    if not values:
        return None, None
    return float(pd.Series(values).median()), interval(values)


def write(summary: pd.DataFrame, parquet: Path, csv: Path) -> None:
    """Write it as Parquet, with its columns' units and meanings, and as CSV."""
    tables.write(summary, columns.SUMMARY, parquet, csv)


def _figures(trials: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The figures of one cell, a column each of SUMMARY_METRICS in its trials; unknown is NaN."""
    row: dict[str, Any] = {}
    for name, column in zip(columns.SUMMARY_METRICS, trials.T, strict=True):
        values = column[~np.isnan(column)].tolist()
        low, high = interval(values) or (None, None)
        value = statistics.median(values) if values else None
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row
