"""Compares a table that a bundle ships with the same table derived again."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

RELATIVE_TOLERANCE = 1e-9
"""Allowed difference of floats: another processor may add numbers in another order."""
_MAX_RATIO, _FREE_BYTES = 4, 2**20
"""A shipped file is read if it is at most so many times larger than the derived one, plus bytes."""


def diff_tables(shipped: Path, derived: Path) -> Iterator[str]:
    """A line per difference between two files, with row, column and both values.

    Parquet: names, types, integers and strings must be equal, floats up to RELATIVE_TOLERANCE.
    CSV: the same per field. Other files: by lines of text.
    """
    if not shipped.exists():
        yield "is missing"
    elif shipped.stat().st_size > _MAX_RATIO * derived.stat().st_size + _FREE_BYTES:
        sizes = f"{shipped.stat().st_size:,} bytes instead of {derived.stat().st_size:,}"
        yield f"has {sizes}"
    elif shipped.suffix == ".parquet":
        yield from _diff_parquet(shipped, derived)
    elif shipped.suffix == ".csv":
        yield from _diff_csv(shipped, derived)
    else:
        yield from _diff_text(shipped, derived)


def describe_row(row: Mapping[Any, Any]) -> str:
    """`deployment/protocol-c8-i31-o100/trial-1`, as far as a row has these columns."""
    known = {key: value for key, value in row.items() if not _is_null(value)}
    if not {"deployment", "protocol", "input_len", "output_len"} <= known.keys():
        return "a row"
    intensity = f"r{known['request_rate']:g}" if "request_rate" in known else ""
    intensity = intensity or f"c{known.get('concurrency', '?')}"
    workload = f"{known['protocol']}-{intensity}-i{known['input_len']}-o{known['output_len']}"
    trial = f"/trial-{known['trial']}" if "trial" in known else ""
    if known.get("bring_up", 1) > 1:
        trial += f"-bring_up-{known['bring_up']}"
    return f"{known['deployment']}/{workload}{trial}"


def _diff_parquet(shipped: Path, derived: Path) -> Iterator[str]:
    expected = pq.read_table(derived)
    try:
        rows = pq.read_metadata(shipped).num_rows
        if rows != expected.num_rows:
            yield f"has {rows} rows; the records give {expected.num_rows}"
            return
        found = pq.read_table(shipped)
    except (OSError, pa.ArrowException) as error:
        yield f"cannot be read ({error})"
        return
    if not found.schema.equals(expected.schema):
        yield "has other columns or column types"
        return
    rows_found, rows_expected = found.to_pylist(), expected.to_pylist()
    for row_found, row_expected in zip(rows_found, rows_expected, strict=True):
        for column, value in row_expected.items():
            if not _is_equal(row_found[column], value):
                cell = f"{column} of {describe_row(row_expected)}"
                yield _format_difference(cell, row_found[column], value)


def _diff_csv(shipped: Path, derived: Path) -> Iterator[str]:
    with shipped.open(newline="", encoding="utf-8") as file:
        found = list(csv.reader(file))
    with derived.open(newline="", encoding="utf-8") as file:
        header, *expected = list(csv.reader(file))
    if not found or found[0] != header:
        yield "has other columns"
        return
    if len(found) - 1 != len(expected):
        yield f"has {len(found) - 1} rows; the records give {len(expected)}"
    for number, (row_found, row_expected) in enumerate(zip(found[1:], expected, strict=False), 2):
        if len(row_found) != len(row_expected):
            yield f"line {number} has {len(row_found)} fields instead of {len(row_expected)}"
            continue
        for column, text, value in zip(header, row_found, row_expected, strict=True):
            if text != value and not _is_equal(_parse_number(text), _parse_number(value)):
                yield _format_difference(f"{column} in line {number}", text, value)


def _diff_text(shipped: Path, derived: Path) -> Iterator[str]:
    found = shipped.read_text(errors="replace", encoding="utf-8").splitlines()
    expected = derived.read_text(encoding="utf-8").splitlines()
    for number, (line_found, line_expected) in enumerate(zip(found, expected, strict=False), 1):
        if line_found != line_expected:
            yield _format_difference(f"line {number}", line_found, line_expected)
    if len(found) != len(expected):
        yield f"has {len(found)} lines; the records give {len(expected)}"


def _is_equal(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=RELATIVE_TOLERANCE) or (
            math.isnan(found) and math.isnan(expected)
        )
    return type(found) is type(expected) and bool(found == expected)


def _parse_number(text: str) -> float | str:
    """The float in a field of a CSV; an integer or other text stays text."""
    try:
        return float(text) if not text.lstrip("-").isdecimal() else text
    except ValueError:
        return text


def _format_difference(place: str, found: Any, expected: Any) -> str:
    return f"{place} is {found!r}; the records give {expected!r}"


def _is_null(value: Any) -> bool:
    return value is None or value != value or str(value) == "<NA>"
