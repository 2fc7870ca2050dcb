"""What all figures are drawn with: their look, their panels, their points and marks.

A cell that was not served is a gap in its line and a cross on the axis, never a zero; one that was
served and has no figure, a question mark there. One without a valid trial has a hollow marker. With
several trials a point is their median, in its 95% interval.
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
from matplotlib.textpath import TextPath
from matplotlib.transforms import ScaledTranslation

from servegrid.analysis.summary import median, served, valid
from servegrid.analysis.titles import INTERVAL_TITLE, emulation
from servegrid.records import parquet

PNG_DPI = 150
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colours that stay apart for all common kinds of colour vision (Okabe and Ito, 2008)."""

MARKERS = "osD^vPXph"
EDGE_IN = 0.1
LEFT_IN = 0.75
GAP_IN = 0.22
PANEL_IN = 2.1
_SIGN_STEP_PT = 5.0
_HEIGHT_PT = {"not served": 0.0, "no figure": 5.0}
"""Of the signs above the axis; a question mark on it would not be read."""
_LONGEST_BAR = 1.5
"""Where a bar ends that is longer, from the highest point: two trials can have one of ten times
that, which would leave the points no height."""
_TICK_LABELS = 10
STYLE: dict[str, Any] = {
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


MARKS: Mapping[str, Mapping[str, Any]] = {
    "not served": {"marker": "x", "markersize": 3.5, "markeredgewidth": 1.2},
    "no figure": {"marker": "$?$", "markersize": 6.0, "markeredgewidth": 0.3},
    "not valid": {"marker": "o", "markerfacecolor": "white"},
}
"""What a cell is marked with that is not to be taken as it stands."""


@dataclass(frozen=True)
class Look:
    colour: Any
    marker: str


@dataclass(frozen=True)
class Line:
    """`points` of one column as by `points_of`, and `beyond` of one that goes with it, if any."""

    points: pd.DataFrame
    look: Look
    beyond: pd.DataFrame | None = None


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
        with parquet.written_whole(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)


def looks_of(keys: Iterable[Any], colours: Sequence[Any]) -> dict[Any, Look]:
    """A look for each key: colours and markers repeat, the pairs of them much later."""
    pairs = zip(itertools.cycle(colours), itertools.cycle(MARKERS), strict=False)
    return {key: Look(*pair) for key, pair in zip(keys, pairs, strict=False)}


def points_of(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The figures of `column` by the column `intensity` of `labels.with_intensity`.

    `median`, with `low` and `high` of its interval, NaN where not known; `mark` is one of MARKS
    or None.
    """
    points = {level: _point(trials, column) for level, trials in rows.groupby("intensity")}
    names = ["median", "low", "high", "mark"]
    frame = pd.DataFrame.from_dict(points, orient="index", columns=names)
    return frame.astype(dict.fromkeys(names[:3], float))


def marks_of(lines: Iterable[Line]) -> list[str]:
    """Those of MARKS that are in `lines`."""
    found = {mark for line in lines for mark in line.points["mark"]}
    return [mark for mark in MARKS if mark in found]


def draw(axes: Axes, lines: Sequence[Line]) -> None:
    """Each line with its bars, a dotted one for what is beyond it, and the marks of its cells."""
    for line in lines:
        points, look = line.points, line.look
        bars = [points["median"] - points["low"], points["high"] - points["median"]]
        axes.errorbar(
            points.index,
            points["median"],
            yerr=bars if points["high"].notna().any() else None,
            color=look.colour,
            marker=look.marker,
            elinewidth=0.9,
            capsize=2,
        )
        _draw_hollow(axes, points.loc[points["mark"] == "not valid", "median"], look)
        if line.beyond is not None:
            _draw_lightly(axes, line.beyond["median"].dropna(), look)
    _draw_on_axis(axes, lines)


def _point(trials: pd.DataFrame, column: str) -> tuple[float, float, float, str | None]:
    value, around = median(trials, column)
    low, high = around or (math.nan, math.nan)
    if served(trials).empty:
        return math.nan, low, high, "not served"
    if value is None:
        return math.nan, low, high, "no figure"
    return value, low, high, "not valid" if valid(trials).empty else None


def _draw_hollow(axes: Axes, points: pd.Series[float], look: Look) -> None:
    axes.plot(
        points.index,
        points,
        linestyle="none",
        marker=look.marker,
        color=look.colour,
        markerfacecolor="white",
        zorder=3,
    )


def _draw_lightly(axes: Axes, points: pd.Series[float], look: Look) -> None:
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


def _draw_on_axis(axes: Axes, lines: Sequence[Line]) -> None:
    """A sign for each cell without a figure, side by side where lines have them together."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    signs: dict[Any, list[tuple[str, Any]]] = {}
    for line in lines:
        marks = line.points["mark"]
        for intensity, mark in marks[marks.isin(_HEIGHT_PT)].items():
            signs.setdefault(intensity, []).append((mark, line.look.colour))
    for intensity, together in signs.items():
        for position, (mark, colour) in enumerate(together):
            aside = (position - (len(together) - 1) / 2) * _SIGN_STEP_PT
            place = ScaledTranslation(aside / 72, _HEIGHT_PT[mark] / 72, figure.dpi_scale_trans)
            axes.plot(
                intensity,
                0,
                color=colour,
                clip_on=False,
                zorder=3,
                transform=axes.get_xaxis_transform() + place,
                **MARKS[mark],
            )


def start_at_zero(panels: Sequence[Axes], lines: Sequence[Line]) -> None:
    """The vertical axis of `panels`, in which `lines` have been drawn and which share it."""
    drawn = [each for line in lines for each in (line.points, line.beyond) if each is not None]
    medians = pd.concat([points["median"] for points in drawn])
    bars = pd.concat([line.points["high"] for line in lines])
    highest = medians.max()
    if not highest > 0:
        panels[0].set_ylim(0, 1)
        panels[0].set_yticks([])
        return
    panels[0].set_ylim(0, 1.05 * min(pd.concat([medians, bars]).max(), _LONGEST_BAR * highest))


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


def handles_of(looks: Mapping[str, Look], marks: Iterable[str]) -> list[Line2D]:
    """For the legend: a line per look, and what `marks` look like."""
    lines = [
        Line2D([], [], color=look.colour, marker=look.marker, label=label)
        for label, look in looks.items()
    ]
    return lines + [
        Line2D([], [], color="0.3", linestyle="none", label=mark, **MARKS[mark]) for mark in marks
    ]


def text_width(text: str) -> float:
    """In inches, in the figures' font."""
    return float(TextPath((0, 0), text, size=STYLE["font.size"]).get_extents().width) / 72


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
