"""Finds out whether a submitted allocation still exists, without Slurm's accounting.

`sacct` is missing, restricted or slow on many sites, so only `squeue` is asked. An end must be
reported twice: Slurm shows a job as failed for a moment while it requeues the job after a
preemption or the loss of a node.
"""

from __future__ import annotations

import getpass
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

END_STATES = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED"),
        *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
    )
)
"""The states of a job that does not run any more (squeue(1), job state codes). In any other state
the job is alive: new versions of Slurm have new states, such as EXPEDITING in 25.11."""
DEFINITE_END_STATES = frozenset(("CANCELLED", "COMPLETED"))
GONE = "GONE"
"""The state of a job that Slurm no longer knows."""
HELD = "LAUNCH_FAILED"
"""The state of a job that Slurm has requeued and holds. squeue shows such a job as pending."""
_HELD_REASON = re.compile(r"requeued[ _]held$|^jobholdmaxrequeue$", re.IGNORECASE)
"""The reasons with which Slurm itself holds a job until somebody releases it: a launch that failed
(all versions), a limit of such failures (23.02), an environment that was not found (25.05)."""


@dataclass(frozen=True)
class Submission:
    """A submitted job, with all that is needed to find exactly this job again.

    Job ids and process ids are reused. So `job_name` contains a random part, and `start_ticks`
    is the start time of the local process in clock ticks since boot (None on Slurm). `submitted`
    is in seconds since the epoch. `host` submitted the job.
    """

    name: str
    cluster: str
    host: str
    job_id: str
    job_name: str
    submitted: float
    log: str
    start_ticks: int | None = None


class Liveness(Protocol):
    def end_state(self, submission: Submission, urgent: bool = False) -> str | None:
        """The state in which the job has ended; None while it may still run.

        Set `urgent` if the job has probably ended.
        """

    def describe(self, submission: Submission) -> str:
        """The job's state as the scheduler reports it; empty if unknown."""


class LocalLiveness:
    """Liveness of processes on this machine."""

    def end_state(self, submission: Submission, urgent: bool = False) -> str | None:
        pid, ticks = int(submission.job_id), submission.start_ticks
        return None if ticks is not None and is_running(pid, ticks) else GONE

    def describe(self, submission: Submission) -> str:
        return ""


class SlurmLiveness:
    """Asks squeue once for all jobs, at most every `period` seconds.

    If a job seems to have ended, squeue is asked again after `confirmation` seconds. Urgent jobs
    are also asked about every `confirmation` seconds.
    """

    def __init__(
        self,
        ask: Callable[[], str | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        period: float = 30.0,
        confirmation: float = 8.0,
    ) -> None:
        self._ask, self._clock = ask or ask_squeue, clock
        self._period, self._confirmation = period, confirmation
        self._states: dict[tuple[str, str], tuple[str, str]] | None = None
        self._asked = float("-inf")
        self._suspected: dict[tuple[str, str], float] = {}

    def end_state(self, submission: Submission, urgent: bool = False) -> str | None:
        key = (submission.job_id, submission.job_name)
        since = self._clock() - self._asked
        if since >= (self._confirmation if self._suspected or urgent else self._period):
            self._asked = self._clock()
            answer = self._ask()
            self._states = None if answer is None else parse_squeue(answer)
        if self._states is None:
            return None
        state, reason = self._states.get(key, (GONE, ""))
        if _HELD_REASON.search(reason):
            state = HELD
        if state != GONE and state not in END_STATES:
            self._suspected.pop(key, None)
            return None
        first = self._suspected.setdefault(key, self._asked)
        if state in DEFINITE_END_STATES or self._asked - first >= self._confirmation:
            del self._suspected[key]
            return state
        return None

    def describe(self, submission: Submission) -> str:
        found = (self._states or {}).get((submission.job_id, submission.job_name))
        if found is None:
            return ""
        state, reason = found
        shown = state.lower()
        return f"{shown} ({reason})" if reason not in ("", "None", "none") else shown


def ask_squeue() -> str | None:
    """The user's jobs, one `id|state|reason|name` per line; None if squeue does not answer."""
    command = ["squeue", "--noheader", "--states=all", "--format=%i|%T|%r|%j"]
    try:
        return subprocess.run(
            [*command, "--user", getpass.getuser()],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def parse_squeue(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """State and reason by job id and job name.

    `CANCELLED by 1000` becomes `CANCELLED`. Lines of another form are ignored.
    """
    states = {}
    for line in text.splitlines():
        fields = line.split("|", 3)
        if len(fields) == 4 and fields[1].strip():
            job_id, state, reason, name = fields
            states[job_id.strip(), name.strip()] = state.split()[0], reason.strip()
    return states


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no such process.

    A zombie counts as no process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(pid: int, ticks: int) -> bool:
    """Whether the process with this id and start time runs, not a later one with its id."""
    return start_ticks(pid) == ticks
