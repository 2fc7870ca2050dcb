"""The table of cells: gathered from all records of a study, written and loaded."""

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
from servegrid.analysis.efficiency import add_efficiency
from servegrid.analysis.slo import DEFAULT_SLO, Slo
from servegrid.analysis.validity import Evidence, check_validity
from servegrid.errors import RecordError
from servegrid.records import columns, parquet
from servegrid.records.columns import Column
from servegrid.records.verdict import SERVED
from servegrid.study.grid import Study, Trial, canonical_json

_MAX_LISTED = 10
_MIN_FOR_PROCESSES = 1000
"""From this number of trials on, forking processes is faster than threads in one interpreter."""
_CHUNK = 50
_REQUEST_COLUMNS = sorted({*metrics.REQUEST_COLUMNS, *validity.REQUEST_COLUMNS})
_TELEMETRY_COLUMNS = sorted({*metrics.TELEMETRY_COLUMNS, *validity.TELEMETRY_COLUMNS})
_LIST_COLUMNS = frozenset(column.name for column in columns.CELLS if pa.types.is_list(column.type))
_LIST = pa.list_(pa.string())
_PANDAS_TYPES = {
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""Types with null. Without them, pandas turns integers into floats and booleans into objects."""


def gather_study(
    study: Study, folder: Path, slo: Slo = DEFAULT_SLO
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells and the drift checks of a study from `folder`: two tables of `columns.CELLS`.

    Raises RecordError like `gather_trials`.
    """
    drift_checks = gather_trials(study.drift_checks, folder, slo=slo)
    drifts = drift_by_allocation(drift_checks)
    return gather_trials(study.trials, folder, drifts, slo), drift_checks


def gather_trials(
    trials: Sequence[Trial],
    folder: Path,
    drifts: Mapping[str, float] | None = None,
    slo: Slo = DEFAULT_SLO,
) -> pd.DataFrame:
    """A table of `columns.CELLS`, one row per trial, in the order of `trials`.

    `folder` has each trial's `requests.parquet` and `telemetry.parquet` in a folder named after its
    id. `slo` decides which requests count as goodput. `drifts` has the drift of each allocation
    (see `drift_by_allocation`). Raises RecordError if a record is missing, damaged or from another
    specification. The error lists these trials and says how to measure only them again.
    """
    read = partial(_row_or_error, folder=folder, drifts=drifts or {}, slo=slo)
    with _readers(len(trials)) as pool:
        gathered = list(pool.map(read, trials, chunksize=_CHUNK))
    rows = [row for row in gathered if not isinstance(row, RecordError)]
    errors = {
        trial.id: error
        for trial, error in zip(trials, gathered, strict=True)
        if isinstance(error, RecordError)
    }
    if errors:
        raise RecordError(_describe_errors(errors, len(trials), folder))
    return _to_pandas(parquet.arrow_table(columns.CELLS, add_efficiency(trials, rows)))


def drift_by_allocation(drift_checks: pd.DataFrame) -> dict[str, float]:
    """The relative difference of output tokens/s between the drift checks of each allocation.

    (highest - lowest) / median, for allocations with at least two served drift checks.
    `drift_checks` is a table of `columns.CELLS`.
    """
    served = drift_checks[drift_checks["verdict"].isin(SERVED)]
    speeds = served.dropna(subset="output_tokens_per_s").groupby("allocation")
    known = speeds["output_tokens_per_s"].agg(["min", "median", "max", "count"])
    known = known[known["count"] > 1]
    drifts = (known["max"] - known["min"]) / known["median"]
    return {str(allocation): float(drift) for allocation, drift in drifts.items()}


def write_cells(cells: pd.DataFrame, path: Path, csv: Path) -> None:
    """Write a table of `columns.CELLS` as Parquet and as CSV, like `save_table`."""
    save_table(cells, columns.CELLS, path, csv)


def save_table(table: pd.DataFrame, columns: Iterable[Column], path: Path, csv: Path) -> None:
    """Write a table of `columns` twice: as Parquet with units and meanings, and as CSV.

    In the CSV, an unknown value is an empty field, and a float has enough digits to give the same
    value when it is read. Raises RecordError if a file cannot be written.
    """
    schema = parquet.arrow_schema(columns)
    written = _as_arrow(table, schema)
    parquet.write_table(written.replace_schema_metadata(None), path)
    write_csv(table, csv)


def write_csv(table: pd.DataFrame, csv: Path) -> None:
    """Write `table` as CSV, without its index. Raises RecordError if the file cannot be written."""
    with parquet.atomic_write(csv) as temporary:
        _lists_as_json(table).to_csv(temporary, index=False, lineterminator="\n")


def load_table(path: Path, columns: Iterable[Column] = ()) -> pd.DataFrame:
    """A table that `write_cells` or `save_table` wrote as Parquet.

    Raises RecordError if it cannot be read, or if it has not all `columns` with their types.
    """
    try:
        table = pq.read_table(path)
        _check_columns(table.schema, columns, path)
        return _to_pandas(table)
    except (OSError, pa.ArrowException) as error:
        cause = "no such file" if isinstance(error, FileNotFoundError) else error
        raise RecordError(
            f"{path}: the table cannot be read ({cause}). Run the study first, or name the folder "
            "of its tables."
        ) from error


def _check_columns(schema: pa.Schema, columns: Iterable[Column], path: Path) -> None:
    for column in columns:
        has = schema.field(column.name).type if column.name in schema.names else None
        # Parquet gives the items of a list another name.
        has = _LIST if has is not None and pa.types.is_list(has) else has
        if has != column.type:
            problem = "no column" if has is None else f"the type {has} in the column"
            raise RecordError(
                f"{path}: has {problem} `{column.name}`. Another tool or another version of "
                "servegrid made this table. Run the study's snakemake command again: it makes the "
                "tables again and measures nothing twice."
            )


def cast_columns(table: pd.DataFrame, columns: Iterable[Column]) -> pd.DataFrame:
    """`table` with the types of `columns`. Integers and booleans can be null."""
    return _to_pandas(_as_arrow(table, parquet.arrow_schema(columns)))


def from_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> pd.DataFrame:
    """A table of `columns` from rows. A missing value is null."""
    table = pd.DataFrame(rows, columns=[column.name for column in columns])
    return fill_nulls(table, columns)


def fill_nulls(table: pd.DataFrame, columns: Iterable[Column]) -> pd.DataFrame:
    """`table` with the types of `columns`, NaN as null."""
    return cast_columns(table.astype(object).where(table.notna(), None), columns)


def _lists_as_json(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with lists as JSON, because a field of a CSV has no structure."""
    lists = _LIST_COLUMNS & set(table.columns)
    return table.assign(**{name: table[name].map(_as_json, na_action="ignore") for name in lists})


def _as_json(values: Sequence[str]) -> str:
    return json.dumps(list(values))


def _as_arrow(table: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """`table` as Arrow. pandas takes a list column that is null everywhere for numbers."""
    unknown = [name for name in _LIST_COLUMNS & set(table.columns) if table[name].isna().all()]
    table = table.astype(dict.fromkeys(unknown, object))
    return pa.Table.from_pandas(table, schema=schema, preserve_index=False)


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    # Parquet gives the items of a list another name, and then the type is not equal to _LIST.
    fields = [
        field.with_type(_LIST) if pa.types.is_list(field.type) else field for field in table.schema
    ]
    frame: pd.DataFrame = table.cast(pa.schema(fields)).to_pandas(types_mapper=_pandas_type)
    return frame


def _pandas_type(arrow: pa.DataType) -> Any:
    return pd.ArrowDtype(_LIST) if arrow == _LIST else _PANDAS_TYPES.get(arrow)


def _readers(trials: int) -> Executor:
    """One reader per core: processes if there are many trials, otherwise threads.

    The processes are forked, because a new interpreter would run Snakemake's script again.
    """
    cores = len(os.sched_getaffinity(0))
    if trials < _MIN_FOR_PROCESSES or cores == 1:
        return ThreadPoolExecutor(cores)
    return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork"))


def _row_or_error(
    trial: Trial, folder: Path, drifts: Mapping[str, float], slo: Slo
) -> dict[str, Any] | RecordError:
    try:
        return _row(trial, folder / trial.id, drifts, slo)
    except RecordError as error:
        return error


def _row(trial: Trial, folder: Path, drifts: Mapping[str, float], slo: Slo) -> dict[str, Any]:
    record, requests = parquet.read_rows(folder / "requests.parquet", _REQUEST_COLUMNS)
    if record.get("spec_digest") != trial.digest:
        raise RecordError(_describe_staleness(record, trial))
    if record.get("format") != parquet.RECORD_FORMAT:
        raise RecordError(
            f"its record has the format {record.get('format')}, but this version of servegrid "
            f"reads the format {parquet.RECORD_FORMAT}"
        )
    other_record, telemetry = parquet.read_rows(folder / "telemetry.parquet", _TELEMETRY_COLUMNS)
    if other_record != record:
        raise RecordError("telemetry.parquet and requests.parquet are from different measurements")
    try:
        row = metrics.cell_row(record, requests, telemetry, slo=slo)
        drift = drifts.get(row["allocation"])
        cell_validity = check_validity(Evidence(record, requests, telemetry, drift))
        return row | {"allocation_drift": drift} | asdict(cell_validity)
    except (KeyError, TypeError) as error:
        raise RecordError(f"its record is not complete ({error})") from error


def find_record(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """The record in the trial's `folder`; None if it is not complete or of another specification.

    A damaged one counts as missing: it is measured again.
    """
    if not (folder / "telemetry.parquet").exists():
        return None
    try:
        record = parquet.read_record(folder / "requests.parquet")
    except RecordError:
        return None
    return record if record.get("spec_digest") == trial.digest else None


def _describe_staleness(record: Mapping[str, Any], trial: Trial) -> str:
    """The keys in which the specification of a record differs from that of the trial."""
    measured = {**_flatten(record.get("spec", {})), "digest": record.get("spec_digest")}
    wanted = {**_flatten(trial.spec), "digest": trial.digest}
    changes = {
        key: f"{key} is {canonical_json(wanted.get(key))} and was "
        f"{canonical_json(measured.get(key))}"
        for key in sorted(wanted.keys() | measured.keys())
        if wanted.get(key) != measured.get(key)
    }
    if len(changes) > 1:
        changes.pop("digest", None)
    return "measured with a different specification: " + ", ".join(changes.values())


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping, with keys such as `workload.prompts`."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _describe_errors(errors: Mapping[str, RecordError], trials: int, folder: Path) -> str:
    lines = [f"{folder}: {len(errors)} of {trials} trials cannot be gathered:"]
    lines += [f"  {trial}: {error}" for trial, error in list(errors.items())[:_MAX_LISTED]]
    if len(errors) > _MAX_LISTED:
        lines.append(f"  … and {len(errors) - _MAX_LISTED} more")
    present = [trial for trial in errors if (folder / trial).exists()]
    if present:
        paths = " ".join(shlex.quote(str(folder / path)) for path in _folders(present, folder))
        lines.append(f"Remove their files:\n  rm -r {paths}")
    lines.append("Run the same snakemake command again. It measures only these trials.")
    return "\n".join(lines)


def _folders(trials: Sequence[str], folder: Path) -> list[str]:
    """The folders of `trials`; of a whole deployment if all its trials are among them."""
    folders: dict[str, None] = {}
    for trial in trials:
        deployment = trial.partition("/")[0]
        present = {str(path.relative_to(folder)) for path in folder.glob(f"{deployment}/*/*")}
        folders[deployment if present <= set(trials) else trial] = None
    return list(folders)
