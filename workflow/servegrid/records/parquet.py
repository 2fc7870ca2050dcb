"""Parquet files that contain a record. A write either completes or changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from servegrid.errors import RecordError
from servegrid.records.columns import Column

RECORD_FORMAT = 4
"""Raise this number when the keys or columns of records change. Older records are then refused."""

RECORD_KEY = b"servegrid"
"""The key in the schema metadata that holds the record of a file, as JSON."""

DIGEST_KEY = b"servegrid.sha256"
"""The key in the file's metadata that holds the SHA-256 of the file, computed with zeros there."""
_PLACEHOLDER = b"0" * 64
# Thrift writes the length of the value between key and value.
_DIGEST = re.compile(re.escape(DIGEST_KEY) + rb".{1,4}?([0-9a-f]{64})", re.DOTALL)


def arrow_schema(columns: Iterable[Column], record: Mapping[str, Any] | None = None) -> pa.Schema:
    """The Arrow schema of `columns`, with `record` as its metadata."""
    metadata = None if record is None else {RECORD_KEY: json.dumps(record, sort_keys=True).encode()}
    return pa.schema([column.field for column in columns], metadata=metadata)


def arrow_table(
    columns: Iterable[Column],
    rows: Iterable[Mapping[str, Any]],
    record: Mapping[str, Any] | None = None,
) -> pa.Table:
    """An Arrow table with one row for each mapping in `rows`. Missing keys become null."""
    return pa.Table.from_pylist(list(rows), schema=arrow_schema(columns, record))


def write_table(table: pa.Table, path: Path) -> None:
    """Write `table` as Parquet with its digest, atomically and synced to disk.

    Raises RecordError, with the path, if the file cannot be written. An older file then remains.
    """
    metadata = dict(table.schema.metadata or {})
    metadata.pop(DIGEST_KEY, None)  # that of the file which the table was read from
    table = table.replace_schema_metadata(metadata)
    with atomic_write(path) as temporary:
        with pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({DIGEST_KEY: _PLACEHOLDER})
        data = temporary.read_bytes()
        digest = hashlib.sha256(data).hexdigest().encode()
        start = _find_digest(data).start(1)
        temporary.write_bytes(data[:start] + digest + data[start + len(digest) :])


def read_intact(path: Path) -> pa.BufferReader:
    """The content of a file that `write_table` wrote, for `pq.ParquetFile`.

    A single wrong bit is found. Parquet's own checksums leave out the metadata, which has the
    record, and the heads of pages, which say how many values there are.

    Raises OSError if the file cannot be read, and ValueError if it has changed since then.
    """
    data = path.read_bytes()
    found = _find_digest(data)
    digest = hashlib.sha256(data[: found.start(1)] + _PLACEHOLDER + data[found.end(1) :])
    if digest.hexdigest().encode() != found[1]:
        raise ValueError("its content does not match its digest")
    return pa.BufferReader(data)


def _find_digest(data: bytes) -> re.Match[bytes]:
    """Where the digest is. The metadata ends the file, so the last place counts."""
    start = data.rfind(DIGEST_KEY)
    found = _DIGEST.match(data, start) if start >= 0 else None
    if found is None:
        raise ValueError("it has no digest")
    return found


def check_writable(folder: Path) -> None:
    """Raise RecordError if no file can be created in `folder`. Creates the folder if missing.

    Call this before a measurement, so that no result is lost.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecordError(
            f"{folder}: the folder is not writable ({error.strerror or error}). Make it writable "
            "or free some space, and run again. Nothing has been measured."
        ) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` if the block ends without an exception.

    Raises RecordError, with the path, if the file cannot be written. An older file then remains.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise RecordError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or make the "
            "folder writable, and run again. Earlier results are not lost."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file if it exists. Raises RecordError, with the path, if that fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(
            f"{path}: cannot be removed ({error.strerror or error}). Make its folder writable, and "
            "run again."
        ) from error


def remove_half_written(folder: Path) -> None:
    """Remove what killed writers have left in `folder`. No other writer may use it meanwhile."""
    for path in folder.glob(".*.parquet.*"):
        path.unlink(missing_ok=True)


def read_rows(path: Path, columns: Sequence[str] | None = None) -> tuple[dict[str, Any], pa.Table]:
    """The record and some columns of a file, or all; the file is opened once.

    Raises RecordError, with the file's name but not its folder, if the file is missing or differs
    from what was written, or if it has no record.
    """
    try:
        with pq.ParquetFile(read_intact(path)) as file:
            record = json.loads(file.schema_arrow.metadata[RECORD_KEY])
            names = None if columns is None else list(columns)
            return record, file.read(names, use_threads=False)
    except FileNotFoundError:
        raise RecordError(f"{path.name} is missing") from None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path.name} is damaged ({error})") from error


def column_or_null(table: pa.Table, name: str) -> Any:
    """A column of integers; all null if the record of `table` is older than the column."""
    if name in table.column_names:
        return table[name]
    return pa.chunked_array([pa.nulls(table.num_rows, pa.int64())])


def read_record(path: Path) -> dict[str, Any]:
    """The record of a Parquet file, without reading its rows.

    Raises RecordError if the file is missing or damaged, or was not written by servegrid.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        record = json.loads(metadata[RECORD_KEY])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise RecordError(
            f"{path}: is not a record of servegrid ({error}). Delete it and run again; "
            "only this trial is measured again."
        ) from error
    if not isinstance(record, dict):
        raise RecordError(f"{path}: the record is not a mapping. Delete it and run again.")
    return record
