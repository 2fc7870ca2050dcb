"""What a run shows follows from the records of Snakemake and of its executor."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

from helpers.log_records import (
    allocation,
    cell_info,
    executor_record,
    job_error,
    job_finished,
    job_info,
    log_record,
    run_info,
)
from snakemake_logger_plugin_servegrid.failures import read_tail
from snakemake_logger_plugin_servegrid.messages import Level
from snakemake_logger_plugin_servegrid.progress import RunProgress

GONE = "For further error details see the cluster/cloud log and the log files of the rule(s)."


def started(*records: logging.LogRecord) -> RunProgress:
    progress = RunProgress()
    for record in (
        log_record("Workflow has started!", event=LogEvent.WORKFLOW_STARTED),
        run_info(measure=3, gather=1, plot=2),
        cell_info(1, "small", "c1"),
        cell_info(2, "small", "c2"),
        cell_info(3, "large", "c1"),
        *records,
    ):
        progress.update(record)
    return progress


def texts(progress: RunProgress, record: logging.LogRecord) -> list[tuple[Level, str]]:
    return [(each.level, each.text) for each in progress.update(record)]


def statuses(progress: RunProgress) -> dict[str, tuple[int, int, str]]:
    return {each.name: (each.done, each.total, each.status) for each in progress.deployments()}


def test_cells_are_counted_per_deployment_and_other_jobs_together() -> None:
    progress = started(job_finished(1), job_info(7, "gather"), job_finished(7))
    assert statuses(progress) == {"small": (1, 2, "pending"), "large": (0, 1, "pending")}
    assert progress.cells() == (1, 3)
    assert (progress.other_done, progress.other_total) == (1, 3)
    assert progress.finished == {"measure", "gather"}


def test_the_job_that_only_collects_results_is_not_counted() -> None:
    progress = started(job_info(9, "all"), job_finished(9))
    assert (progress.other_done, progress.other_total) == (0, 3)


def test_a_cell_that_is_tried_again_is_counted_once() -> None:
    progress = started(cell_info(1, "small", "c1"))
    assert progress.cells() == (0, 3)


@pytest.mark.parametrize(
    ("state", "values", "status"),
    [
        ("pending", {"reason": "Priority"}, "pending: Priority"),
        ("pending", {}, "pending"),
        ("starting", {"node": "n1"}, "starting on n1"),
        ("running", {"node": "n1", "eta_s": 125.0}, "running on n1, about 2 min 5 s left"),
        ("running", {}, "running"),
        ("ended", {}, "pending: another allocation measures the rest"),
        ("failed", {"reason": "out of memory"}, "failed: out of memory"),
        ("unheard of", {}, "pending: another allocation measures the rest"),
    ],
)
def test_the_state_of_a_deployment_is_that_of_its_allocation(
    state: str, values: dict[str, object], status: str
) -> None:
    progress = started(allocation("small", state, **values))
    assert statuses(progress)["small"] == (0, 2, status)
    assert statuses(progress)["large"] == (0, 1, "pending")


def test_each_change_of_state_is_said_once() -> None:
    progress = started()
    changes = [
        texts(progress, record)
        for record in (
            allocation("small", "pending"),
            allocation("small", "pending", reason="Priority"),
            allocation("small", "pending", reason="Resources"),
            allocation("small", "starting", node="n1"),
            allocation("small", "running", node="n1"),
            allocation("small", "running", node="n1", eta_s=4.0),
            job_finished(1),
            job_finished(2),
            allocation("small", "ended"),
        )
    ]
    assert [text for change in changes for _, text in change] == [
        "small: pending: Priority",
        "small: starting on n1",
        "small: running on n1",
        "small: done, 2 measurements",
    ]
    assert {level for change in changes for level, _ in change} == {Level.CHANGE}


def test_an_allocation_without_cells_of_this_run_is_not_shown() -> None:
    progress = started()
    assert texts(progress, allocation("other", "running", node="n1")) == []
    assert set(statuses(progress)) == {"small", "large"}


def test_a_failed_cell_is_shown_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "trial-1.log"
    script = [f"line {number}" for number in range(20)]
    snakemake = ["Building DAG of jobs...", "RuleException:", "Command 'python x' returned 1.",
                 '  File "x.py", line 1, in run', "Elapsed time: 0:00:01"]  # fmt: skip
    log.write_text("\n".join([*script, *snakemake]))
    progress = started(
        job_error(2, message=f"Exit status 1 in allocation a. {GONE}", log=[str(log)])
    )
    assert progress.failures() == []  # Snakemake may try again
    (failure,) = progress.failures(older_than_s=0.0)
    assert failure.level == Level.ERROR
    assert [line.strip() for line in failure.text.splitlines()] == [
        "Rule measure failed for small/c2/trial-1: Exit status 1 in allocation a.",
        f"Log, last lines: {log}",
        *script[-12:],
    ]
    assert statuses(progress)["small"] == (0, 2, "pending, 1 failed")
    assert progress.failures(older_than_s=0.0) == []


def test_no_path_in_a_long_line_is_cut(tmp_path: Path) -> None:
    paths = [f"results/cells/deployment/burst-c{number}-i31-o100/trial-1" for number in range(100)]
    log = tmp_path / "log"
    log.write_text(f"  rm -r {' '.join(paths[:3])}\n  rm -r {' '.join(paths)}\n{'x' * 9000}\n")
    few, many, one = read_tail(log)
    assert few.split() == ["rm", "-r", *paths[:3]]
    *shown, mark = many.split()[2:]
    assert (shown, mark) == (paths[: len(shown)], "…")
    assert 10 < len(shown) < 100
    assert one == f"{'x' * 2000} …"


def test_the_log_is_named_if_it_is_missing_or_not_wanted(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("secret")
    quiet = RunProgress(show_failed_logs=False)
    for progress, log in ((quiet, tmp_path / "log"), (RunProgress(), tmp_path / "missing")):
        progress.update(job_info(5, "plot", deployment="small", figure="total"))
        progress.update(job_error(5, "plot", log=[str(log)]))
        (failure,) = progress.failures(older_than_s=0.0)
        assert failure.text == (
            f"Rule plot failed for deployment=small, figure=total.\n    Log: {log}"
        )


def test_only_the_first_failures_show_their_logs(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("what happened")
    progress = RunProgress()
    for number in range(5):
        progress.update(cell_info(number, "small", f"c{number}"))
        progress.update(job_error(number, log=[str(tmp_path / "log")]))
    failures = progress.failures(older_than_s=0.0)
    assert ["what happened" in each.text for each in failures] == [True] * 3 + [False] * 2


def test_a_failure_that_is_tried_again_is_a_warning_of_one_line() -> None:
    progress = started(job_error(2, message=f"Exit status 1. {GONE}", log=["x.log"]))
    assert texts(progress, log_record("Trying to restart job 2.")) == [
        (
            Level.WARNING,
            "Rule measure failed for small/c2/trial-1: Exit status 1. Snakemake retries it.",
        )
    ]
    assert progress.failures(older_than_s=0.0) == []
    assert statuses(progress)["small"] == (0, 2, "pending")
    # The jobs of an allocation that has failed have no error of their own.
    assert texts(progress, log_record("Trying to restart job 3.")) == []


def test_a_deployment_has_failed_if_no_cell_is_left_for_another_allocation() -> None:
    progress = started(job_finished(1), job_error(2), allocation("small", "ended"))
    progress.failures(older_than_s=0.0)
    assert statuses(progress)["small"] == (1, 2, "failed: 1 of 2")


def test_after_the_run_nothing_is_running() -> None:
    progress = started(allocation("small", "running", node="n1"), job_finished(3))
    progress.stop()
    assert statuses(progress) == {"small": (0, 2, "stopped"), "large": (1, 1, "done")}


@pytest.mark.parametrize(
    "text",
    [
        "Select jobs to execute...",
        "Using shell: /usr/bin/bash",
        "Provided remote nodes: 10000",
        "Elapsed time: 0:00:01",
        None,
    ],
)
def test_snakemakes_routine_messages_are_left_out(text: str | None) -> None:
    assert texts(started(), log_record(text)) == []


@pytest.mark.parametrize(
    "event", [LogEvent.SHELLCMD, LogEvent.JOB_STARTED, LogEvent.PROGRESS, LogEvent.RESOURCES_INFO]
)
def test_records_with_an_event_are_not_printed(event: LogEvent) -> None:
    assert texts(started(), log_record("Execute 2 jobs...", event=event)) == []


@pytest.mark.parametrize(
    "text",
    [
        "WorkflowError:\nAt least one job did not complete successfully.",
        "Exiting because a job execution failed. Look above for error messages",
        "RuleException:\nCommand 'python x.py' returned non-zero exit status 1.",
    ],
)
def test_errors_that_repeat_a_failed_job_are_left_out(text: str) -> None:
    assert texts(started(), log_record(text, logging.ERROR, event=LogEvent.ERROR)) == []


def test_other_errors_and_warnings_are_printed_as_they_are() -> None:
    progress = started()
    error = log_record("study.yaml: unknown key", logging.ERROR, event=LogEvent.ERROR)
    assert texts(progress, error) == [(Level.ERROR, "study.yaml: unknown key")]
    warning = log_record("slurm does not answer", logging.WARNING)
    assert texts(progress, warning) == [(Level.WARNING, "slurm does not answer")]
    assert texts(progress, warning) == []  # not twice in a row


def test_a_workflow_error_is_shown_without_its_stack() -> None:
    text = (
        'WorkflowError in file "Snakefile", line 19:\nno `workload`\n  File "x.py", line 2, in run'
    )
    record = log_record(text, logging.ERROR, event=LogEvent.ERROR, exception="WorkflowError")
    assert texts(started(), record) == [
        (Level.ERROR, 'WorkflowError in file "Snakefile", line 19:\nno `workload`')
    ]


def test_a_warning_about_an_allocation_is_printed_with_its_change() -> None:
    record = allocation("small", "pending", reason="preempted")
    record.levelno = logging.WARNING
    assert texts(started(), record) == [
        (Level.CHANGE, "small: pending: preempted"),
        (Level.WARNING, "Allocation small.0123abcd: pending"),
    ]


def test_the_executors_own_messages_are_left_to_plain_output() -> None:
    progress = started()
    summary = (
        "Allocations:\n    small: 2 of 2 jobs done\n    To resume, run the same command again: x"
    )
    assert texts(progress, executor_record(summary)) == [
        (Level.CHANGE, "Allocations:\n    small: 2 of 2 jobs done")
    ]


def test_messages_before_a_run_are_what_somebody_asked_for() -> None:
    progress = RunProgress()
    unlocked = "Unlocked working directory."
    assert texts(progress, log_record(unlocked)) == [(Level.INFO, unlocked)]
    assert texts(progress, log_record("Building DAG of jobs...")) == []


def test_an_interrupt_and_an_empty_run_are_noticed() -> None:
    progress = started()
    (interrupted,) = progress.update(log_record("Terminating processes on user request, this …"))
    assert interrupted.level == Level.WARNING and "Interrupted" in interrupted.text
    assert progress.interrupted
    (nothing,) = progress.update(log_record("Nothing to be done (all requested files are …)."))
    assert nothing.level == Level.INFO
    assert progress.nothing_to_do
