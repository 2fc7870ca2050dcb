"""The last lines of a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from snakemake_interface_logger_plugins.common import LogEvent

from helpers.log_records import cell_info, job_error, job_finished, job_info, log_record, run_info
from servegrid.analysis.validity import RULES
from servegrid.records import columns
from servegrid.records.verdict import OK, VERDICTS
from snakemake_logger_plugin_servegrid import forecast
from snakemake_logger_plugin_servegrid.outcome import (
    REMEDIES,
    describe_validity,
    dry_run_lines,
    outcome_lines,
)
from snakemake_logger_plugin_servegrid.progress import RunProgress


def cell(
    verdict: str = OK, valid: bool | None = True, rules: list[str] | None = None, trial: int = 1
) -> dict[str, Any]:
    return {
        "trial": trial,
        "bring_up": 1,
        "verdict": verdict,
        "valid": valid,
        "invalid_rules": rules,
    }


def test_every_verdict_and_every_rule_of_validity_has_a_remedy() -> None:
    assert set(REMEDIES) == (set(VERDICTS) - {OK}) | set(RULES)


def test_valid_cells_take_one_line() -> None:
    assert describe_validity([cell(rules=[])] * 24, "cells.csv") == ["Valid cells: 24 of 24."]
    assert describe_validity([], "cells.csv") == []


def test_cells_that_are_not_valid_are_counted_by_cause_with_a_remedy() -> None:
    cells = [
        cell(rules=[]),
        cell("timeout", None),
        cell(valid=False, rules=["drifted", "client_busy"]),
        cell(valid=False, rules=["drifted"]),
    ]
    assert describe_validity(cells, "cells.csv") == [
        "Valid cells: 1 of 4. Not served, or not valid:",
        f"  2 drifted: {REMEDIES['drifted']}.",
        f"  1 timeout: {REMEDIES['timeout']}.",
        f"  1 client_busy: {REMEDIES['client_busy']}.",
        "  Evidence: the columns verdict_detail and invalid_evidence of cells.csv.",
        "  To measure a cell again, delete its folder in results/cells and run the same "
        "command again.",
    ]


def test_cells_that_were_not_run_are_not_failures() -> None:
    cells = [cell(rules=[]), cell("not_run", None), cell("not_run", None)]
    assert describe_validity(cells, "cells.csv") == [
        f"Valid cells: 1 of 1. Not run: 2; {REMEDIES['not_run']}."
    ]


def test_several_trials_of_a_cell_are_counted_as_trials() -> None:
    cells = [cell(rules=[]), cell(rules=[], trial=2)]
    assert describe_validity(cells, "cells.csv") == ["Valid trials: 2 of 2."]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a run that was started from its parent."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def write_results(folder: Path) -> None:
    table = folder / "results" / "tables" / "cells.parquet"
    table.parent.mkdir(parents=True)
    row: dict[str, Any] = {column.name: None for column in columns.CELLS}
    schema = pa.schema([column.field for column in columns.CELLS])
    rows = [row | cell(rules=[]), row | cell("timeout", None)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), table)
    page = folder / "results" / "report" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("page")


def run(*done: int) -> RunProgress:
    progress = RunProgress()
    for record in (
        log_record("…", event=LogEvent.WORKFLOW_STARTED),
        run_info(measure=2, gather=1),
        cell_info(1, "small", "c1"),
        cell_info(2, "small", "c2"),
        job_info(3, "gather"),
        *map(job_finished, done),
    ):
        progress.update(record)
    return progress


def test_a_complete_run_says_what_is_valid_and_where_the_page_is(folder: Path) -> None:
    write_results(folder)
    lines = outcome_lines(run(1, 2, 3), folder.parent)
    assert lines[0] == "2 measurements done in 0 s."
    assert lines[1] == "Valid cells: 1 of 2. Not served, or not valid:"
    assert "work/results/tables/cells.csv" in "\n".join(lines)
    assert lines[-1] == "Results on one page: work/results/report/index.html"


def test_an_incomplete_run_says_what_is_missing_and_how_to_resume(folder: Path) -> None:
    write_results(folder)  # of an earlier run
    progress = run(1)
    progress.update(job_error(2))
    progress.update(log_record(f"Complete log(s): {folder}/.snakemake/log/1.log"))
    progress.failures(older_than_s=0.0)
    assert outcome_lines(progress, folder.parent) == [
        "Not finished: 1 of 2 measurements done in 0 s. Missing: small (1).",
        "Snakemake's log: work/.snakemake/log/1.log",
        "To resume, run the same command again.",
    ]


def test_a_run_whose_tables_are_missing_says_so(folder: Path) -> None:
    assert outcome_lines(run(1, 2), folder) == [
        "Not finished: 2 of 2 measurements done in 0 s. 1 other job not done.",
        "To resume, run the same command again.",
    ]


def test_an_interrupted_run_is_called_so(folder: Path) -> None:
    progress = run(1)
    progress.update(log_record("Terminating processes on user request, this might take some time."))
    assert outcome_lines(progress, folder)[0].startswith("Interrupted: 1 of 2 measurements done")
    assert outcome_lines(progress, folder)[-1] == "To resume, run the same command again."


def test_nothing_to_do_shows_the_results_that_are_there(folder: Path) -> None:
    write_results(folder)
    progress = RunProgress()
    progress.update(log_record("Nothing to be done (all requested files are present)."))
    lines = outcome_lines(progress, folder)
    assert lines[0] == "Valid cells: 1 of 2. Not served, or not valid:"
    assert lines[-1] == "Results on one page: results/report/index.html"


def test_a_study_that_was_refused_gets_no_last_lines(folder: Path) -> None:
    progress = RunProgress()
    progress.update(run_info(measure=2))
    assert outcome_lines(progress, folder) == []


def test_a_damaged_table_does_not_hide_where_the_page_is(folder: Path) -> None:
    write_results(folder)
    (folder / "results" / "tables" / "cells.parquet").write_bytes(b"PAR1 torn")
    assert outcome_lines(run(1, 2, 3), folder) == [
        "2 measurements done in 0 s.",
        "Results on one page: results/report/index.html",
    ]


def test_a_dry_run_counts_cells_by_deployment_and_says_why() -> None:
    progress = RunProgress()
    changed = "Params have changed since last execution: 'spec'"
    for record in (
        cell_info(1, "small", "c1"),
        cell_info(2, "small", "c2"),
        job_info(3, deployment="large", cell="c1", trial="1", reason=changed),
        *(job_info(number, "plot", figure=str(number)) for number in (4, 5)),
        job_info(6, "gather"),
        job_info(7, "all"),
    ):
        progress.update(record)
    assert dry_run_lines(progress) == [
        "3 measurements to do:",
        "  1  large (1: Params have changed since last execution)",
        "  2  small",
        "3 other jobs to run: 2 × plot, gather",
        "This was a dry run: nothing was started. --verbose lists every job.",
    ]
    assert dry_run_lines(RunProgress()) == []


def test_a_dry_run_of_few_cells_says_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []

    def expect(targets: Collection[str]) -> str:
        asked.append(set(targets))
        return "Expected time: 3 min\nCAUTION: a CPU"

    monkeypatch.setattr(forecast, "source", expect)
    progress = RunProgress()
    for record in (cell_info(1, "small", "c1"), job_info(2, "gather")):
        progress.update(record)
    assert dry_run_lines(progress)[:4] == [
        "1 measurement to do:",
        "  1  small",
        "Expected time: 3 min",
        "CAUTION: a CPU",
    ]
    assert asked == [{"small/c1/trial-1"}]
    for number in range(3, 203):
        progress.update(cell_info(number, "small", f"c{number}"))
    (hint,) = [line for line in dry_run_lines(progress) if "predicts" in line]
    assert hint == "`servegrid plan --configfile STUDY` predicts what they take."
    assert len(asked) == 1


def test_a_dry_run_shows_its_measurements_if_the_time_cannot_be_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Collection[str]) -> str:
        raise ValueError("could not convert")  # which logging drops without a word

    monkeypatch.setattr(forecast, "source", fail)
    progress = RunProgress()
    progress.update(cell_info(1, "small", "c1"))
    assert dry_run_lines(progress)[:3] == [
        "1 measurement to do:",
        "  1  small",
        "The time cannot be predicted (ValueError: could not convert).",
    ]


def test_the_start_of_a_run_says_what_it_takes() -> None:
    (message,) = RunProgress().update(log_record("Expected time: 3 min (95% …)"))
    assert message.text == "Expected time: 3 min (95% …)"
