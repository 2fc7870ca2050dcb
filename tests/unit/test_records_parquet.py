"""Records are written atomically, and errors name the file and the remedy."""

import errno
import os
import resource
import stat
import subprocess
import sys
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
    """Simulate a full disk: the kernel accepts the first bytes of a file and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("columns", [columns.REQUESTS, columns.TELEMETRY, columns.CELLS])
def test_column_names_are_unique_and_have_a_meaning(columns: tuple[columns.Column, ...]) -> None:
    assert len({column.name for column in columns}) == len(columns)
    assert all(column.meaning for column in columns)
    # Columns whose name ends in a unit state the unit.
    assert [
        column.name
        for column in columns
        if column.name.endswith(("_s", "_ns", "_bytes", "_w", "_j", "_mhz", "_tokens"))
        and not column.unit
    ] == []


def test_rows_metadata_and_units_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "requests.parquet"
    rows = [{"request_id": "a", "token_ns": [1, 2]}, {"request_id": "b"}]
    parquet.write_table(parquet.arrow_table(columns.REQUESTS, rows, RECORD), path)
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
        b"meaning": b"Time when its first byte was passed to the kernel",
    }


def test_files_are_readable_by_others_and_temporary_files_are_removed(tmp_path: Path) -> None:
    parquet.write_table(table(10), tmp_path / "a.parquet")
    assert names(tmp_path) == ["a.parquet"]
    assert stat.S_IMODE((tmp_path / "a.parquet").stat().st_mode) == 0o644


def test_a_full_disk_is_reported_and_the_old_file_remains(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(10), path)
    before = path.read_bytes()
    with (
        files_no_larger_than(20_000),
        pytest.raises(RecordError, match="Free some space") as caught,
    ):
        parquet.write_table(table(100_000), path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.parquet"]


def test_an_error_while_syncing_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match=r"a\.parquet: cannot be written \(No space left"):
        parquet.write_table(table(10), tmp_path / "a.parquet")
    assert names(tmp_path) == []


def test_an_exception_leaves_the_old_file_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), parquet.atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        _ = 1 / 0
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.csv"]


def test_readers_of_the_old_file_are_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with path.open() as reader:
        with parquet.atomic_write(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cells"
    for attempt in (
        lambda: parquet.write_table(table(1), folder / "a.parquet"),
        lambda: parquet.check_writable(folder),
    ):
        with pytest.raises(RecordError, match="Not a directory") as caught:
            attempt()
        assert str(folder) in str(caught.value)


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Drop the rights of root, who can write anywhere."""
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
            parquet.check_writable(folder)
        with pytest.raises(RecordError, match="writable"):
            parquet.write_table(table(1), folder / "a.parquet")


def test_check_writable_leaves_no_files(tmp_path: Path) -> None:
    parquet.check_writable(tmp_path / "new")
    assert names(tmp_path / "new") == []


def test_files_without_a_record_are_refused(tmp_path: Path) -> None:
    plain, listed, torn = (tmp_path / f"{name}.parquet" for name in ("plain", "listed", "torn"))
    parquet.write_table(table(1), plain)
    parquet.write_table(table(1).replace_schema_metadata({parquet.RECORD_KEY: b"[1]"}), listed)
    torn.write_bytes(plain.read_bytes()[:-10])
    for path in (plain, listed, torn, tmp_path / "missing.parquet"):
        with pytest.raises(RecordError, match="run again") as caught:
            parquet.read_record(path)
        assert str(path) in str(caught.value)


def test_a_full_disk_is_reported_for_text_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.csv"
    with (
        pytest.raises(RecordError, match="Free some space"),
        files_no_larger_than(100),
        parquet.atomic_write(path) as temporary,
    ):
        temporary.write_text("x" * 1000)
    assert names(tmp_path / "new") == []


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """A writer that is killed cannot remove its temporary file itself."""
    program = (
        "import os, sys; from pathlib import Path; from servegrid.records import parquet\n"
        "with parquet.atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write_text('half'); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "requests.parquet"
    subprocess.run([sys.executable, "-c", program, str(path)])
    assert len(list(tmp_path.iterdir())) == 1
    path.write_text("whole")
    (tmp_path / "telemetry.parquet").write_text("whole")
    parquet.remove_half_written(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        *("requests.parquet", "telemetry.parquet")
    ]


def test_a_changed_bit_in_any_byte_of_a_file_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    schema = parquet.arrow_schema(columns.REQUESTS, RECORD)
    parquet.write_table(pa.Table.from_pylist([{}], schema=schema), path)
    intact = path.read_bytes()
    assert parquet.read_intact(path).read() == intact
    for position in range(len(intact)):
        data = bytearray(intact)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(ValueError, match="digest"):
            parquet.read_intact(path)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_shorter_file_and_one_without_a_digest_are_detected(tmp_path: Path, size: int) -> None:
    path = tmp_path / "requests.parquet"
    parquet.write_table(table(100), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="digest"):
        parquet.read_intact(path)
    pq.write_table(table(100), path)
    with pytest.raises(ValueError, match="it has no digest"):
        parquet.read_intact(path)


def test_a_table_that_is_written_again_gets_a_new_digest(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    parquet.write_table(table(3), first)
    parquet.write_table(pq.read_table(first).slice(1), second)
    assert pq.read_table(parquet.read_intact(second)).num_rows == 2
    assert second.read_bytes().count(parquet.DIGEST_KEY) == 1
