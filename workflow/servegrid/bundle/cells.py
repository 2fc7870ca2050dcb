"""Loads the table of cells of a study from its results folder or from its bundle."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd

from servegrid.analysis import tables
from servegrid.bundle import tarball
from servegrid.bundle.integrity import find_integrity_problems
from servegrid.errors import ComparisonError

CELLS = "results/tables/cells.parquet"


def load_cells(source: Path) -> pd.DataFrame:
    """The table of cells of `source`, a folder of results or a bundle. Runs nothing from it.

    Raises ComparisonError if there is no table, BundleError if the bundle is not safe to read.
    """
    if source.is_dir():
        for file in (source / CELLS, source / "tables/cells.parquet", source / "cells.parquet"):
            if file.is_file():
                return tables.load_table(file)
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
        return tables.load_table(tree / CELLS)
