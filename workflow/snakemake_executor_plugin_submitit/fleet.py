"""The main process's side: which allocations there are, what each has to do, how it ended.

Nothing here knows Snakemake. Jobs go in by `put`, outcomes come out of `poll`; between the two
they wait for an allocation, are under way in one, or, when one has ended early, wait for the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit import allocation as inside
from snakemake_executor_plugin_submitit import spool as events
from snakemake_executor_plugin_submitit.liveness import (
    GONE,
    Liveness,
    LocalLiveness,
    SlurmLiveness,
    Submission,
    runs,
    start_ticks,
)
from snakemake_executor_plugin_submitit.spool import Event, Spool, Task, write_atomically
from snakemake_executor_plugin_submitit.submission import Parameters, Submitted, cancel, submit

YIELD_S = 3.0
"""How long an allocation without jobs may keep others waiting: Snakemake's next job takes less."""
LOCAL_EXIT_S = 60.0
"""How long local allocations have to take their services down before they are killed."""

Job = TypeVar("Job")


@dataclass(frozen=True)
class Need:
    """What an allocation is to be: all but its tasks."""

    name: str
    service: str | None
    params: dict[str, Any]
    resources: dict[str, Any]
    parameters: Parameters
    lingers: bool = True


@dataclass(frozen=True)
class Queued(Generic[Job]):
    """A job with the task that carries it out."""

    job: Job
    task: Task
    need: Callable[[], Need]


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
class _Live(Generic[Job]):
    """An allocation that has not been seen to end."""

    submission: Submission
    spool: Spool
    handle: Any = None  # submitit's; none where an earlier run has submitted it
    closing: bool = False
    announced: bool = False
    process: Event | None = None
    stopped: Event | None = None
    ended: Event | None = None
    under_way: dict[str, str] = field(default_factory=dict)
    tickets: dict[str, Queued[Job]] = field(default_factory=dict)
    interrupted: str | None = None
    busy: float = field(default_factory=time.monotonic)
    given: int = 0
    finished: int = 0

    def __post_init__(self) -> None:
        self.journal = self.spool.journal()


class Fleet(Generic[Job]):
    """All allocations of a run. `tell` gets one line of progress at a time.

    At most `most` are up at once (None: any number). Thread-safe.
    """

    def __init__(
        self,
        folder: Path,
        cluster: str,
        most: int | None,
        linger: float,
        tell: Callable[[str], None],
    ) -> None:
        self._folder, self._cluster, self._most, self._linger = folder, cluster, most, linger
        self._tell = tell
        self._liveness: Liveness = SlurmLiveness() if cluster == "slurm" else LocalLiveness()
        self._guard = threading.RLock()
        self._waiting: dict[str, list[Queued[Job]]] = {}
        self._refused: list[Outcome[Job]] = []
        self._cancelled = False
        self._live: dict[str, _Live[Job]] = {}
        for orphan in self._orphans():
            self._live[orphan.submission.name] = orphan

    def put(self, jobs: Iterable[tuple[str, Queued[Job]]]) -> None:
        """Queue jobs, each with the name of its allocation."""
        with self._guard:
            for name, queued in jobs:
                self._waiting.setdefault(name, []).append(queued)
            self._dispatch()

    def poll(self) -> list[Outcome[Job]]:
        """What has come to its end since the last call; allocations go on or begin as needed."""
        with self._guard:
            if self._cancelled:
                return []
            outcomes: list[Outcome[Job]] = []
            for live in list(self._live.values()):
                outcomes += self._read(live)
                state = None if live.ended else self._end_of(live)
                if live.ended or state:
                    outcomes += self._read(live)  # what it wrote before it was seen to end
                    del self._live[live.submission.name]
                    outcomes += self._settle(live, state)
            self._dispatch()
            outcomes += self._refused
            self._refused = []
            return outcomes

    def close(self) -> None:
        """Let all allocations end; on this machine, wait until they have."""
        with self._guard:
            self._cancelled = True
            for live in self._live.values():
                live.spool.clear()
                live.spool.close()
            self._see_off()

    def cancel(self) -> None:
        """Stop all allocations and their jobs; on this machine, wait until they are gone."""
        with self._guard:
            self._cancelled = True
            for live in self._live.values():
                live.spool.clear()
                live.spool.close()
                cancel(live.submission)
                self._tell(f"Allocation {live.submission.name}: cancelled.")
            self._see_off()

    # allocations begin

    def _dispatch(self) -> None:
        if self._cancelled:
            return
        for name in list(self._waiting):
            if name not in self._live and self._full():
                continue
            jobs = self._waiting.pop(name)
            try:
                self._assign(name, jobs)
            except WorkflowError as error:
                refused = tuple(queued.job for queued in jobs)
                self._refused.append(Outcome(refused, Failure(str(error), None)))

        if self._waiting and self._full():
            for live in self._live.values():
                if not live.tickets and time.monotonic() - live.busy > YIELD_S:
                    live.spool.close()
                    live.closing = True

    def _full(self) -> bool:
        return self._most is not None and len(self._live) >= self._most

    def _assign(self, name: str, jobs: list[Queued[Job]]) -> None:
        live = self._live.get(name)
        if live is None:
            self._live[name] = self._begin(jobs)
            return
        if live.handle is None and not live.given:
            self._tell(
                f"Allocation {name}: job {live.submission.job_id} of an earlier run is still "
                f"there and takes {_count(len(jobs), 'job')}."
            )
        for queued in jobs:
            ticket = live.under_way.pop(queued.task.key, None)
            if ticket is None and live.closing:
                self._waiting.setdefault(name, []).append(queued)
                continue
            live.given += 1
            live.tickets[ticket or live.spool.put(queued.task)] = queued

    def _begin(self, jobs: list[Queued[Job]]) -> _Live[Job]:
        need = jobs[0].need()
        identity = uuid.uuid4().hex[:8]
        spool = Spool.create(self._folder / slug(need.name) / identity)
        (self._index / identity).write_text(str(spool.root))
        if not need.lingers:
            spool.close()
        function = inside.Allocation(
            name=need.name,
            folder=str(spool.root),
            service=need.service,
            params=need.params,
            resources=need.resources,
            linger=self._linger,
            limit=need.parameters.limit_s,
            warned=need.parameters.warned_s,
        )
        tickets = {spool.put(queued.task): queued for queued in jobs}
        job_name = f"{slug(need.name)[:80]}-{identity}"
        folder = spool.root / "submitit"
        submitted: Submitted = submit(
            need.name, self._cluster, job_name, folder, need.parameters, function
        )
        submission = submitted.submission
        write_atomically(spool.root / "allocation.json", json.dumps(asdict(submission)))
        self._tell(
            f"Allocation {need.name}: submitted as job {submission.job_id} with "
            f"{_count(len(jobs), 'job')}; log: {submission.log}"
        )
        return _Live(
            submission,
            spool,
            submitted.handle,
            closing=not need.lingers,
            announced=need.service is not None,
            tickets=tickets,
            given=len(jobs),
        )

    # allocations of an earlier run

    @property
    def _index(self) -> Path:
        """One file for each allocation that has not been seen to end: its spool's path."""
        index = self._folder / "live"
        index.mkdir(parents=True, exist_ok=True)
        return index

    def _orphans(self) -> Iterator[_Live[Job]]:
        """Those that still run; what they have not begun is taken back."""
        for entry in sorted(self._index.iterdir()):
            spool = Spool(Path(entry.read_text()))
            try:
                record = json.loads((spool.root / "allocation.json").read_text())
            except (FileNotFoundError, ValueError):
                # The main process was killed while it submitted: should that ever run, it ends.
                with contextlib.suppress(FileNotFoundError):
                    spool.clear()
                    spool.close()
                entry.unlink()
                continue
            spool.clear()
            live: _Live[Job] = _Live(Submission(**record), spool, closing=spool.closed)
            live.under_way = spool.under_way()
            # Not through `live`: it has to tell what has been done to those who will ask for it.
            seen: _Live[Job] = _Live(live.submission, spool)
            self._read(seen)
            live.process = seen.process
            if seen.ended or self._end_of(seen):
                entry.unlink()
            else:
                yield live

    # allocations go on and end

    def _read(self, live: _Live[Job]) -> list[Outcome[Job]]:
        outcomes: list[Outcome[Job]] = []
        for event in live.journal.new():
            name, data = live.submission.name, event.data
            if event.kind == events.STARTED:
                live.process = event
            elif event.kind == events.UP and live.announced:
                self._tell(f"Allocation {name}: up after {data['seconds']:.0f} s.")
            elif event.kind == events.BEGAN:
                live.interrupted = data["ticket"]
            elif event.kind == events.DONE:
                live.interrupted, live.busy = None, time.monotonic()
                if queued := live.tickets.pop(data["ticket"], None):
                    live.finished += 1
                    failure = _failure(live, data["ticket"], queued.task, data["status"])
                    outcomes.append(Outcome((queued.job,), failure))
            elif event.kind == events.STOPPED:
                live.stopped = event
            elif event.kind == events.ENDED:
                live.ended = event
        return outcomes

    def _end_of(self, live: _Live[Job]) -> str | None:
        if self._cluster == "local":
            if live.handle is not None:
                live.handle.done()  # reaps it
            if _process_runs(live.process):
                return None
        return self._liveness.end_of(live.submission)

    def _settle(self, live: _Live[Job], state: str | None) -> list[Outcome[Job]]:
        """What becomes of the jobs of an allocation that has ended."""
        name = live.submission.name
        (self._index / live.spool.root.name).unlink(missing_ok=True)
        if live.ended is None and self._cluster == "local":
            _kill_remains(live)
        if not live.given:
            return []
        told = f"Allocation {name}: {_why(live, state)}; {live.finished} of {live.given} jobs done"
        if not live.tickets:
            self._tell(f"{told}.")
            return []
        left = list(live.tickets.values())
        if not _may_go_on(live, state):
            detail = live.ended.data["detail"] if live.ended else ""
            message = "\n".join(filter(None, (f"{told}.", detail)))
            failure = Failure(message, live.submission.log)
            return [Outcome(tuple(queued.job for queued in left), failure)]
        self._tell(f"{told}; {_count(len(left), 'job')} left for a further allocation.")
        # A job that takes its allocation down must not keep the others from being done.
        last = live.tickets.get(live.interrupted or "")
        left.sort(key=lambda queued: queued is last)
        self._waiting[name] = left + self._waiting.get(name, [])
        return []

    def _see_off(self) -> None:
        """On this machine, wait for all allocations to end; kill those that don't."""
        if self._cluster == "local":
            deadline = time.monotonic() + LOCAL_EXIT_S
            for live in self._live.values():
                live.tickets.clear()
                self._read(live)
                while self._end_of(live) is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                self._read(live)
                self._settle(live, GONE)
        self._live.clear()


def slug(name: str) -> str:
    """The name as part of a path and of a Slurm job's name; different names stay different."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:100]
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return plain if plain == name else f"{plain}-{digest}"


def _failure(live: _Live[Any], ticket: str, task: Task, status: int) -> Failure | None:
    if status == 0:
        return None
    how = f"Exit status {status}" if status > 0 else f"Killed by {signal.Signals(-status).name}"
    where = f"in allocation {live.submission.name}."
    return Failure(
        f"{how} {where}", task.log or str(live.spool.log_of(ticket)), of_allocation=False
    )


def _may_go_on(live: _Live[Any], state: str | None) -> bool:
    """Whether a further allocation is to take what is left.

    Not without a finished job: what has prevented the first will prevent the second as well.
    """
    if live.ended and live.ended.data["reason"] in (inside.IDLE, inside.CLOSED):
        return True  # jobs came just as it ended
    if state == "CANCELLED":
        return False  # somebody wants it so
    adopted_too_late = live.handle is None and live.ended is None
    return live.finished > 0 or adopted_too_late


def _why(live: _Live[Any], state: str | None) -> str:
    if live.ended:
        return {
            inside.IDLE: "ended",
            inside.CLOSED: "ended",
            inside.WALLTIME: "ended by its time limit",
            inside.UNHEALTHY: "ended, its service is no longer healthy",
            inside.BRING_UP: "its service did not come up",
            inside.FAILURE: "failed",
        }[live.ended.data["reason"]]
    if live.stopped:
        return f"stopped by {live.stopped.data['reason']}"
    return "was killed" if state == GONE else f"ended as {state}"


def _process_runs(process: Event | None) -> bool:
    return process is not None and runs(process.data["pid"], process.data["start_ticks"])


def _kill_remains(live: _Live[Any]) -> None:
    """Kill what a local allocation has left behind, and itself."""
    submission = live.submission
    if submission.start_ticks is not None and runs(int(submission.job_id), submission.start_ticks):
        os.kill(int(submission.job_id), signal.SIGKILL)
    if live.process is None or not live.process.data["own_session"]:
        return
    pid, begun = live.process.data["pid"], live.process.data["start_ticks"]
    # Its number is not given to others as long as its group has members.
    if start_ticks(pid) in (None, begun):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
