"""What the executor is told to expect of trials and of engine starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from helpers.deployments import EMULATED_ENTRY, EXTERNAL_ENTRY
from servegrid.analysis import tables
from servegrid.analysis.plan import Site, plan_study
from servegrid.analysis.predictor import load_calibration
from servegrid.analysis.slo import Slo
from servegrid.records.columns import CELLS
from servegrid.reference.checkpoint import find_model
from servegrid.run.walltime import Walltimes
from servegrid.study.config import parse_study
from servegrid.study.grid import Study

V100 = {key: value for key, value in EMULATED_ENTRY.items() if key != "engine_args"}
VLLM = V100 | {"engine": "vllm"}
WORKLOAD = {"concurrency": [1, 8], "input_len": [31, 579], "drift_checks": True}


def study(entry: dict[str, Any], **workload: Any) -> Study:
    keys = WORKLOAD | workload
    return parse_study({"study": "s", "workload": keys, "deployments": [entry]})


def planned(study: Study) -> dict[str, float]:
    """The upper ends of the plan, by cell."""
    facts = {each.name: find_model(each, Path("/nonexistent")) for each in study.deployments}
    plan = plan_study(study, facts, load_calibration(), Site())
    return {cell.workload.cell: cell.run_s.high for cell in plan.deployments[0].cells if cell.run_s}


def test_a_trial_takes_the_plan_s_upper_end_and_the_gap(tmp_path: Path) -> None:
    made = study(VLLM)
    times, plan = Walltimes(made, tmp_path), planned(made)
    assert len(plan) == 4
    for trial in made.all_trials:  # with the drift checks
        assert times.trial_s(trial) == math.ceil(plan[trial.workload.cell] + 3)


def test_an_engine_s_start_takes_twice_the_expected_time_and_a_minute(tmp_path: Path) -> None:
    made = study(VLLM)
    (deployment,) = made.deployments
    # 7.24e9 parameters of 2 bytes at 1 GB/s, after 60 s.
    assert Walltimes(made, tmp_path).start_s(deployment) == pytest.approx(
        2 * (60 + 7.24 * 2) + 60, abs=2
    )


def test_an_emulated_engine_starts_when_its_settings_say(tmp_path: Path) -> None:
    made = study(EMULATED_ENTRY | {"engine_args": {"startup_s": 7}})
    (deployment,) = made.deployments
    assert Walltimes(made, tmp_path).start_s(deployment) == 67


@pytest.mark.parametrize(
    "entry",
    [
        VLLM | {"gpu": "cpu", "gpu_count": 0},
        V100 | {"engine": "llamacpp"},
        VLLM | {"gpu": "b1000"},
        VLLM | {"model": "nobody-s", "checkpoint": "/nonexistent"},
        EXTERNAL_ENTRY,
    ],
    ids=["CPU", "engine", "GPU", "model", "external"],
)
def test_what_was_never_seen_has_no_times(entry: dict[str, Any], tmp_path: Path) -> None:
    made = study(entry)
    times = Walltimes(made, tmp_path)
    assert times.trial_s(made.trials[0]) is None
    assert times.start_s(made.deployments[0]) is None


def test_finished_cells_of_the_study_calibrate_the_times(tmp_path: Path) -> None:
    """A CPU that served one of its cells is no longer unknown."""
    made = study(VLLM | {"gpu": "cpu", "gpu_count": 0})
    (tmp_path / "tables").mkdir()
    row = {
        "spec_digest": made.trials[0].digest,
        "deployment": made.deployments[0].name,
        "concurrency": 1,
        "input_len": 31,
        "output_len": 100,
        "think_time_s": None,
        "seconds_per_100_tokens": 40.0,
    }
    table = pd.DataFrame([row]).reindex(columns=[column.name for column in CELLS])
    tables.write_cells(table, tmp_path / "tables/cells.parquet", tmp_path / "tables/cells.csv")
    found = Walltimes(made, tmp_path).trial_s(made.trials[0])
    assert found is not None
    assert 80 < found < 200  # the warm-up and the burst take 40 s each


def test_a_damaged_table_of_finished_cells_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "cells.parquet").write_text("damaged", encoding="utf-8")
    made = study(VLLM)
    assert Walltimes(made, tmp_path).trial_s(made.trials[0])


def test_the_forecast_adds_starts_and_trials_up_and_names_what_was_never_seen(
    tmp_path: Path,
) -> None:
    # A minute of requests each, an engine that starts in 7 s; what responses take is scaled away.
    emulated = EMULATED_ENTRY | {"engine_args": {"startup_s": 7, "time_scale": 1e-9}}
    made = study(emulated, protocol="closed_loop", duration_s=60, concurrency=[1, 8], bring_ups=2)
    ids = {trial.id for trial in made.trials}
    assert len(ids) == 8
    times = Walltimes(made, tmp_path)
    # 8 × (60 + 0.2) + 2 × 7 = 495.6 s
    assert times.forecast(ids) == (
        "Expected time: 9 min (95% interval: 9 min to 9 min), with 2 engine starts."
    )
    # 60.2 + 7 = 67.2 s
    assert times.forecast({made.trials[0].id}) == (
        "Expected time: 2 min (95% interval: 2 min to 2 min), with 1 engine start."
    )
    assert times.forecast(set()) is None


def test_the_forecast_names_cells_with_too_few_requests(tmp_path: Path) -> None:
    made = study(VLLM, protocol="closed_loop", concurrency=[1, 8], requests_per_user=8)
    text = Walltimes(made, tmp_path).forecast({trial.id for trial in made.trials})
    # One user: 8 - 2 requests; eight users: 64 - 16. Two prompt lengths each.
    assert text is not None
    assert "\nToo few requests for valid results: closed_loop-c1-i31-o100 and 1 more. " in text


def test_the_forecast_of_an_unknown_cpu_is_labelled(tmp_path: Path) -> None:
    made = study(VLLM | {"gpu": "cpu", "gpu_count": 0})
    text = Walltimes(made, tmp_path).forecast({trial.id for trial in made.trials})
    assert text is not None
    assert text.splitlines()[1] == "The prediction has no data for a CPU: it may be far off."


def test_the_forecast_of_a_search_is_the_time_of_the_cells_that_prove_its_frontier(
    tmp_path: Path,
) -> None:
    emulated = EMULATED_ENTRY | {"engine_args": {"startup_s": 7, "time_scale": 1e-9}}
    keys = {"protocol": "closed_loop", "duration_s": 60, "concurrency": [1, 8]}
    made = study(emulated, **keys, grid="frontier")
    times = Walltimes(made, tmp_path)
    text = times.forecast({trial.id for trial in made.trials})
    # The heaviest cell meets 5 tokens/s, so all lighter ones do: 60 + 0.2 + 7 = 67.2 s.
    assert len(made.trials) == 12
    assert text == (
        "Expected time: 2 min (95% interval: 2 min to 2 min), with 1 engine start. "
        "Searches will measure about 1 of 4 cells."
    )
    expected = {trial.id: times.trial_s(trial) for trial in made.trials}
    heaviest = f"{made.deployments[0].name}/closed_loop-c8-i579-o100/trial-1"
    assert expected.pop(heaviest) == 64
    assert set(expected.values()) == {3}  # the gap alone, of other cells and of further trials


def test_the_forecast_of_a_search_follows_its_slo(tmp_path: Path) -> None:
    """No engine has 100,000 tokens/s per user, so the lightest cell shows that all miss the SLO."""
    made = study(VLLM, grid="frontier")
    times = Walltimes(made, tmp_path, Slo(tokens_per_s_per_user=1e5))
    found = {trial.id for trial in made.trials if (times.trial_s(trial) or 0) > 3}
    assert found == {f"{made.deployments[0].name}/burst-c1-i31-o100/trial-1"}


def test_the_search_of_an_open_loop_is_a_staircase_up_to_the_highest_rate(tmp_path: Path) -> None:
    """No engine completes 1e6 requests/s, and each completes one an hour."""
    rates = {"protocol": "poisson", "request_rate": [1 / 3600, 1e6]}
    keys = {key: value for key, value in WORKLOAD.items() if key != "concurrency"}
    made = parse_study(
        {
            "study": "s",
            "workload": keys | rates | {"grid": "frontier", "drift_checks": False},
            "deployments": [VLLM],
        }
    )
    times = Walltimes(made, tmp_path)
    found = [trial.cell for trial in made.trials if (times.trial_s(trial) or 0) > 3]
    # The high rate misses the SLO with the shortest prompts, the low one meets it with the longest.
    # The staircase also measures the low rate with the shortest prompts on its way.
    assert found == [
        "poisson-r0.000277778-i31-o100",
        "poisson-r1e+06-i31-o100",
        "poisson-r0.000277778-i579-o100",
    ]


def test_the_forecast_counts_what_is_not_predicted(tmp_path: Path) -> None:
    made = parse_study(
        {"study": "s", "workload": WORKLOAD, "deployments": [VLLM, VLLM | {"model": "nobody-s"}]}
    )
    text = Walltimes(made, tmp_path).forecast({trial.id for trial in made.trials})
    assert text is not None
    assert text.endswith("Not predicted: 4 measurements.")
