"""Records are written whole or not at all, and say clearly why one cannot be kept or read."""

import errno
import os
import resource
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from servegrid.errors import RecordError
from servegrid.records import columns, parquet

RECORD = {
    "spec": {"workload": {"concurrency": 4}},
    "verdict_detail": None,
    "words": "é × ☃",
    "list": [1, 2.5],
}


def table(rows: int) -> pa.Table:
    """A table that does not compress: 8 bytes per row."""
    stamps = np.random.default_rng(0).integers(0, 2**62, rows)
    return pa.table({"time_ns": stamps}, schema=pa.schema([("time_ns", pa.int64())]))


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As a full disk: the kernel takes the first bytes of a file and then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("columns", [columns.REQUESTS, columns.TELEMETRY, columns.CELLS])
def test_every_column_is_named_once_and_explained(columns: tuple[columns.Column, ...]) -> None:
    assert len({column.name for column in columns}) == len(columns)
    assert all(column.meaning for column in columns)
    # A unit is said wherever the name ends in one.
    assert [
        column.name
        for column in columns
        if column.name.endswith(("_s", "_ns", "_bytes", "_w", "_j", "_mhz", "_tokens"))
        and not column.unit
    ] == []


def test_rows_metadata_and_units_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "requests.parquet"
    rows = [{"request_id": "a", "token_ns": [1, 2]}, {"request_id": "b"}]
    parquet.write(parquet.table_of(columns.REQUESTS, rows, RECORD), path)
    assert parquet.read_record(path) == RECORD
    back = pq.read_table(path)
    assert [(field.name, field.type, field.metadata[b"unit"]) for field in back.schema] == [
        (column.name, column.type, column.unit.encode()) for column in columns.REQUESTS
    ]
    assert back.select(["request_id", "token_ns", "error"]).to_pylist() == [
        {"request_id": "a", "token_ns": [1, 2], "error": None},
        {"request_id": "b", "token_ns": None, "error": None},
    ]
    assert back.schema.field("sent_ns").metadata == {
        b"unit": b"ns of CLOCK_MONOTONIC",
        b"meaning": b"When its first byte was handed to the kernel",
    }


def test_others_may_read_what_is_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    parquet.write(table(10), tmp_path / "a.parquet")
    assert names(tmp_path) == ["a.parquet"]
    assert stat.S_IMODE((tmp_path / "a.parquet").stat().st_mode) == 0o644


def test_a_full_disk_is_named_and_what_lay_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write(table(10), path)
    before = path.read_bytes()
    with files_no_larger_than(20_000), pytest.raises(RecordError, match="free some space") as told:
        parquet.write(table(100_000), path)
    assert str(path) in str(told.value)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.parquet"]


def test_a_disk_that_is_full_only_when_synced_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"a\.parquet: cannot be written \(No space left"):
        parquet.write(table(10), tmp_path / "a.parquet")
    assert names(tmp_path) == []


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), parquet.written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        _ = 1 / 0
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.csv"]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with path.open() as reader:
        with parquet.written_whole(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cells"
    for attempt in (
        lambda: parquet.write(table(1), folder / "a.parquet"),
        lambda: parquet.refuse_unwritable(folder),
    ):
        with pytest.raises(RecordError, match="Not a directory") as told:
            attempt()
        assert str(folder) in str(told.value)


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Without root's rights: root may write anywhere."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    yield
    os.seteuid(user)


@pytest.mark.usefixtures("unprivileged")
def test_a_folder_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o500)
        with pytest.raises(RecordError, match="writable"):
            parquet.refuse_unwritable(folder)
        with pytest.raises(RecordError, match="writable"):
            parquet.write(table(1), folder / "a.parquet")


def test_asking_whether_a_folder_is_writable_leaves_nothing_in_it(tmp_path: Path) -> None:
    parquet.refuse_unwritable(tmp_path / "new")
    assert names(tmp_path / "new") == []


def test_what_is_no_record_is_refused_by_name(tmp_path: Path) -> None:
    plain, listed, torn = (tmp_path / f"{name}.parquet" for name in ("plain", "listed", "torn"))
    parquet.write(table(1), plain)
    parquet.write(table(1).replace_schema_metadata({parquet.RECORD_KEY: b"[1]"}), listed)
    torn.write_bytes(plain.read_bytes()[:-10])
    for path in (plain, listed, torn, tmp_path / "missing.parquet"):
        with pytest.raises(RecordError, match="run again") as told:
            parquet.read_record(path)
        assert str(path) in str(told.value)


def test_a_full_disk_is_named_for_text_as_well(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.csv"
    with (
        pytest.raises(RecordError, match="free some space"),
        files_no_larger_than(100),
        parquet.written_whole(path) as temporary,
    ):
        temporary.write_text("x" * 1000)
    assert names(tmp_path / "new") == []
