"""What is kept of a measurement: Parquet files with its record, written all or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from servegrid.errors import RecordError
from servegrid.records.columns import Column

RECORD_FORMAT = 3
"""Raise it when records get other keys or columns: those before can't be gathered any more."""

RECORD_KEY = b"servegrid"
"""The key of the schema metadata under which a file's record lies, as JSON."""


def schema_of(columns: Iterable[Column], record: Mapping[str, Any] | None = None) -> pa.Schema:
    """The Arrow schema of `columns`, with `record` as its metadata."""
    metadata = None if record is None else {RECORD_KEY: json.dumps(record, sort_keys=True).encode()}
    return pa.schema([column.field for column in columns], metadata=metadata)


def table_of(
    columns: Iterable[Column],
    rows: Iterable[Mapping[str, Any]],
    record: Mapping[str, Any] | None = None,
) -> pa.Table:
    """An Arrow table of `rows`, one mapping each; a key that is missing becomes null."""
    return pa.Table.from_pylist(list(rows), schema=schema_of(columns, record))


def write(table: pa.Table, path: Path) -> None:
    """Write `table` as Parquet: whole and on disk, or not at all.

    Raises RecordError, naming the path, where that is not possible; what lay there stays.
    """
    with written_whole(path) as temporary:
        # Without the checksums, two of three flipped bytes would be read as other numbers.
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def refuse_unwritable(folder: Path) -> None:
    """Raise RecordError, naming `folder`, where no file can be made in it.

    Cheap, so that it can be asked before something is measured that could not be kept.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecordError(
            f"{folder}: nothing can be written here ({error.strerror or error}). Make the folder "
            "writable or free some space, and run again; nothing has been measured."
        ) from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well.

    Raises RecordError, naming the path, where it cannot be written; what lay there stays.
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
            f"{path}: cannot be written ({error.strerror or error}). Nothing that was measured "
            "before is lost: free some space or make the folder writable, and run again."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a Parquet file, without its rows.

    Raises RecordError where the file is missing, damaged or not one of ours.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        record = json.loads(metadata[RECORD_KEY])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
        raise RecordError(
            f"{path}: not a record of servegrid ({error}). Delete it and run again: "
            "only this cell is measured anew."
        ) from error
    if not isinstance(record, dict):
        raise RecordError(f"{path}: its record is not a mapping. Delete it and run again.")
    return record
