"""The folder through which the main process and an allocation communicate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit.spool import (
    ENDED,
    JOB_FINISHED,
    JOB_STARTED,
    SERVICE_STARTED,
    STARTED,
    STOPPED,
    Spool,
    Task,
    ticket_key,
)


def task(key: str) -> Task:
    return Task(key, ("--target-jobs", key), "/somewhere", None)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.create(tmp_path / "spool")


def other_side(spool: Spool) -> Spool:
    return Spool(spool.root)


def test_tasks_keep_their_order_and_content(spool: Spool) -> None:
    tickets = [spool.put(task(key)) for key in ("b", "a", "c")]
    assert tickets == sorted(tickets)
    there = other_side(spool)
    taken = [there.take() for _ in range(4)]
    assert taken == [*zip(tickets, [task("b"), task("a"), task("c")], strict=True), None]


def test_a_task_that_is_queued_later_is_found(spool: Spool) -> None:
    there = other_side(spool)
    assert not there.has_tasks()
    ticket = spool.put(task("a"))
    assert there.has_tasks()
    assert there.take() == (ticket, task("a"))


def test_a_preferred_order_comes_next_and_the_rest_stays(spool: Spool) -> None:
    tickets = [spool.put(replace(task(key), order=order)) for key, order in (("a", 1), ("b", 2))]
    tickets += [spool.put(replace(task(key), order=7)) for key in ("c", "d")]
    there = other_side(spool)
    assert there.orders() == [1, 2, 7, 7]
    there.prefer(7)
    assert there.take() == (tickets[2], replace(task("c"), order=7))
    there.prefer(5)  # no task has it
    assert there.orders() == [1, 2, 7]
    assert [taken[0] for taken in iter(there.take, None)] == [tickets[0], tickets[1], tickets[3]]


def test_only_unclaimed_tasks_can_be_taken_back(
    spool: Spool,
) -> None:
    tickets = {key: spool.put(task(key)) for key in "abc"}
    there = other_side(spool)
    assert there.take() == (tickets["a"], task("a"))
    spool.clear()
    assert spool.running() == {"a": tickets["a"]}
    assert there.take() is None
    there.finish(tickets["a"], 0)
    assert spool.running() == {}


def test_a_lower_order_goes_first_and_equal_ones_keep_their_sequence(spool: Spool) -> None:
    for key, order in (("late", 11), ("a", 2), ("b", 2)):
        spool.put(replace(task(key), order=order))
    there = Spool(spool.root)
    taken = [there.take() for _ in range(3)]
    assert [each[1].key for each in taken if each] == ["a", "b", "late"]
    assert [ticket_key(each[0]) for each in taken if each] == ["a", "b", "late"]


def test_a_task_gets_a_new_ticket_each_time(spool: Spool) -> None:
    assert spool.put(task("a")) != spool.put(task("a"))


def test_a_spool_is_not_created_twice(spool: Spool) -> None:
    with pytest.raises(FileExistsError):
        Spool.create(spool.root)


def test_the_other_side_sees_that_the_spool_is_closed(spool: Spool) -> None:
    there = other_side(spool)
    assert not there.closed
    spool.close()
    assert there.closed


def test_each_complete_line_of_the_journal_is_read_once(spool: Spool) -> None:
    reader, there = spool.journal(), other_side(spool)
    assert reader.read_new() == []
    there.record(JOB_STARTED, ticket="1-a")
    with (spool.root / "journal.jsonl").open("a") as file:
        file.write('{"event": "job_finished", "ticket": "1-a", ')
        file.flush()
        assert [event.kind for event in reader.read_new()] == [JOB_STARTED]
        file.write('"status": 3}\n')
    (event,) = reader.read_new()
    assert (event.kind, event.data) == (JOB_FINISHED, {"ticket": "1-a", "status": 3})
    assert reader.read_new() == []
    assert [event.kind for event in spool.journal().read_new()] == [JOB_STARTED, JOB_FINISHED]


def test_a_restarted_allocation_continues(spool: Spool) -> None:
    done, lost, queued = (spool.put(task(key)) for key in ("done", "lost", "queued"))
    there = other_side(spool)
    there.take()
    # Killed between the journal and the removal of the claim, then in the middle of a line.
    there.record(JOB_FINISHED, ticket=done, status=0)
    there.take()
    there.record(STOPPED, reason="SIGTERM")
    with (spool.root / "journal.jsonl").open("a") as file:
        file.write('{"event": "job_fi')
    again = other_side(spool)
    assert again.restore()
    assert [again.take(), again.take(), again.take()] == [
        (lost, task("lost")),
        (queued, task("queued")),
        None,
    ]
    again.finish(lost, 0)
    kinds = [(event.kind, event.data.get("ticket")) for event in spool.journal().read_new()]
    assert kinds == [(JOB_FINISHED, done), (STOPPED, None), (JOB_FINISHED, lost)]


def test_an_ended_allocation_does_not_continue(spool: Spool) -> None:
    there = other_side(spool)
    assert there.restore()
    there.record(ENDED, reason="time_limit", detail="")
    assert not other_side(spool).restore()


def test_stops_are_counted_since_the_last_finished_job(spool: Spool) -> None:
    assert spool.count_stops() == 0
    for kind in (STOPPED, STOPPED, JOB_FINISHED, STARTED, STOPPED, SERVICE_STARTED):
        spool.record(kind)
    assert spool.count_stops() == 1
