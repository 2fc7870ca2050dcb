"""Whether a submitted allocation still exists, without Slurm's accounting.

`sacct` is missing, restricted or slow on many sites, so `squeue` alone is asked. What it says
about an end is believed only when it says so twice: of a job that is being requeued after its
preemption or the loss of its node, Slurm tells for a moment that it has failed.
"""

from __future__ import annotations

import getpass
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ALIVE_STATES = frozenset(
    (
        *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING"),
        *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
        *("RESIZING", "SIGNALING", "STAGE_OUT"),
    )
)
CERTAIN_ENDS = frozenset(("CANCELLED", "COMPLETED"))
GONE = "GONE"
"""The state of a job that Slurm no longer knows."""
HELD = "LAUNCH_FAILED"
"""The state of a job that Slurm has put back and will not start again, as squeue does not say."""
_HELD_FOR = frozenset(("launch failed requeued held", "jobholdmaxrequeue"))
"""Reasons to wait that end only when somebody releases the job; nobody has held it on purpose."""


@dataclass(frozen=True)
class Submission:
    """What is known of a submitted job: enough to find it again, and nothing else by mistake.

    Job ids and process ids are reused, so `job_name` has a random part, and `start_ticks` is
    when the local process began (None on Slurm). `submitted` is seconds since the epoch, `host`
    where it was submitted.
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
    def end_of(self, submission: Submission, urgent: bool = False) -> str | None:
        """The state in which the job has ended, or None as long as it may still run.

        `urgent` where there is reason to believe that it has.
        """

    def describe(self, submission: Submission) -> str:
        """What the cluster says of the job, for people."""


class LocalLiveness:
    """Of processes of this machine."""

    def end_of(self, submission: Submission, urgent: bool = False) -> str | None:
        pid, begun = int(submission.job_id), submission.start_ticks
        return None if begun is not None and runs(pid, begun) else GONE

    def describe(self, submission: Submission) -> str:
        return ""


class SlurmLiveness:
    """One call of squeue for all jobs, at most every `period` seconds.

    A job that seems to have ended is asked for again after `confirmation` seconds, which is also
    how often it is asked about urgent ones.
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

    def end_of(self, submission: Submission, urgent: bool = False) -> str | None:
        key = (submission.job_id, submission.job_name)
        since = self._clock() - self._asked
        if since >= (self._confirmation if self._suspected or urgent else self._period):
            self._asked = self._clock()
            answer = self._ask()
            self._states = None if answer is None else parse_squeue(answer)
        if self._states is None:
            return None
        state, reason = self._states.get(key, (GONE, ""))
        if reason.lower().replace("_", " ") in _HELD_FOR:
            state = HELD
        if state in ALIVE_STATES:
            self._suspected.pop(key, None)
            return None
        first = self._suspected.setdefault(key, self._asked)
        if state in CERTAIN_ENDS or self._asked - first >= self._confirmation:
            del self._suspected[key]
            return state
        return None

    def describe(self, submission: Submission) -> str:
        """State and reason as Slurm last gave them, for people; empty where it said nothing."""
        found = (self._states or {}).get((submission.job_id, submission.job_name))
        if found is None:
            return ""
        state, reason = found
        shown = state.lower()
        return f"{shown} ({reason})" if reason not in ("", "None", "none") else shown


def ask_squeue() -> str | None:
    """The user's jobs, one `id|state|reason|name` a line; None where squeue does not answer."""
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

    States such as `CANCELLED by 1000` lose their detail; what is not such a line is left out.
    """
    states = {}
    for line in text.splitlines():
        fields = line.split("|", 3)
        if len(fields) == 4 and fields[1].strip():
            job_id, state, reason, name = fields
            states[job_id.strip(), name.strip()] = state.split()[0], reason.strip()
    return states


def start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None where there is no such process.

    A process that has ended and waits for its parent counts as none.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def runs(pid: int, begun: int) -> bool:
    """Whether that very process, and not a later one with its number, still runs."""
    return start_ticks(pid) == begun
