"""Reads the trials of a results folder for an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.analysis import tables
from servegrid.errors import ExchangeError, RecordError
from servegrid.records import parquet
from servegrid.records.verdict import NOT_RUN
from servegrid.study.grid import Study, Trial


def find_records_folder(results: Path) -> Path:
    """The folder `cells` of a study or of its results. Raises ExchangeError if there is none."""
    for folder in (results / "results" / "cells", results / "cells"):
        if folder.is_dir():
            return folder
    raise ExchangeError(f"{results}: has no folder cells/. Name a folder of results.")


def read_trials(folder: Path) -> Iterator[tuple[Trial, Mapping[str, Any], dict[str, Any]]]:
    """Each trial in `folder` with its record and its row of `columns.CELLS`, with None for null.

    Drift checks and what was not run are left out. Raises ExchangeError if there are no trials.
    """
    files = _record_files(folder)
    found = [(file, parquet.read_record(file)) for file in files]
    found = [(file, record) for file, record in found if record.get("verdict") != NOT_RUN]
    all_trials = [_trial_of(record, file) for file, record in found]
    records = [record for _, record in found]
    trials = tuple(trial for trial in all_trials if not trial.drift_check)
    drift_checks = tuple(trial for trial in all_trials if trial.drift_check)
    if not trials:
        raise ExchangeError(f"{folder}: contains no trials. Measure the study first.")
    cells, _ = tables.gather_study(Study(folder.name, trials, drift_checks), folder)
    rows = {row["spec_digest"]: row for row in _rows_with_none(cells)}
    by_digest = {record["spec_digest"]: record for record in records}
    for trial in trials:
        yield trial, by_digest[trial.digest], rows[trial.digest]


def _record_files(folder: Path) -> list[Path]:
    """The records of all trials. Raises OSError at a folder that cannot be read.

    `Path.glob` leaves such a folder out without a word.
    """
    folders = [folder]
    for _ in ("deployment", "cell", "trial"):
        folders = [each for one in folders for each in one.iterdir() if each.is_dir()]
    files = (each / "requests.parquet" for each in folders)
    return sorted(file for file in files if file.exists())


def _trial_of(record: Mapping[str, Any], file: Path) -> Trial:
    """The trial of a record. Raises RecordError if it is not that of a trial."""
    try:
        return Trial.from_spec(record["spec"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecordError(
            f"{file}: is not the record of a trial of this version ({type(error).__name__}: "
            f"{error}). Move it out of the folder."
        ) from error


def _rows_with_none(cells: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row in cells.to_dict("records"):
        yield {
            str(key): value if isinstance(value, list) or not pd.isna(value) else None
            for key, value in row.items()
        }
