"""One allocation as the main process sees it: its jobs, its events, and how it ended."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from snakemake_executor_plugin_submitit import allocation as reasons
from snakemake_executor_plugin_submitit import spool as events
from snakemake_executor_plugin_submitit.liveness import (
    GONE,
    HELD,
    Submission,
    is_running,
    start_ticks,
)
from snakemake_executor_plugin_submitit.progress import (
    ENDED,
    PENDING,
    RUNNING,
    STARTING,
    Progress,
)
from snakemake_executor_plugin_submitit.spool import Event, Spool, Task
from snakemake_executor_plugin_submitit.submission import Parameters
from snakemake_executor_plugin_submitit.usage import UsageStats, format_duration

Job = TypeVar("Job")

CLUSTER_ENDS = frozenset(("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", HELD))
"""End states that the cluster has caused. They say nothing about the allocation itself."""
MAX_LOSSES = 5
"""After this number of lost allocations in a row without a finished job, the jobs fail."""

_END_TEXTS = {
    reasons.IDLE: "ended",
    reasons.CLOSED: "ended",
    reasons.TIME_LIMIT: "reached its time limit",
    reasons.PREEMPTED: "was preempted",
    reasons.UNHEALTHY: "ended because its service is no longer healthy",
    reasons.START_FAILED: "its service did not start",
    reasons.FAILED: "failed",
    reasons.NODE_LOST: "lost one of its nodes",
}


@dataclass(frozen=True)
class AllocationSpec:
    """What is submitted as one allocation. Only a reusable one takes more jobs later.

    Its service is expected to start in `start_s`. Jobs that Snakemake has not handed over yet are
    expected to take `later_s`; None if that is not known.
    """

    name: str
    service: str | None
    params: dict[str, Any]
    resources: dict[str, Any]
    parameters: Parameters
    is_reusable: bool = True
    follower: str | None = None
    start_s: float = 0.0
    later_s: float | None = 0.0


@dataclass(frozen=True)
class QueuedJob(Generic[Job]):
    """A job and its task. `spec` is called if the job is the first of a new allocation.

    `expected_s` are the seconds that it takes at most, as far as is known; None if nothing is.
    """

    job: Job
    task: Task
    spec: Callable[[], AllocationSpec]
    expected_s: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why jobs are not done, and the log with the details.

    `allocation` is set if the allocation failed, not the jobs themselves.
    """

    message: str
    log: str | None
    allocation: Progress | None = None


@dataclass(frozen=True)
class Outcome(Generic[Job]):
    """Jobs that have ended in the same way; without a failure they are done."""

    jobs: tuple[Job, ...]
    failure: Failure | None = None


@dataclass
class AllocationState(Generic[Job]):
    """An allocation that has not ended, as far as the main process knows.

    `handle` is submitit's handle; None if an earlier run submitted the allocation. `tickets` are
    its unfinished jobs. `inherited` are the tickets that run for an earlier run, by key. Of those,
    `done_unasked` has the keys that succeeded after `since` (seconds since the epoch) and before
    this run asked for them. The allocation was given `assigned` jobs, of which `finished` have
    ended. `last_job_end` and `last_event` are times of time.monotonic.
    """

    submission: Submission
    spool: Spool
    handle: Any = None
    is_closing: bool = False
    has_service: bool = False
    usage: UsageStats = field(default_factory=lambda: UsageStats(""))
    tickets: dict[str, QueuedJob[Job]] = field(default_factory=dict)
    inherited: dict[str, str] = field(default_factory=dict)
    since: float = math.inf
    done_unasked: set[str] = field(default_factory=set)
    assigned: int = 0
    finished: int = 0
    last_job_end: float = field(default_factory=time.monotonic)
    last_event: float = field(default_factory=time.monotonic)
    process: Event | None = None
    service: Event | None = None
    running_ticket: str | None = None
    stopped: Event | None = None
    ended: Event | None = None

    def __post_init__(self) -> None:
        self._journal = self.spool.journal()

    @property
    def name(self) -> str:
        return self.submission.name

    @property
    def end_reason(self) -> str | None:
        """The reason that the allocation itself has recorded; None if it has recorded none."""
        return self.ended.data["reason"] if self.ended else None

    def read_events(self) -> list[Outcome[Job]]:
        """Read the new events. Returns the jobs that have ended since the last call."""
        outcomes = []
        for event in self._journal.read_new():
            self.last_event = time.monotonic()
            self.usage.add(event)
            if event.kind == events.STARTED:
                self.process, self.stopped, self.service = event, None, None
            elif event.kind == events.SERVICE_STARTED:
                self.service = event
            elif event.kind == events.JOB_STARTED:
                self.running_ticket = event.data["ticket"]
            elif event.kind == events.JOB_FINISHED:
                self.running_ticket, self.last_job_end = None, time.monotonic()
                if queued := self.tickets.pop(event.data["ticket"], None):
                    self.finished += 1
                    failure = self._job_failure(event, queued.task)
                    keys = self.usage.failed if failure else self.usage.done
                    keys.add(queued.task.key)
                    outcomes.append(Outcome((queued.job,), failure))
                elif event.data["time"] > self.since:
                    key = events.ticket_key(event.data["ticket"])
                    self.inherited.pop(key, None)
                    if event.data["status"] == 0:
                        self.done_unasked.add(key)
            elif event.kind == events.STOPPED:
                self.stopped = event
            elif event.kind == events.ENDED:
                self.ended = event
        return outcomes

    def _job_failure(self, finished: Event, task: Task) -> Failure | None:
        status = finished.data["status"]
        if status == 0:
            return None
        how = f"Exit status {status}" if status > 0 else f"Killed by {signal.Signals(-status).name}"
        log = task.log or str(self.spool.task_log(finished.data["ticket"]))
        return Failure(f"{how} in allocation {self.name}.", log)

    def describe_end(self, state: str | None) -> str:
        """How the allocation has ended; `state` is the scheduler's end state."""
        if self.end_reason:
            return _END_TEXTS[self.end_reason]
        if state == HELD:
            return "is held by Slurm after a failed launch"
        if self.stopped:
            return f"was stopped by {self.stopped.data['reason']}"
        if state == GONE:
            return "was killed" if self.submission.cluster == "local" else "is unknown to Slurm"
        return f"ended with state {state}"

    def unfinished_jobs(self) -> list[QueuedJob[Job]]:
        """The unfinished jobs.

        The running one comes last: if it kills allocations, the others are done first.
        """
        suspect = self.tickets.get(self.running_ticket or "")
        return sorted(self.tickets.values(), key=lambda queued: queued is suspect)

    def should_continue(self, state: str | None) -> bool:
        """Whether another allocation gets the unfinished jobs after the end `state`.

        Without a finished job, the next allocation would fail for the same reason.
        """
        if self.end_reason in (reasons.IDLE, reasons.CLOSED):
            return True  # jobs arrived at the moment of the end
        if state == "CANCELLED":
            return False  # a person wants this
        if self.was_too_short(state):
            return True
        cluster_reasons = (reasons.PREEMPTED, reasons.NODE_LOST)
        if state in CLUSTER_ENDS or self.end_reason in cluster_reasons:
            self.usage.losses += 1
            return self.usage.losses < MAX_LOSSES
        was_already_gone = self.handle is None and self.ended is None
        return self.finished > 0 or was_already_gone

    def was_too_short(self, state: str | None) -> bool:
        """Whether it ran into a time limit that was shorter than allowed."""
        at_limit = self.end_reason == reasons.TIME_LIMIT or state == "TIMEOUT"
        return at_limit and self.submission.is_shortened

    def room_s(self) -> float:
        """Seconds of further jobs that fit into the time limit; infinite if nothing is known."""
        usable_s, begun = self.submission.usable_s, self.process
        if usable_s is None:
            return math.inf
        spent_s = 0.0 if begun is None or self.stopped else time.time() - begun.data["time"]
        if self.service is None:
            spent_s = max(spent_s, self.submission.start_s)
        return usable_s - spent_s - sum(each.expected_s or 0.0 for each in self.tickets.values())

    def progress(self, cluster_state: str, left: int) -> Progress:
        """The current progress.

        `cluster_state` describes the job as the scheduler reports it, empty if unknown. `left`
        counts the jobs that are not done.
        """
        job = f"job {self.submission.job_id}"
        if self.process is None or self.stopped:
            waited = format_duration(time.time() - self.submission.submitted)
            state = f"{cluster_state} for {waited}" if cluster_state else f"submitted {waited} ago"
            reason = cluster_state.partition("(")[2].rstrip(")") or None
            return self._progress(PENDING, f"{job} {state}", reason=reason)
        node = str(self.process.data["host"])
        if self.service is None and self.has_service:
            return self._progress(STARTING, f"starting on {node} ({job})", node)
        text = f"{'running' if self.tickets else 'idle'} on {node} ({job})"
        if self.service and self.has_service and not self.finished:
            text += f", service started in {format_duration(self.service.data['seconds'])}"
        job_s = self.usage.mean_job_s()
        return self._progress(RUNNING, text, node, eta_s=left * job_s if job_s else None)

    def final_progress(self, state: str = ENDED, reason: str | None = None) -> Progress:
        """The progress after the end."""
        return self._progress(state, reason or state, reason=reason)

    def _progress(self, state: str, text: str, node: str | None = None, **more: Any) -> Progress:
        done, total = len(self.usage.done), len(self.usage.jobs)
        return Progress(self.name, state, text, done, total, node, **more)

    def runs_locally(self) -> bool:
        """Whether its process runs on this machine."""
        if self.handle is not None:
            self.handle.done()  # reaps submitit's process
        process = self.process
        return process is not None and is_running(process.data["pid"], process.data["start_ticks"])

    def kill_locally(self) -> None:
        """Kill a local allocation and the processes that it has left behind."""
        pid, ticks = int(self.submission.job_id), self.submission.start_ticks
        if ticks is not None and is_running(pid, ticks):
            os.kill(pid, signal.SIGKILL)
        if self.process is None:
            return
        leader, ticks = self.process.data["pid"], self.process.data["start_ticks"]
        # Its id is not reused as long as its process group has members.
        if start_ticks(leader) in (None, ticks):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
