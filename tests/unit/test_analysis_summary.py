"""The summary has one row per cell, with medians over its trials."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from servegrid.analysis import summary
from servegrid.analysis.capacity import Demand, HardwarePrices, plan_capacity
from servegrid.analysis.slo import Slo
from servegrid.analysis.summary import count_trials, lacks_low_loads, summarise, tried_cells
from servegrid.analysis.tables import cast_columns
from servegrid.records import columns, parquet
from servegrid.report.capacity_report import render_capacity_report, render_capacity_reports

KEYS = {
    "deployment": "d",
    "model": "m",
    "quantization": "q",
    "gpu": "cpu",
    "gpu_count": 0,
    "engine": "vllm",
    "protocol": "closed_loop",
    "concurrency": 8,
    "input_len": 31,
    "output_len": 100,
}


def cells(*rows: dict[str, Any]) -> pd.DataFrame:
    given = pd.DataFrame(
        [KEYS | {"trial": n, "verdict": "ok", "valid": True} | row for n, row in enumerate(rows)],
        columns=[column.name for column in columns.CELLS],
    )
    return cast_columns(given, columns.CELLS)


def test_figures_are_medians_of_the_valid_trials_with_intervals() -> None:
    table = summarise(
        cells(
            {"output_tokens_per_s": 10.0, "ttft_s_p50": 0.2},
            {"output_tokens_per_s": 1000.0, "ttft_s_p50": 0.3, "valid": False},
            {"output_tokens_per_s": 12.1},
            {"verdict": "timeout", "valid": None},
        )
    )
    (row,) = table.to_dict("records")
    assert (row["trials"], row["trials_served"], row["trials_valid"]) == (4, 3, 2)
    assert row["output_tokens_per_s"] == pytest.approx(11.05)
    # Geometric mean 11; s of the logarithms is ln(1.21) / sqrt(2), and t is 12.7062047.
    assert row["output_tokens_per_s_low"] == pytest.approx(11 / 1.1**12.7062047, rel=1e-6)
    assert row["output_tokens_per_s_high"] == pytest.approx(11 * 1.1**12.7062047, rel=1e-6)
    assert row["ttft_s_p50"] == 0.2
    assert pd.isna(row["ttft_s_p50_low"])
    assert pd.isna(row["e2el_s_p50"])


def test_the_interval_of_a_share_ends_at_1() -> None:
    shares = ({"slo_attainment": 0.9}, {"slo_attainment": 1.0})
    (row,) = summarise(cells(*shares)).to_dict("records")
    # Geometric mean sqrt(0.9); s of the logarithms is ln(1 / 0.9) / sqrt(2), and t is 12.7062047.
    assert row["slo_attainment_low"] == pytest.approx(0.9 ** (0.5 + 12.7062047 / 2), rel=1e-6)
    assert row["slo_attainment_high"] == 1.0


def test_without_a_valid_trial_the_figures_come_from_the_served_ones() -> None:
    (row,) = summarise(cells({"output_tokens_per_s": 5.0, "valid": False})).to_dict("records")
    assert (row["trials_served"], row["trials_valid"]) == (1, 0)
    assert row["output_tokens_per_s"] == 5.0


def test_rows_are_in_study_order_also_for_request_rates() -> None:
    table = summarise(
        cells(
            {"concurrency": 8},
            {"concurrency": 2},
            {"concurrency": None, "request_rate": 1.5, "protocol": "poisson"},
            {"concurrency": 8},
        )
    )
    assert table["concurrency"].tolist()[:2] == [8, 2]
    assert pd.isna(table["concurrency"][2])
    assert table["request_rate"][2] == 1.5
    assert table["trials"].tolist() == [2, 1, 1]


def test_the_summary_is_written_with_units(tmp_path: Path) -> None:
    table = summarise(cells({"output_tokens_per_s": 5.0}))
    summary.write_summary(table, tmp_path / "s.parquet", tmp_path / "s.csv")
    schema = pq.read_schema(tmp_path / "s.parquet")
    assert schema.equals(parquet.arrow_schema(columns.SUMMARY), check_metadata=True)
    header = (tmp_path / "s.csv").read_text().split("\n")[0]
    assert header == ",".join(column.name for column in columns.SUMMARY)


def searched(*loads: tuple[int, int, float | None]) -> pd.DataFrame:
    """A summary of cells: prompt length, concurrency and seconds per 100 tokens (None: not run)."""
    return summarise(
        cells(
            *(
                {"input_len": length, "concurrency": concurrency}
                | (
                    {"verdict": "not_run", "valid": None}
                    if seconds is None
                    else {"seconds_per_100_tokens": seconds}
                )
                for length, concurrency, seconds in loads
            )
        )
    )


def test_trials_that_were_not_run_do_not_count() -> None:
    rows = cells({"output_tokens_per_s": 5.0}, {"verdict": "not_run", "valid": None})
    (row,) = summarise(rows).to_dict("records")
    assert (row["trials"], row["trials_served"], row["trials_valid"]) == (1, 1, 1)
    assert count_trials(rows) == (1, 1)


@pytest.mark.parametrize(
    ("loads", "kept"),
    [
        # Everything was run: nothing is left out, whatever it shows.
        ([(31, 8, 30.0), (31, 16, 40.0)], [(31, 8), (31, 16)]),
        # 31 is bounded by a load that meets 5 tokens/s; 119 has only one that misses it.
        ([(31, 8, 19.0), (31, 16, None), (119, 8, None), (119, 16, 30.0)], [(31, 8)]),
        # The lowest load misses it: then none meets it, which is known.
        ([(31, 8, 19.0), (31, 16, None), (119, 8, 21.0), (119, 16, None)], [(31, 8), (119, 8)]),
        # Nothing meets it: all stay, so that there is a reason.
        ([(31, 8, None), (31, 16, 40.0)], [(31, 16)]),
    ],
)
def test_prompt_lengths_that_a_search_decided_by_others_are_left_out(
    loads: list[tuple[int, int, float | None]], kept: list[tuple[int, int]]
) -> None:
    left = tried_cells(searched(*loads), Slo())
    assert list(left[["input_len", "concurrency"]].itertuples(index=False, name=None)) == kept


@pytest.mark.parametrize(
    ("loads", "lacks"),
    [
        ([(31, 8, None), (31, 16, 19.0), (119, 8, 19.0)], True),
        # A load above, as pruning leaves out; a gap between; a length without any measured load.
        ([(31, 8, 19.0), (31, 16, None)], False),
        ([(31, 4, 10.0), (31, 8, None), (31, 16, 19.0)], False),
        ([(31, 8, 19.0), (119, 8, None)], False),
    ],
)
def test_loads_that_a_search_left_out_below_measured_ones_are_noted(
    loads: list[tuple[int, int, float | None]], lacks: bool
) -> None:
    summary = searched(*loads)
    sparse = lacks_low_loads(summary)
    assert sparse == (["d"] if lacks else [])
    demand, prices = Demand(), HardwarePrices("USD", {})
    plan = plan_capacity(summary, demand, prices)
    for text in (
        render_capacity_report(plan, demand, prices, sparse),
        render_capacity_reports([plan], [demand], prices, sparse),
    ):
        assert ("can show more users and a lower price. This concerns d." in text) == lacks
