"""Remembers the allocations that have not ended, so that the next run finds them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic

import psutil

from snakemake_executor_plugin_submitit.liveness import Submission
from snakemake_executor_plugin_submitit.private import check_private
from snakemake_executor_plugin_submitit.spool import Spool, write_atomically
from snakemake_executor_plugin_submitit.tracking import AllocationState, Job
from snakemake_executor_plugin_submitit.usage import UsageStats


@dataclass
class Adopted(Generic[Job]):
    """What an earlier run has left: its live allocations, and the keys of jobs done meanwhile."""

    allocations: list[AllocationState[Job]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)


class Registry:
    """A folder with one file per allocation that has not ended; it contains the spool's path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, spool: Spool) -> None:
        (self._folder / spool.root.name).write_bytes(os.fsencode(spool.root))

    def remove(self, spool: Spool) -> None:
        (self._folder / spool.root.name).unlink(missing_ok=True)

    def adopt(
        self, cluster: str, has_ended: Callable[[AllocationState[Job]], bool]
    ) -> Adopted[Job]:
        """Take over what an earlier run has left, and withdraw the jobs that have not started.

        Jobs that have finished since this process started are done: Snakemake has looked, or will
        look, for missing outputs before it learns of them.
        """
        adopted: Adopted[Job] = Adopted()
        started = psutil.Process().create_time()
        for entry in sorted(self._folder.iterdir()):
            spool = Spool(Path(os.fsdecode(entry.read_bytes())))
            with contextlib.suppress(FileNotFoundError):
                check_private(spool.root)
            with contextlib.suppress(FileNotFoundError):
                spool.clear()
            found = _read_submission(spool)
            if found is None or not _can_be_adopted(found[0], cluster):
                # The submission was interrupted, or another cluster or machine runs the
                # allocation. If it exists, it ends.
                with contextlib.suppress(FileNotFoundError):
                    spool.close()
                entry.unlink()
                adopted.done |= spool.finished_since(started)
                continue
            submission, has_service = found
            # A second reader, because the adopted state must still read all finished jobs.
            seen: AllocationState[Job] = AllocationState(submission, spool)
            seen.read_events()
            if seen.ended or has_ended(seen):
                entry.unlink()
                adopted.done |= spool.finished_since(started)
                continue
            name, label = submission.name, f"job {submission.job_id}, of an earlier run"
            adopted.allocations.append(
                AllocationState(
                    submission,
                    spool,
                    is_closing=spool.closed,
                    has_service=has_service,
                    usage=UsageStats(name, in_summary=True, submissions=[label]),
                    inherited=spool.running(),
                    since=started,  # its own reader finds the jobs that are done, when asked
                    process=seen.process,
                    service=seen.service,
                )
            )
        return adopted


def write_submission(spool: Spool, submission: Submission, has_service: bool) -> None:
    """Write what a later run needs to adopt the allocation."""
    text = json.dumps({"submission": asdict(submission), "has_service": has_service})
    write_atomically(spool.root / "allocation.json", text)


def _read_submission(spool: Spool) -> tuple[Submission, bool] | None:
    try:
        data = json.loads((spool.root / "allocation.json").read_text(encoding="utf-8"))
        return Submission(**data["submission"]), bool(data["has_service"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _can_be_adopted(submission: Submission, cluster: str) -> bool:
    is_reachable = cluster == "slurm" or submission.host == socket.gethostname()
    return submission.cluster == cluster and is_reachable
