"""What all figures are drawn with: their look, their panels, their points and marks.

A cell that was not served is a gap in its line and a cross on the axis, never a zero; one that may
not be believed has a hollow marker. With several trials a point is their median, in its 95%
interval.
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
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from servegrid import records
from servegrid.labels import INTERVAL_TITLE, doubtful, emulation
from servegrid.summary import median
from servegrid.verdict import OK

PNG_DPI = 150
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colours that stay apart for all common kinds of colour vision (Okabe and Ito, 2008)."""

MARKERS = "osD^vPXph"
EDGE_IN = 0.1
LEFT_IN = 0.75
GAP_IN = 0.22
PANEL_IN = 2.1
_CROSS_PT = 3.5
_CROSS_STEP_PT = 5.0
_TICK_LABELS = 10
STYLE = {
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
class Look:
    colour: Any
    marker: str


@dataclass(frozen=True)
class Layout:
    """Panels in rows and columns; `foot` is the room below them for more than their axes. Panels
    that are `apart` have a vertical axis each, others share that of their row.

    Lengths are in inches.
    """

    rows: int
    columns: int
    width: float
    right: float
    gap_above: float
    titled: bool
    apart: bool = False
    foot: float = 0.0


@mpl.rc_context(STYLE)
def save(figure: Figure, *paths: Path) -> None:
    """Write `figure` to each of `paths`, as SVG or PNG by its suffix.

    The same figure gives the same bytes. Raises RecordError where a file cannot be written.
    """
    for path in paths:
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with records.written_whole(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)


def looks_of(keys: Iterable[Any], colours: Sequence[Any]) -> dict[Any, Look]:
    """A look for each key: colours and markers repeat, the pairs of them much later."""
    pairs = zip(itertools.cycle(colours), itertools.cycle(MARKERS), strict=False)
    return {key: Look(*pair) for key, pair in zip(keys, pairs, strict=False)}


def draw(axes: Axes, lines: Iterable[tuple[pd.DataFrame, Look]], column: str) -> None:
    """A line of `column` for each pair of rows and look, and crosses for what was not served.

    `rows` have the column `intensity` of `labels.with_intensity`.
    """
    missing: dict[float, list[Look]] = {}
    for rows, look in lines:
        points = points_of(rows, column)
        known = points["high"].notna().any()
        axes.errorbar(
            points.index,
            points["median"],
            yerr=[points["median"] - points["low"], points["high"] - points["median"]]
            if known
            else None,
            color=look.colour,
            marker=look.marker,
            capsize=2,
        )
        hollow = rows.loc[doubtful(rows), "intensity"].unique()
        _draw_doubtful(axes, points.loc[points.index.isin(hollow), "median"], look)
        for intensity in rows.loc[rows["verdict"] != OK, "intensity"].unique():
            if pd.isna(points.loc[intensity, "median"]):
                missing.setdefault(intensity, []).append(look)
    for intensity, looks in missing.items():
        _draw_crosses(axes, intensity, looks)


def draw_lightly(axes: Axes, rows: pd.DataFrame, look: Look, column: str) -> None:
    """A dotted line of `column`, which goes with the one that `draw` has drawn."""
    points = points_of(rows, column)["median"].dropna()
    axes.plot(
        points.index,
        points,
        color=look.colour,
        linestyle=":",
        linewidth=0.8,
        marker=".",
        markersize=3,
        zorder=1,
    )


def points_of(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """`median` over the trials by intensity, with `low` and `high` of its interval or NaN."""
    levels = sorted(rows["intensity"].unique())
    points = pd.DataFrame(index=levels, columns=["median", "low", "high"], dtype=float)
    for level in levels:
        value, around = median(rows[rows["intensity"] == level], column)
        if value is not None:
            points.loc[level] = [value, *(around or (math.nan, math.nan))]
    return points


def _draw_doubtful(axes: Axes, points: pd.Series[float], look: Look) -> None:
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


def _draw_crosses(axes: Axes, intensity: float, looks: Sequence[Look]) -> None:
    """One cross per line on the axis at `intensity`, side by side."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    for position, look in enumerate(looks):
        aside = (position - (len(looks) - 1) / 2) * _CROSS_STEP_PT / 72
        axes.plot(
            intensity,
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


def start_at_zero(panels: Sequence[Axes]) -> None:
    """Once all is drawn in `panels`, which share their vertical axis."""
    if max(axes.dataLim.y1 for axes in panels) > 0:
        panels[0].set_ylim(bottom=0)
    else:
        panels[0].set_ylim(0, 1)
        panels[0].set_yticks([])


def label_intensity(axes: Axes, rows: pd.DataFrame) -> None:
    """Concurrency and rates double at equal steps; ticks where they were measured."""
    levels = sorted(rows["intensity"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xlim(levels[0] / 2**0.3, levels[-1] * 2**0.3)
    axes.set_xticks(levels, labels=_thinned(levels))
    axes.minorticks_off()


def mark_emulated(axes: Axes, rows: pd.DataFrame) -> None:
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


def _thinned(levels: Sequence[float]) -> list[str]:
    """The labels of the ticks: from the largest down, those with enough room."""
    room = math.log2(levels[-1] / levels[0]) / _TICK_LABELS
    labels: list[str] = []
    last = math.inf
    for level in reversed(levels):
        fits = last - math.log2(level) >= room
        labels.append(f"{level:g}" if fits else "")
        last = math.log2(level) if fits else last
    return labels[::-1]


def handles_of(looks: Mapping[str, Look], rows: pd.DataFrame) -> list[Line2D]:
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
    keys = ["deployment", "protocol", "output_len", "input_len", "intensity"]
    return rows[keys].drop_duplicates()


def trials_note(cells: pd.DataFrame) -> str:
    """How many trials a point is of, and what its bar is."""
    trials = cells["trial"].nunique()
    return "1 trial." if trials == 1 else f"Median of {trials} trials, bars: {INTERVAL_TITLE}."


def framed(title: str, caption: str, layout: Layout) -> tuple[Figure, Any]:
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
    panels = layout.rows * PANEL_IN + (layout.rows - 1) * layout.gap_above
    height = head + panels + foot
    gap = LEFT_IN if layout.apart else GAP_IN
    panel_width = (width - LEFT_IN - layout.right + gap) / layout.columns - gap
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        layout.rows,
        layout.columns,
        squeeze=False,
        sharey="none" if layout.apart else "row",
        gridspec_kw={
            "left": LEFT_IN / width,
            "right": 1 - layout.right / width,
            "top": 1 - head / height,
            "bottom": foot / height,
            "wspace": gap / panel_width,
            "hspace": layout.gap_above / PANEL_IN,
        },
    )
    for axes in grid.flat if layout.apart else grid[:, 0]:
        axes.yaxis.set_label_coords((EDGE_IN + 0.12 - LEFT_IN) / panel_width, 0.5)
    left = EDGE_IN / width
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
