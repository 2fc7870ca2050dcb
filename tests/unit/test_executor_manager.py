"""What the main process makes of the allocations of an earlier run, before any of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit.manager import AllocationManager
from snakemake_executor_plugin_submitit.spool import DONE, Spool, Task
from snakemake_executor_plugin_submitit.tracking import AllocationSpec, Queued


def unneeded() -> AllocationSpec:
    raise AssertionError("nothing is to be submitted")


def queued(key: str) -> Queued[str]:
    return Queued(f"job {key}", Task(key, (), "/", None), unneeded)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """Of an allocation that an earlier run has submitted and that is gone."""
    spool = Spool.create(tmp_path / "a" / "1f")
    index = tmp_path / "live"
    index.mkdir()
    (index / "1f").write_text(str(spool.root))
    return spool


def manager_of(folder: Path) -> AllocationManager[str]:
    return AllocationManager(
        folder, "local", max_allocations=1, idle_timeout=1, report=lambda *_: None
    )


def record_done(spool: Spool, key: str, status: int, when: float) -> None:
    """As `Spool.finish` does, at a time of one's own."""
    event = {"event": DONE, "time": when, "ticket": f"00017-{key}", "status": status}
    with (spool.root / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps(event) + "\n")


def test_what_was_done_while_snakemake_planned_is_not_done_again(
    tmp_path: Path, spool: Spool
) -> None:
    record_done(spool, "x", 0, time.time())
    manager = manager_of(tmp_path)
    manager.put([("a", queued("x"))])
    (outcome,) = manager.poll()
    assert (outcome.jobs, outcome.failure) == (("job x",), None)


@pytest.mark.parametrize(
    ("status", "when"),
    [(1, time.time()), (0, 0.0)],
    ids=["it failed", "before this process began: its result may have been removed since"],
)
def test_what_is_asked_for_again_is_done_again(
    tmp_path: Path, spool: Spool, status: int, when: float
) -> None:
    record_done(spool, "x", status, when)
    manager = manager_of(tmp_path)
    with pytest.raises(AssertionError, match="nothing is to be submitted"):
        manager.put([("a", queued("x"))])
