"""Trials that cannot work get their verdict at the start of a run, and lose it when they can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from servegrid.analysis.summary import count_trials
from servegrid.analysis.tables import gather_study
from servegrid.bundle.derive import AnalysisInputs, write_figures, write_tables
from servegrid.errors import RecordError
from servegrid.records import parquet
from servegrid.reference.hardware import find_hardware_file
from servegrid.run import unmeasured
from servegrid.run.refusals import (
    CELLS,
    LIST,
    find_outdated,
    forget_refused,
    refuse_unsupported,
)
from servegrid.study.config import parse_study
from servegrid.study.grid import Study, Trial

SWEEP = {
    "protocol": "poisson",
    "request_rate": "sweep",
    "input_len": [31, 40, 60],
    "drift_checks": False,
}


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def study(max_model_len: int = 135, **changes: Any) -> Study:
    """Prompts of 31, 40 and 60 tokens with 100 output tokens each."""
    return parse_study(configuration(max_model_len, **changes))


def configuration(max_model_len: int = 135, **changes: Any) -> dict[str, Any]:
    deployment = {
        "model": "m",
        "checkpoint": "org/m",
        "quantization": "fp16",
        "engine": "emulated",
        "gpu": "v100-16gb",
        "max_model_len": max_model_len,
    }
    return {
        "study": "small",
        "workload": {"concurrency": [1], "input_len": [31, 40, 60], "drift_checks": False},
        "deployments": [deployment | changes],
    }


def of_length(study: Study, input_len: int) -> Trial:
    return next(trial for trial in study.trials if trial.workload.input_len == input_len)


def files(trial: Trial) -> list[Path]:
    return [CELLS / trial.id / f"{part}.parquet" for part in ("requests", "telemetry")]


def record(trial: Trial) -> dict[str, Any]:
    return parquet.read_record(files(trial)[0])


def times(trials: tuple[Trial, ...]) -> list[int]:
    return [file.stat().st_mtime_ns for trial in trials for file in files(trial)]


def test_only_trials_that_cannot_work_get_the_verdict() -> None:
    small = study()
    assert refuse_unsupported(small) == [of_length(small, 40).id, of_length(small, 60).id]
    assert record(of_length(small, 60))["verdict"] == "unsupported"
    assert record(of_length(small, 60))["verdict_detail"] == (
        "input_len 60 plus output_len 100 is more than max_model_len 135"
    )
    assert not files(of_length(small, 31))[0].exists()


def test_a_study_without_such_trials_gets_no_file() -> None:
    assert refuse_unsupported(study(1000)) == []
    assert list(Path().iterdir()) == []


def test_a_verdict_is_written_once() -> None:
    small = study()
    refuse_unsupported(small)
    before = times(small.unsupported)
    assert refuse_unsupported(small) == []
    assert times(small.unsupported) == before


@pytest.mark.parametrize("part", [0, 1])
def test_a_deleted_file_is_written_again(part: int) -> None:
    small = study()
    refuse_unsupported(small)
    files(of_length(small, 40))[part].unlink()
    assert refuse_unsupported(small) == [of_length(small, 40).id]
    assert all(file.exists() for file in files(of_length(small, 40)))


def test_a_changed_specification_gets_a_new_verdict() -> None:
    refuse_unsupported(study())
    changed = study(136)
    assert refuse_unsupported(changed) == [trial.id for trial in changed.unsupported]
    assert record(of_length(changed, 40))["spec_digest"] == of_length(changed, 40).digest


def test_what_can_work_now_is_measured() -> None:
    refuse_unsupported(study())
    larger = study(150)
    assert forget_refused(larger) == [of_length(larger, 40).id]
    assert not any(file.exists() for file in files(of_length(larger, 40)))
    assert all(file.exists() for file in files(of_length(larger, 60)))
    assert forget_refused(larger) == []


def test_what_can_work_now_is_found_without_a_change() -> None:
    assert find_outdated(study(150)) == []
    refuse_unsupported(study())
    before = times(study().unsupported)
    larger = study(150)
    assert find_outdated(larger) == [of_length(larger, 40).id]
    assert times(study().unsupported) == before
    write_measured(of_length(larger, 40))
    assert find_outdated(larger) == []


def write_measured(trial: Trial, name: str = "oom") -> None:
    verdict = unmeasured.Verdict(name, "it was tried")
    engine = unmeasured.planned_facts(trial.deployment)
    environment = {"allocation": "a", "started": "a"}
    unmeasured.write_unmeasured(trial, verdict, *files(trial), engine, environment)


@pytest.mark.parametrize("max_model_len", [135, 150])
def test_a_measured_record_is_never_removed(max_model_len: int) -> None:
    """Whatever the list says: of another specification, or of this one."""
    larger = study(150)
    listed = of_length(study(max_model_len), 40)
    write_measured(of_length(larger, 40))
    LIST.write_text(json.dumps({listed.id: listed.digest}), encoding="utf-8")
    assert forget_refused(larger) == [listed.id]
    assert record(of_length(larger, 40))["verdict"] == "oom"


def test_a_measurement_is_replaced_only_if_the_whole_study_is_needed() -> None:
    """Somebody has lowered max_model_len, and measures one other cell or bundles what there is."""
    measured = of_length(study(150), 40)
    write_measured(measured)
    small = study()
    assert refuse_unsupported(small, replace=False) == [of_length(small, 60).id]
    assert record(measured)["verdict"] == "oom"
    assert find_outdated(study(150)) == []
    assert refuse_unsupported(small) == [of_length(small, 40).id]
    assert record(of_length(small, 40))["spec_digest"] == of_length(small, 40).digest


def test_an_engine_s_own_verdict_is_kept() -> None:
    larger = study(150)
    listed = of_length(study(), 40)
    write_measured(of_length(larger, 40), "unsupported")
    LIST.write_text(json.dumps({listed.id: listed.digest}), encoding="utf-8")
    forget_refused(larger)
    assert record(of_length(larger, 40))["verdict_detail"] == "it was tried"


def test_what_an_older_version_measured_is_kept() -> None:
    small = study()
    write_measured(of_length(small, 40))
    assert refuse_unsupported(small) == [of_length(small, 60).id]
    assert record(of_length(small, 40))["verdict"] == "oom"


def test_the_records_of_a_bundle_are_taken_as_they_are() -> None:
    """It has no list: the list is no record."""
    small = study()
    refuse_unsupported(small)
    before = times(small.unsupported)
    LIST.unlink()
    assert refuse_unsupported(small) == []
    assert times(small.unsupported) == before
    larger = study(150)
    assert forget_refused(larger) == [of_length(larger, 40).id]


@pytest.mark.parametrize("text", ["", "[]", '{"a":', '{"a": 1}'])
def test_a_damaged_list_is_made_anew(text: str) -> None:
    small = study()
    refuse_unsupported(small)
    LIST.write_text(text)
    assert forget_refused(study(150)) == []
    assert refuse_unsupported(small) == []
    assert forget_refused(study(150)) != []


def test_a_run_that_ends_between_its_files_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older verdict must not look like the present one."""
    refuse_unsupported(study())
    changed = study(136)

    def end(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unmeasured, "refuse_trial", end)
        refuse_unsupported(changed)
    refuse_unsupported(changed)
    for trial in changed.unsupported:
        assert record(trial)["spec_digest"] == trial.digest


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(RecordError, match="results"):
        refuse_unsupported(study())


def test_a_record_that_cannot_be_removed_is_an_error() -> None:
    refuse_unsupported(study())
    requests, _ = files(of_length(study(), 40))
    requests.unlink()
    requests.mkdir()  # a folder, because root may remove any file
    with pytest.raises(RecordError, match=r"requests\.parquet: cannot be removed .*writable"):
        refuse_unsupported(study(136))


def test_the_tables_of_a_sweep_have_trials_that_were_not_tried(tmp_path: Path) -> None:
    """They have no rate: the rate at saturation was not needed, or is not known."""
    config = configuration(max_num_seqs=8, name="d") | {"workload": SWEEP}
    sweep = parse_study(config)
    assert len(sweep.unsupported) == 9 * 2  # 8 rates, and the saturation, of prompts of 40 and 60
    refuse_unsupported(sweep)
    for trial in sweep.trials:
        if not trial.unsupported:
            write_measured(trial, "oom_at_start")
    cells, drift_checks = gather_study(sweep, CELLS)
    swept = cells[cells["rate_fraction"].notna()]
    assert len(swept) == 8 * 3 and swept["request_rate"].isna().all()
    assert count_trials(cells) == (1, 1)
    inputs = AnalysisInputs(config, CELLS, find_hardware_file(), cells, drift_checks)
    write_tables(inputs, tmp_path / "tables")
    table = (tmp_path / "tables/d.md").read_text(encoding="utf-8")
    assert "oom_at_start" in table and "trials" not in table
    write_figures(inputs, tmp_path / "tables", tmp_path)
    assert (tmp_path / "plots/d.per_user.svg").exists()
    assert "oom_at_start" in (tmp_path / "report/index.html").read_text(encoding="utf-8")
