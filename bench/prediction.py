"""Validates the predictions of `servegrid plan` on the published tables: `make bench`.

`--write` fits the calibration of the package again, which a change of the tables or of the model
needs, and writes the table of searches in docs/prediction.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from servegrid.analysis import validation
from servegrid.analysis.feasibility import GIB
from servegrid.analysis.prediction import Table
from servegrid.analysis.predictor import CALIBRATION, UNSEEN, Calibration
from servegrid.analysis.published_tables import (
    MAX_MODEL_LEN,
    published_bursts,
    published_tables,
)
from servegrid.analysis.validation import FRONTIER_RATE, Searched, search_published

BARS = {
    "deployment": {0: (15, 60), 2: (6, 18), 4: (5, 13), 8: (3, 9)},
    "kind of GPU": {4: (5, 15)},
}
"""Median and 90th percentile of |log ratio| in %, by what is left out and the measured cells."""
COVERAGE = (0.90, 0.98)
"""What the 95% intervals must cover."""
OTHER_RATES = (2.5, 10.0, 20.0)
"""Further SLOs of the searches, in tokens/s per user. None was used to choose the method."""
DOCUMENT = Path(__file__).parent.parent / "docs" / "prediction.md"
START, END = "<!-- generated: searches -->\n", "<!-- end -->"


def print_memory(tables: list[Table]) -> None:
    print("Weights and KV cache, at 90% of the GPUs' memory:")
    for table in tables:
        placement = table.traits.placement
        length = MAX_MODEL_LEN
        print(
            f"  {table.name:<38}{placement.weights / GIB:6.1f} GiB per GPU"
            f"{placement.shape.kv_bytes_per_token / 1024:7.0f} KiB per token"
            f"{placement.capacity_tokens(length):10,.0f} tokens"
        )


def print_errors(tables: list[Table]) -> None:
    for what, folds, level in (
        ("deployment", validation.folds_by_deployment(tables), 0.0),
        ("kind of GPU", validation.folds_by_architecture(tables), UNSEEN["architecture"]),
    ):
        calibrations = validation.fit_without(tables, folds)
        errors = validation.leave_out(tables, folds, calibrations, level)
        print(f"\nOne {what} left out. |log ratio| of the cells that were not measured, in %,")
        print("median / p90, and coverage of the 95% intervals, by the number of measured cells:")
        print(f"  {'':<38}" + "".join(f"{count:>14}" for count in validation.MEASURED))
        for table in tables:
            parts = [each for each in errors if each.deployment == table.name]
            texts = ["{:.1f} / {:.1f}".format(*each.percentiles) for each in parts]
            print(f"  {table.name:<38}" + "".join(f"{text:>14}" for text in texts))
        pooled = {
            count: validation.pool(each for each in errors if each.measured == count)
            for count in validation.MEASURED
        }
        rows = {
            "all": [f"{median:.1f} / {high:.1f}" for median, high, _ in pooled.values()],
            "coverage": [f"{covered:.1%}" for _, _, covered in pooled.values()],
            "wanted": [
                "{} / {}".format(*BARS[what][count]) if count in BARS[what] else ""
                for count in pooled
            ],
        }
        for name, texts in rows.items():
            print(f"  {name:<38}" + "".join(f"{text:>14}" for text in texts))


def render_searches(tables: list[Table]) -> str:
    """The table of searches in Markdown: cells per deployment, with and without predictions.

    Raises ValueError if a search did not find the exact frontier.
    """
    folds = validation.folds_by_deployment(tables)
    calibrations = validation.fit_without(tables, folds)

    def run(predicted: bool, rate: float) -> list[Searched]:
        searched = [
            search_published(table, bursts, calibration if predicted else None, rate)
            for table, bursts, calibration in zip(
                tables, published_bursts(), calibrations, strict=True
            )
        ]
        if wrong := [each.deployment for each in searched if not each.exact]:
            raise ValueError(f"not the exact frontier: {', '.join(wrong)}")
        return searched

    columns = [run(predicted, FRONTIER_RATE) for predicted in (True, False)]
    lines = ["| deployment | cells | cells without predictions |", "|---|---|---|"]
    lines += [
        f"| {first.deployment} | {first.cells} | {second.cells} |"
        for first, second in zip(*columns, strict=True)
    ]
    for rate in (FRONTIER_RATE, *OTHER_RATES):
        means = [
            f"{statistics.mean(each.cells for each in run(predicted, rate)):.1f}"
            for predicted in (True, False)
        ]
        name = f"mean, {rate:g} tokens/s per user"
        name = f"**{name}**" if rate == FRONTIER_RATE else name
        lines.append(f"| {name} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def write_searches(text: str) -> None:
    """Put the table of searches between its marks. Raises ValueError if a mark is missing."""
    before, start, rest = DOCUMENT.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{DOCUMENT}: the mark {START.strip()} is missing")
    DOCUMENT.write_text(f"{before}{start}{text}{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the package's calibration and the searches in docs/prediction.md",
    )
    options = parser.parse_args()
    tables = published_tables()
    if options.write:
        calibration = Calibration(*validation.fit_all(tables))
        CALIBRATION.write_text(calibration.to_json(), encoding="utf-8")
        write_searches(render_searches(tables))
        return
    started = time.monotonic()
    print_memory(tables)
    print_errors(tables)
    print(f"\nSearches for {FRONTIER_RATE:g} tokens/s per user, cells of 56:")
    print(render_searches(tables), end="")
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
