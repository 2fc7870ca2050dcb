"""One allocation as the main process sees it: what it was given, what it says, how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from snakemake_executor_plugin_submitit import allocation as inside
from snakemake_executor_plugin_submitit import spool as events
from snakemake_executor_plugin_submitit.liveness import GONE, HELD, Submission, runs, start_ticks
from snakemake_executor_plugin_submitit.spool import Event, Spool, Task
from snakemake_executor_plugin_submitit.submission import Parameters
from snakemake_executor_plugin_submitit.usage import Progress, UsageStats, duration

Job = TypeVar("Job")

TAKEN_AWAY = frozenset(("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", HELD))
"""Ends that the cluster brought about, and that say nothing of the allocation itself."""
PATIENCE = 5
"""So many allocations in a row may be taken away before they have done a job."""


@dataclass(frozen=True)
class AllocationSpec:
    """What is submitted as one allocation. One that is not reusable takes no further jobs."""

    name: str
    service: str | None
    params: dict[str, Any]
    resources: dict[str, Any]
    parameters: Parameters
    is_reusable: bool = True


@dataclass(frozen=True)
class Queued(Generic[Job]):
    """A job with the task that carries it out; `need` is asked where it is the first one."""

    job: Job
    task: Task
    need: Callable[[], AllocationSpec]


@dataclass(frozen=True)
class Failure:
    """Why jobs are not done, and where to read on.

    `of_allocation` where the jobs themselves are not to blame.
    """

    message: str
    log: str | None
    of_allocation: bool = True


@dataclass(frozen=True)
class Outcome(Generic[Job]):
    """Jobs that have ended in the same way: well where there is no failure."""

    jobs: tuple[Job, ...]
    failure: Failure | None = None


@dataclass
class AllocationState(Generic[Job]):
    """An allocation that has not been seen to end.

    `handle` is submitit's, None where an earlier run has submitted it. `tickets` are the jobs
    that it was given and has not finished; `under_way` are tickets by the key of their task,
    begun for an earlier run. `busy` is when it last finished a job, `heard` when it last wrote
    anything (time.monotonic).
    """

    submission: Submission
    spool: Spool
    handle: Any = None
    closing: bool = False
    announced: bool = False
    account: UsageStats = field(default_factory=lambda: UsageStats(""))
    tickets: dict[str, Queued[Job]] = field(default_factory=dict)
    under_way: dict[str, str] = field(default_factory=dict)
    given: int = 0
    finished: int = 0
    busy: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    up: Event | None = None
    process: Event | None = None
    interrupted: str | None = None
    stopped: Event | None = None
    ended: Event | None = None

    def __post_init__(self) -> None:
        self._journal = self.spool.journal()

    @property
    def name(self) -> str:
        return self.submission.name

    @property
    def reason(self) -> str | None:
        """Why it has ended by its own words."""
        return self.ended.data["reason"] if self.ended else None

    def read(self, report: Callable[[str], None]) -> list[Outcome[Job]]:
        """What it has finished since the last call."""
        outcomes = []
        for event in self._journal.new():
            self.heard = time.monotonic()
            self.account.note(event)
            if event.kind == events.STARTED:
                self.process, self.stopped, self.up = event, None, None
            elif event.kind == events.UP:
                self.up = event
                if self.announced:
                    report(f"Allocation {self.name}: up after {event.data['seconds']:.0f} s.")
            elif event.kind == events.BEGAN:
                self.interrupted = event.data["ticket"]
            elif event.kind == events.DONE:
                self.interrupted, self.busy = None, time.monotonic()
                if queued := self.tickets.pop(event.data["ticket"], None):
                    self.finished += 1
                    failure = self._failure(event, queued.task)
                    ended = self.account.failed if failure else self.account.done
                    ended.add(queued.task.key)
                    outcomes.append(Outcome((queued.job,), failure))
            elif event.kind == events.STOPPED:
                self.stopped = event
            elif event.kind == events.ENDED:
                self.ended = event
        return outcomes

    def _failure(self, done: Event, task: Task) -> Failure | None:
        status = done.data["status"]
        if status == 0:
            return None
        how = f"Exit status {status}" if status > 0 else f"Killed by {signal.Signals(-status).name}"
        log = task.log or str(self.spool.log_of(done.data["ticket"]))
        return Failure(f"{how} in allocation {self.name}.", log, of_allocation=False)

    def describe_end(self, state: str | None) -> str:
        """How it has ended, for people; `state` is what the cluster says."""
        words = {
            inside.IDLE: "ended",
            inside.CLOSED: "ended",
            inside.WALLTIME: "ended by its time limit",
            inside.PREEMPTED: "was preempted",
            inside.UNHEALTHY: "ended, its service is no longer healthy",
            inside.BRING_UP: "its service did not come up",
            inside.FAILURE: "failed",
        }
        if self.reason:
            how = words[self.reason]
        elif state == HELD:
            how = "could not be started again by Slurm, which holds it"
        elif self.stopped:
            how = f"was stopped by {self.stopped.data['reason']}"
        elif state == GONE:
            how = "was killed" if self.submission.cluster == "local" else "is unknown to Slurm"
        else:
            how = f"ended as {state}"
        return f"Allocation {self.name}: {how}; {self.finished} of {self.given} jobs done"

    def left(self) -> list[Queued[Job]]:
        """The unfinished jobs.

        The one under way comes last: if it takes allocations down, the others are done first.
        """
        suspect = self.tickets.get(self.interrupted or "")
        return sorted(self.tickets.values(), key=lambda queued: queued is suspect)

    def may_be_continued(self, state: str | None) -> bool:
        """Whether a further allocation is to take what is left.

        Not without a finished job: what has prevented the first will prevent the second as well.
        """
        if self.reason in (inside.IDLE, inside.CLOSED):
            return True  # jobs came just as it ended
        if state == "CANCELLED":
            return False  # somebody wants it so
        if state in TAKEN_AWAY or self.reason == inside.PREEMPTED:
            self.account.lost += 1
            return self.account.lost < PATIENCE
        adopted_too_late = self.handle is None and self.ended is None
        return self.finished > 0 or adopted_too_late

    def progress(self, cluster_state: str, left: int) -> Progress:
        """Its progress now. `cluster_state` is what the cluster reports, `left` counts jobs."""
        job = f"job {self.submission.job_id}"
        done, total = len(self.account.done), len(self.account.given)
        if self.process is None or self.stopped:
            waited = duration(time.time() - self.submission.submitted)
            text = f"{job} {cluster_state or 'submitted'} since {waited}"
            reason = cluster_state.partition("(")[2].rstrip(")") or None
            return Progress(self.name, "pending", text, done, total, reason=reason)
        node = str(self.process.data["host"])
        if self.up is None and self.announced:
            text = f"starting, {job} on {node}"
            return Progress(self.name, "starting", text, done, total, node)
        job_s = self.account.job_s()
        eta_s = left * job_s if job_s else None
        text = f"{'running' if self.tickets else 'idle'}, {job} on {node}"
        return Progress(self.name, "running", text, done, total, node, eta_s=eta_s)

    def runs_here(self) -> bool:
        """Whether its process is one of this machine and still there."""
        if self.handle is not None:
            self.handle.done()  # reaps submitit's
        process = self.process
        return process is not None and runs(process.data["pid"], process.data["start_ticks"])

    def kill_here(self) -> None:
        """Kill what a local allocation has left behind, and itself."""
        pid, begun = int(self.submission.job_id), self.submission.start_ticks
        if begun is not None and runs(pid, begun):
            os.kill(pid, signal.SIGKILL)
        if self.process is None:
            return
        leader, begun = self.process.data["pid"], self.process.data["start_ticks"]
        # Its number is not given to others as long as its process group has members.
        if start_ticks(leader) in (None, begun):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
