"""The style of all figures: fonts, colours, panels, lines and marks.

A cell that was not served is a gap in its line and a cross on the axis, never a zero. A cell that
was served but has no value is a question mark on the axis. A cell without a valid trial has a
hollow marker. With several trials, a point is their median and a bar is its 95% interval.
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
from matplotlib.markers import MarkerStyle
from matplotlib.textpath import TextPath
from matplotlib.transforms import ScaledTranslation

from servegrid.analysis.summary import TrialMedian, count_trials, trial_medians
from servegrid.analysis.titles import emulation_label, interval_title
from servegrid.records import parquet

PNG_DPI = 150
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colours that people with colour blindness can tell apart (Okabe and Ito, 2008)."""

MARKERS = "osD^vPXph"
EDGE_IN = 0.1
LEFT_IN = 0.75
GAP_IN = 0.22
PANEL_IN = 2.1
_MARK_STEP_PT = 5.0
_MARK_HEIGHT_PT = {"not served": 0.0, "no value": 5.0}
"""Height of a mark above the axis. A question mark on the axis line would be hard to read."""
_MAX_BAR = 1.5
"""Bars are cut at this multiple of the highest point. The interval of two trials can be ten times
as long, and the points would then lie flat on the axis."""
_MAX_TICK_LABELS = 10
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
    # A dollar in the name of a model or a version is a dollar.
    "text.parse_math": False,
    # Make files reproducible: keep text as text, and do not derive ids from the time.
    "svg.fonttype": "none",
    "svg.hashsalt": "servegrid",
}


MARKS: Mapping[str, Mapping[str, Any]] = {
    "not served": {"marker": "x", "markersize": 3.5, "markeredgewidth": 1.2},
    "no value": {"marker": MarkerStyle("$?$"), "markersize": 6.0, "markeredgewidth": 0.3},
    "not valid": {"marker": "o", "markerfacecolor": "white"},
}
"""Marks of cells that were not served, have no value, or are not valid."""


@dataclass(frozen=True)
class LineStyle:
    colour: Any
    marker: str


@dataclass(frozen=True)
class Line:
    """One line: `points` of a column (see `line_points`) and, if wanted, those of its `p99`."""

    points: pd.DataFrame
    style: LineStyle
    p99: pd.DataFrame | None = None


@dataclass(frozen=True)
class Layout:
    """Panels in rows and columns. All lengths are in inches.

    `right` is the margin right of the panels, `row_gap` the gap between rows, and `foot` the space
    below the axis labels. With `own_y_axes`, each panel has its own vertical axis. Otherwise the
    panels of a row share one. `titled` leaves space for panel titles.
    """

    rows: int
    columns: int
    width: float
    right: float
    row_gap: float
    titled: bool
    own_y_axes: bool = False
    foot: float = 0.0


@mpl.rc_context(STYLE)
def save_figure(figure: Figure, *paths: Path) -> None:
    """Write `figure` to each path, as SVG or PNG according to its suffix.

    The same figure gives the same bytes. Raises RecordError if a file cannot be written.
    """
    for path in paths:
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with parquet.atomic_write(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)


def assign_line_styles(keys: Iterable[Any], colours: Sequence[Any]) -> dict[Any, LineStyle]:
    """A line style for each key. Pairs of colour and marker repeat much later than colours do."""
    pairs = zip(itertools.cycle(colours), itertools.cycle(MARKERS), strict=False)
    return {key: LineStyle(*pair) for key, pair in zip(keys, pairs, strict=False)}


def line_points(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The points of `column`, indexed by `intensity` (see `titles.with_intensity`).

    Columns: `median`, `low` and `high` of its 95% interval (NaN if unknown), and `mark` (one of
    MARKS, or None).
    """
    medians = trial_medians(rows, "intensity", column)
    points = {level: _point(median) for level, median in medians.items()}
    names = ["median", "low", "high", "mark"]
    frame = pd.DataFrame.from_dict(points, orient="index", columns=names)
    return frame.astype(dict.fromkeys(names[:3], float))


def marks_in(lines: Iterable[Line]) -> list[str]:
    """The marks that occur in `lines`, in the order of MARKS."""
    found = {mark for line in lines for mark in line.points["mark"]}
    return [mark for mark in MARKS if mark in found]


def draw_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw each line with its bars, its dotted 99th percentile, and the marks of its cells."""
    for line in lines:
        points, style = line.points, line.style
        bars = [points["median"] - points["low"], points["high"] - points["median"]]
        axes.errorbar(
            points.index,
            points["median"],
            yerr=bars if points["high"].notna().any() else None,
            color=style.colour,
            marker=style.marker,
            elinewidth=0.9,
            capsize=2,
        )
        _draw_hollow(axes, points.loc[points["mark"] == "not valid", "median"], style)
        if line.p99 is not None:
            _draw_dotted(axes, line.p99["median"].dropna(), style)
    _draw_marks_on_axis(axes, lines)


def _point(median: TrialMedian) -> tuple[float, float, float, str | None]:
    low, high = median.interval or (math.nan, math.nan)
    if not median.is_served:
        return math.nan, low, high, "not served"
    if median.value is None:
        return math.nan, low, high, "no value"
    return median.value, low, high, None if median.is_valid else "not valid"


def _draw_hollow(axes: Axes, points: pd.Series[float], style: LineStyle) -> None:
    axes.plot(
        points.index,
        points,
        linestyle="none",
        marker=style.marker,
        color=style.colour,
        markerfacecolor="white",
        zorder=3,
    )


def _draw_dotted(axes: Axes, points: pd.Series[float], style: LineStyle) -> None:
    axes.plot(
        points.index,
        points,
        color=style.colour,
        linestyle=":",
        linewidth=0.8,
        marker=".",
        markersize=3,
        zorder=1,
    )


def _draw_marks_on_axis(axes: Axes, lines: Sequence[Line]) -> None:
    """Mark each cell without a value. Marks of several lines at one place stand side by side."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    marked: dict[Any, list[tuple[str, Any]]] = {}
    for line in lines:
        marks = line.points["mark"]
        for intensity, mark in marks[marks.isin(_MARK_HEIGHT_PT)].items():
            marked.setdefault(intensity, []).append((mark, line.style.colour))
    for intensity, neighbours in marked.items():
        for position, (mark, colour) in enumerate(neighbours):
            x_pt = (position - (len(neighbours) - 1) / 2) * _MARK_STEP_PT
            shift = ScaledTranslation(x_pt / 72, _MARK_HEIGHT_PT[mark] / 72, figure.dpi_scale_trans)
            axes.plot(
                intensity,
                0,
                color=colour,
                clip_on=False,
                zorder=3,
                transform=axes.get_xaxis_transform() + shift,
                **MARKS[mark],
            )


def start_at_zero(panels: Sequence[Axes], lines: Sequence[Line]) -> None:
    """Start the vertical axis that `panels` share at zero. `lines` are the lines drawn in them."""
    drawn = [each for line in lines for each in (line.points, line.p99) if each is not None]
    medians = pd.concat([points["median"] for points in drawn])
    bars = pd.concat([line.points["high"] for line in lines])
    highest = medians.max()
    if not highest > 0:
        panels[0].set_ylim(0, 1)
        panels[0].set_yticks([])
        return
    panels[0].set_ylim(0, 1.05 * min(pd.concat([medians, bars]).max(), _MAX_BAR * highest))


def label_intensity(axes: Axes, rows: pd.DataFrame) -> None:
    """Make the horizontal axis logarithmic, with a tick at each measured concurrency or rate."""
    levels = sorted(rows["intensity"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xlim(levels[0] / 2**0.3, levels[-1] * 2**0.3)
    axes.set_xticks(levels, labels=_thin_labels(levels))
    axes.minorticks_off()


def mark_emulated(axes: Axes, rows: pd.DataFrame) -> None:
    """Write `EMULATED` across a panel if its results are emulated."""
    mark = emulation_label(rows)
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


def _thin_labels(levels: Sequence[float]) -> list[str]:
    """Tick labels that do not overlap. The largest level always has one."""
    room = math.log2(levels[-1] / levels[0]) / _MAX_TICK_LABELS
    labels: list[str] = []
    last = math.inf
    for level in reversed(levels):
        fits = last - math.log2(level) >= room
        labels.append(f"{level:g}" if fits else "")
        last = math.log2(level) if fits else last
    return labels[::-1]


def legend_handles(styles: Mapping[str, LineStyle], marks: Iterable[str]) -> list[Line2D]:
    """Legend entries: one line per style, then one per mark."""
    lines = [
        Line2D([], [], color=style.colour, marker=style.marker, label=label)
        for label, style in styles.items()
    ]
    return lines + [
        Line2D([], [], color="0.3", linestyle="none", label=mark, **MARKS[mark]) for mark in marks
    ]


def text_width(text: str) -> float:
    """Width of `text` in inches, in the font of the figures."""
    return float(TextPath((0, 0), text, size=STYLE["font.size"]).get_extents().width) / 72


def trials_note(cells: pd.DataFrame) -> str:
    """Number of trials per point, and the meaning of the bars."""
    trials, bring_ups = count_trials(cells)
    title = interval_title(bring_ups)
    return "1 trial." if trials == 1 else f"Median of {trials} trials, bars: {title}."


def create_figure(title: str, caption: str, layout: Layout) -> tuple[Figure, Any]:
    """A figure with title and caption above its panels, and the array of panels (rows × columns).

    All positions are in inches. An automatic layout would change the last digits of positions from
    run to run, and so the bytes of the SVG.
    """
    width = layout.width
    title = textwrap.fill(title, int(11 * width))
    caption = textwrap.fill(caption, int(17 * width))
    caption_top = 0.12 + 0.17 * len(title.splitlines())
    head = caption_top + 0.14 * len(caption.splitlines()) + (0.3 if layout.titled else 0.15)
    foot = 0.55 + layout.foot
    panels = layout.rows * PANEL_IN + (layout.rows - 1) * layout.row_gap
    height = head + panels + foot
    gap = LEFT_IN if layout.own_y_axes else GAP_IN
    panel_width = (width - LEFT_IN - layout.right + gap) / layout.columns - gap
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        layout.rows,
        layout.columns,
        squeeze=False,
        sharey="none" if layout.own_y_axes else "row",
        gridspec_kw={
            "left": LEFT_IN / width,
            "right": 1 - layout.right / width,
            "top": 1 - head / height,
            "bottom": foot / height,
            "wspace": gap / panel_width,
            "hspace": layout.row_gap / PANEL_IN,
        },
    )
    for axes in grid.flat if layout.own_y_axes else grid[:, 0]:
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
