"""What follows from a study's records, made again beside it, as the workflow's rules make it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from servegrid.analysis import summary, tables
from servegrid.report import write
from servegrid.report.article_table import write_article
from servegrid.study.grid import Study

ANALYSIS_PACKAGES = ("matplotlib", "numpy", "pandas", "pyarrow", "vl-convert-python")
"""What decides the bytes of a figure and of the page, beside Python and the processor's kind."""

_ENDINGS = {"markdown": "md", "csv": "csv", "latex": "tex", "parquet": "parquet"}
_CONCLUSIONS = {
    "frontier": "frontier.parquet",
    "frontier_csv": "frontier.csv",
    "frontier_tex": "frontier.tex",
    "findings": "findings.md",
    "published": "published.parquet",
    "published_csv": "published.csv",
    "published_tex": "published.tex",
    "published_md": "published.md",
}
"""The names of the rule `conclude` for its outputs, and those of the files."""


@dataclass(frozen=True)
class Ground:
    """All that a study's tables, figures and page follow from."""

    config: Mapping[str, Any]
    folder: Path
    """Of the records."""
    hardware: Path
    """The file of prices."""
    cells: pd.DataFrame
    drift_checks: pd.DataFrame


def cells_of(study: Study, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells and the sentinels of the records in `folder`, tables of `columns.CELLS`.

    Raises RecordError as `tables.gather` does.
    """
    drift_checks = tables.gather(study.drift_checks, folder)
    drifts = tables.drift_by_allocation(drift_checks)
    return tables.gather(study.trials, folder, drifts), drift_checks


def write_tables(ground: Ground, folder: Path) -> None:
    """Write all of `results/tables`, under the names that the rules give them."""
    cells = ground.cells
    tables.write_cells(cells, folder / "cells.parquet", folder / "cells.csv")
    tables.write_csv(ground.drift_checks, folder / "sentinels.csv")
    summarised = summary.summarise(cells)
    summary.write(summarised, folder / "summary.parquet", folder / "summary.csv")
    for name in _deployments(cells):
        write_article(cells, name, _paths(folder, name))
    conclusions = {key: folder / name for key, name in _CONCLUSIONS.items()}
    write.write_conclusions(ground.config, cells, summarised, conclusions)
    write.write_plan(ground.config, summarised, ground.hardware, _paths(folder, "capacity"))


def write_figures(ground: Ground, found: Path, folder: Path) -> None:
    """Write the figures of `results/plots` and the page of `results/report` below `folder`.

    `found` has the tables that `write_tables` wrote.
    """
    from servegrid.report.figure_style import save
    from servegrid.report.plots import FIGURES, deployment_figure, overview_figure

    plots = folder / "plots"
    save(overview_figure(ground.cells), plots / "overview.svg", plots / "overview.png")
    for name in _deployments(ground.cells):
        for figure, metrics in FIGURES.items():
            paths = (plots / f"{name}.{figure}.{suffix}" for suffix in ("svg", "png"))
            save(deployment_figure(ground.cells, name, metrics), *paths)
    tables_of = {
        name: found / f"{name}.parquet" for name in ("cells", "summary", "frontier", "published")
    }
    page = folder / "report" / "index.html"
    write.write_page(ground.config, ground.folder, tables_of, ground.hardware, page)


def analysis_environment() -> dict[str, str]:
    """The versions of what makes tables and figures here, and the processor's kind."""
    versions = {name: metadata.version(name) for name in ANALYSIS_PACKAGES}
    return {"machine": platform.machine(), "python": platform.python_version()} | versions


def _paths(folder: Path, name: str) -> dict[str, Path]:
    return {kind: folder / f"{name}.{ending}" for kind, ending in _ENDINGS.items()}


def _deployments(cells: pd.DataFrame) -> Iterable[str]:
    return dict.fromkeys(cells["deployment"])
