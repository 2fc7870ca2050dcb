"""How often an allocation lets Slurm restart it after a preemption."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit.allocation import PREEMPTED, Allocation
from snakemake_executor_plugin_submitit.spool import ENDED, JOB_FINISHED, Spool

HOUR_S = 3600.0


@pytest.fixture
def requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each command that was sent to Slurm."""
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    calls.touch()
    return calls


def preempt(spool: Spool, times: int) -> None:
    """Slurm's warning reaches the allocation this often, a minute after its start."""
    allocation = Allocation("a", str(spool.root), None, {}, {}, 1.0, HOUR_S, 60.0)
    for _ in range(times):
        allocation._handle_stop(spool, signal.SIGUSR2, 60.0)


def test_an_allocation_that_finishes_no_job_ends_after_three_restarts(
    tmp_path: Path, requeued: Path
) -> None:
    spool = Spool.create(tmp_path / "spool")
    preempt(spool, 4)
    assert requeued.read_text(encoding="utf-8") == "requeue 7\n" * 3
    *_, last = spool.journal().read_new()
    assert (last.kind, last.data["reason"]) == (ENDED, PREEMPTED)


def test_a_finished_job_allows_three_more_restarts(tmp_path: Path, requeued: Path) -> None:
    spool = Spool.create(tmp_path / "spool")
    preempt(spool, 3)
    spool.record(JOB_FINISHED, ticket="t", status=0)
    preempt(spool, 3)
    assert requeued.read_text(encoding="utf-8") == "requeue 7\n" * 6
    assert not any(event.kind == ENDED for event in spool.journal().read_new())
