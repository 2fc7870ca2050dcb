"""Loads the table of cells of a study from its results folder or from its bundle."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd

from servegrid.analysis import tables
from servegrid.bundle import tarball
from servegrid.bundle.integrity import find_integrity_problems
from servegrid.bundle.limits import MEMORY_BYTES, check_table_size, limited_memory
from servegrid.errors import ComparisonError, RecordError
from servegrid.records import columns

CELLS = "results/tables/cells.parquet"


def load_cells(source: Path) -> pd.DataFrame:
    """The table of cells of `source`, a folder of results or a bundle. Runs nothing from it.

    Raises ComparisonError if there is no table, BundleError if the bundle is not safe to read.
    """
    if source.is_dir():
        for file in (source / CELLS, source / "tables/cells.parquet", source / "cells.parquet"):
            if file.is_file():
                return _load(file)
        raise ComparisonError(
            f"{source}: has no tables/cells.parquet. Name a folder of results, or a bundle."
        )
    if not source.is_file():
        raise ComparisonError(f"{source}: does not exist. Name a folder of results, or a bundle.")
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        problems = find_integrity_problems(tree, tarball.unpack_archive(source, tree))
        if problems:
            raise ComparisonError(
                f"{source}: is damaged: {problems[0]}. Get the bundle again from its source."
            )
        if not (tree / CELLS).is_file():
            raise ComparisonError(
                f"{source}: is a bundle of a partial study and has no {CELLS}. Measure the rest of "
                "the study and bundle it again."
            )
        return _load(tree / CELLS)


def _load(file: Path) -> pd.DataFrame:
    """The table in `file`, with limits on size and memory.

    Raises ComparisonError if it is not a table of cells, or too large.
    """
    check_table_size(file)
    try:
        with limited_memory():
            return tables.load_table(file, columns.CELLS)
    except RecordError as error:
        raise ComparisonError(str(error)) from error
    except MemoryError as error:
        raise ComparisonError(
            f"{file.name}: needs more than {MEMORY_BYTES:,} bytes of memory. It is not a table of "
            "servegrid."
        ) from error
