"""The account of a run: what jobs, allocations and time have come to, and how it is described."""

from __future__ import annotations

from typing import Any

import pytest

from snakemake_executor_plugin_submitit.history import parse_sacct, parse_scontrol
from snakemake_executor_plugin_submitit.spool import Event
from snakemake_executor_plugin_submitit.usage import Progress, UsageStats, duration, summary


def account_of(*events: tuple[str, float, dict[str, Any]]) -> UsageStats:
    account = UsageStats("a", shown=True, given={"x", "y"}, done={"x"}, jobs=["job 7"])
    for kind, time, data in events:
        account.note(Event(kind, {"time": time, **data}))
    return account


RUN = (
    ("started", 100.0, {}),
    ("up", 110.0, {}),
    ("began", 110.0, {"ticket": "1-x"}),
    ("done", 115.0, {"ticket": "1-x", "at_work": [111.0, 114.0]}),
    ("began", 115.0, {"ticket": "2-y"}),
    ("stopped", 118.0, {}),
    # Slurm starts it again, a minute later: that minute was nobody's.
    ("started", 178.0, {}),
    ("up", 180.0, {}),
    ("began", 180.0, {"ticket": "3-y"}),
    ("done", 183.0, {"ticket": "3-y", "at_work": [180.5, 182.5]}),
    ("began", 183.0, {"ticket": "4-z"}),
    ("done", 188.0, {"ticket": "4-z", "at_work": [183.2, 187.5]}),
)


def test_times_are_added_up_by_what_they_were_spent_on() -> None:
    account = account_of(*RUN)
    assert account.bring_ups == 2
    assert account.allocated == pytest.approx(18 + 10)
    assert account.under_jobs == pytest.approx(5 + 3 + 5)
    assert account.at_work == pytest.approx(3 + 2 + 4.3)
    # From the end of work in y to its beginning in z; not over the restart, not after y's failure.
    assert account.gaps == pytest.approx([0.7])
    assert (account.begun, account.repeated) == (4, 1)


def test_the_end_of_a_run_is_described_with_what_is_left_and_how_to_do_it() -> None:
    account = account_of(*RUN)
    account.failed = {"y"}
    account.failures.append("was killed")
    lines = summary([account, UsageStats("unseen", given={"q"})], 95.0, "snakemake --profile p")
    assert lines == [
        "a: 1 of 2 jobs done, 1 failed, 1 start repeated, up 2 times in 1 allocation (job 7), "
        "28 s allocated, 46% of it under jobs, 33% at work",
        "Together: 1 of 2 jobs done in 1 min 35 s, 2 bring-ups, 1 start repeated, "
        "28 s allocated, 46% of it under jobs, 33% at work, "
        "0.70 s from one's work to the next one's (median)",
        "Not done in a: was killed",
        "To resume, run the same command again: snakemake --profile p",
    ]


def test_a_run_without_allocations_says_nothing() -> None:
    assert summary([UsageStats("a")], 1.0, "snakemake") == []


def test_progress_is_described_in_a_line() -> None:
    running = Progress("a", "running", "running, job 7 on n1", 1, 2, "n1", eta_s=61.0)
    text = "Allocation a: 1 of 2 jobs done, running, job 7 on n1, about 1 min 1 s left"
    assert running.describe() == text
    pending = Progress("b", "pending", "job 8 pending (Resources) since 2 min", 0, 1)
    assert pending.describe() == (
        "Allocation b: 0 of 1 job done, job 8 pending (Resources) since 2 min"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (7260, "2 h 1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_scontrol_s_record() -> None:
    text = (
        "JobId=7 JobName=a-1 UserId=me(1000) Restarts=2 ExitCode=0:0 Comment=two words NumNodes=1"
    )
    record = parse_scontrol(text + "\n")
    assert record["JobId"] == "7"
    assert record["Restarts"] == "2"
    assert record["Comment"] == "two words"
    assert record["NumNodes"] == "1"
    assert parse_scontrol("") == {}


def test_sacct_s_record_is_that_of_the_last_start() -> None:
    text = "JobID|State|Restarts\n7|NODE_FAIL|0\n7|COMPLETED|1\n"
    assert parse_sacct(text) == {"JobID": "7", "State": "COMPLETED", "Restarts": "1"}
    assert parse_sacct("JobID|State|Restarts\n") is None
