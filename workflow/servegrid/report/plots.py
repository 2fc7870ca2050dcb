"""Figures of a study: speed and latency over the load, per deployment and side by side.

Drawn from the table of cells alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from servegrid.analysis.titles import (
    axis_title,
    deployment_titles,
    emulation_notes,
    load_title,
    nearest_length,
    with_intensity,
)
from servegrid.report.figure_style import (
    EDGE_IN,
    OKABE_ITO,
    STYLE,
    Layout,
    Line,
    Look,
    draw,
    framed,
    handles_of,
    label_intensity,
    looks_of,
    mark_emulated,
    marks_of,
    points_of,
    start_at_zero,
    text_width,
    trials_note,
)

_HANDLE_IN = 0.7
"""Of the legend's columns, for their handles and what is left free between them."""


@dataclass(frozen=True)
class Metric:
    """A column of `columns.CELLS` that is drawn, what its axis is called, and a second column, of
    which a thin line tells where it is known. `of_users` has no meaning at a rate."""

    column: str
    axis: str
    beyond: str | None = None
    of_users: bool = False

    def of_load(self, protocol: str) -> bool:
        return not (self.of_users and protocol == "poisson")


PER_USER = Metric("output_tokens_per_s_per_user", "tokens/s per user", of_users=True)
TOTAL = Metric("output_tokens_per_s", "tokens/s in total")
TTFT = Metric("ttft_s_p50", "time to first token, s", "ttft_s_p99")
ITL = Metric("itl_s_p50", "time between tokens, s", "itl_s_p99")

FIGURES = {"per_user": (PER_USER,), "total": (TOTAL,), "latency": (TTFT, ITL)}
"""The figures of a deployment, and what each has panels of."""


@mpl.rc_context(STYLE)
def deployment_figure(cells: pd.DataFrame, deployment: str, metrics: Sequence[Metric]) -> Figure:
    """`metrics` of one deployment over the load, a line per prompt length.

    A row of panels for each protocol and output length, in study order, a column for each metric.
    Rates are left out where users' figures are drawn of other loads.
    """
    own = with_intensity(cells[cells["deployment"] == deployment])
    workloads = [
        workload
        for workload in _loads(own)
        if all(metric.of_load(workload[0]) for metric in metrics)
    ] or _loads(own)
    figure, grid = framed(
        deployment_titles(own)[deployment],
        _caption(own, workloads, metrics),
        Layout(
            rows=len(workloads),
            columns=len(metrics),
            width=1.2 + 3.6 * len(metrics),
            right=1.35,
            gap_above=0.75,
            titled=len(workloads) > 1,
            apart=True,
        ),
    )
    lengths = sorted(own["input_len"].unique())
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(lengths))).tolist()
    looks = looks_of(lengths, colours)
    drawn = []
    for panels, workload in zip(grid, workloads, strict=True):
        rows = _of_load(own, workload)
        for axes, metric in zip(panels, metrics, strict=True):
            lines = _lines(rows, "input_len", looks, metric)
            drawn += lines
            draw(axes, lines)
            label_intensity(axes, rows)
            mark_emulated(axes, rows)
            start_at_zero([axes], lines)
            axes.set_ylabel(metric.axis)
            axes.set_xlabel(axis_title(workload[0]))
        if len(workloads) > 1:
            panels[0].set_title(load_title(*workload).capitalize(), loc="left")
    grid[0][-1].legend(
        handles=handles_of({str(length): looks[length] for length in lengths}, marks_of(drawn)),
        title="prompt tokens",
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


@mpl.rc_context(STYLE)
def overview_figure(cells: pd.DataFrame) -> Figure:
    """All deployments side by side: per user above, in total below, a column per prompt length.

    Of many prompt lengths the shortest, the middle and the longest are shown, and of several
    protocols and output lengths the one with the most cells.
    """
    cells = with_intensity(cells)
    workload = max(_loads(cells), key=lambda each: len(_of_load(cells, each)))
    rows = _of_load(cells, workload)
    columns = _prompt_columns(rows)
    titles = deployment_titles(rows)
    looks: dict[str, Look] = looks_of(titles, OKABE_ITO)
    metrics = [metric for metric in (PER_USER, TOTAL) if metric.of_load(workload[0])]
    lines = [
        [_lines(column, "deployment", looks, metric) for column in columns] for metric in metrics
    ]
    marks = marks_of(line for panels in lines for panel in panels for line in panel)
    handles = handles_of({titles[name]: look for name, look in looks.items()}, marks)
    width = max(4.8, 1.0 + 2.4 * len(columns))
    widest = _HANDLE_IN + max(map(text_width, titles.values()))
    legend_columns = 2 if len(handles) > 3 and 2 * widest < width else 1
    figure, grid = framed(
        "Output tokens per second, per user and in total",
        _caption(rows, [workload], metrics),
        Layout(
            rows=len(metrics),
            columns=len(columns),
            width=width,
            right=EDGE_IN,
            gap_above=0.15,
            titled=True,
            foot=0.05 + 0.18 * math.ceil(len(handles) / legend_columns),
        ),
    )
    for panels, metric, of_panels in zip(grid, metrics, lines, strict=True):
        for axes, column, of_panel in zip(panels, columns, of_panels, strict=True):
            draw(axes, of_panel)
            label_intensity(axes, rows)
            mark_emulated(axes, column)
            axes.label_outer()
        start_at_zero(panels, list(itertools.chain(*of_panels)))
        panels[0].set_ylabel(metric.axis)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(_prompt_title(column))
    for axes in grid[-1]:
        axes.set_xlabel(axis_title(workload[0]))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 0),
        borderaxespad=0.4,
        ncols=legend_columns,
    )
    return figure


_Load = tuple[str, int]
"""Protocol and output length: what must be alike for lines to be comparable."""


def _loads(cells: pd.DataFrame) -> list[_Load]:
    return list(cells[["protocol", "output_len"]].drop_duplicates().itertuples(index=False))


def _of_load(cells: pd.DataFrame, workload: _Load) -> pd.DataFrame:
    return cells[(cells["protocol"] == workload[0]) & (cells["output_len"] == workload[1])]


def _lines(rows: pd.DataFrame, key: str, looks: Mapping[Any, Look], metric: Metric) -> list[Line]:
    """A line of `metric` for each look whose key is in `rows`."""
    lines = []
    for value, look in looks.items():
        own = rows[rows[key] == value]
        if not own.empty:
            beyond = None if metric.beyond is None else points_of(own, metric.beyond)
            lines.append(Line(points_of(own, metric.column), look, beyond))
    return lines


def _prompt_columns(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of up to three prompt lengths, each with what every deployment has near it."""
    lengths = [sorted(own.unique()) for _, own in rows.groupby("deployment")["input_len"]]
    most = max(lengths, key=len)
    chosen = sorted({most[0], most[(len(most) - 1) // 2], most[-1]})
    return [
        pd.concat(_nearest(own, length) for _, own in rows.groupby("deployment", sort=False))
        for length in chosen
    ]


def _nearest(own: pd.DataFrame, length: int) -> pd.DataFrame:
    nearest = nearest_length(own["input_len"].unique().tolist(), length)
    near: pd.DataFrame = own[own["input_len"] == nearest]
    return near


def _prompt_title(column: pd.DataFrame) -> str:
    shortest, longest = column["input_len"].min(), column["input_len"].max()
    lengths = str(shortest) if shortest == longest else f"{shortest} to {longest}"
    return f"{lengths} prompt tokens"


def _caption(cells: pd.DataFrame, workloads: Sequence[_Load], metrics: Sequence[Metric]) -> str:
    sentences = []
    if len(workloads) == 1:
        sentences.append(load_title(*workloads[0]).capitalize() + ".")
    sentences.append(trials_note(cells))
    beyond = [metric.beyond for metric in metrics if metric.beyond is not None]
    if beyond:
        known = bool(cells[beyond].notna().any(axis=None))
        dotted = ", dotted: their 99th percentile" if known else ""
        sentences.append(f"Medians of the requests or tokens{dotted}.")
    sentences += emulation_notes(cells)
    return " ".join(sentences)
