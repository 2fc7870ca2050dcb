"""The plan and its outcome on the page, calculated by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from helpers.deployments import EMULATED_ENTRY
from servegrid.analysis.capacity import Demand, HardwarePrices
from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import cast_columns
from servegrid.records import columns
from servegrid.report.page.payload import build_payload
from servegrid.report.page.sections import plan_section, validity_section
from servegrid.report.write import outcomes_of
from servegrid.study.config import parse_study

VLLM = {key: value for key, value in EMULATED_ENTRY.items() if key != "engine_args"}
VLLM |= {"engine": "vllm", "name": "d"}
# 128 × (2193 + 100) tokens of 128 KiB are 36 GiB; two V100 have 2 × 14.4 - 13.5 - 2.8 = 12.5 GiB.
GRID = {"concurrency": [1, 128], "input_len": 2193, "trials": 2, "drift_checks": False}


def row(concurrency: int, trial: int, **other: Any) -> dict[str, Any]:
    return {
        "deployment": "d",
        "model": "mistral-7b",
        "quantization": "fp16",
        "engine": "vllm",
        "gpu": "v100-16gb",
        "gpu_count": 2,
        "protocol": "burst",
        "concurrency": concurrency,
        "input_len": 2193,
        "output_len": 100,
        "trial": trial,
        "requests": concurrency,
        "verdict": "ok",
        "valid": True,
        "seconds_per_100_tokens": 3.0,
        **other,
    }


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=[column.name for column in columns.CELLS])
    return cast_columns(frame, columns.CELLS)


def test_the_heat_map_has_the_medians_of_efficiency_over_trials() -> None:
    cells = table(
        row(1, 1, measured_over_bound=2.0, predicted_over_measured=0.5),
        row(1, 2, measured_over_bound=3.0, predicted_over_measured=0.25),
        row(128, 1),
    )
    pairs = pd.DataFrame(columns=[column.name for column in columns.PUBLISHED_COMPARISON])
    prices = HardwarePrices("USD", {})
    payload = build_payload("s", summarise(cells), cells, pairs, Demand(), prices)
    one, many = payload["cells"]
    assert one["measured_over_bound"] == [2.5]
    assert one["measured_over_predicted"] == [3.0]  # of 2 and 4
    assert "measured_over_bound" not in many
    labels = {metric["column"]: metric["label"] for metric in payload["metrics"]}
    assert labels["measured_over_bound"] == "Seconds per 100 tokens, measured / lower bound"
    none = build_payload("s", summarise(cells[2:]), cells[2:], pairs, Demand(), prices)
    assert not {"measured_over_bound"} & {metric["column"] for metric in none["metrics"]}


def test_efficiency_is_of_the_trials_whose_time_the_page_shows() -> None:
    """The valid ones; with several bring-ups, the median of their medians."""
    cells = table(
        row(1, 1, measured_over_bound=2.0, seconds_per_100_tokens=2.0, allocation="a"),
        *(
            row(1, trial, measured_over_bound=took, seconds_per_100_tokens=took, allocation="b")
            | {"bring_up": 2, "valid": trial < 3}
            for trial, took in ((1, 3.0), (2, 4.0), (3, 9.0))
        ),
        row(128, 1, measured_over_bound=8.0, valid=False),
    )
    pairs = pd.DataFrame(columns=[column.name for column in columns.PUBLISHED_COMPARISON])
    prices = HardwarePrices("USD", {})
    one, many = build_payload("s", summarise(cells), cells, pairs, Demand(), prices)["cells"]
    # Of 2, and of 3.5: the median of 3 and 4.
    assert one["seconds_per_100_tokens"][0] == 2.75
    assert one["measured_over_bound"] == [2.75]
    assert many["measured_over_bound"] == [8.0]


def outcome(entry: dict[str, Any], *rows: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The row of the only deployment, and the surprises."""
    study = parse_study({"study": "s", "workload": GRID, "deployments": [entry]})
    section = plan_section(outcomes_of(study, table(*rows)), {"d": "Mistral"})
    [found] = section.tables[0].rows
    return list(found), list(section.points)


def test_a_deployment_s_outlook_and_outcome_are_a_row() -> None:
    found, surprises = outcome(VLLM, row(1, 1), row(128, 1, waiting_max=0))
    assert found[:4] == ["Mistral", "1", "1", "0"]
    assert found[6].endswith(" of 2")
    assert float(found[7]) > 1
    assert surprises == ["Mistral: burst-c128-i2193-o100: should queue, but no request waited."]


def test_a_surprise_ends_with_one_full_stop() -> None:
    failed = {"verdict": "http_error", "verdict_detail": "503 Too much.", "valid": None}
    _, surprises = outcome(VLLM, row(1, 1, **failed, seconds_per_100_tokens=None))
    assert surprises == ["Mistral: burst-c1-i2193-o100: not served, http_error: 503 Too much."]


@pytest.mark.parametrize(
    ("change", "outlooks"),
    [({"gpu": "cpu", "gpu_count": 0}, ["2", "0", "0"]), ({"model": "nobody-s"}, ["–"] * 3)],
)
def test_what_the_tables_do_not_know_is_a_dash(change: dict[str, Any], outlooks: list[str]) -> None:
    found, _ = outcome(VLLM | change, row(1, 1, **change))
    assert found[1:] == [*outlooks, "–", "–", "–", "–"]


def test_each_reason_for_not_run_is_listed_and_evidence_ends_after_a_word() -> None:
    long = "128 of 128 requests failed: " + "words " * 40
    found = (
        *(row(8, trial, verdict="http_error", verdict_detail=long, valid=None) for trial in (1, 2)),
        row(1, 1, verdict="not_run", verdict_detail="dominated by burst-c1: oom", valid=None),
        row(2, 1, verdict="not_run", verdict_detail="not needed by the search", valid=None),
        row(4, 1, verdict="not_run", verdict_detail="not needed by the search", valid=None),
    )
    (shown,) = validity_section(table(*found)).tables
    assert [list(each)[1:3] for each in shown.rows] == [
        ["http_error", "2"],
        ["not_run", "1"],
        ["not_run", "2"],
    ]
    evidence = [each[3] for each in shown.rows]
    assert evidence[0].endswith("words words …") and len(evidence[0]) < 190
    assert evidence[1:] == ["dominated by burst-c1: oom", "not needed by the search"]
    assert 3 in shown.text_columns and 2 not in shown.text_columns


def test_without_finished_cells_there_is_no_outcome() -> None:
    study = parse_study({"study": "s", "workload": GRID, "deployments": [VLLM]})
    assert outcomes_of(study, table()) == []
