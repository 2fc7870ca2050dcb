"""The table of cells of a study, from its results folder or from a bundle of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd

from servegrid.analysis import tables
from servegrid.bundle import tarball
from servegrid.bundle.integrity import culprits_of
from servegrid.errors import ComparisonError

CELLS = "results/tables/cells.parquet"


def cells_of(source: Path) -> pd.DataFrame:
    """The table of cells of a bundle, or of a folder with results. Nothing in it is run.

    Raises ComparisonError where there is none, and BundleError where a bundle is not safe to read.
    """
    if source.is_dir():
        for file in (source / CELLS, source / "tables/cells.parquet", source / "cells.parquet"):
            if file.is_file():
                return tables.read_summary(file)
        raise ComparisonError(
            f"{source}: has no tables/cells.parquet. Name a folder of results, or a bundle."
        )
    if not source.is_file():
        raise ComparisonError(f"{source}: is not there. Name a folder of results, or a bundle.")
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        culprits = culprits_of(tree, tarball.unpack(source, tree))
        if culprits:
            raise ComparisonError(f"{source}: is not whole: {culprits[0]}")
        if not (tree / CELLS).is_file():
            raise ComparisonError(f"{source}: has no {CELLS}: it is of a partial study.")
        return tables.read_summary(tree / CELLS)
