"""The folder between the main process and an allocation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit.spool import (
    BEGAN,
    DONE,
    ENDED,
    STOPPED,
    Spool,
    Task,
    key_of,
)


def task(key: str) -> Task:
    return Task(key, ("--target-jobs", key), "/somewhere", None)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.create(tmp_path / "spool")


def other_side(spool: Spool) -> Spool:
    return Spool(spool.root)


def test_tasks_come_out_as_they_went_in(spool: Spool) -> None:
    tickets = [spool.put(task(key)) for key in ("b", "a", "c")]
    assert tickets == sorted(tickets)
    there = other_side(spool)
    taken = [there.take() for _ in range(4)]
    assert taken == [*zip(tickets, [task("b"), task("a"), task("c")], strict=True), None]


def test_what_is_put_later_is_seen(spool: Spool) -> None:
    there = other_side(spool)
    assert not there.waiting()
    ticket = spool.put(task("a"))
    assert there.waiting()
    assert there.take() == (ticket, task("a"))


def test_what_is_taken_back_is_not_done_and_what_is_claimed_is_not_taken_back(
    spool: Spool,
) -> None:
    tickets = {key: spool.put(task(key)) for key in "abc"}
    there = other_side(spool)
    assert there.take() == (tickets["a"], task("a"))
    spool.clear()
    assert spool.under_way() == {"a": tickets["a"]}
    assert there.take() is None
    there.finish(tickets["a"], 0)
    assert spool.under_way() == {}


def test_a_lower_turn_goes_first_and_equal_ones_as_they_came(spool: Spool) -> None:
    for key, order in (("late", 11), ("a", 2), ("b", 2)):
        spool.put(replace(task(key), order=order))
    there = Spool(spool.root)
    taken = [there.take() for _ in range(3)]
    assert [each[1].key for each in taken if each] == ["a", "b", "late"]
    assert [key_of(each[0]) for each in taken if each] == ["a", "b", "late"]


def test_the_same_task_gets_a_new_ticket_each_time(spool: Spool) -> None:
    assert spool.put(task("a")) != spool.put(task("a"))


def test_a_spool_is_never_used_twice(spool: Spool) -> None:
    with pytest.raises(FileExistsError):
        Spool.create(spool.root)


def test_closing_is_seen_by_the_other_side(spool: Spool) -> None:
    there = other_side(spool)
    assert not there.closed
    spool.close()
    assert there.closed


def test_the_journal_is_read_once_and_without_half_lines(spool: Spool) -> None:
    reader, there = spool.journal(), other_side(spool)
    assert reader.new() == []
    there.record(BEGAN, ticket="1-a")
    with (spool.root / "journal.jsonl").open("a") as file:
        file.write('{"event": "done", "ticket": "1-a", ')
        file.flush()
        assert [event.kind for event in reader.new()] == [BEGAN]
        file.write('"status": 3}\n')
    (event,) = reader.new()
    assert (event.kind, event.data) == (DONE, {"ticket": "1-a", "status": 3})
    assert reader.new() == []
    assert [event.kind for event in spool.journal().new()] == [BEGAN, DONE]


def test_an_allocation_that_is_started_again_goes_on(spool: Spool) -> None:
    done, lost, queued = (spool.put(task(key)) for key in ("done", "lost", "server_queueing"))
    there = other_side(spool)
    there.take()
    # Killed between the journal and the removal of the claim, then in the middle of a line.
    there.record(DONE, ticket=done, status=0)
    there.take()
    there.record(STOPPED, reason="SIGTERM")
    with (spool.root / "journal.jsonl").open("a") as file:
        file.write('{"event": "do')
    again = other_side(spool)
    assert again.restore()
    assert [again.take(), again.take(), again.take()] == [
        (lost, task("lost")),
        (queued, task("server_queueing")),
        None,
    ]
    again.finish(lost, 0)
    kinds = [(event.kind, event.data.get("ticket")) for event in spool.journal().new()]
    assert kinds == [(DONE, done), (STOPPED, None), (DONE, lost)]


def test_an_allocation_that_has_ended_does_not_go_on(spool: Spool) -> None:
    there = other_side(spool)
    assert there.restore()
    there.record(ENDED, reason="walltime", detail="")
    assert not other_side(spool).restore()
