"""How the manager submits allocations, adopts those of an earlier run, and reports progress."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit import liveness, manager
from snakemake_executor_plugin_submitit.liveness import Submission
from snakemake_executor_plugin_submitit.manager import AllocationManager
from snakemake_executor_plugin_submitit.progress import Progress
from snakemake_executor_plugin_submitit.registry import write_submission
from snakemake_executor_plugin_submitit.slurm import Answer
from snakemake_executor_plugin_submitit.spool import (
    ENDED,
    JOB_FINISHED,
    JOB_STARTED,
    SERVICE_STARTED,
    STARTED,
    Spool,
    Task,
)
from snakemake_executor_plugin_submitit.submission import Parameters, SchedulerUnavailable
from snakemake_executor_plugin_submitit.tracking import AllocationSpec, QueuedJob


def spec() -> AllocationSpec:
    return AllocationSpec("a", "m:serve", {}, {}, Parameters({"timeout_min": 10}))


def refuse_spec() -> AllocationSpec:
    raise AssertionError("this job must not be submitted")


def queued(key: str, get_spec: Callable[[], AllocationSpec] = refuse_spec) -> QueuedJob[str]:
    return QueuedJob(f"job {key}", Task(key, (), "/", None), get_spec)


# Allocations of an earlier run


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """The spool of an allocation that an earlier run has submitted and that no longer exists."""
    spool = Spool.create(tmp_path / "a" / "1f")
    index = tmp_path / "live"
    index.mkdir()
    (index / "1f").write_text(str(spool.root))
    return spool


def local_manager(folder: Path) -> AllocationManager[str]:
    return AllocationManager(
        folder, "local", max_allocations=1, idle_timeout=1, report=lambda text, progress=None: None
    )


def record_finished(spool: Spool, key: str, status: int, when: float) -> None:
    """Do what `Spool.finish` does, at a given time."""
    event = {"event": JOB_FINISHED, "time": when, "ticket": f"00017-{key}", "status": status}
    with (spool.root / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps(event) + "\n")


def test_a_job_that_was_done_while_snakemake_planned_is_not_repeated(
    tmp_path: Path, spool: Spool
) -> None:
    record_finished(spool, "x", 0, time.time())
    manager = local_manager(tmp_path)
    manager.put([("a", queued("x"))])
    (outcome,) = manager.poll()
    assert (outcome.jobs, outcome.failure) == (("job x",), None)


@pytest.mark.parametrize(
    ("status", "when"),
    [(1, time.time()), (0, 0.0)],
    ids=["it failed", "before this process started: its output may have been removed since"],
)
def test_other_jobs_of_an_earlier_run_are_repeated(
    tmp_path: Path, spool: Spool, status: int, when: float
) -> None:
    record_finished(spool, "x", status, when)
    manager = local_manager(tmp_path)
    with pytest.raises(AssertionError, match="must not be submitted"):
        manager.put([("a", queued("x"))])


@pytest.fixture
def running(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], AllocationManager[str]]:
    """Adopts an allocation of an earlier run that runs the job x at this moment."""
    monkeypatch.setattr(AllocationManager, "_end_state", lambda *_: None)
    submission = Submission("a", "local", socket.gethostname(), "1", "a", time.time(), "log")
    write_submission(spool, submission, has_service=True)
    spool.put(Task("x", (), "/", None))
    assert spool.take() is not None
    return lambda: local_manager(tmp_path)


def finish(spool: Spool, status: int) -> None:
    spool.finish(spool.running()["x"], status)


def test_a_job_that_ends_while_its_allocation_is_adopted_is_not_repeated(
    running: Callable[[], AllocationManager[str]], spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_state(*_: object) -> None:
        """Slurm's answer takes a while. Meanwhile, the job ends."""
        if spool.running():
            finish(spool, 0)

    monkeypatch.setattr(AllocationManager, "_end_state", end_state)
    manager = running()
    manager.put([("a", queued("x"))])
    assert [outcome.jobs for outcome in manager.poll()] == [("job x",)]
    assert not spool.has_tasks()


@pytest.mark.parametrize("polled", [True, False], ids=["and read", "and not yet read"])
@pytest.mark.parametrize("ended", [True, False], ids=["with its allocation", "alone"])
def test_a_job_that_ended_before_it_was_asked_for_is_not_repeated(
    running: Callable[[], AllocationManager[str]], spool: Spool, polled: bool, ended: bool
) -> None:
    manager = running()
    finish(spool, 0)
    if ended:
        spool.record(ENDED, reason="idle", detail="")
    if polled:
        assert manager.poll() == []
    manager.put([("a", queued("x"))])
    assert [outcome.jobs for outcome in manager.poll()] == [("job x",)]
    assert not spool.has_tasks()


def test_a_job_that_failed_before_it_was_asked_for_is_repeated(
    running: Callable[[], AllocationManager[str]], spool: Spool
) -> None:
    manager = running()
    finish(spool, 1)
    assert manager.poll() == []
    manager.put([("a", queued("x"))])
    assert spool.has_tasks()
    assert manager.poll() == []


def test_a_job_that_runs_on_is_not_queued_again(
    running: Callable[[], AllocationManager[str]], spool: Spool
) -> None:
    manager = running()
    manager.put([("a", queued("x"))])
    assert not spool.has_tasks()
    finish(spool, 0)
    assert [outcome.jobs for outcome in manager.poll()] == [("job x",)]


# Progress


class SlurmRun:
    """A manager on a fake Slurm with one shared allocation, and what it reports."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.squeue: str | None = ""
        self.error: Exception | None = None
        self.reports: list[tuple[str, Progress | None]] = []
        monkeypatch.setattr(liveness, "ask_squeue", lambda _: Answer(self.squeue, "no route"))
        monkeypatch.setattr(manager, "submit", self._submit)
        self.manager: AllocationManager[str] = AllocationManager(
            folder, "slurm", max_allocations=None, idle_timeout=1, report=self._report
        )

    def _report(self, text: str, progress: Progress | None = None) -> None:
        self.reports.append((text, progress))

    def _submit(self, name: str, cluster: str, job_name: str, *_: Any) -> tuple[Submission, Any]:
        if self.error:
            raise self.error
        self.squeue = f"7|PENDING|Resources|{job_name}\n"
        return Submission(name, cluster, "here", "7", job_name, time.time(), "a.log"), object()

    def start(self, *keys: str) -> None:
        self.manager.put([("a", queued(key, spec)) for key in keys])

    def spool(self) -> Spool:
        (root,) = self.folder.glob("a/*")
        return Spool(root)

    def poll(self, *events: tuple[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        """Record events and poll. Returns the text and the data of the new reports."""
        before = len(self.reports)
        for kind, data in events:
            self.spool().record(kind, **data)
        self.outcomes = self.manager.poll()
        new = self.reports[before:]
        return [(text, progress.to_dict()) for text, progress in new if progress]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmRun:
    return SlurmRun(tmp_path, monkeypatch)


def data(state: str, done: int, total: int, **more: Any) -> dict[str, Any]:
    empty = {"node": None, "reason": None, "eta_s": None}
    return {"name": "a", "state": state, "done": done, "total": total} | empty | more


def test_every_state_of_an_allocation_is_reported_with_its_data(run: SlurmRun) -> None:
    run.start("x", "y")
    [(text, submitted)] = run.reports
    assert text == "Allocation a: submitted as job 7 with 2 jobs; log: a.log"
    assert submitted is not None and submitted.to_dict() == data("pending", 0, 2)
    [(text, pending)] = run.poll()
    assert text == "Allocation a: job 7 pending (Resources) for 0 s, 0 of 2 jobs done"
    assert pending == data("pending", 0, 2, reason="Resources")
    assert run.poll() == []

    [(text, starting)] = run.poll((STARTED, {"host": "n1", "pid": 1, "start_ticks": 1}))
    assert text == "Allocation a: starting on n1 (job 7), 0 of 2 jobs done"
    assert starting == data("starting", 0, 2, node="n1")
    [(text, running)] = run.poll((SERVICE_STARTED, {"seconds": 61.0}))
    assert text == (
        "Allocation a: running on n1 (job 7), service started in 1 min 1 s, 0 of 2 jobs done"
    )
    assert running == data("running", 0, 2, node="n1")

    taken = [run.spool().take() for _ in range(2)]
    for ticket in [each[0] for each in taken if each]:
        assert run.poll((JOB_STARTED, {"ticket": ticket})) == []
        run.spool().finish(ticket, 0)
        assert run.poll() == []  # a finished job is not a new state
        assert [outcome.failure for outcome in run.outcomes] == [None]
    [(text, ended)] = run.poll((ENDED, {"reason": "closed", "detail": ""}))
    assert text == "Allocation a: ended; 2 of 2 jobs done."
    assert ended == data("ended", 2, 2)


def test_a_failed_allocation_is_reported_with_its_outcome(run: SlurmRun) -> None:
    run.start("x", "y")
    run.poll((STARTED, {"host": "n1", "pid": 1, "start_ticks": 1}))
    assert run.poll((ENDED, {"reason": "start_failed", "detail": "ValueError: no model"})) == []
    [outcome] = run.outcomes
    assert outcome.jobs == ("job x", "job y")
    assert outcome.failure is not None and outcome.failure.allocation is not None
    assert outcome.failure.message == (
        "Allocation a: its service did not start; 0 of 2 jobs done.\nValueError: no model"
    )
    reason = "its service did not start"
    assert outcome.failure.allocation.to_dict() == data("failed", 0, 2, reason=reason)


def test_a_continued_allocation_ends_and_another_one_is_pending(run: SlurmRun) -> None:
    run.start("x", "y")
    taken = run.spool().take()
    assert taken is not None
    run.spool().finish(taken[0], 0)
    [(text, ended), (_, pending)] = run.poll((ENDED, {"reason": "time_limit", "detail": ""}))
    assert text == (
        "Allocation a: reached its time limit; 1 of 2 jobs done. "
        "Another allocation runs 1 remaining job."
    )
    assert ended == data("ended", 1, 2)
    assert pending == data("pending", 1, 2)


def test_a_refused_allocation_is_reported_as_failed(run: SlurmRun) -> None:
    run.error = WorkflowError("slurm refused the allocation a: no such partition")
    run.start("x")
    assert run.poll() == []
    [outcome] = run.outcomes
    assert outcome.failure is not None and outcome.failure.allocation is not None
    assert outcome.failure.message == "slurm refused the allocation a: no such partition"
    assert outcome.failure.allocation.to_dict() == data("failed", 0, 1, reason="was not submitted")


def test_without_an_answer_of_slurm_the_allocation_stays_pending(run: SlurmRun) -> None:
    run.error = SchedulerUnavailable("Socket timed out")
    run.start("x")
    [(text, _)] = run.reports
    assert text == ("Allocation a: slurm does not answer (Socket timed out). Next attempt in 20 s.")
    [(_, pending)] = run.poll()
    assert pending == data("pending", 0, 1, reason="slurm does not answer")


def test_a_squeue_that_fails_for_minutes_is_reported(
    run: SlurmRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(run.manager._liveness, "_clock", lambda: now)
    run.start("x")
    run.poll()
    run.squeue = None
    for seconds in (60, 60):
        now += seconds
        run.poll()
    assert not [text for text, _ in run.reports if "squeue" in text]
    now += 60
    run.poll()
    told = [text for text, _ in run.reports if text.startswith("squeue")]
    assert told[0].startswith("squeue has not answered for 2 min: no route. Allocations continue")
    assert len(told) == 1
    (progress,) = run.manager._current_progress()
    assert progress.reason == "squeue does not answer"


def test_a_failed_scancel_is_reported_with_the_command(
    run: SlurmRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "cancel", lambda _: "Unable to contact slurm controller")
    monkeypatch.setattr(manager, "SLURM_EXIT_S", 0.0)
    run.start("x")
    run.manager.cancel()
    (text,) = [text for text, _ in run.reports if "cancelled" in text]
    assert "could not be cancelled (Unable to contact slurm controller)" in text
    assert text.endswith("To end it now: scancel 7")
