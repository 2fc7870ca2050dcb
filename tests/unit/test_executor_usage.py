"""Usage statistics, the summary of a run, and Slurm's records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from snakemake_executor_plugin_submitit import records
from snakemake_executor_plugin_submitit.records import parse_sacct, parse_scontrol
from snakemake_executor_plugin_submitit.spool import Event
from snakemake_executor_plugin_submitit.usage import UsageStats, format_duration, summarise


def usage_of(*events: tuple[str, float, dict[str, Any]]) -> UsageStats:
    usage = UsageStats("a", in_summary=True, jobs={"x", "y"}, done={"x"}, submissions=["job 7"])
    for kind, time, data in events:
        usage.add(Event(kind, {"time": time, **data}))
    return usage


RUN = (
    ("started", 100.0, {}),
    ("service_started", 110.0, {}),
    ("job_started", 110.0, {"ticket": "1-x"}),
    ("job_finished", 115.0, {"ticket": "1-x", "work_span": [111.0, 114.0]}),
    ("job_started", 115.0, {"ticket": "2-y"}),
    ("stopped", 118.0, {}),
    # Slurm restarts it a minute later. This minute is not allocated.
    ("started", 178.0, {}),
    ("service_started", 180.0, {}),
    ("job_started", 180.0, {"ticket": "3-y"}),
    ("job_finished", 183.0, {"ticket": "3-y", "work_span": [180.5, 182.5]}),
    ("job_started", 183.0, {"ticket": "4-z"}),
    ("job_finished", 188.0, {"ticket": "4-z", "work_span": [183.2, 187.5]}),
)


def test_times_are_added_up_per_use() -> None:
    usage = usage_of(*RUN)
    assert usage.service_starts == 2
    assert usage.allocated_s == pytest.approx(18 + 10)
    assert usage.jobs_s == pytest.approx(5 + 3 + 5)
    assert usage.mean_job_s() == pytest.approx(13 / 3)
    assert usage.work_s == pytest.approx(3 + 2 + 4.3)
    # From the end of work in y to the start of work in z; none across the restart.
    assert usage.gaps_s == pytest.approx([0.7])
    assert (usage.starts, usage.repeated_starts) == (4, 1)


def test_a_clock_that_is_stepped_gives_no_negative_times() -> None:
    """Found by `make chaos`: a run reported -134% work."""
    usage = usage_of(
        ("started", 100.0, {}),
        ("job_started", 101.0, {"ticket": "1-x"}),
        ("job_finished", 103.0, {"ticket": "1-x", "work_span": [191.0, 102.0]}),
        ("job_started", 103.0, {"ticket": "2-y"}),
        ("job_finished", 106.0, {"ticket": "2-y", "work_span": [15.0, 17.0]}),
    )
    assert usage.work_s == pytest.approx(2)
    assert usage.gaps_s == []


def test_the_summary_says_what_is_left_and_how_to_resume() -> None:
    usage = usage_of(*RUN)
    usage.failed = {"y"}
    usage.failures.append("was killed")
    lines = summarise([usage, UsageStats("alone", jobs={"q"})], 95.0, "snakemake --profile p")
    assert lines == [
        "a: 1 of 2 jobs done, 1 failed, 1 job restart, 2 service starts in 1 allocation "
        "(job 7), 28 s allocated (jobs ran for 46% of it, their reported work for 33%)",
        "Total: 1 of 2 jobs done in 1 min 35 s, 2 service starts, 1 job restart, "
        "28 s allocated (jobs ran for 46% of it, their reported work for 33%), "
        "median gap between the work of two jobs 0.70 s",
        "Not done in a: was killed",
        "To resume, run the same command again: snakemake --profile p",
    ]


def test_a_run_without_shared_allocations_has_no_summary() -> None:
    assert summarise([UsageStats("a")], 1.0, "snakemake") == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (7260, "2 h 1 min")],
)
def test_durations_are_formatted(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_scontrol_s_record_is_parsed() -> None:
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


def test_a_sacct_without_the_field_restarts_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in 22.05 to 24.05."""
    for name, script in {
        "scontrol": "exit 1",
        "sacct": 'case "$*" in *Restarts*) echo "Invalid field requested" >&2; exit 1;; esac; '
        "printf 'JobID|State\\n7|COMPLETED\\n'",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert records.fetch_slurm_record("7") == {"JobID": "7", "State": "COMPLETED"}


# Slurm's documentation of sacct --format: https://slurm.schedmd.com/sacct.html
SACCT_FIELDS = (
    "Account AllocTRES Elapsed End ExitCode JobID JobName NodeList Partition Restarts Start State "
    "Submit Timelimit"
)


def test_sacct_knows_all_fields() -> None:
    assert sorted(records.SACCT_FIELDS) == SACCT_FIELDS.split()
