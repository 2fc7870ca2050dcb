"""A search in an allocation: which trials are measured, and what is recorded of the others."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from servegrid.analysis.findings import compute_frontier
from servegrid.analysis.search import (
    NOT_NEEDED,
    FrontierEntry,
    Search,
    check_left_out,
    load_measured,
)
from servegrid.analysis.slo import DEFAULT_SLO, Slo
from servegrid.analysis.summary import summarise
from servegrid.analysis.tables import gather_study
from servegrid.errors import RecordError
from servegrid.exchange.trials import read_trials
from servegrid.records import columns, parquet
from servegrid.reference import data
from servegrid.run import search as run_search
from servegrid.run.search import Chooser, complete_file, measure_if_needed
from servegrid.run.search_plan import (
    SearchPlan,
    find_outdated,
    forget_left_out,
    left_out_file,
    plan_file,
    search_plans,
    write_plans,
)
from servegrid.run.service import INFO_VARIABLE
from servegrid.study.config import parse_study
from servegrid.study.grid import Study, Trial

FEW = {"trials": 1, "concurrency": [16, 32, 64, 128], "input_len": [31, 296, 2193]}
"""A part of the grid, for tests of what is kept: records take most of the time."""
REHEARSAL = Path(__file__).parents[2] / "config" / "rehearsal.yaml"
CELLS = Path("results/cells")
ENGINE = {"engine": "emulated", "version": None, "time_scale": 1.0}
ENVIRONMENT = {"allocation": "a", "started": "now"}


def rehearsal(position: int, **workload: Any) -> Study:
    """One deployment of the rehearsal, with the article's timing."""
    config = yaml.safe_load(REHEARSAL.read_text(encoding="utf-8"))
    entry = config["deployments"][position]
    entry["engine_args"] = entry["engine_args"] | {"time_scale": 1.0}
    config["workload"] |= {"grid": "frontier"} | workload
    return parse_study(config | {"deployments": [entry]})


def published_seconds(trial: Trial) -> float | None:
    """The article's seconds per 100 tokens; None for a dash."""
    table, workload, deployment = (
        data.published_cells("inria-2024"),
        trial.workload,
        trial.deployment,
    )
    keys = {
        "model": deployment.model,
        "quantization": deployment.quantization,
        "gpu": deployment.gpu,
        "gpu_count": deployment.gpu_count,
        "concurrency": workload.concurrency,
        "input_len": workload.input_len,
    }
    for key, value in keys.items():
        table = table[table[key] == value]
    (seconds,) = table["seconds_per_100_tokens"]
    return None if math.isnan(seconds) else float(seconds)


def write_measured(trial: Trial, seconds: float | None) -> str:
    """The records of a burst that took so long, or was not served."""
    verdict = "timeout" if seconds is None else "ok"
    end = round((seconds or 600.0) * 1e9)
    record = {
        "format": parquet.RECORD_FORMAT,
        "spec": trial.spec,
        "spec_digest": trial.digest,
        "verdict": verdict,
        "verdict_detail": "too slow" if seconds is None else None,
        "engine": ENGINE,
        "client": {"window_ns": [0, end], "cpu_s_busiest": 0.1, "token_chunks": 2},
        "environment": ENVIRONMENT,
        "calibration": None,
        "metrics_before": None,
        "metrics_after": None,
    }
    request = {
        "wave": 0,
        "scheduled_ns": 0,
        "sent_ns": 0,
        "first_token_ns": end // 100,
        "token_ns": [end // 100, end],
        "chunk_tokens": [1, 99],
        "done_ns": end,
        "prompt_tokens": trial.workload.input_len,
        "completion_tokens": 100,
        "requested_tokens": 100,
        "error": "timeout: too slow" if seconds is None else None,
    }
    n = trial.workload.concurrency or 1
    folder = CELLS / trial.id
    parquet.write_table(
        parquet.arrow_table(columns.TELEMETRY, [], record), folder / "telemetry.parquet"
    )
    parquet.write_table(
        parquet.arrow_table(columns.REQUESTS, [request] * n, record), folder / "requests.parquet"
    )
    return verdict


class Allocation:
    """Runs the jobs of a study one after another, as the executor does, without an engine."""

    def __init__(self, measure: Callable[[Trial], float | None]) -> None:
        self.measure = measure
        self.measured: list[str] = []

    def run(self, study: Study, slo: Slo = DEFAULT_SLO) -> None:
        write_plans(study, slo)
        (name,) = study.searched
        info = Path("info") / "allocation.json"
        info.parent.mkdir(exist_ok=True)
        complete_file(info).unlink(missing_ok=True)
        choose = Chooser(SearchPlan.read(plan_file(name)), 1, {}, complete_file(info))
        waiting = {
            study.position(trial): trial
            for trial in study.trials
            if not (CELLS / trial.id / "requests.parquet").exists()
        }
        while waiting:
            order = choose(sorted(waiting))
            trial = waiting.pop(min(waiting) if order is None else order)
            files = (CELLS / trial.id / f"{name}.parquet" for name in ("requests", "telemetry"))
            measure_if_needed(plan_file(name), trial, *files, last_attempt=False)

    def measure_trial(self, trial: Trial, *_: Any) -> str:
        self.measured.append(trial.id)
        return write_measured(trial, self.measure(trial))


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Allocation:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(INFO_VARIABLE, "info/allocation.json")
    allocation = Allocation(published_seconds)
    monkeypatch.setattr(run_search, "measure_trial", allocation.measure_trial)

    class Info:
        engine, environment, calibration = ENGINE, ENVIRONMENT, None

    monkeypatch.setattr(run_search.AllocationInfo, "read", Info)
    return allocation


def gather(study: Study, slo: Slo = DEFAULT_SLO) -> pd.DataFrame:
    cells, _ = gather_study(study, CELLS, slo)
    check_left_out(study, cells, slo, CELLS)
    return cells


def found(study: Study, slo: Slo = DEFAULT_SLO) -> list[FrontierEntry]:
    return Search(study.trials, slo, load_measured(study.trials, CELLS, slo)).frontier()


def published_frontier(study: Study, rate: float = 5.0) -> dict[int, float]:
    best: dict[int, float] = {}
    for trial in study.trials:
        seconds = published_seconds(trial)
        if seconds is not None and 100 / seconds >= rate:
            length = trial.workload.input_len
            best[length] = max(best.get(length, 0), trial.workload.intensity)
    return best


@pytest.mark.parametrize("position", [0, 4, 6])
def test_the_search_finds_the_articles_frontier_in_few_cells(
    allocation: Allocation, position: int
) -> None:
    study = rehearsal(position, trials=1)
    allocation.run(study)
    cells = {trial.rpartition("/")[0] for trial in allocation.measured}
    assert len(cells) <= 10
    entries = found(study)
    assert {each.input_len: each.largest for each in entries} == published_frontier(study)
    assert all(each.is_complete for each in entries)
    table = gather(study)
    assert (table["verdict"] == "not_run").sum() == 56 - len(cells)
    skipped = table[table["verdict"] == "not_run"]
    assert (skipped["verdict_detail"] == NOT_NEEDED).all() and skipped["valid"].isna().all()
    assert (skipped["requests"] == 0).all() and skipped["seconds_per_100_tokens"].isna().all()
    assert {trial.id for trial, _, _ in read_trials(CELLS)} == set(allocation.measured)
    # Tables: nothing that was not run counts as a failure.
    frontier = compute_frontier(summarise(table), Slo())
    assert frontier["reason"].isna().all() and set(frontier["input_len"]) <= {
        each.input_len for each in entries
    }
    assert not frontier.empty
    for row in frontier.to_dict("records"):
        entry = next(each for each in entries if each.input_len == row["input_len"])
        assert (entry.largest or 0) <= row["max_within_slo"] < (entry.smallest_missing or math.inf)


def test_cells_near_the_limit_get_further_trials(allocation: Allocation) -> None:
    """mixtral-8x22b has 5.15 tokens/s at 8 × 822 tokens, 3% above the limit."""
    study = rehearsal(5, concurrency=[8, 16], input_len=[119, 822])
    allocation.run(study)
    near = [trial for trial in allocation.measured if "burst-c8-i822-o100" in trial]
    far = [trial for trial in allocation.measured if "burst-c16-i119-o100" in trial]
    assert [trial[-1] for trial in near] == ["1", "2"] and len(far) <= 1
    assert not any(each.is_open for each in found(study))


def test_a_full_grid_keeps_what_a_search_measured_and_measures_the_rest(
    allocation: Allocation,
) -> None:
    study, full = rehearsal(0, **FEW), rehearsal(0, **FEW, grid="full", drift_checks=False)
    allocation.run(study)
    kept = set(allocation.measured)
    with pytest.raises(RecordError, match=r"another search left out \d trials") as error:
        gather(full)
    assert "rm -r results/cells/" in str(error.value)
    assert find_outdated(study, Slo()) == forget_left_out(study, Slo()) == []
    outdated = find_outdated(full, Slo())
    assert all((CELLS / trial / "requests.parquet").exists() for trial in outdated)
    forgotten = forget_left_out(full, Slo())
    assert outdated == forgotten and find_outdated(full, Slo()) == []
    assert len(forgotten) == 12 - len(kept) and not kept & set(forgotten)
    left = {trial.id for trial in full.trials if (CELLS / trial.id / "requests.parquet").exists()}
    assert left == kept
    assert [file.read_text() for file in Path("results/search").glob("*.jsonl")] == [""]


def test_another_slo_reuses_what_was_measured(allocation: Allocation) -> None:
    study, stricter = rehearsal(0, **FEW), Slo(tokens_per_s_per_user=10.0)
    allocation.run(study)
    kept = set(allocation.measured)
    with pytest.raises(RecordError, match="another search left out"):
        gather(study, stricter)
    assert forget_left_out(study, stricter)
    allocation.measured.clear()
    allocation.run(study, stricter)
    assert not kept & set(allocation.measured)
    entries = found(study, stricter)
    assert {each.input_len: each.largest for each in entries} == published_frontier(study, 10.0)
    gather(study, stricter)


def test_a_search_resumes_from_the_records(allocation: Allocation) -> None:
    study = rehearsal(0, **FEW)
    allocation.run(study)
    everything = list(allocation.measured)
    for trial in study.trials:
        if trial.id not in everything[:2]:
            for file in (CELLS / trial.id).iterdir():
                file.unlink()
    allocation.measured.clear()
    allocation.run(study)
    assert allocation.measured == everything[2:]


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    study = rehearsal(0)
    (plan,) = search_plans(study, Slo(ttft_s=2.0)).values()
    plan.write(tmp_path / "plan.json")
    again = SearchPlan.read(tmp_path / "plan.json")
    assert again == plan and again.digest == plan.digest
    assert asdict(again.slo)["ttft_s"] == 2.0
    assert plan.digest != search_plans(study, Slo())[study.trials[0].deployment.name].digest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"digest": 1'])
def test_a_damaged_plan_is_an_error_with_a_remedy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"plan\.json: .*Run the same command again"):
        SearchPlan.read(path)


def test_a_list_that_was_cut_off_is_read_as_far_as_it_goes(allocation: Allocation) -> None:
    study, full = rehearsal(0, **FEW), rehearsal(0, **FEW, grid="full", drift_checks=False)
    allocation.run(study)
    file = left_out_file(study.deployments[0].name, 1)
    lines = file.read_text().splitlines()
    file.write_bytes("\n".join(lines[:3]).encode() + b'\n{"trial": "x\xff')
    assert len(forget_left_out(full, Slo())) == 3


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_a_list_removes_no_record_of_another_study(allocation: Allocation, kind: str) -> None:
    study, full = rehearsal(0, **FEW), rehearsal(0, **FEW, grid="full", drift_checks=False)
    allocation.run(study)
    file = left_out_file(study.deployments[0].name, 1)
    line = file.read_text().splitlines()[0]
    trial = json.loads(line)["trial"]
    other = shutil.copytree(CELLS / trial, Path("other"))
    path = "../../other" if kind == "relative" else str(other.absolute())
    file.write_text(line + "\n" + line.replace(trial, path) + "\n")
    assert forget_left_out(full, Slo()) == [trial]
    assert sorted(each.name for each in other.iterdir()) == [
        "requests.parquet",
        "telemetry.parquet",
    ]


def test_a_list_that_cannot_be_read_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = left_out_file("d", 1)
    file.mkdir(parents=True)
    with pytest.raises(RecordError, match=rf"^{file}: the list of a search cannot be read \(Is a"):
        find_outdated(rehearsal(0, **FEW), Slo())
