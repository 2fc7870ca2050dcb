"""Whether a job still exists according to squeue and /proc."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit import slurm
from snakemake_executor_plugin_submitit.liveness import (
    GONE,
    HELD,
    REPORT_AGAIN_S,
    SILENT_S,
    LocalLiveness,
    SlurmLiveness,
    Submission,
    ask_squeue,
    is_running,
    parse_squeue,
    start_ticks,
)
from snakemake_executor_plugin_submitit.slurm import Answer

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

    def ask(self, clusters: str | None) -> Answer:
        self.asked += 1
        return Answer(self.answer, "" if self.answer is not None else "Socket timed out")

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


def test_each_cluster_has_its_own_squeue() -> None:
    asked = []

    def ask(clusters: str | None) -> Answer:
        asked.append(clusters)
        return Answer("101|RUNNING|None|alpha-1f\n" if clusters else "")

    now = 0.0
    liveness = SlurmLiveness(ask, lambda: now)
    here, there = submission("101"), replace(submission("101"), clusters="gpu")
    assert [liveness.end_state(here), liveness.end_state(there)] == [None, None]
    now = 30.0
    assert [liveness.end_state(here), liveness.end_state(there)] == [GONE, None]
    assert asked == [None, "gpu"] * 2
    assert liveness.describe(there) == "running"


def test_a_silent_squeue_is_told_once_and_so_is_its_return() -> None:
    cluster = Cluster("101|RUNNING|None|alpha-1f\n")
    news = cluster.liveness.news
    cluster.end()
    cluster.answer = None
    cluster.end(30)
    assert news() == []
    cluster.end(SILENT_S)
    [line] = news()
    assert line.startswith("squeue has not answered for 2 min: Socket timed out.")
    assert cluster.liveness.describe(submission("101")).endswith("(squeue does not answer)")
    cluster.end(30)
    assert news() == []
    cluster.end(REPORT_AGAIN_S)
    assert news()[0].startswith("squeue has not answered for 12 min 30 s")
    cluster.answer = "101|RUNNING|None|alpha-1f\n"
    cluster.end(30)
    assert news() == ["squeue answers again."]
    assert news() == []
    assert cluster.liveness.describe(submission("101")) == "running"


def test_a_short_silence_is_not_told() -> None:
    cluster = Cluster(None)
    cluster.end()
    cluster.end(SILENT_S - 1)
    cluster.answer = ""
    cluster.end(30)
    assert cluster.liveness.news() == []


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that records its arguments and environment and prints bytes that are no UTF-8."""
    path = tmp_path / "squeue"
    path.write_text(f"#!/bin/sh\necho \"$@\" >{path}.args\nenv >{path}.env\nprintf '1|a|\\351|b'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return path


@pytest.mark.parametrize("user", [None, "somebody-else", "no such user"])
def test_squeue_is_asked_for_the_user_id_whatever_user_says(
    squeue: Path, monkeypatch: pytest.MonkeyPatch, user: str | None
) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
        if user is not None:
            monkeypatch.setenv(name, user)
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")
    monkeypatch.setenv("SLURM_CLUSTERS", "another")
    monkeypatch.setenv("SLURM_CONF", "/somewhere/slurm.conf")
    assert ask_squeue(None) == Answer("1|a|\N{REPLACEMENT CHARACTER}|b")
    arguments = Path(f"{squeue}.args").read_text(encoding="utf-8").split()
    assert arguments[-1] == f"--user={os.getuid()}"
    assert not any("clusters" in argument for argument in arguments)
    environment = Path(f"{squeue}.env").read_text(encoding="utf-8")
    assert "SLURM_CONF=/somewhere/slurm.conf" in environment
    assert "SQUEUE_PARTITION" not in environment
    assert "SLURM_CLUSTERS" not in environment


def test_a_user_id_without_a_name_is_no_filter(
    squeue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    ask_squeue("gpu")
    text = Path(f"{squeue}.args").read_text(encoding="utf-8")
    assert "--user" not in text
    assert text.startswith("--clusters=gpu ")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo 'slurm_load_jobs error: Invalid user' >&2; exit 1", "load_jobs error: Invalid user"),
        ("exit 3", "squeue: exit status 3"),
        (None, "squeue: cannot be run (No such file or directory)"),
        ("sleep 9", "squeue: no answer within 0 s"),
    ],
)
def test_the_reason_for_no_answer_is_kept(
    squeue: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, error: str
) -> None:
    squeue.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    if script is None:
        squeue.unlink()
        monkeypatch.setenv("PATH", str(squeue.parent))
    elif "sleep" in script:
        squeue.write_text("#!/bin/sh\nexec sleep 9\n", encoding="utf-8")
        monkeypatch.setattr(slurm, "TIMEOUT_S", 0.3)
    answer = ask_squeue(None)
    assert answer.text is None
    assert answer.error.endswith(error)
