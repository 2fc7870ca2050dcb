"""Validates the predictions of `servegrid plan` on the published tables: `make bench`.

`--write` fits the calibration of the package again, which a change of the tables or of the model
needs.
"""

from __future__ import annotations

import argparse
import time

from servegrid.analysis import validation
from servegrid.analysis.feasibility import GIB
from servegrid.analysis.prediction import Table
from servegrid.analysis.predictor import CALIBRATION, UNSEEN, Calibration
from servegrid.analysis.published_tables import MAX_MODEL_LEN, published_tables

BARS = {
    "deployment": {0: (15, 60), 2: (6, 18), 4: (5, 13), 8: (3, 9)},
    "kind of GPU": {4: (5, 15)},
}
"""Median and 90th percentile of |log ratio| in %, by what is left out and the measured cells."""
COVERAGE = (0.90, 0.98)
"""What the 95% intervals must cover."""


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
        errors = validation.leave_out(tables, folds, level)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the package's calibration")
    options = parser.parse_args()
    tables = published_tables()
    if options.write:
        calibration = Calibration(*validation.fit_all(tables))
        CALIBRATION.write_text(calibration.to_json(), encoding="utf-8")
        return
    started = time.monotonic()
    print_memory(tables)
    print_errors(tables)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
