"""The comparison of two studies: the forest plot and the page around it."""

from __future__ import annotations

import itertools
import math
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from servegrid.analysis.comparison import FASTER, NO_EVIDENCE, SLOWER, Comparison, Ratio
from servegrid.report.comparison_report import (
    METHOD,
    render_comparison_markdown,
    render_comparison_page,
)
from servegrid.report.figure_style import OKABE_ITO
from servegrid.report.forest_plot import forest_plot, forest_plot_svg


def ratio(name: str, value: float, *interval: float, verdict: str = NO_EVIDENCE) -> Ratio:
    low, high = interval or (None, None)
    return Ratio(name, value, low, high, None, 1, None, verdict)


def points(figure: Figure) -> list[tuple[float, float]]:
    containers = figure.axes[0].containers
    return [
        (float(c.lines[0].get_xdata()[0]), float(c.lines[0].get_ydata()[0])) for c in containers
    ]


def bars(figure: Figure) -> list[list[float]]:
    """The ends of each interval; empty if there is none."""
    return [
        [float(x) for segment in c.lines[2][0].get_segments() for x in segment[:, 0]]
        if c.lines[2]
        else []
        for c in figure.axes[0].containers
    ]


def test_ratios_and_intervals_are_drawn_in_rows_on_a_logarithmic_axis() -> None:
    figure = forest_plot([ratio("half", 0.5, 0.4, 0.625), ratio("twice", 2.0)], 0.02)
    (axes,) = figure.axes
    assert points(figure) == [(0.5, 0), (2.0, 1)]
    assert bars(figure) == [[pytest.approx(0.4), pytest.approx(0.625)], []]
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low * high == pytest.approx(1)  # 1 lies in the middle
    assert high > 2.5
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
    assert [label.get_text() for label in axes.get_yticklabels()] == ["half", "twice"]
    assert axes.get_xlabel() == "ratio of output tokens/s, second study / first study"


def test_values_beyond_the_axis_are_drawn_at_its_edge() -> None:
    figure = forest_plot([ratio("far", 100.0, 0.001, 1000.0), ratio("one", 1.0)], 0.02)
    assert figure.axes[0].get_xlim() == pytest.approx((0.25, 4.0))
    assert points(figure) == [(pytest.approx(4.0), 0), (1.0, 1)]
    assert bars(figure)[0] == pytest.approx([0.25, 4.0])


def test_the_band_covers_negligible_changes() -> None:
    (axes,) = forest_plot([ratio("a", 1.0)], 0.02).axes
    (band,) = axes.patches
    extent = band.get_path().get_extents(band.get_patch_transform())
    assert (extent.x0, extent.x1) == pytest.approx((0.98, 1.02))


def test_colour_marker_and_text_show_the_verdict() -> None:
    ratios = [
        ratio("a", 1.1, verdict=FASTER),
        ratio("b", 0.9, verdict=SLOWER),
        ratio("c", 1.0),
    ]
    (axes,) = forest_plot(ratios, 0.02).axes
    lines = [container.lines[0] for container in axes.containers]
    assert [line.get_color() for line in lines[:2]] == list(OKABE_ITO[:2])
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 3
    assert len({line.get_marker() for line in lines}) == 3
    assert [text.get_text() for text in axes.texts] == [FASTER, SLOWER, NO_EVIDENCE]


@pytest.mark.parametrize("value", [1.0, 1.3, 2.0, 10.0])
def test_tick_labels_do_not_overlap(value: float) -> None:
    figure = forest_plot([ratio("a", value)], 0.02)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) >= 3
    assert "1" in [label.get_text() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_long_names_and_verdicts_fit_into_the_figure() -> None:
    figure = forest_plot([ratio("mixtral-8x22b_awq-4bit_4xa100-40gb_" * 2, 1.0)], 0.02)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_yticklabels()[0].get_window_extent().x0 >= 0
    assert axes.texts[0].get_window_extent().x1 <= figure.bbox.x1


def test_the_svg_is_reproducible_and_takes_the_text_colour_of_the_page() -> None:
    ratios = [ratio("<far>", 1.2, 1.1, 1.3, verdict=FASTER)]
    svg = forest_plot_svg(ratios, 0.02)
    assert svg == forest_plot_svg(ratios, 0.02)
    root = ElementTree.fromstring(svg)
    texts = ["".join(each.itertext()).strip() for each in root.iter() if each.tag.endswith("text")]
    assert "<far>" in texts
    assert root.attrib["role"] == "img"
    assert "Ratio of output tokens/s" in root.attrib["aria-label"]
    assert "currentColor" in svg
    assert "#1b1b1b" not in svg
    assert "http://matplotlib" not in svg


def comparison(**other: Any) -> Comparison:
    deployments = [Ratio("d", 0.9, 0.85, 0.95, 0.001, 4, 0.05, SLOWER)]
    cells = [Ratio("d, burst, 8 at once", 0.9, 0.8, 1.0, 0.02, 3, 0.05, NO_EVIDENCE)]
    return Comparison(deployments, cells, **{"left_out": [], **other})


def test_markdown_has_ratios_verdicts_and_power() -> None:
    text = render_comparison_markdown(["old", "new"], comparison())
    assert text.startswith(f"# new compared with old\n\n{METHOD}\n\n")
    assert "| d | 4 | 0.900 [0.850, 0.950] | 0.001 | slower |" in text
    assert "| burst, 8 at once | 3 | 0.900 [0.800, 1.000] | 0.02 | no evidence |" in text
    # Three bring-ups per study with 5% between them. From tables of power: with three per group, a
    # two-sided test at 5% finds a difference of 3.07 standard deviations in 80%.
    power = 1 - math.exp(-3.07 * 0.05) * 0.98
    (row,) = [line for line in text.splitlines() if line.startswith("| d | ") and "%" in line]
    assert " | 5.0% | " in row and f" | {power:.1%} | " in row
    assert "with 2 bring-ups | with 3 bring-ups | with 5 bring-ups" in text


def test_markdown_lists_at_most_twenty_cells_that_are_left_out() -> None:
    text = render_comparison_markdown(["a", "b"], comparison(left_out=[f"c{n}" for n in range(25)]))
    assert "- c19\n- and 5 more\n" in text
    assert "c20" not in text


def test_the_page_has_the_figure_with_its_caption_and_escapes_names() -> None:
    text = render_comparison_page(["a", "<b>"], comparison(left_out=["c"], notes=["A note."]))
    assert "<h1>&lt;b&gt; compared with a</h1>" in text
    assert '<p class="mark">A note.</p>' in text
    assert text.count("<svg") == 1
    assert "Changes inside the grey band count as no change." in text
    assert "<li>c</li>" in text
