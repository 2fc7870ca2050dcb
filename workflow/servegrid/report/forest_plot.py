"""A forest plot: ratios of two studies with their 95% intervals, one row per deployment."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from servegrid.analysis.comparison import FASTER, SLOWER, Ratio
from servegrid.report.figure_style import EDGE_IN, OKABE_ITO, STYLE, LineStyle, text_width

MAX_RATIO = 4.0
"""The axis ends at this ratio and at its inverse. What lies beyond is drawn at the edge."""

_STYLES = {FASTER: LineStyle(OKABE_ITO[0], ">"), SLOWER: LineStyle(OKABE_ITO[1], "<")}
_NO_EVIDENCE = LineStyle("#767676", "o")
_INK = "#1b1b1b"
"""Replaced by the colour of the page's text, so that the plot is readable in dark mode."""
_MIN_REACH = math.log(1.12)
_TICKS = (0.25, 0.33, 0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
_MIN_TICK_GAP_IN = 0.4
_TEXT_SLACK = 1.05
"""Hinting makes a text in a PNG a little wider than its outline."""
_ROW_IN, _PLOT_IN, _FOOT_IN = 0.28, 4.2, 0.5


@mpl.rc_context(STYLE | {"axes.grid": False})
def forest_plot(ratios: Sequence[Ratio], negligible: float) -> Figure:
    """Each ratio on a logarithmic axis, with its interval and its verdict.

    The grey band covers changes of up to `negligible` (a share). Colour and marker show the
    verdict. Intervals that are None are not drawn.
    """
    left, right = (
        _TEXT_SLACK * max(map(text_width, texts)) + 0.25
        for texts in ([each.name for each in ratios], [each.verdict for each in ratios])
    )
    width, height = left + _PLOT_IN + right, len(ratios) * _ROW_IN + _FOOT_IN + EDGE_IN
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (
            left / width,
            _FOOT_IN / height,
            _PLOT_IN / width,
            len(ratios) * _ROW_IN / height,
        )
    )
    reach = _reach(ratios)
    low, high = math.exp(-reach), math.exp(reach)
    axes.axvspan(1 - negligible, 1 + negligible, color=_NO_EVIDENCE.colour, alpha=0.25, lw=0)
    axes.axvline(1, color=_INK, linewidth=0.9)
    for row, each in enumerate(ratios):
        style = _STYLES.get(each.verdict, _NO_EVIDENCE)
        value = min(max(each.ratio, low), high)
        bar = None
        if each.low is not None and each.high is not None:
            bar = [[value - max(each.low, low)], [min(each.high, high) - value]]
        axes.errorbar(
            value,
            row,
            xerr=bar,
            color=style.colour,
            marker=style.marker,
            markersize=6,
            elinewidth=1.8,
            capsize=3,
            clip_on=False,
        )
        axes.annotate(
            each.verdict,
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=_INK,
            annotation_clip=False,
        )
    _format_axes(axes, [each.name for each in ratios], reach)
    return figure


def forest_plot_svg(ratios: Sequence[Ratio], negligible: float) -> str:
    """The plot as an SVG element for an HTML page, in the page's text colour."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = forest_plot(ratios, negligible)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    label = 'role="img" aria-label="Ratio of output tokens/s per deployment"'
    return text.replace("<svg", f'<svg {label} style="max-width: 100%; height: auto"', 1)


def _reach(ratios: Sequence[Ratio]) -> float:
    """Logarithm of the right end of the axis. The left end is its inverse."""
    values = [x for each in ratios for x in (each.ratio, each.low, each.high) if x]
    widest = max(_MIN_REACH, *(abs(math.log(value)) for value in values))
    return min(1.05 * widest, math.log(MAX_RATIO))


def _format_axes(axes: Axes, names: Sequence[str], reach: float) -> None:
    ticks = _select_ticks(reach)
    axes.set_xscale("log")
    axes.set_xlim(math.exp(-reach), math.exp(reach))
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ratio of output tokens/s, second study / first study")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), labels=list(names))
    axes.tick_params(axis="y", length=0, colors=_INK)
    axes.tick_params(axis="x", colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(_INK)


def _select_ticks(reach: float) -> list[float]:
    """Ticks whose labels do not overlap. 1 comes first, then the nearest to 1."""
    chosen: list[float] = []
    for tick in sorted(_TICKS, key=lambda tick: abs(math.log(tick))):
        if abs(math.log(tick)) > reach:
            continue
        gaps = (abs(math.log(tick / other)) / (2 * reach) * _PLOT_IN for other in chosen)
        if all(gap >= _MIN_TICK_GAP_IN for gap in gaps):
            chosen.append(tick)
    return sorted(chosen)
