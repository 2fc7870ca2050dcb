"""One row per cell: the median over its trials and how sure it is. Pure but for `write`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from servegrid import records, tables
from servegrid.intervals import Interval, interval
from servegrid.verdict import OK


def summarise(cells: pd.DataFrame) -> pd.DataFrame:
    """One row of `records.SUMMARY` per cell, in the order of `cells`, a table of `records.CELLS`.

    Figures are of the trials that may be believed; where none may, of all that were served.
    """
    keys = [column.name for column in records.SUMMARY_KEYS]
    groups = cells.groupby(keys, sort=False, dropna=False)
    rows = [dict(zip(keys, key, strict=True)) | _row(trials) for key, trials in groups]
    frame = pd.DataFrame(rows, columns=[column.name for column in records.SUMMARY])
    return tables.typed(frame.astype(object).where(frame.notna(), None), records.SUMMARY)


def served(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials with the verdict ok."""
    return trials[trials["verdict"] == OK]


def valid(trials: pd.DataFrame) -> pd.DataFrame:
    """Those of them that may be believed."""
    return trials[trials["valid"].eq(True).fillna(False).astype(bool)]


def believed(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials of one cell that its figures are of: the valid ones, or all served without any."""
    return served(trials) if valid(trials).empty else valid(trials)


def median(trials: pd.DataFrame, figure: str) -> tuple[float | None, Interval | None]:
    """The median of a column over one cell's trials, and its 95% interval."""
    values = believed(trials)[figure].dropna().astype(float).tolist()
    if not values:
        return None, None
    return float(pd.Series(values).median()), interval(values)


def write(summary: pd.DataFrame, parquet: Path, csv: Path) -> None:
    """Write it as Parquet, with its columns' units and meanings, and as CSV."""
    tables.write(summary, records.SUMMARY, parquet, csv)


def _row(trials: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {
        "trials": len(trials),
        "trials_served": len(served(trials)),
        "trials_valid": len(valid(trials)),
    }
    for figure in records.SUMMARISED:
        value, around = median(trials, figure)
        low, high = around or (None, None)
        row |= {figure: value, f"{figure}_low": low, f"{figure}_high": high}
    return row
