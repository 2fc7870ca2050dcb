"""What a study has measured already: the trials with a record, and their times."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from servegrid.analysis import tables
from servegrid.analysis.plan import time_scale
from servegrid.analysis.prediction import Bursts, Points
from servegrid.errors import RecordError
from servegrid.records import columns
from servegrid.study.grid import Study, Trial


def find_measured_trials(study: Study, folder: Path) -> list[Trial]:
    """The trials and drift checks with a record of their present specification in `folder`."""
    if not folder.is_dir():
        return []
    return [trial for trial in study.all_trials if tables.find_record(trial, folder / trial.id)]


def load_measured(study: Study, results: Path) -> tuple[list[Trial], pd.DataFrame | None]:
    """The measured trials of a study, and a table of `columns.CELLS` without drift checks.

    It is that of `results` if it has them all; otherwise the records are read. The table is None if
    nothing is measured. Raises RecordError if a record is damaged.
    """
    measured = find_measured_trials(study, results / "cells")
    wanted = [trial for trial in measured if not trial.drift_check]
    if not wanted:
        return measured, None
    file = results / "tables" / "cells.parquet"
    # A damaged table, or that of another version, says no more than the records.
    with contextlib.suppress(RecordError):
        table = tables.load_table(file, columns.CELLS)
        digests = {trial.digest for trial in wanted}
        if digests <= set(table["spec_digest"]):
            return measured, table[table["spec_digest"].isin(digests)]
    return measured, tables.gather_trials(wanted, results / "cells")


def earlier_bursts(study: Study, cells: pd.DataFrame | None) -> Mapping[str, Bursts]:
    """The served cells of a table of `columns.CELLS` as bursts, by deployment.

    The mean response time of a closed loop counts as a burst of its users. Open loops are left out.
    Times of an emulated engine are taken without its scale.
    """
    if cells is None:
        return {}
    usable = cells.dropna(subset=["seconds_per_100_tokens", "concurrency"])
    usable = usable[usable["think_time_s"].fillna(0.0) == 0]
    deployments = {each.name: each for each in study.deployments}
    found = {}
    for name, rows in usable.groupby("deployment", sort=False):
        points = Points.of(
            *(rows[key].astype(float) for key in ("concurrency", "input_len", "output_len"))
        )
        seconds = rows["seconds_per_100_tokens"].to_numpy(float) * points.output_len / 100
        found[str(name)] = Bursts(points, seconds / time_scale(deployments[str(name)]))
    return found
