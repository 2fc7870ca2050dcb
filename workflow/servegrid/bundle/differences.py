"""Two tables of the same name, one shipped and one derived: where they are not the same."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

RELATIVE = 1e-9
"""By how much floats may differ: another processor may sum in another order."""
_TIMES, _FREE_BYTES = 4, 2**20
"""How much larger the shipped file may be for its content to be looked at."""


def between_files(shipped: Path, derived: Path) -> Iterator[str]:
    """Where the shipped table is not the derived one: a line each, with row, column and values.

    Parquet by value: names, types, integers and strings exactly, floats to `RELATIVE`. CSV
    likewise, field by field. Anything else by its text.
    """
    if not shipped.exists():
        yield "is missing"
    elif shipped.stat().st_size > _TIMES * derived.stat().st_size + _FREE_BYTES:
        yield f"has {shipped.stat().st_size:,} bytes, {derived.stat().st_size:,} follow"
    elif shipped.suffix == ".parquet":
        yield from _of_parquet(shipped, derived)
    elif shipped.suffix == ".csv":
        yield from _of_csv(shipped, derived)
    else:
        yield from _of_text(shipped, derived)


def of_cell(row: Mapping[Any, Any]) -> str:
    """`deployment/protocol-c8-i31-o100/trial-1` of a row that has these keys, else what it has."""
    known = {key: value for key, value in row.items() if not _is_unknown(value)}
    if not {"deployment", "protocol", "input_len", "output_len"} <= known.keys():
        return "a row"
    intensity = f"r{known['request_rate']:g}" if "request_rate" in known else ""
    intensity = intensity or f"c{known.get('concurrency', '?')}"
    workload = f"{known['protocol']}-{intensity}-i{known['input_len']}-o{known['output_len']}"
    trial = f"/trial-{known['trial']}" if "trial" in known else ""
    return f"{known['deployment']}/{workload}{trial}"


def _of_parquet(shipped: Path, derived: Path) -> Iterator[str]:
    ours = pq.read_table(derived)
    try:
        rows = pq.read_metadata(shipped).num_rows
        if rows != ours.num_rows:
            yield f"has {rows} rows, {ours.num_rows} follow from the records"
            return
        theirs = pq.read_table(shipped)
    except (OSError, pa.ArrowException) as error:
        yield f"cannot be read ({error})"
        return
    if not theirs.schema.equals(ours.schema):
        yield "its columns or their types are others"
        return
    for theirs_row, ours_row in zip(theirs.to_pylist(), ours.to_pylist(), strict=True):
        for column, value in ours_row.items():
            if not _same(theirs_row[column], value):
                yield _told(f"{column} of {of_cell(ours_row)}", theirs_row[column], value)


def _of_csv(shipped: Path, derived: Path) -> Iterator[str]:
    with shipped.open(newline="") as file:
        theirs = list(csv.reader(file))
    with derived.open(newline="") as file:
        header, *ours = list(csv.reader(file))
    if not theirs or theirs[0] != header:
        yield "its columns are others"
        return
    if len(theirs) - 1 != len(ours):
        yield f"has {len(theirs) - 1} rows, {len(ours)} follow from the records"
    for number, (theirs_row, ours_row) in enumerate(zip(theirs[1:], ours, strict=False), 2):
        if len(theirs_row) != len(ours_row):
            yield f"line {number} has {len(theirs_row)} fields instead of {len(ours_row)}"
            continue
        for column, told, value in zip(header, theirs_row, ours_row, strict=True):
            if told != value and not _same(_number(told), _number(value)):
                yield _told(f"{column} in line {number}", told, value)


def _of_text(shipped: Path, derived: Path) -> Iterator[str]:
    theirs = shipped.read_text(errors="replace").splitlines()
    ours = derived.read_text().splitlines()
    for number, (told, line) in enumerate(zip(theirs, ours, strict=False), 1):
        if told != line:
            yield _told(f"line {number}", told, line)
    if len(theirs) != len(ours):
        yield f"has {len(theirs)} lines, {len(ours)} follow from the records"


def _same(told: Any, value: Any) -> bool:
    if isinstance(told, float) and isinstance(value, float):
        return math.isclose(told, value, rel_tol=RELATIVE) or (
            math.isnan(told) and math.isnan(value)
        )
    return type(told) is type(value) and bool(told == value)


def _number(text: str) -> float | str:
    """The float that a field of a CSV shows; an integer or anything else stays text."""
    try:
        return float(text) if not text.lstrip("-").isdecimal() else text
    except ValueError:
        return text


def _told(place: str, told: Any, value: Any) -> str:
    return f"{place} is {told!r}, {value!r} follows from the records"


def _is_unknown(value: Any) -> bool:
    return value is None or value != value or str(value) == "<NA>"
