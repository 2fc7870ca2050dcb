"""Derives a study's tables, figures and page from its records, like the workflow's rules."""

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
from servegrid.report.latency_table import write_latency_tables

ANALYSIS_PACKAGES = ("matplotlib", "numpy", "pandas", "pyarrow", "scipy", "vl-convert-python")
"""Packages whose version can change the bytes of a figure or of the page."""

_SUFFIXES = {"markdown": "md", "csv": "csv", "latex": "tex", "parquet": "parquet"}
_FINDINGS = {
    "frontier": "frontier.parquet",
    "frontier_csv": "frontier.csv",
    "frontier_tex": "frontier.tex",
    "findings": "findings.md",
    "published": "published.parquet",
    "published_csv": "published.csv",
    "published_tex": "published.tex",
    "published_md": "published.md",
}
"""The outputs of the rule `findings`: name and file."""
_SLO = {
    "slo": "slo.parquet",
    "slo_csv": "slo.csv",
    "slo_md": "slo.md",
    "saturation": "saturation.parquet",
    "saturation_csv": "saturation.csv",
}
"""The outputs of the rule `goodput`: name and file."""


@dataclass(frozen=True)
class AnalysisInputs:
    """Everything that a study's tables, figures and page depend on."""

    config: Mapping[str, Any]
    records: Path
    """The folder of the records, `results/cells`."""
    hardware: Path
    """The file of prices."""
    cells: pd.DataFrame
    drift_checks: pd.DataFrame


def write_tables(inputs: AnalysisInputs, folder: Path) -> None:
    """Write all files of `results/tables` into `folder`, named as by the rules."""
    cells = inputs.cells
    tables.write_cells(cells, folder / "cells.parquet", folder / "cells.csv")
    tables.write_csv(inputs.drift_checks, folder / "drift_checks.csv")
    summarised = summary.summarise(cells)
    summary.write_summary(summarised, folder / "summary.parquet", folder / "summary.csv")
    for name in _deployments(cells):
        write_latency_tables(cells, name, _paths(folder, name))
    findings = {key: folder / name for key, name in _FINDINGS.items()}
    write.write_findings(inputs.config, cells, summarised, findings)
    slo = {key: folder / name for key, name in _SLO.items()}
    write.write_slo(inputs.config, inputs.records, cells, slo)
    paths = _paths(folder, "capacity")
    write.write_capacity_plan(inputs.config, summarised, inputs.hardware, paths)


def write_figures(inputs: AnalysisInputs, tables_folder: Path, folder: Path) -> None:
    """Write the figures of `results/plots` and the page of `results/report` below `folder`.

    `tables_folder` has the tables that `write_tables` wrote.
    """
    from servegrid.report.figure_style import save_figure
    from servegrid.report.plots import FIGURES, deployment_figure, overview_figure

    plots = folder / "plots"
    save_figure(overview_figure(inputs.cells), plots / "overview.svg", plots / "overview.png")
    for name in _deployments(inputs.cells):
        for figure, metrics in FIGURES.items():
            paths = (plots / f"{name}.{figure}.{suffix}" for suffix in ("svg", "png"))
            save_figure(deployment_figure(inputs.cells, name, metrics), *paths)
    page_inputs = {
        name: tables_folder / f"{name}.parquet"
        for name in ("cells", "summary", "frontier", "published", "slo", "saturation")
    }
    page = folder / "report" / "index.html"
    write.write_study_page(inputs.config, inputs.records, page_inputs, inputs.hardware, page)


def analysis_environment() -> dict[str, str]:
    """The versions here of Python and ANALYSIS_PACKAGES, and the kind of processor."""
    versions = {name: metadata.version(name) for name in ANALYSIS_PACKAGES}
    return {"machine": platform.machine(), "python": platform.python_version()} | versions


def _paths(folder: Path, name: str) -> dict[str, Path]:
    return {kind: folder / f"{name}.{suffix}" for kind, suffix in _SUFFIXES.items()}


def _deployments(cells: pd.DataFrame) -> Iterable[str]:
    return dict.fromkeys(cells["deployment"])
