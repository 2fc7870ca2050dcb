"""Removes the lock that a killed Snakemake has left in the working directory.

    python -m snakemake_executor_plugin_submitit unlock

Snakemake takes its lock before it creates an executor, so an executor cannot do this itself. The
lock is removed only if the main process that took it ran on this machine and no longer exists.
Locks of other machines and of runs with other executors stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snakemake_executor_plugin_submitit.liveness import is_running, start_ticks
from snakemake_executor_plugin_submitit.spool import write_atomically

LOCKS = Path(".snakemake/locks")
HOLDER = Path(".snakemake/submitit.holder")
LOCKING_S = 60.0
"""The longest time between the record of the holder and its last lock file."""


def record_before_locking() -> None:
    """Make this process record itself as the holder before Snakemake takes the lock.

    Snakemake's interface for plugins has no such moment. Between its lock and the executor, a
    process with thousands of jobs spends seconds. If it were killed there without a record, the
    lock would stay.
    """
    from snakemake.persistence import PersistenceBase  # it imports most of Snakemake

    original = PersistenceBase.lock
    if original.__module__ == __name__:
        return

    @contextlib.contextmanager
    def lock(self: Any) -> Iterator[None]:
        if not self.locked:
            with contextlib.suppress(OSError):  # Snakemake reports the same about its own files
                record_lock_holder()
        with original(self):
            yield

    PersistenceBase.lock = lock


def record_lock_holder() -> None:
    """Record that this process is about to take the lock of the working directory."""
    pid = os.getpid()
    holder = {"host": socket.gethostname(), "pid": pid, "start_ticks": start_ticks(pid)}
    write_atomically(HOLDER, json.dumps(holder))


def remove_stale_locks() -> int:
    """Remove the locks of a dead main process. Returns the number of removed files.

    A lock that is much younger than the record of its holder belongs to another process and stays.
    """
    try:
        holder = json.loads(HOLDER.read_text(encoding="utf-8"))
        recorded = HOLDER.stat().st_mtime_ns
    except (FileNotFoundError, ValueError):
        return 0
    if holder["host"] != socket.gethostname() or is_running(holder["pid"], holder["start_ticks"]):
        return 0
    newest = recorded + LOCKING_S * 1e9
    stale = [lock for lock in LOCKS.glob("*.lock") if lock.stat().st_mtime_ns <= newest]
    for lock in stale:
        lock.unlink()
    HOLDER.unlink()
    return len(stale)
