"""How the main process interprets the events and the end of an allocation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snakemake_executor_plugin_submitit.liveness import GONE, HELD, Submission
from snakemake_executor_plugin_submitit.spool import (
    ENDED,
    JOB_STARTED,
    SERVICE_STARTED,
    STARTED,
    STOPPED,
    Spool,
    Task,
)
from snakemake_executor_plugin_submitit.tracking import AllocationSpec, AllocationState, QueuedJob


def refuse_spec() -> AllocationSpec:
    raise AssertionError("only the first job of an allocation has to provide its specification")


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.create(tmp_path / "spool")


def allocation(
    spool: Spool, jobs: str, cluster: str = "slurm", **more: Any
) -> AllocationState[str]:
    """An allocation with one job per letter. Its journal is written through `spool`."""
    submission = Submission("a", cluster, "here", "7", "a-1", 0.0, "a.log")
    queued = [QueuedJob(job, Task(job, (), "/", None), refuse_spec) for job in jobs]
    tickets = {spool.put(each.task): each for each in queued}
    return AllocationState(submission, spool, tickets=tickets, assigned=len(jobs), **more)


def ticket_of(live: AllocationState[str], job: str) -> str:
    return next(ticket for ticket, queued in live.tickets.items() if queued.job == job)


def test_the_running_job_comes_last(spool: Spool) -> None:
    live = allocation(spool, "abc")
    spool.record(JOB_STARTED, ticket=ticket_of(live, "a"))
    live.read_events()
    assert [queued.job for queued in live.unfinished_jobs()] == ["b", "c", "a"]


def test_outcomes_name_jobs_logs_and_signals(spool: Spool) -> None:
    live = allocation(spool, "abc")
    tickets = [ticket_of(live, job) for job in "abc"]
    for ticket, status in zip(tickets, (0, 3, -9), strict=True):
        spool.finish(ticket, status)
    good, failed, killed = live.read_events()
    assert (good.jobs, good.failure) == (("a",), None)
    assert failed.failure is not None
    assert failed.failure.message == "Exit status 3 in allocation a."
    assert failed.failure.log == str(spool.root / "logs" / f"{tickets[1]}.log")
    assert failed.failure.allocation is None
    assert killed.failure is not None
    assert killed.failure.message == "Killed by SIGKILL in allocation a."
    assert (live.finished, live.tickets) == (3, {})


def test_an_allocation_is_continued_only_after_a_finished_job(spool: Spool) -> None:
    live = allocation(spool, "ab", handle=object())
    assert not live.should_continue("FAILED")
    spool.finish(ticket_of(live, "a"), 3)
    live.read_events()
    assert live.should_continue("FAILED")


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED", "BOOT_FAIL", HELD])
def test_after_a_loss_the_allocation_is_continued_but_not_for_ever(
    spool: Spool, state: str
) -> None:
    live = allocation(spool, "ab", handle=object())
    assert [live.should_continue(state) for _ in range(6)] == [True] * 4 + [False] * 2
    spool.finish(ticket_of(live, "a"), 0)
    live.read_events()
    assert live.should_continue(state)  # a finished job resets the count


def test_after_the_loss_of_another_node_the_allocation_is_continued(spool: Spool) -> None:
    live = allocation(spool, "ab", handle=object())
    spool.record(ENDED, reason="node_lost", detail="node 1 is gone")
    live.read_events()
    assert [live.should_continue(None) for _ in range(6)] == [True] * 4 + [False] * 2
    assert live.describe_end(None) == "lost one of its nodes"


def test_a_cancelled_allocation_is_not_continued(spool: Spool) -> None:
    live = allocation(spool, "ab", handle=object())
    spool.finish(ticket_of(live, "a"), 0)
    live.read_events()
    assert not live.should_continue("CANCELLED")


@pytest.mark.parametrize("reason", ["idle", "closed"])
def test_jobs_that_arrive_at_the_moment_of_the_end_are_continued(spool: Spool, reason: str) -> None:
    live = allocation(spool, "a", handle=object())
    spool.record(ENDED, reason=reason, detail="")
    live.read_events()
    assert live.should_continue(None)


def test_an_adopted_allocation_that_was_already_gone_is_continued(spool: Spool) -> None:
    assert allocation(spool, "a", handle=None).should_continue(GONE)


@pytest.mark.parametrize(
    ("events", "state", "cluster", "text"),
    [
        ([(ENDED, {"reason": "time_limit"})], None, "slurm", "reached its time limit"),
        ([(ENDED, {"reason": "start_failed"})], None, "local", "its service did not start"),
        ([(STOPPED, {"reason": "SIGTERM"})], "PREEMPTED", "slurm", "was stopped by SIGTERM"),
        (
            [(STOPPED, {"reason": "SIGTERM"}), (STARTED, {})],
            "FAILED",
            "slurm",
            "ended with state FAILED",
        ),
        ([], GONE, "slurm", "is unknown to Slurm"),
        (
            [(STOPPED, {"reason": "SIGTERM"})],
            HELD,
            "slurm",
            "is held by Slurm after a failed launch",
        ),
        ([], GONE, "local", "was killed"),
    ],
)
def test_the_end_is_described(
    spool: Spool, events: list[tuple[str, Any]], state: str, cluster: str, text: str
) -> None:
    live = allocation(spool, "ab", cluster)
    for kind, data in events:
        spool.record(kind, **data)
    live.read_events()
    assert live.describe_end(state) == text


def test_progress_follows_the_journal(spool: Spool) -> None:
    live = allocation(spool, "ab", has_service=True)
    live.usage.jobs = {"a", "b"}
    pending = live.progress("pending (Resources)", left=2)
    assert (pending.state, pending.reason, pending.node) == ("pending", "Resources", None)
    assert (pending.done, pending.total) == (0, 2)
    spool.record(STARTED, host="n1", pid=1, start_ticks=1)
    live.read_events()
    starting = live.progress("running", left=2)
    assert (starting.state, starting.reason, starting.node) == ("starting", None, "n1")
    assert starting.text == "starting on n1 (job 7)"
    spool.record(SERVICE_STARTED, seconds=42.7)
    live.read_events()
    running = live.progress("running", left=2)
    assert running.text == "running on n1 (job 7), service started in 42 s"
    spool.record(JOB_STARTED, ticket=ticket_of(live, "a"))
    spool.finish(ticket_of(live, "a"), 0)
    live.read_events()
    running = live.progress("running", left=1)
    assert (running.state, running.node, running.done) == ("running", "n1", 1)
    assert running.text == "running on n1 (job 7)"
    assert running.eta_s == pytest.approx(live.usage.jobs_s)  # one job took this long, one is left
    spool.record(STOPPED, reason="SIGTERM")
    live.read_events()
    assert live.progress("requeued", left=1).state == "pending"


def test_without_a_service_an_allocation_is_never_starting(spool: Spool) -> None:
    live = allocation(spool, "a")
    spool.record(STARTED, host="n1", pid=1, start_ticks=1)
    live.read_events()
    assert live.progress("running", left=1).state == "running"
