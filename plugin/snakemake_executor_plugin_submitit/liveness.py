"""Finds out whether a submitted allocation still exists, without Slurm's accounting.

`sacct` is missing, restricted or slow on many sites, so only `squeue` is asked. An end must be
reported twice: Slurm shows a job as failed for a moment while it requeues the job after a
preemption or the loss of a node.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from snakemake_executor_plugin_submitit.slurm import Answer, ask, user_filter
from snakemake_executor_plugin_submitit.usage import format_duration

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
SILENT_S = 120.0
"""After this time without an answer of squeue, the run reports it."""
REPORT_AGAIN_S = 600.0


@dataclass(frozen=True)
class Submission:
    """A submitted job, with all that is needed to find exactly this job again.

    Job ids and process ids are reused. So `job_name` contains a random part, and `start_ticks`
    is the start time of the local process in clock ticks since boot (None on Slurm). `submitted`
    is in seconds since the epoch. `host` submitted the job. `clusters` is another cluster than
    that of this machine. `usable_s` is the part of the time limit in which the service starts,
    expected to take `start_s`, and jobs run; None if nothing is expected of them. `is_shortened`
    says whether less time was requested than is allowed.
    """

    name: str
    cluster: str
    host: str
    job_id: str
    job_name: str
    submitted: float
    log: str
    start_ticks: int | None = None
    clusters: str | None = None
    usable_s: float | None = None
    start_s: float = 0.0
    is_shortened: bool = False


class Liveness(Protocol):
    def end_state(self, submission: Submission, urgent: bool = False) -> str | None:
        """The state in which the job has ended; None while it may still run.

        Set `urgent` if the job has probably ended.
        """

    def describe(self, submission: Submission) -> str:
        """The job's state as the scheduler reports it; empty if unknown."""

    def news(self) -> list[str]:
        """What a person should know about the scheduler and the run has not reported yet."""


class LocalLiveness:
    """Liveness of processes on this machine."""

    def end_state(self, submission: Submission, urgent: bool = False) -> str | None:
        pid, ticks = int(submission.job_id), submission.start_ticks
        return None if ticks is not None and is_running(pid, ticks) else GONE

    def describe(self, submission: Submission) -> str:
        return ""

    def news(self) -> list[str]:
        return []


@dataclass
class _Queue:
    """What squeue has said about the jobs of one cluster.

    `states` is None without an answer; then squeue has been silent since `silent_since`, for the
    reason `error`. The run reported it at `reported`. Times are those of the clock.
    """

    states: dict[tuple[str, str], tuple[str, str]] | None = None
    asked: float = float("-inf")
    suspected: dict[tuple[str, str], float] = field(default_factory=dict)
    silent_since: float | None = None
    error: str = ""
    reported: float | None = None

    def update(self, answer: Answer, now: float) -> None:
        self.error = answer.error
        if answer.text is None:
            self.states = None
            self.silent_since = now if self.silent_since is None else self.silent_since
        else:
            self.states, self.silent_since = parse_squeue(answer.text), None


class SlurmLiveness:
    """Asks squeue once for all jobs of a cluster, at most every `period` seconds.

    If a job seems to have ended, squeue is asked again after `confirmation` seconds. Urgent jobs
    are also asked about every `confirmation` seconds.
    """

    def __init__(
        self,
        ask: Callable[[str | None], Answer] | None = None,
        clock: Callable[[], float] = time.monotonic,
        period: float = 30.0,
        confirmation: float = 8.0,
    ) -> None:
        self._ask, self._clock = ask or ask_squeue, clock
        self._period, self._confirmation = period, confirmation
        self._queues: dict[str | None, _Queue] = {}

    def end_state(self, submission: Submission, urgent: bool = False) -> str | None:
        key = (submission.job_id, submission.job_name)
        queue = self._queues.setdefault(submission.clusters, _Queue())
        since = self._clock() - queue.asked
        if since >= (self._confirmation if queue.suspected or urgent else self._period):
            queue.asked = self._clock()
            queue.update(self._ask(submission.clusters), queue.asked)
        if queue.states is None:
            return None
        state, reason = queue.states.get(key, (GONE, ""))
        if _HELD_REASON.search(reason):
            state = HELD
        if state != GONE and state not in END_STATES:
            queue.suspected.pop(key, None)
            return None
        first = queue.suspected.setdefault(key, queue.asked)
        if state in DEFINITE_END_STATES or queue.asked - first >= self._confirmation:
            del queue.suspected[key]
            return state
        return None

    def describe(self, submission: Submission) -> str:
        queue = self._queues.get(submission.clusters, _Queue())
        if self._silence(queue) >= SILENT_S:
            return "in an unknown state (squeue does not answer)"
        found = (queue.states or {}).get((submission.job_id, submission.job_name))
        if found is None:
            return ""
        state, reason = found
        shown = state.lower()
        return f"{shown} ({reason})" if reason not in ("", "None", "none") else shown

    def news(self) -> list[str]:
        lines, now = [], self._clock()
        for clusters, queue in self._queues.items():
            which = f"squeue for {clusters}" if clusters else "squeue"
            silence = self._silence(queue)
            if queue.reported is not None and not silence:
                queue.reported = None
                lines.append(f"{which} answers again.")
            elif silence >= SILENT_S and (
                queue.reported is None or now - queue.reported >= REPORT_AGAIN_S
            ):
                queue.reported = now
                lines.append(
                    f"{which} has not answered for {format_duration(silence)}: {queue.error}. "
                    "Allocations continue. The run notices some ends only when squeue "
                    "answers again."
                )
        return lines

    def _silence(self, queue: _Queue) -> float:
        """Seconds since the first of the questions that squeue has not answered."""
        return 0.0 if queue.silent_since is None else self._clock() - queue.silent_since


def ask_squeue(clusters: str | None) -> Answer:
    """The user's jobs, one `id|state|reason|name` per line."""
    options = ("--noheader", "--states=all", "--format=%i|%T|%r|%j")
    return ask("squeue", *options, *user_filter(), clusters=clusters)


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
        # The name of a program, in parentheses, can be any bytes.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def is_running(pid: int, ticks: int) -> bool:
    """Whether the process with this id and start time runs, not a later one with its id."""
    return start_ticks(pid) == ticks
