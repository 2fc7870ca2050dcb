"""The table of cells of another study: read with limits, and refused with one error."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.bundling import make_bundle, write_results
from servegrid.bundle import limits
from servegrid.bundle.cells import load_cells
from servegrid.errors import ComparisonError, ServegridError


def write_table(folder: Path, table: pa.Table) -> Path:
    path = folder / "tables" / "cells.parquet"
    path.parent.mkdir()
    pq.write_table(table, path)
    return path


def test_a_folder_and_its_bundle_have_the_same_cells(tmp_path: Path) -> None:
    write_results(tmp_path)
    assert load_cells(tmp_path).equals(load_cells(make_bundle(tmp_path)))


def test_a_small_file_that_needs_much_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MEMORY_BYTES", 2**27)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000), pa.array(["x" * 4000]))
    path = write_table(tmp_path, pa.table({"deployment": text.cast(pa.string())}))
    assert path.stat().st_size < 100_000
    with pytest.raises(ServegridError, match=r"cells\.parquet: .*(memory|alloc)"):
        load_cells(tmp_path)


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, pa.table({"deployment": ["d"], "price": [1.0]}))
    with pytest.raises(ComparisonError, match="has no column `model`"):
        load_cells(tmp_path)
