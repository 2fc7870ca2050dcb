"""Removes the lock that a killed Snakemake has left in the working directory.

    python -m snakemake_executor_plugin_submitit unlock

Snakemake takes its lock before any executor exists, so none can do that by itself. The lock goes
only if the main process that took it ran on this machine and is certainly gone; whoever shares
the folder from another machine, or runs another executor, keeps theirs.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from snakemake_executor_plugin_submitit.liveness import runs, start_ticks
from snakemake_executor_plugin_submitit.spool import write_atomically

LOCKS = Path(".snakemake/locks")
HOLDER = Path(".snakemake/submitit.holder")


def hold() -> None:
    """Note that this process has the lock of the working directory."""
    pid = os.getpid()
    holder = {"host": socket.gethostname(), "pid": pid, "start_ticks": start_ticks(pid)}
    write_atomically(HOLDER, json.dumps(holder))


def remove_stale_locks() -> int:
    """The number of lock files that were removed.

    Locks younger than the note of their holder belong to somebody else.
    """
    try:
        holder = json.loads(HOLDER.read_text())
        noted = HOLDER.stat().st_mtime_ns
    except (FileNotFoundError, ValueError):
        return 0
    if holder["host"] != socket.gethostname() or runs(holder["pid"], holder["start_ticks"]):
        return 0
    stale = [lock for lock in LOCKS.glob("*.lock") if lock.stat().st_mtime_ns <= noted]
    for lock in stale:
        lock.unlink()
    HOLDER.unlink()
    return len(stale)
