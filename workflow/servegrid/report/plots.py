"""Figures of a study: throughput and latency over concurrency or request rate.

One set per deployment, and an overview of all deployments. Their only input is the table of cells.
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
    deployment_titles,
    figure_notes,
    intensity_title,
    nearest_length,
    with_intensity,
    workload_title,
)
from servegrid.report.figure_style import (
    EDGE_IN,
    OKABE_ITO,
    STYLE,
    Layout,
    Line,
    LineStyle,
    assign_line_styles,
    create_figure,
    draw_lines,
    label_intensity,
    legend_handles,
    line_points,
    mark_emulated,
    marks_in,
    start_at_zero,
    text_width,
    trials_note,
)
from servegrid.study.grid import OPEN_LOOPS

_HANDLE_IN = 0.7
"""Width of a legend handle plus the gap to the next column."""


@dataclass(frozen=True)
class FigureMetric:
    """A column of `columns.CELLS` to draw, with the label of its axis.

    `p99` is a second column, drawn as a dotted line if it is known. A metric that is `per_user` has
    no meaning at a request rate.
    """

    column: str
    axis: str
    p99: str | None = None
    per_user: bool = False

    def applies_to(self, protocol: str) -> bool:
        return not (self.per_user and protocol in OPEN_LOOPS)


PER_USER = FigureMetric("output_tokens_per_s_per_user", "output tokens/s per user", per_user=True)
TOTAL = FigureMetric("output_tokens_per_s", "output tokens/s, all users")
TTFT = FigureMetric("ttft_s_p50", "time to first token (s)", "ttft_s_p99")
ITL = FigureMetric("itl_s_p50", "inter-token latency (s)", "itl_s_p99")

FIGURES = {"per_user": (PER_USER,), "total": (TOTAL,), "latency": (TTFT, ITL)}
"""The figures of a deployment, with the metric of each of their panels."""


@mpl.rc_context(STYLE)
def deployment_figure(
    cells: pd.DataFrame, deployment: str, metrics: Sequence[FigureMetric]
) -> Figure:
    """`metrics` of one deployment over concurrency or request rate, one line per prompt length.

    One row of panels per protocol and output length, in study order, and one column per metric.
    Metrics per user leave out the workloads with a request rate, unless there are no others.
    """
    selected = with_intensity(cells[cells["deployment"] == deployment])
    workloads = [
        workload
        for workload in _workloads(selected)
        if all(metric.applies_to(workload[0]) for metric in metrics)
    ] or _workloads(selected)
    figure, grid = create_figure(
        deployment_titles(selected)[deployment],
        _caption(selected, workloads, metrics),
        Layout(
            rows=len(workloads),
            columns=len(metrics),
            width=1.2 + 3.6 * len(metrics),
            right=1.35,
            row_gap=0.75,
            titled=len(workloads) > 1,
            own_y_axes=True,
        ),
    )
    lengths = sorted(selected["input_len"].unique())
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(lengths))).tolist()
    styles = assign_line_styles(lengths, colours)
    drawn = []
    for panels, workload in zip(grid, workloads, strict=True):
        rows = _select(selected, workload)
        for axes, metric in zip(panels, metrics, strict=True):
            lines = _lines(rows, "input_len", styles, metric)
            drawn += lines
            draw_lines(axes, lines)
            label_intensity(axes, rows)
            mark_emulated(axes, rows)
            start_at_zero([axes], lines)
            axes.set_ylabel(metric.axis)
            axes.set_xlabel(intensity_title(workload[0]))
        if len(workloads) > 1:
            panels[0].set_title(workload_title(*workload).capitalize(), loc="left")
    grid[0][-1].legend(
        handles=legend_handles(
            {str(length): styles[length] for length in lengths}, marks_in(drawn)
        ),
        title="prompt tokens",
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


@mpl.rc_context(STYLE)
def overview_figure(cells: pd.DataFrame) -> Figure:
    """All deployments: tokens/s per user above, of all users below, a column per prompt length.

    If there are more than three prompt lengths, the figure shows the shortest, the middle and the
    longest. If there are several protocols and output lengths, it shows the one with most cells.
    """
    cells = with_intensity(cells)
    workload = max(_workloads(cells), key=lambda each: len(_select(cells, each)))
    rows = _select(cells, workload)
    columns = _prompt_columns(rows)
    titles = deployment_titles(rows)
    styles: dict[str, LineStyle] = assign_line_styles(titles, OKABE_ITO)
    metrics = [metric for metric in (PER_USER, TOTAL) if metric.applies_to(workload[0])]
    lines = [
        [_lines(column, "deployment", styles, metric) for column in columns] for metric in metrics
    ]
    marks = marks_in(line for row in lines for panel in row for line in panel)
    handles = legend_handles({titles[name]: style for name, style in styles.items()}, marks)
    width = max(4.8, 1.0 + 2.4 * len(columns))
    widest = _HANDLE_IN + max(map(text_width, titles.values()))
    legend_columns = 2 if len(handles) > 3 and 2 * widest < width else 1
    figure, grid = create_figure(
        "Output tokens per second, per user and of all users",
        _caption(rows, [workload], metrics),
        Layout(
            rows=len(metrics),
            columns=len(columns),
            width=width,
            right=EDGE_IN,
            row_gap=0.15,
            titled=True,
            foot=0.05 + 0.18 * math.ceil(len(handles) / legend_columns),
        ),
    )
    for panels, metric, row_lines in zip(grid, metrics, lines, strict=True):
        for axes, column, panel_lines in zip(panels, columns, row_lines, strict=True):
            draw_lines(axes, panel_lines)
            label_intensity(axes, rows)
            mark_emulated(axes, column)
            axes.label_outer()
        start_at_zero(panels, list(itertools.chain(*row_lines)))
        panels[0].set_ylabel(metric.axis)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(_prompt_title(column))
    for axes in grid[-1]:
        axes.set_xlabel(intensity_title(workload[0]))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 0),
        borderaxespad=0.4,
        ncols=legend_columns,
    )
    return figure


_Workload = tuple[str, int]
"""Protocol and output length. Only lines with the same ones can be compared."""


def _workloads(cells: pd.DataFrame) -> list[_Workload]:
    return list(cells[["protocol", "output_len"]].drop_duplicates().itertuples(index=False))


def _select(cells: pd.DataFrame, workload: _Workload) -> pd.DataFrame:
    return cells[(cells["protocol"] == workload[0]) & (cells["output_len"] == workload[1])]


def _lines(
    rows: pd.DataFrame, key: str, styles: Mapping[Any, LineStyle], metric: FigureMetric
) -> list[Line]:
    """A line of `metric` for each style whose key occurs in `rows`."""
    lines = []
    for value, style in styles.items():
        selected = rows[rows[key] == value]
        if not selected.empty:
            p99 = None if metric.p99 is None else line_points(selected, metric.p99)
            lines.append(Line(line_points(selected, metric.column), style, p99))
    return lines


def _prompt_columns(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of up to three prompt lengths. Each deployment adds the length nearest to it."""
    lengths = [sorted(group.unique()) for _, group in rows.groupby("deployment")["input_len"]]
    most = max(lengths, key=len)
    chosen = sorted({most[0], most[(len(most) - 1) // 2], most[-1]})
    return [
        pd.concat(_nearest(group, length) for _, group in rows.groupby("deployment", sort=False))
        for length in chosen
    ]


def _nearest(rows: pd.DataFrame, length: int) -> pd.DataFrame:
    nearest = nearest_length(rows["input_len"].unique().tolist(), length)
    near: pd.DataFrame = rows[rows["input_len"] == nearest]
    return near


def _prompt_title(column: pd.DataFrame) -> str:
    shortest, longest = column["input_len"].min(), column["input_len"].max()
    lengths = str(shortest) if shortest == longest else f"{shortest} to {longest}"
    return f"{lengths} prompt tokens"


def _caption(
    cells: pd.DataFrame, workloads: Sequence[_Workload], metrics: Sequence[FigureMetric]
) -> str:
    sentences = []
    if len(workloads) == 1:
        sentences.append(workload_title(*workloads[0]).capitalize() + ".")
    sentences.append(trials_note(cells))
    p99 = [metric.p99 for metric in metrics if metric.p99 is not None]
    if p99:
        known = bool(cells[p99].notna().any(axis=None))
        dotted = ", dotted: 99th percentile" if known else ""
        sentences.append(f"Each trial contributes its median over requests or tokens{dotted}.")
    sentences += figure_notes(cells)
    return " ".join(sentences)
