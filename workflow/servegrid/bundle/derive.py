"""What follows from a study's records, made again beside it, as the workflow's rules make it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pandas as pd

from servegrid import summary, tables
from servegrid.article import write_article
from servegrid.grid import Study

ANALYSIS_PACKAGES = ("matplotlib", "numpy", "pandas", "pyarrow")
"""What decides the bytes of a figure, beside Python and the processor's kind."""


def cells_of(study: Study, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells and the sentinels of the records in `folder`, tables of `records.CELLS`.

    Raises RecordError as `tables.gather` does.
    """
    sentinels = tables.gather(study.sentinels, folder)
    drifts = tables.drift_by_allocation(sentinels)
    return tables.gather(study.trials, folder, drifts), sentinels


def write_tables(cells: pd.DataFrame, sentinels: pd.DataFrame, folder: Path) -> None:
    """Write the tables of `results/tables` that follow from `cells` alone."""
    tables.write_cells(cells, folder / "cells.parquet", folder / "cells.csv")
    tables.write_csv(sentinels, folder / "sentinels.csv")
    summarised = summary.summarise(cells)
    summary.write(summarised, folder / "summary.parquet", folder / "summary.csv")
    for name in _deployments(cells):
        write_article(cells, name, folder / f"{name}.md", folder / f"{name}.csv")


def write_figures(cells: pd.DataFrame, folder: Path) -> None:
    """Write the figures of `results/plots` that follow from `cells` alone."""
    from servegrid.drawing import save
    from servegrid.plots import FIGURES, deployment_figure, overview_figure

    save(overview_figure(cells), folder / "overview.svg", folder / "overview.png")
    for name in _deployments(cells):
        for figure, metrics in FIGURES.items():
            paths = (folder / f"{name}.{figure}.{suffix}" for suffix in ("svg", "png"))
            save(deployment_figure(cells, name, metrics), *paths)


def analysis_environment() -> dict[str, str]:
    """The versions of what makes tables and figures here, and the processor's kind."""
    versions = {name: metadata.version(name) for name in ANALYSIS_PACKAGES}
    return {"machine": platform.machine(), "python": platform.python_version()} | versions


def _deployments(cells: pd.DataFrame) -> Sequence[str]:
    return list(dict.fromkeys(cells["deployment"]))
