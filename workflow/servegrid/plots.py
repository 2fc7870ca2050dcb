"""Figures of a study: speed over concurrent requests, per deployment and side by side.

Drawn from the table of cells alone. A cell that was not served is a gap in its line and a
cross on the axis, never a zero; with several trials a point is their median, and whiskers
reach from the lowest to the highest.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from servegrid import records
from servegrid.labels import deployment_titles, doubtful, emulation, emulation_notes, load_title
from servegrid.verdict import OK

PNG_DPI = 150
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colours that stay apart for all common kinds of colour vision (Okabe and Ito, 2008)."""

SAME_PROMPT_FACTOR = 1.5
"""Tokenizers count the same text differently: lengths this close are compared with each other."""

_MARKERS = "osD^vPXph"
_EDGE_IN = 0.1
_LEFT_IN = 0.75
_GAP_IN = 0.22
_PANEL_IN = 2.1
_CROSS_PT = 3.5
_CROSS_STEP_PT = 5.0
_TICK_LABELS = 10
_CHARACTER_IN = 0.064
"""Of the legend's text, on average."""
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    # The same cells give the same bytes: text stays text, and ids don't depend on the time.
    "svg.fonttype": "none",
    "svg.hashsalt": "servegrid",
}


@dataclass(frozen=True)
class Metric:
    """A column of `records.CELLS` that is drawn, and what its axis is called."""

    column: str
    axis: str


PER_USER = Metric("output_tokens_per_s_per_user", "tokens/s per user")
TOTAL = Metric("output_tokens_per_s", "tokens/s in total")


@dataclass(frozen=True)
class _Look:
    colour: Any
    marker: str


@dataclass(frozen=True)
class _Layout:
    """Panels in rows and columns; `foot` is the room below them for more than their axes.

    Lengths are in inches.
    """

    rows: int
    columns: int
    width: float
    right: float
    gap_above: float
    titled: bool
    foot: float = 0.0


@mpl.rc_context(_STYLE)
def deployment_figure(cells: pd.DataFrame, deployment: str, metric: Metric) -> Figure:
    """`metric` of one deployment over concurrency, a line per prompt length.

    One panel for each protocol and output length, in study order.
    """
    own = cells[cells["deployment"] == deployment]
    loads = _loads(own)
    figure, grid = _figure(
        deployment_titles(own)[deployment],
        _caption(own, loads),
        _Layout(
            rows=len(loads),
            columns=1,
            width=4.8,
            right=1.35,
            gap_above=0.55,
            titled=len(loads) > 1,
        ),
    )
    panels = grid[:, 0]
    lengths = sorted(own["input_len"].unique())
    looks = _looks(lengths, mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(lengths))).tolist())
    for axes, load in zip(panels, loads, strict=True):
        rows = _of_load(own, load)
        lines = [(rows[rows["input_len"] == length], look) for length, look in looks.items()]
        _draw(axes, lines, metric)
        _label_concurrency(axes, rows)
        _mark_emulated(axes, rows)
        _start_at_zero([axes])
        axes.set_ylabel(metric.axis)
        if len(loads) > 1:
            axes.set_title(load_title(*load).capitalize(), loc="left")
    panels[-1].set_xlabel("concurrent requests")
    handles = _handles({str(length): look for length, look in looks.items()}, own)
    panels[0].legend(
        handles=handles,
        title="prompt tokens",
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


@mpl.rc_context(_STYLE)
def overview_figure(cells: pd.DataFrame) -> Figure:
    """All deployments side by side: per user above, in total below, a column per prompt length.

    Of many prompt lengths the shortest, the middle and the longest are shown, and of several
    protocols and output lengths the one with the most cells.
    """
    load = max(_loads(cells), key=lambda each: len(_of_load(cells, each)))
    rows = _of_load(cells, load)
    columns = _prompt_columns(rows)
    titles = deployment_titles(rows)
    looks = _looks(titles, OKABE_ITO)
    handles = _handles({titles[name]: look for name, look in looks.items()}, pd.concat(columns))
    width = max(4.8, 1.0 + 2.4 * len(columns))
    widest = 0.5 + _CHARACTER_IN * max(map(len, titles.values()))
    legend_columns = 2 if len(handles) > 3 and 2 * widest < width else 1
    figure, grid = _figure(
        "Output tokens per second, per user and in total",
        _caption(rows, [load]),
        _Layout(
            rows=2,
            columns=len(columns),
            width=width,
            right=_EDGE_IN,
            gap_above=0.15,
            titled=True,
            foot=0.05 + 0.18 * math.ceil(len(handles) / legend_columns),
        ),
    )
    for panels, metric in zip(grid, (PER_USER, TOTAL), strict=True):
        for axes, column in zip(panels, columns, strict=True):
            _draw(
                axes,
                [(column[column["deployment"] == name], look) for name, look in looks.items()],
                metric,
            )
            _label_concurrency(axes, rows)
            _mark_emulated(axes, rows)
            axes.label_outer()
        _start_at_zero(panels)
        panels[0].set_ylabel(metric.axis)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(_prompt_title(column))
    for axes in grid[-1]:
        axes.set_xlabel("concurrent requests")
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 0),
        borderaxespad=0.4,
        ncols=legend_columns,
    )
    return figure


@mpl.rc_context(_STYLE)
def save(figure: Figure, *paths: Path) -> None:
    """Write `figure` to each of `paths`, as SVG or PNG by its suffix.

    The same figure gives the same bytes. Raises RecordError where a file cannot be written.
    """
    for path in paths:
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with records.written_whole(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)


_Load = tuple[str, int]
"""Protocol and output length: what must be alike for lines to be comparable."""


def _loads(cells: pd.DataFrame) -> list[_Load]:
    return list(cells[["protocol", "output_len"]].drop_duplicates().itertuples(index=False))


def _of_load(cells: pd.DataFrame, load: _Load) -> pd.DataFrame:
    return cells[(cells["protocol"] == load[0]) & (cells["output_len"] == load[1])]


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
    factors = {each: max(each, length) / min(each, length) for each in own["input_len"].unique()}
    nearest = min(factors, key=lambda each: factors[each])
    near: pd.DataFrame = own[
        (own["input_len"] == nearest) & (factors[nearest] <= SAME_PROMPT_FACTOR)
    ]
    return near


def _prompt_title(column: pd.DataFrame) -> str:
    shortest, longest = column["input_len"].min(), column["input_len"].max()
    lengths = str(shortest) if shortest == longest else f"{shortest} to {longest}"
    return f"{lengths} prompt tokens"


def _looks(keys: Iterable[Any], colours: Sequence[Any]) -> dict[Any, _Look]:
    """A look for each key: colours and markers repeat, the pairs of them much later."""
    pairs = zip(itertools.cycle(colours), itertools.cycle(_MARKERS), strict=False)
    return {key: _Look(*pair) for key, pair in zip(keys, pairs, strict=False)}


def _draw(axes: Axes, lines: Iterable[tuple[pd.DataFrame, _Look]], metric: Metric) -> None:
    """A line for each pair of rows and look, and the crosses of what was not served."""
    missing: dict[int, list[_Look]] = {}
    for rows, look in lines:
        points = _points(rows, metric)
        whiskers = [points["median"] - points["min"], points["max"] - points["median"]]
        axes.errorbar(
            points.index,
            points["median"],
            yerr=whiskers if (rows["trial"] > 1).any() else None,
            color=look.colour,
            marker=look.marker,
            capsize=2,
        )
        hollow = rows.loc[doubtful(rows), "concurrency"].unique()
        _draw_doubtful(axes, points.loc[points.index.isin(hollow), "median"], look)
        for concurrency in points.index[points["median"].isna()]:
            missing.setdefault(concurrency, []).append(look)
    for concurrency, looks in missing.items():
        _draw_crosses(axes, concurrency, looks)


def _points(rows: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Median, min and max over the served trials per concurrency; NaN where there is none."""
    served = rows[rows["verdict"] == OK].groupby("concurrency")[metric.column]
    points = served.agg(["median", "min", "max"]).reindex(sorted(rows["concurrency"].unique()))
    points.index = points.index.astype(int)
    return points


def _draw_doubtful(axes: Axes, points: pd.Series[float], look: _Look) -> None:
    """Hollow markers over the points of cells that may not be believed."""
    if points.empty:
        return
    axes.plot(
        points.index,
        points,
        linestyle="none",
        marker=look.marker,
        color=look.colour,
        markerfacecolor="white",
        zorder=3,
    )


def _draw_crosses(axes: Axes, concurrency: int, looks: Sequence[_Look]) -> None:
    """One cross per line on the axis at `concurrency`, side by side."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    for position, look in enumerate(looks):
        aside = (position - (len(looks) - 1) / 2) * _CROSS_STEP_PT / 72
        axes.plot(
            concurrency,
            0,
            marker="x",
            markersize=_CROSS_PT,
            markeredgewidth=1.2,
            color=look.colour,
            clip_on=False,
            zorder=3,
            transform=axes.get_xaxis_transform()
            + ScaledTranslation(aside, 0, figure.dpi_scale_trans),
        )


def _start_at_zero(panels: Sequence[Axes]) -> None:
    """Once all is drawn in `panels`, which share their vertical axis."""
    if max(axes.dataLim.y1 for axes in panels) > 0:
        panels[0].set_ylim(bottom=0)
    else:
        panels[0].set_ylim(0, 1)
        panels[0].set_yticks([])


def _label_concurrency(axes: Axes, rows: pd.DataFrame) -> None:
    """Concurrency doubles at equal steps; ticks where it was measured."""
    levels = sorted({int(level) for level in rows["concurrency"]})
    axes.set_xscale("log", base=2)
    axes.set_xlim(levels[0] / 2**0.3, levels[-1] * 2**0.3)
    axes.set_xticks(levels, labels=_thinned(levels))
    axes.minorticks_off()


def _mark_emulated(axes: Axes, rows: pd.DataFrame) -> None:
    mark = emulation(rows)
    if mark:
        axes.text(
            0.5,
            0.5,
            mark.upper(),
            transform=axes.transAxes,
            ha="center",
            va="center",
            color="0.85",
            fontsize=22,
            rotation=20,
            zorder=0,
        )


def _thinned(levels: Sequence[int]) -> list[str]:
    """The labels of the ticks: from the largest down, those with enough room."""
    room = math.log2(levels[-1] / levels[0]) / _TICK_LABELS
    labels: list[str] = []
    last = math.inf
    for level in reversed(levels):
        fits = last - math.log2(level) >= room
        labels.append(str(level) if fits else "")
        last = math.log2(level) if fits else last
    return labels[::-1]


def _handles(looks: Mapping[str, _Look], rows: pd.DataFrame) -> list[Line2D]:
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, label=label)
        for label, look in looks.items()
    ]
    if len(_places(rows)) > len(_places(rows[rows["verdict"] == OK])):
        cross = Line2D([], [], color="0.3", marker="x", linestyle="none", label="not served")
        handles.append(cross)
    if doubtful(rows).any():
        hollow = Line2D(
            [],
            [],
            color="0.3",
            marker="o",
            markerfacecolor="white",
            linestyle="none",
            label="not valid",
        )
        handles.append(hollow)
    return handles


def _places(rows: pd.DataFrame) -> pd.DataFrame:
    keys = ["deployment", "protocol", "output_len", "input_len", "concurrency"]
    return rows[keys].drop_duplicates()


def _caption(cells: pd.DataFrame, loads: Sequence[_Load]) -> str:
    sentences = []
    if len(loads) == 1:
        sentences.append(load_title(*loads[0]).capitalize() + ".")
    trials = cells["trial"].nunique()
    if trials > 1:
        sentences.append(f"Median of {trials} trials, whiskers from the lowest to the highest.")
    else:
        sentences.append("1 trial.")
    sentences += emulation_notes(cells)
    return " ".join(sentences)


def _figure(title: str, caption: str, layout: _Layout) -> tuple[Figure, Any]:
    """A figure with title and caption above its panels, and these: an array of rows × columns.

    Everything is placed in inches: a layout that is solved for would differ in the last digits
    from one time to the next, and the SVG with it.
    """
    width = layout.width
    title = textwrap.fill(title, int(11 * width))
    caption = textwrap.fill(caption, int(17 * width))
    caption_top = 0.12 + 0.17 * len(title.splitlines())
    head = caption_top + 0.14 * len(caption.splitlines()) + (0.3 if layout.titled else 0.15)
    foot = 0.55 + layout.foot
    panels = layout.rows * _PANEL_IN + (layout.rows - 1) * layout.gap_above
    height = head + panels + foot
    panel_width = (width - _LEFT_IN - layout.right + _GAP_IN) / layout.columns - _GAP_IN
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        layout.rows,
        layout.columns,
        squeeze=False,
        sharey="row",
        gridspec_kw={
            "left": _LEFT_IN / width,
            "right": 1 - layout.right / width,
            "top": 1 - head / height,
            "bottom": foot / height,
            "wspace": _GAP_IN / panel_width,
            "hspace": layout.gap_above / _PANEL_IN,
        },
    )
    for axes in grid[:, 0]:
        axes.yaxis.set_label_coords((_EDGE_IN + 0.12 - _LEFT_IN) / panel_width, 0.5)
    left = _EDGE_IN / width
    figure.text(left, 1 - 0.08 / height, title, weight="bold", va="top", linespacing=1.1)
    figure.text(
        left,
        1 - caption_top / height,
        caption,
        size=7,
        color="0.35",
        va="top",
        linespacing=1.2,
    )
    return figure, grid
