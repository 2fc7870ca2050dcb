"""Figures: what is drawn, what is written on them, and that the same cells give the same files."""

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from servegrid.report.figure_style import save_figure
from servegrid.report.plots import ITL, PER_USER, TOTAL, TTFT, deployment_figure, overview_figure


def row(
    concurrency: int, input_len: int, tokens_per_s: float | None, **other: Any
) -> dict[str, Any]:
    """One row of cells; without tokens per second it was not served."""
    return {
        "deployment": "d",
        "model": "m",
        "quantization": "awq",
        "gpu": "a100-40gb",
        "gpu_count": 2,
        "engine": "vllm",
        "engine_version": "0.32.0",
        "protocol": "burst",
        "concurrency": concurrency,
        "request_rate": None,
        "input_len": input_len,
        "output_len": 100,
        "trial": 1,
        "verdict": "ok" if tokens_per_s else "timeout",
        "valid": True if tokens_per_s else None,
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_user": tokens_per_s and tokens_per_s / concurrency,
        **other,
    }


def cells(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    numbers = ("request_rate", "output_tokens_per_s", "output_tokens_per_s_per_user")
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, "float64"))


PLAIN = [
    row(1, 31, 30.0),
    row(2, 31, 50.0),
    row(4, 31, 80.0),
    row(1, 119, 20.0),
    row(2, 119, None),
    row(4, 119, None),
]


def panel(figure: Figure, index: int = 0) -> Axes:
    return figure.axes[index]


def drawn(axes: Axes) -> list[list[tuple[float, float]]]:
    """The points of each line, the gaps left out; in the order of the legend."""
    lines = [container.lines[0] for container in axes.containers]
    points = [np.asarray(line.get_xydata(), dtype=float) for line in lines]
    return [[(x, y) for x, y in each if not np.isnan(y)] for each in points]


def marked(axes: Axes, marker: str) -> list[float]:
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [float(np.asarray(line.get_xdata())[0]) for line in lines]


def crosses(axes: Axes) -> list[float]:
    return marked(axes, "x")


def hollow(axes: Axes) -> list[tuple[float, float]]:
    lines = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    return [(x, y) for line in lines for x, y in np.asarray(line.get_xydata()).tolist()]


def svg_texts(figure: Figure, folder: Path) -> list[str]:
    save_figure(figure, folder / "figure.svg")
    root = ET.parse(folder / "figure.svg").getroot()
    return [
        "".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")
    ]


def test_a_deployment_has_a_line_per_prompt_length() -> None:
    total = panel(deployment_figure(cells(PLAIN), "d", (TOTAL,)))
    assert drawn(total) == [[(1, 30), (2, 50), (4, 80)], [(1, 20)]]
    per_user = panel(deployment_figure(cells(PLAIN), "d", (PER_USER,)))
    assert drawn(per_user) == [[(1, 30), (2, 25), (4, 20)], [(1, 20)]]


def test_a_cell_that_was_not_served_is_a_cross_and_not_a_zero(tmp_path: Path) -> None:
    figure = deployment_figure(cells(PLAIN), "d", (TOTAL,))
    assert crosses(panel(figure)) == [2, 4]
    assert "not served" in svg_texts(figure, tmp_path)
    served = deployment_figure(cells(PLAIN[:3]), "d", (TOTAL,))
    assert crosses(panel(served)) == []
    assert "not served" not in svg_texts(served, tmp_path)


def test_the_x_axis_is_logarithmic_and_the_y_axis_starts_at_zero() -> None:
    axes = panel(deployment_figure(cells(PLAIN), "d", (TOTAL,)))
    assert axes.get_xscale() == "log"
    assert list(axes.get_xticks()) == [1, 2, 4]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 80


def test_labels_are_text_in_the_svg(tmp_path: Path) -> None:
    texts = svg_texts(deployment_figure(cells(PLAIN), "d", (PER_USER,)), tmp_path)
    for words in (
        "m · awq · 2 × A100 40 GB · vLLM 0.32.0",
        "Burst, 100 output tokens per request. 1 trial.",
        "concurrent requests",
        "output tokens/s per user",
        "prompt tokens",
        "31",
        "119",
        *("1", "2", "4"),
    ):
        assert words in texts


def test_several_trials_are_drawn_as_median_and_interval(tmp_path: Path) -> None:
    trials = [row(4, 31, rate, trial=trial) for trial, rate in enumerate((10.0, 40.0, 20.0), 1)]
    figure = deployment_figure(cells([*trials, row(8, 31, 30.0)]), "d", (TOTAL,))
    axes = panel(figure)
    assert drawn(axes) == [[(4, 20), (8, 30)]]
    (whiskers,) = axes.containers[0].lines[2]
    # Logarithms to base 2 of 10, 20 and 40 are 1 apart, so that s is 1.
    reach = 2 ** (4.302653 / 3**0.5)
    (bar, none) = (segment.tolist() for segment in whiskers.get_segments())
    assert bar == [[4, pytest.approx(20 / reach)], [4, pytest.approx(20 * reach)]]
    assert none == []  # one trial alone
    caption = (
        "Burst, 100 output tokens per request. "
        "Median of 3 trials, bars: 95% interval within one bring-up, Student's t on the logarithms."
    )
    assert caption in " ".join(svg_texts(figure, tmp_path))


def test_a_partly_served_cell_is_drawn_from_its_served_trials() -> None:
    figure = deployment_figure(cells([row(4, 31, 10.0), row(4, 31, None, trial=2)]), "d", (TOTAL,))
    assert drawn(panel(figure)) == [[(4, 10)]]
    assert crosses(panel(figure)) == []


def test_a_cell_that_is_not_valid_has_a_hollow_marker_and_a_legend_entry(tmp_path: Path) -> None:
    with_invalid = [*PLAIN[:2], row(4, 31, 80.0, valid=False), *PLAIN[3:]]
    for figure in (
        deployment_figure(cells(with_invalid), "d", (TOTAL,)),
        overview_figure(cells(with_invalid)),
    ):
        assert [x for x, _ in hollow(panel(figure))] == [4]
        assert "not valid" in " ".join(svg_texts(figure, tmp_path))
    texts = svg_texts(deployment_figure(cells(PLAIN), "d", (TOTAL,)), tmp_path)
    assert "not valid" not in texts


def test_each_protocol_and_output_length_has_a_panel(tmp_path: Path) -> None:
    closed_loop = [
        row(1, 31, 10.0, protocol="closed_loop"),
        row(2, 31, 15.0, protocol="closed_loop"),
    ]
    figure = deployment_figure(cells([*PLAIN, *closed_loop]), "d", (TOTAL,))
    assert drawn(panel(figure, 0))[0] == [(1, 30), (2, 50), (4, 80)]
    assert drawn(panel(figure, 1))[0] == [(1, 10), (2, 15)]
    texts = svg_texts(figure, tmp_path)
    assert "Burst, 100 output tokens per request" in texts
    assert "Closed loop, 100 output tokens per request" in texts


def test_emulated_figures_are_marked(tmp_path: Path) -> None:
    emulated = cells(PLAIN).assign(engine="emulated", time_scale=1.0)
    for figure in (deployment_figure(emulated, "d", (TOTAL,)), overview_figure(emulated)):
        texts = svg_texts(figure, tmp_path)
        assert "EMULATED" in texts
        assert "Emulated: these results do not come from hardware." in " ".join(texts)
    assert "EMULATED" not in svg_texts(overview_figure(cells(PLAIN)), tmp_path)


DEGENERATE = {
    "one cell": [row(4, 31, 10.0)],
    "one cell, not served": [row(4, 31, None)],
    "nothing served": [row(1, 31, None), row(2, 31, None), row(1, 63, None)],
    "seven lines": [row(n, 31 * k, 10.0 * n / k) for n in (1, 128) for k in range(1, 8)],
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_studies_have_figures(case: str, tmp_path: Path) -> None:
    frame = cells(DEGENERATE[case])
    save_figure(deployment_figure(frame, "d", (PER_USER,)), tmp_path / "d.svg", tmp_path / "d.png")
    save_figure(overview_figure(frame), tmp_path / "o.svg", tmp_path / "o.png")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["d.png", "d.svg", "o.png", "o.svg"]


def test_tick_labels_are_thinned_and_the_largest_stays() -> None:
    levels = range(1, 65)
    figure = deployment_figure(cells(row(n, 31, 10.0) for n in levels), "d", (TOTAL,))
    axes = panel(figure)
    assert list(axes.get_xticks()) == list(levels)
    labels = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
    assert labels[0] == "1"
    assert labels[-1] == "64"
    assert len(labels) <= 11


def test_a_png_has_150_dots_per_inch(tmp_path: Path) -> None:
    figure = deployment_figure(cells(PLAIN), "d", (TOTAL,))
    save_figure(figure, tmp_path / "d.png")
    with Image.open(tmp_path / "d.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width == 720  # 4.8 inches
        assert len(picture.convert("RGB").getcolors(maxcolors=1_000_000)) > 10


def test_the_same_cells_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_figure(deployment_figure(cells(PLAIN), "d", (TOTAL,)), tmp_path / f"{name}.svg")
        save_figure(overview_figure(cells(PLAIN)), tmp_path / f"{name}-overview.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    first, second = (tmp_path / f"{name}-overview.svg" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_the_style_of_other_figures_does_not_change(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    save_figure(overview_figure(cells(PLAIN)), tmp_path / "o.svg")
    assert dict(mpl.rcParams) == before


def test_the_overview_has_a_column_per_prompt_length_and_a_line_per_deployment(
    tmp_path: Path,
) -> None:
    other = {"deployment": "e", "engine": "llamacpp", "quantization": "q4_1", "gpu": "cpu"}
    rows = [*PLAIN, *(row(n, length, 10.0 * n, **other) for n in (1, 2) for length in (31, 119))]
    figure = overview_figure(cells(rows))
    assert drawn(panel(figure, 0)) == [[(1, 30), (2, 25), (4, 20)], [(1, 10), (2, 10)]]
    assert drawn(panel(figure, 1)) == [[(1, 20)], [(1, 10), (2, 10)]]
    assert drawn(panel(figure, 2)) == [[(1, 30), (2, 50), (4, 80)], [(1, 10), (2, 20)]]
    assert drawn(panel(figure, 3)) == [[(1, 20)], [(1, 10), (2, 20)]]
    texts = svg_texts(figure, tmp_path)
    for words in (
        "m · awq · 2 × A100 40 GB · vLLM 0.32.0",
        "m · q4_1 · CPU · llama.cpp 0.32.0",
        "31 prompt tokens",
        "119 prompt tokens",
        "output tokens/s per user",
        "output tokens/s, all users",
        "not served",
    ):
        assert words in texts


def test_a_prompt_length_without_served_cells_does_not_change_the_scale() -> None:
    figure = overview_figure(cells([*PLAIN[:3], row(1, 119, None), row(2, 119, None)]))
    assert crosses(panel(figure, 3)) == [1, 2]
    for axes in figure.axes[2:]:
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 80
    assert len(panel(figure, 2).get_yticks()) > 2


def columns(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_the_overview_shows_at_most_three_prompt_lengths() -> None:
    rows = [row(1, length, 10.0) for length in (31, 63, 119, 296, 480, 822, 2193)]
    titles = ["31 prompt tokens", "296 prompt tokens", "2193 prompt tokens"]
    assert columns(overview_figure(cells(rows))) == titles


def test_similar_prompt_lengths_share_a_column_of_the_overview() -> None:
    llama = [row(1, length, 20.0, deployment="llama") for length in (21, 240)]
    far = [row(1, 100, 30.0, deployment="far")]
    rows = [*(row(1, length, 10.0) for length in (31, 63, 296)), *llama, *far]
    figure = overview_figure(cells(rows))
    assert columns(figure) == [
        "21 to 31 prompt tokens",
        "63 prompt tokens",
        "240 to 296 prompt tokens",
    ]
    assert drawn(panel(figure, 0)) == [[(1, 10)], [(1, 20)]]
    assert drawn(panel(figure, 1)) == [[(1, 10)]]
    assert drawn(panel(figure, 2)) == [[(1, 10)], [(1, 20)]]


def test_the_overview_shows_the_workload_with_most_cells(tmp_path: Path) -> None:
    closed_loop = [row(1, 31, 99.0, protocol="closed_loop")]
    figure = overview_figure(cells([*closed_loop, *PLAIN]))
    assert drawn(panel(figure, 2))[0] == [(1, 30), (2, 50), (4, 80)]
    assert "Burst, 100 output tokens per request. 1 trial." in svg_texts(figure, tmp_path)


def test_the_line_styles_of_twenty_deployments_differ() -> None:
    rows = [row(1, 31, 10.0, deployment=f"d{k}") for k in range(20)]
    lines = [container.lines[0] for container in panel(overview_figure(cells(rows))).containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


LATENCY = (TTFT, ITL)


def latencies(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    names = [name for metric in LATENCY for name in (metric.column, metric.p99) if name]
    given = cells(rows)
    return given.reindex(columns=[*dict.fromkeys([*given.columns, *names])]).astype(
        dict.fromkeys(names, "float64")
    )


def test_latency_figures_have_a_panel_per_metric_and_a_dotted_p99(tmp_path: Path) -> None:
    known = {"ttft_s_p50": 0.2, "itl_s_p50": 0.02, "itl_s_p99": 0.05}
    figure = deployment_figure(latencies([row(1, 31, 30.0, **known)]), "d", LATENCY)
    ttft, itl = figure.axes
    assert (drawn(ttft), drawn(itl)) == ([[(1, 0.2)]], [[(1, 0.02)]])
    assert ttft.get_ylabel() == "time to first token (s)"
    dotted = [line for line in itl.lines if line.get_linestyle() == ":"]
    assert [np.asarray(line.get_ydata()).tolist() for line in dotted] == [[0.05]]
    assert "dotted: 99th percentile." in " ".join(svg_texts(figure, tmp_path))


def test_poisson_is_drawn_over_the_request_rate() -> None:
    workload = {"protocol": "poisson", "concurrency": None, "output_tokens_per_s_per_user": None}
    rows = [row(1, 31, 30.0 * rate) | workload | {"request_rate": rate} for rate in (0.5, 2.0)]
    axes = panel(deployment_figure(cells(rows), "d", (TOTAL,)))
    assert drawn(axes) == [[(0.5, 15), (2, 60)]]
    assert axes.get_xlabel() == "requests per second"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "2"]
    (alone,) = overview_figure(cells(rows)).axes
    assert alone.get_ylabel() == "output tokens/s, all users"


def test_a_cell_without_steady_state_is_a_question_mark(tmp_path: Path) -> None:
    served = {"verdict": "ok", "valid": False}
    figure = deployment_figure(cells([row(1, 31, 30.0), row(2, 31, None) | served]), "d", (TOTAL,))
    assert drawn(panel(figure)) == [[(1, 30)]]
    assert crosses(panel(figure)) == []
    assert marked(panel(figure), "$?$") == [2]
    texts = svg_texts(figure, tmp_path)
    assert "no value" in texts
    assert "not valid" not in texts  # nothing is drawn so


def test_a_cell_with_a_valid_trial_is_drawn_from_that_trial() -> None:
    trials = [row(4, 31, 10.0), row(4, 31, 90.0, trial=2, valid=False)]
    axes = panel(deployment_figure(cells(trials), "d", (TOTAL,)))
    assert drawn(axes) == [[(4, 10)]]
    assert hollow(axes) == []


@pytest.mark.parametrize("rates", [[3.0, 3.0], [1.0] * 6 + [10.0] * 5])
def test_equal_or_bimodal_trials_are_drawn(rates: list[float]) -> None:
    trials = [row(4, 31, rate, trial=trial) for trial, rate in enumerate(rates, 1)]
    axes = panel(deployment_figure(cells(trials), "d", (TOTAL,)))
    assert drawn(axes) == [[(4, rates[0])]]


def test_a_very_long_bar_is_cut() -> None:
    trials = [row(4, 31, 10.0), row(4, 31, 20.0, trial=2)]
    axes = panel(deployment_figure(cells([*trials, row(8, 31, 40.0)]), "d", (TOTAL,)))
    # The interval of 10 and 20 is a factor of 82 wide to either side; the highest point is 40.
    assert 40 < axes.get_ylim()[1] < 80


def test_per_user_figures_leave_out_request_rates() -> None:
    rate = {"protocol": "poisson", "concurrency": None, "request_rate": 2.0}
    rows = [*PLAIN, row(1, 31, 30.0) | rate | {"output_tokens_per_s_per_user": None}]
    assert len(deployment_figure(cells(rows), "d", (TOTAL,)).axes) == 2
    (axes,) = deployment_figure(cells(rows), "d", (PER_USER,)).axes
    assert axes.get_xlabel() == "concurrent requests"
    alone = panel(deployment_figure(cells(rows[-1:]), "d", (PER_USER,)))
    assert marked(alone, "$?$") == [2]


def test_a_workload_that_was_never_served_has_a_panel() -> None:
    closed_loop = [row(n, 31, None, protocol="closed_loop") for n in (1, 2)]
    figure = deployment_figure(cells([*PLAIN, *closed_loop]), "d", (TOTAL,))
    assert crosses(panel(figure, 1)) == [1, 2]


def test_a_legend_with_long_titles_fits_into_the_figure() -> None:
    rows = [
        row(1, length, 10.0, deployment=name, model=name)
        for length in (31, 296, 2193)
        for name in (f"mixtral-8x22b-instruct-v{n}" for n in range(4))
    ]
    figure = overview_figure(cells(rows))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1
