"""Draws docs/images/architecture.svg: which subpackage does what, and where data flow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

OUT = Path(__file__).parent / "images" / "architecture.svg"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


@dataclass(frozen=True)
class Box:
    """A subpackage with what it does; `x` and `y` are its centre, `color` its border."""

    title: str
    text: str
    x: float
    y: float
    color: str = BLUE
    width: float = 1.9

    def draw(self, axes: Axes) -> None:
        corner = (self.x - self.width / 2, self.y - 0.36)
        axes.add_patch(
            FancyBboxPatch(
                corner,
                self.width,
                0.72,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor="white",
                edgecolor=self.color,
                linewidth=1.6,
            )
        )
        axes.text(self.x, self.y + 0.14, self.title, ha="center", va="center", weight="bold")
        axes.text(self.x, self.y - 0.15, self.text, ha="center", va="center", size=8.5, color=GREY)


BOXES = {
    box.title: box
    for box in (
        Box("config/", "the study: what to measure", 1.1, 5.6, GREY, 2.1),
        Box("profiles/", "the site: where it runs", 1.1, 4.5, GREY, 2.1),
        Box("study", "checks and expands\nto cells and trials", 3.7, 5.6),
        Box("Snakemake", "workflow/rules", 6.3, 5.6, GREY),
        Box("plugin/", "submitit executor:\nmany jobs, one allocation", 6.3, 4.5, ORANGE, 2.2),
        Box("run", "one engine, then\nits trials in order", 3.7, 3.0, GREEN),
        Box("engines", "vLLM, llama.cpp,\nexternal, emulated", 1.3, 1.75, GREEN),
        Box("client", "sends the workload,\nstamps every chunk", 6.1, 1.75, GREEN),
        Box("telemetry", "GPUs, processes,\nserver metrics", 3.7, 1.75, GREEN),
        Box("mock_server", "calibrates the client", 1.3, 3.0, GREEN),
        Box("records", "Parquet: requests\nand telemetry", 8.9, 3.0),
        Box("analysis", "metrics, validity,\nstatistics, capacity", 11.3, 3.0),
        Box("report", "tables, figures,\nHTML page", 11.3, 4.25),
        Box("bundle", "pack, verify,\nunpack", 11.3, 5.5),
        Box("exchange", "vllm bench, guidellm,\nllm-d", 11.3, 1.75),
        Box("doctor", "checks a site before\nthe first run", 3.7, 4.5),
    )
}
ARROWS = (
    ("config/", "study"),
    ("study", "Snakemake"),
    ("Snakemake", "plugin/"),
    ("profiles/", "doctor"),
    ("plugin/", "run"),
    ("run", "engines"),
    ("run", "client"),
    ("mock_server", "run"),
    ("run", "telemetry"),
    ("run", "records"),
    ("records", "analysis"),
    ("analysis", "report"),
    ("report", "bundle"),
    ("exchange", "analysis"),
)


def draw() -> Figure:
    """The picture, in inches: subpackages as boxes, data flow as arrows."""
    figure = Figure(figsize=(12.4, 6.1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.1, 12.4)
    axes.set_ylim(0.95, 6.25)
    axes.set_axis_off()
    axes.add_patch(
        Rectangle((0.15, 1.2), 7.1, 2.5, facecolor="#F2F7F4", edgecolor=GREEN, linestyle="--")
    )
    axes.text(0.25, 3.55, "one allocation: a Slurm or local job", color=GREEN, size=9, va="center")
    for start, end in ARROWS:
        one, two = BOXES[start], BOXES[end]
        axes.annotate(
            "",
            xy=_edge(two, one),
            xytext=_edge(one, two),
            arrowprops={"arrowstyle": "-|>", "color": GREY, "linewidth": 1.2},
        )
    for box in BOXES.values():
        box.draw(axes)
    return figure


def _edge(box: Box, towards: Box) -> tuple[float, float]:
    """Where a line from the centre of `box` to that of `towards` leaves the box."""
    dx, dy = towards.x - box.x, towards.y - box.y
    scale = min(
        (box.width / 2 + 0.04) / abs(dx) if dx else float("inf"),
        0.40 / abs(dy) if dy else float("inf"),
    )
    return box.x + dx * scale, box.y + dy * scale


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "servegrid", "svg.fonttype": "none", "font.size": 10})
    draw().savefig(OUT, metadata={"Date": None})
