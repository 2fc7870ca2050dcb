"""Ratios with their intervals as a picture: an SVG that needs nothing else. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from servegrid.analysis.comparison import FASTER, SLOWER, Ratio
from servegrid.report.figure_style import OKABE_ITO

_COLOURS = {FASTER: OKABE_ITO[0], SLOWER: OKABE_ITO[1]}
_NEITHER = "#767676"
_TICKS = (0.25, 0.33, 0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
_WIDEST = math.log(4.0)
_LETTER, _ROW, _PLOT, _VERDICT, _BELOW = 7.4, 26, 380, 100, 44
"""Pixels: of a letter, a row, the width of the plot and of the verdicts, the axis below."""
_LEAST_APART = 40


def svg(ratios: Sequence[Ratio], indifferent: float) -> str:
    """One row for each ratio, from 1/4 to 4 at most; ends beyond that lie on the edge."""
    reach = max(
        [
            math.log(1.12),
            *(abs(math.log(x)) for each in ratios for x in (each.ratio, each.low, each.high) if x),
        ]
    )
    reach = min(reach * 1.05, _WIDEST)
    left = max(len(each.name) for each in ratios) * _LETTER + 12
    width, height = left + _PLOT + _VERDICT, len(ratios) * _ROW + _BELOW

    def x(ratio: float) -> float:
        place = min(max(math.log(ratio), -reach), reach)
        return round(left + _PLOT * (place + reach) / (2 * reach), 1)

    bottom = len(ratios) * _ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" role="img" aria-label="Ratio of speeds per deployment" '
        'font-size="13" fill="currentColor" style="max-width: 100%; height: auto">',
        _band(x(1 - indifferent), x(1 + indifferent), bottom),
        f'<line x1="{x(1)}" x2="{x(1)}" y1="0" y2="{bottom}" stroke="currentColor"/>',
        f'<line x1="{left}" x2="{left + _PLOT}" y1="{bottom}" y2="{bottom}" '
        'stroke="currentColor"/>',
    ]
    for tick in _spread([tick for tick in _TICKS if abs(math.log(tick)) <= reach], x):
        parts.append(
            f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{bottom}" y2="{bottom + 5}" '
            f'stroke="currentColor"/><text x="{x(tick)}" y="{bottom + 19}" '
            f'text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text x="{left + _PLOT / 2}" y="{bottom + 38}" text-anchor="middle">'
        "ratio of output tokens/s</text>"
    )
    for number, each in enumerate(ratios):
        middle = number * _ROW + _ROW / 2
        colour = _COLOURS.get(each.verdict, _NEITHER)
        parts.append(f'<text x="0" y="{middle + 4}">{escape(each.name)}</text>')
        if each.low is not None and each.high is not None:
            parts.append(
                f'<line x1="{x(each.low)}" x2="{x(each.high)}" y1="{middle}" y2="{middle}" '
                f'stroke="{colour}" stroke-width="2.5"/>'
            )
        parts.append(
            f'<circle cx="{x(each.ratio)}" cy="{middle}" r="5" fill="{colour}"/>'
            f'<text x="{left + _PLOT + 12}" y="{middle + 4}">{each.verdict}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def _band(start: float, end: float, bottom: int) -> str:
    return (
        f'<rect x="{start}" y="0" width="{end - start:.1f}" height="{bottom}" fill="{_NEITHER}" '
        'fill-opacity="0.25"/>'
    )


def _spread(ticks: Sequence[float], x: Callable[[float], float]) -> list[float]:
    """Those that can be read beside each other: 1, and from there to either side."""
    shown: list[float] = []
    for tick in sorted(ticks, key=lambda tick: abs(math.log(tick))):
        if all(abs(x(tick) - x(other)) >= _LEAST_APART for other in shown):
            shown.append(tick)
    return sorted(shown)
