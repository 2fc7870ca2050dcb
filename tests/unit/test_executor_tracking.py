"""What the main process makes of an allocation's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snakemake_executor_plugin_submitit.liveness import GONE, HELD, Submission
from snakemake_executor_plugin_submitit.spool import BEGAN, ENDED, STARTED, STOPPED, UP, Spool, Task
from snakemake_executor_plugin_submitit.tracking import AllocationSpec, AllocationState, Queued


def needless() -> AllocationSpec:
    raise AssertionError("only an allocation's first job is asked")


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.create(tmp_path / "spool")


def tracked(spool: Spool, jobs: str, cluster: str = "slurm", **more: Any) -> AllocationState[str]:
    """An allocation with one job per letter; it writes its journal through `spool`."""
    record = Submission("a", cluster, "here", "7", "a-1", 0.0, "a.log")
    queued = [Queued(job, Task(job, (), "/", None), needless) for job in jobs]
    tickets = {spool.put(each.task): each for each in queued}
    return AllocationState(record, spool, tickets=tickets, given=len(jobs), **more)


def ticket_of(live: AllocationState[str], job: str) -> str:
    return next(ticket for ticket, queued in live.tickets.items() if queued.job == job)


def silent(line: str) -> None:
    raise AssertionError(line)


def test_the_job_under_way_comes_last(spool: Spool) -> None:
    live = tracked(spool, "abc")
    spool.record(BEGAN, ticket=ticket_of(live, "a"))
    live.read(silent)
    assert [queued.job for queued in live.left()] == ["b", "c", "a"]


def test_outcomes_name_jobs_logs_and_signals(spool: Spool) -> None:
    live = tracked(spool, "abc")
    tickets = [ticket_of(live, job) for job in "abc"]
    for ticket, status in zip(tickets, (0, 3, -9), strict=True):
        spool.finish(ticket, status)
    good, failed, killed = live.read(silent)
    assert (good.jobs, good.failure) == (("a",), None)
    assert failed.failure is not None
    assert failed.failure.message == "Exit status 3 in allocation a."
    assert failed.failure.log == str(spool.root / "logs" / f"{tickets[1]}.log")
    assert killed.failure is not None
    assert killed.failure.message == "Killed by SIGKILL in allocation a."
    assert (live.finished, live.tickets) == (3, {})


def test_only_what_makes_progress_is_continued(spool: Spool) -> None:
    live = tracked(spool, "ab", handle=object())
    assert not live.may_be_continued("FAILED")
    spool.finish(ticket_of(live, "a"), 3)
    live.read(silent)
    assert live.may_be_continued("FAILED")


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED", "BOOT_FAIL", HELD])
def test_what_the_cluster_takes_away_is_continued_but_not_for_ever(
    spool: Spool, state: str
) -> None:
    live = tracked(spool, "ab", handle=object())
    assert [live.may_be_continued(state) for _ in range(6)] == [True] * 4 + [False] * 2
    spool.finish(ticket_of(live, "a"), 0)
    live.read(silent)
    assert live.may_be_continued(state)  # it got something done, and has new patience


def test_what_somebody_has_cancelled_is_not_continued(spool: Spool) -> None:
    live = tracked(spool, "ab", handle=object())
    spool.finish(ticket_of(live, "a"), 0)
    live.read(silent)
    assert not live.may_be_continued("CANCELLED")


@pytest.mark.parametrize("reason", ["idle", "closed"])
def test_jobs_that_came_just_at_the_end_go_on(spool: Spool, reason: str) -> None:
    live = tracked(spool, "a", handle=object())
    spool.record(ENDED, reason=reason, detail="")
    live.read(silent)
    assert live.may_be_continued(None)


def test_an_orphan_that_was_gone_already_is_no_evidence(spool: Spool) -> None:
    assert tracked(spool, "a", handle=None).may_be_continued(GONE)


@pytest.mark.parametrize(
    ("events", "state", "cluster", "text"),
    [
        ([(ENDED, {"reason": "walltime"})], None, "slurm", "ended by its time limit"),
        ([(ENDED, {"reason": "bring-up"})], None, "local", "its service did not come up"),
        ([(STOPPED, {"reason": "SIGTERM"})], "PREEMPTED", "slurm", "was stopped by SIGTERM"),
        ([(STOPPED, {"reason": "SIGTERM"}), (STARTED, {})], "FAILED", "slurm", "ended as FAILED"),
        ([], GONE, "slurm", "is unknown to Slurm"),
        (
            [(STOPPED, {"reason": "SIGTERM"})],
            HELD,
            "slurm",
            "could not be started again by Slurm, which holds it",
        ),
        ([], GONE, "local", "was killed"),
    ],
)
def test_how_it_ended(
    spool: Spool, events: list[tuple[str, Any]], state: str, cluster: str, text: str
) -> None:
    live = tracked(spool, "ab", cluster)
    for kind, data in events:
        spool.record(kind, **data)
    live.read(silent)
    assert live.describe_end(state) == f"Allocation a: {text}; 0 of 2 jobs done"


def test_a_bring_up_is_reported_once_and_only_where_there_is_a_service(spool: Spool) -> None:
    spool.record("up", seconds=42.7)
    lines: list[str] = []
    live = tracked(spool, "a", announced=True)
    live.read(lines.append)
    live.read(lines.append)
    assert lines == ["Allocation a: up after 43 s."]
    tracked(spool, "a").read(silent)


def test_progress_follows_the_journal(spool: Spool) -> None:
    live = tracked(spool, "ab", announced=True)
    live.account.given = {"a", "b"}
    pending = live.progress("pending (Resources)", left=2)
    assert (pending.state, pending.reason, pending.node) == ("pending", "Resources", None)
    assert (pending.done, pending.total) == (0, 2)
    spool.record(STARTED, host="n1", pid=1, start_ticks=1)
    live.read(lambda *_: None)
    starting = live.progress("running", left=2)
    assert (starting.state, starting.reason, starting.node) == ("starting", None, "n1")
    spool.record(UP, seconds=1.0)
    spool.finish(ticket_of(live, "a"), 0)
    live.read(lambda *_: None)
    running = live.progress("running", left=1)
    assert (running.state, running.node, running.done) == ("running", "n1", 1)
    spool.record(STOPPED, reason="SIGTERM")
    live.read(lambda *_: None)
    assert live.progress("requeued", left=1).state == "pending"
