"""The table of cells: gathered from all records of a study, written and read again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from servegrid.analysis import metrics, validity
from servegrid.analysis.validity import Evidence, check_validity
from servegrid.errors import RecordError
from servegrid.records import columns, parquet
from servegrid.records.columns import Column
from servegrid.study.grid import Study, Trial, canonical_json

_LISTED = 10
_MANY = 1000
"""Trials from which on threads, that share one interpreter, take longer than it takes to fork."""
_CHUNK = 50
_REQUEST_COLUMNS = sorted({*metrics.REQUEST_COLUMNS, *validity.REQUEST_COLUMNS})
_TELEMETRY_COLUMNS = sorted({*metrics.TELEMETRY_COLUMNS, *validity.TELEMETRY_COLUMNS})
LIST_COLUMNS = frozenset(each.name for each in columns.CELLS if pa.types.is_list(each.type))
_LIST = pa.list_(pa.string())
_PANDAS_TYPES = {
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""Of what may be unknown: pandas would turn integers into floats, and booleans into objects."""


def gather(
    trials: Sequence[Trial], folder: Path, drifts: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """One row of `columns.CELLS` per trial, in the order of `trials`.

    `folder` has each trial's `requests.parquet` and `telemetry.parquet` under its id. `drifts`
    gives the drift of each allocation's drift checks (see `drift_by_allocation`).
    Raises RecordError where any is missing, damaged or was measured with another
    specification: one error that lists them and says how to measure just these anew.
    """
    read = partial(_row_or_error, folder=folder, drifts=drifts or {})
    with _readers(len(trials)) as pool:
        gathered = list(pool.map(read, trials, chunksize=_CHUNK))
    rows = [each for each in gathered if not isinstance(each, RecordError)]
    errors = {
        trial.id: each
        for trial, each in zip(trials, gathered, strict=True)
        if isinstance(each, RecordError)
    }
    if errors:
        raise RecordError(_refusal(errors, len(trials), folder))
    return _frame(parquet.arrow_table(columns.CELLS, rows))


def gather_study(study: Study, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The study's cells and its drift checks from `folder`, both as `columns.CELLS`.

    Raises RecordError if a record is missing, damaged or of another specification.
    """
    drift_checks = gather(study.drift_checks, folder)
    drifts = drift_by_allocation(drift_checks)
    return gather(study.trials, folder, drifts), drift_checks


def drift_by_allocation(drift_checks: pd.DataFrame) -> dict[str, float]:
    """The relative difference of output tokens/s between the drift checks of each allocation.

    (highest - lowest) / median, of the allocations that have at least two that were served.
    `drift_checks` has the columns of `columns.CELLS`.
    """
    speeds = drift_checks.dropna(subset="output_tokens_per_s").groupby("allocation")
    known = speeds["output_tokens_per_s"].agg(["min", "median", "max", "count"])
    known = known[known["count"] > 1]
    shares = (known["max"] - known["min"]) / known["median"]
    return {str(allocation): float(share) for allocation, share in shares.items()}


def write_cells(cells: pd.DataFrame, path: Path, csv: Path) -> None:
    """Write `cells` twice: as Parquet with its columns' units and meanings, and as CSV.

    In the CSV an unknown value is an empty field, and a float has as many digits as it takes
    to read the same value back. Raises RecordError where a file cannot be written.
    """
    write(cells, columns.CELLS, path, csv)


def write(table: pd.DataFrame, columns: Iterable[Column], path: Path, csv: Path) -> None:
    """Write a table of `columns` twice, as `write_cells` does."""
    schema = parquet.arrow_schema(columns)
    written = _as_arrow(table, schema)
    parquet.write_table(written.replace_schema_metadata(None), path)
    write_csv(table, csv)


def write_csv(table: pd.DataFrame, csv: Path) -> None:
    """Write `table` as CSV, its columns only. Raises RecordError where that is not possible."""
    with parquet.atomic_write(csv) as temporary:
        _lists_as_json(table).to_csv(temporary, index=False, lineterminator="\n")


def _lists_as_json(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with its lists as JSON: a field of a CSV has no structure of its own."""
    lists = LIST_COLUMNS & set(table.columns)
    return table.assign(**{name: table[name].map(_as_json, na_action="ignore") for name in lists})


def _as_json(values: Sequence[str]) -> str:
    return json.dumps(list(values))


def read_cells(path: Path) -> pd.DataFrame:
    """The table that `write_cells` wrote."""
    return _frame(pq.read_table(path))


def read_summary(path: Path) -> pd.DataFrame:
    """The table of a study's summary. Raises RecordError where there is none to be read."""
    try:
        return _frame(pq.read_table(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise RecordError(
            f"{path}: no summary of a study ({error}). Run the study first, or name the folder "
            "of its tables."
        ) from error


def typed(table: pd.DataFrame, columns: Iterable[Column]) -> pd.DataFrame:
    """`table` with the types of `columns`, in which integers can be unknown."""
    schema = parquet.arrow_schema(columns)
    return _frame(_as_arrow(table, schema))


def _as_arrow(table: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """`table` as Arrow; a list that is unknown everywhere may have been taken for a number."""
    unknown = [name for name in LIST_COLUMNS & set(table.columns) if table[name].isna().all()]
    table = table.astype(dict.fromkeys(unknown, object))
    return pa.Table.from_pandas(table, schema=schema, preserve_index=False)


def _frame(table: pa.Table) -> pd.DataFrame:
    # Parquet calls the items of a list otherwise, which makes another type of the same thing.
    fields = [
        each.with_type(_LIST) if pa.types.is_list(each.type) else each for each in table.schema
    ]
    cells: pd.DataFrame = table.cast(pa.schema(fields)).to_pandas(types_mapper=_pandas_type)
    return cells


def _pandas_type(arrow: pa.DataType) -> Any:
    return pd.ArrowDtype(_LIST) if arrow == _LIST else _PANDAS_TYPES.get(arrow)


def _readers(trials: int) -> Executor:
    """As many readers as there are cores: processes where there is enough to read.

    They are forked, for this may run in a script that must not be started once more.
    """
    cores = len(os.sched_getaffinity(0))
    if trials < _MANY or cores == 1:
        return ThreadPoolExecutor(cores)
    return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork"))


def _row_or_error(
    trial: Trial, folder: Path, drifts: Mapping[str, float]
) -> dict[str, Any] | RecordError:
    try:
        return _row(trial, folder / trial.id, drifts)
    except RecordError as error:
        return error


def _row(trial: Trial, folder: Path, drifts: Mapping[str, float]) -> dict[str, Any]:
    record, requests = _read(folder / "requests.parquet", _REQUEST_COLUMNS)
    if record.get("spec_digest") != trial.digest:
        raise RecordError(_staleness(record, trial))
    if record.get("format") != parquet.RECORD_FORMAT:
        raise RecordError(
            f"its record has the format {record.get('format')}, this version of servegrid reads "
            f"{parquet.RECORD_FORMAT}"
        )
    same, telemetry = _read(folder / "telemetry.parquet", _TELEMETRY_COLUMNS)
    if same != record:
        raise RecordError("telemetry.parquet is of another measurement than requests.parquet")
    try:
        row = metrics.row_of(record, requests, telemetry)
        drift = drifts.get(row["allocation"])
        validity_of_cell = check_validity(Evidence(record, requests, telemetry, drift))
        return row | {"allocation_drift": drift} | asdict(validity_of_cell)
    except (KeyError, TypeError) as error:
        raise RecordError(f"its record is not complete ({error})") from error


def _read(path: Path, columns: Sequence[str]) -> tuple[dict[str, Any], pa.Table]:
    """The record and the asked columns of one file, which is opened once."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            record = json.loads(file.schema_arrow.metadata[parquet.RECORD_KEY])
            return record, file.read(list(columns), use_threads=False)
    except FileNotFoundError:
        raise RecordError(f"{path.name} is missing") from None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path.name} is damaged ({error})") from error


def _staleness(record: Mapping[str, Any], trial: Trial) -> str:
    measured = {**_flat(record.get("spec", {})), "digest": record.get("spec_digest")}
    asked = {**_flat(trial.spec), "digest": trial.digest}
    changes = [
        f"{key} is {canonical_json(asked.get(key))} and was {canonical_json(measured.get(key))}"
        for key in sorted(asked.keys() | measured.keys())
        if asked.get(key) != measured.get(key)
    ]
    shown = [each for each in changes if not each.startswith("digest ")] or changes
    return "measured with another specification: " + ", ".join(shown)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _refusal(errors: Mapping[str, RecordError], trials: int, folder: Path) -> str:
    lines = [f"{folder}: {len(errors)} of {trials} trials cannot be gathered:"]
    lines += [f"  {trial}: {error}" for trial, error in list(errors.items())[:_LISTED]]
    if len(errors) > _LISTED:
        lines.append(f"  … and {len(errors) - _LISTED} more")
    present = [trial for trial in errors if (folder / trial).exists()]
    if present:
        paths = " ".join(shlex.quote(str(folder / each)) for each in _folded(present, folder))
        lines.append(f"Remove what is there of them:\n  rm -r {paths}")
    lines.append("Run the same snakemake command again: it measures these anew and no other.")
    return "\n".join(lines)


def _folded(trials: Sequence[str], folder: Path) -> list[str]:
    """`trials`, or their deployment's name where all that it has in `folder` is among them."""
    folded: dict[str, None] = {}
    for trial in trials:
        deployment = trial.partition("/")[0]
        kept = {str(each.relative_to(folder)) for each in folder.glob(f"{deployment}/*/*")}
        folded[deployment if kept <= set(trials) else trial] = None
    return list(folded)
