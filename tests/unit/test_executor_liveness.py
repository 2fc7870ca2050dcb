"""Whether a job still exists according to squeue and /proc."""

from __future__ import annotations

import os
import subprocess

import pytest

from snakemake_executor_plugin_submitit.liveness import (
    GONE,
    HELD,
    LocalLiveness,
    SlurmLiveness,
    Submission,
    is_running,
    parse_squeue,
    start_ticks,
)

SQUEUE = """\
101|RUNNING|None|alpha-1f
102|CANCELLED|None|beta-2e
103_[0-9]|PENDING|Priority|somebody's array
104|NODE_FAIL|NodeDown|odd|name
slurm_load_jobs error: Unable to contact slurm controller
"""


def submission(job_id: str, job_name: str = "alpha-1f", ticks: int | None = None) -> Submission:
    cluster = "slurm" if ticks is None else "local"
    return Submission("alpha", cluster, "here", job_id, job_name, 0.0, "log", ticks)


def test_squeue_s_lines_are_parsed() -> None:
    assert parse_squeue(SQUEUE) == {
        ("101", "alpha-1f"): ("RUNNING", "None"),
        ("102", "beta-2e"): ("CANCELLED", "None"),
        ("103_[0-9]", "somebody's array"): ("PENDING", "Priority"),
        ("104", "odd|name"): ("NODE_FAIL", "NodeDown"),
    }
    assert parse_squeue("") == {}


class Cluster:
    """A clock, and a squeue with a given answer."""

    def __init__(self, answer: str | None) -> None:
        self.answer, self.now, self.asked = answer, 0.0, 0
        self.liveness = SlurmLiveness(self.ask, lambda: self.now, period=30, confirmation=8)

    def ask(self) -> str | None:
        self.asked += 1
        return self.answer

    def end(self, after: float = 0.0, job: str = "101") -> str | None:
        self.now += after
        return self.liveness.end_state(submission(job))


def test_one_squeue_call_per_period_serves_all_jobs() -> None:
    cluster = Cluster("101|RUNNING|None|alpha-1f\n102|PENDING|None|alpha-1f\n")
    assert [cluster.end(), cluster.end(job="102"), cluster.end(29)] == [None, None, None]
    assert cluster.asked == 1
    cluster.end(1)
    assert cluster.asked == 2


@pytest.mark.parametrize("state", ["FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"])
def test_an_end_must_be_reported_twice(state: str) -> None:
    cluster = Cluster(f"101|{state}|None|alpha-1f\n")
    assert cluster.end() is None
    assert cluster.end(7) is None
    assert cluster.end(1) == state


def test_a_requeued_job_is_alive() -> None:
    cluster = Cluster("101|NODE_FAIL|None|alpha-1f\n")
    assert cluster.end() is None
    cluster.answer = "101|PENDING|None|alpha-1f\n"
    assert cluster.end(8) is None
    # The first report no longer counts: a new one must be confirmed, too.
    cluster.answer = "101|FAILED|None|alpha-1f\n"
    assert cluster.end(30) is None
    assert cluster.end(8) == "FAILED"


@pytest.mark.parametrize(
    "reason",
    [
        *("launch failed requeued held", "JobHoldMaxRequeue"),
        "launch_failure_limit_exceeded_requeued_held",  # since 23.02, with max_batch_requeue
        "user_env_retrieval_failed_requeued_held",  # since 25.05
    ],
)
def test_a_job_held_by_slurm_after_a_failed_launch_has_ended(reason: str) -> None:
    cluster = Cluster(f"101|PENDING|{reason}|alpha-1f\n")
    assert cluster.end() is None
    assert cluster.end(8) == HELD


@pytest.mark.parametrize("state", ["EXPEDITING", "POWER_UP_NODE", "A_STATE_OF_NEXT_YEAR"])
def test_a_job_in_an_unknown_state_is_alive(state: str) -> None:
    cluster = Cluster(f"101|{state}|None|alpha-1f\n")
    assert [cluster.end(), cluster.end(30), cluster.end(30)] == [None] * 3


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin", "BeginTime", "Resources"])
def test_a_job_held_by_its_user_is_alive(reason: str) -> None:
    cluster = Cluster(f"101|PENDING|{reason}|alpha-1f\n")
    assert [cluster.end(), cluster.end(30), cluster.end(30)] == [None] * 3


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETED"])
def test_a_definite_end_needs_no_confirmation(state: str) -> None:
    assert Cluster(f"101|{state}|None|alpha-1f\n").end() == state


def test_a_reused_job_id_with_another_name_is_another_job() -> None:
    cluster = Cluster("101|RUNNING|None|alpha-99\n")
    assert cluster.end() is None
    assert cluster.end(8) == GONE


def test_without_an_answer_of_squeue_no_job_ends() -> None:
    cluster = Cluster(None)
    assert [cluster.end(100) for _ in range(5)] == [None] * 5
    cluster.answer = ""
    assert cluster.end(100) is None
    cluster.answer = None
    assert cluster.end(8) is None
    cluster.answer = ""
    assert cluster.end(30) == GONE


def test_a_process_is_identified_by_its_id_and_start_time() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        ticks = start_ticks(process.pid)
        assert ticks is not None
        assert is_running(process.pid, ticks)
        assert not is_running(process.pid, ticks - 1)
        job = submission(str(process.pid), ticks=ticks)
        assert LocalLiveness().end_state(job) is None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        # It is a zombie.
        assert start_ticks(process.pid) is None
        assert LocalLiveness().end_state(job) == GONE
    finally:
        process.kill()
        process.wait()
    assert start_ticks(process.pid) is None


def test_state_and_reason_are_described() -> None:
    cluster = Cluster("101|PENDING|Resources|alpha-1f\n102|RUNNING|None|alpha-1f\n")
    assert cluster.liveness.describe(submission("101")) == ""  # squeue was not asked yet
    cluster.end()
    assert cluster.liveness.describe(submission("101")) == "pending (Resources)"
    assert cluster.liveness.describe(submission("102")) == "running"
    assert cluster.liveness.describe(submission("103")) == ""
