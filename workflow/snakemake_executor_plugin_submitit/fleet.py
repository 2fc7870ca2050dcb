"""The main process's side: which allocations there are, what each has to do, how it ended.

Nothing here knows Snakemake. Jobs go in by `put`, outcomes come out of `poll`; between the two
they wait for an allocation, are under way in one, or, when one has ended early, wait for the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Generic

from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit.allocation import Allocation
from snakemake_executor_plugin_submitit.liveness import (
    GONE,
    Liveness,
    LocalLiveness,
    SlurmLiveness,
    Submission,
)
from snakemake_executor_plugin_submitit.spool import Spool, write_atomically
from snakemake_executor_plugin_submitit.submission import cancel, submit
from snakemake_executor_plugin_submitit.tracking import Failure, Job, Outcome, Queued, Tracked

YIELD_S = 3.0
"""How long an allocation without jobs may keep others waiting: Snakemake's next job takes less."""
LOCAL_EXIT_S = 60.0
"""How long local allocations have to take their services down before they are killed."""


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
        self._ending = False
        self._live: dict[str, Tracked[Job]] = {}
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
            if self._ending:
                return []
            outcomes, self._refused = self._refused, []
            for live in list(self._live.values()):
                outcomes += live.read(self._tell)
                state = None if live.ended else self._end_of(live)
                if live.ended or state:
                    outcomes += live.read(self._tell)  # what it wrote before it was seen to end
                    del self._live[live.name]
                    outcomes += self._settle(live, state)
            self._dispatch()
            return outcomes

    def close(self) -> None:
        """Let all allocations end; on this machine, wait until they have."""
        with self._guard:
            self._end(cancelled=False)

    def cancel(self) -> None:
        """Stop all allocations and their jobs; on this machine, wait until they are gone."""
        with self._guard:
            self._end(cancelled=True)

    def _end(self, cancelled: bool) -> None:
        self._ending = True
        for live in self._live.values():
            live.spool.clear()
            live.spool.close()
            if cancelled:
                cancel(live.submission)
                self._tell(f"Allocation {live.name}: cancelled.")
            elif self._cluster == "slurm" and live.given:
                done = f"{live.finished} of {live.given} jobs done"
                self._tell(f"Allocation {live.name}: {done}; ends now.")
        if self._cluster == "local":
            deadline = time.monotonic() + LOCAL_EXIT_S
            for live in self._live.values():
                live.read(self._tell)
                while self._end_of(live) is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                live.read(self._tell)
                live.tickets.clear()
                self._settle(live, GONE)
        self._live.clear()

    # allocations begin

    def _dispatch(self) -> None:
        if self._ending:
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

    def _begin(self, jobs: list[Queued[Job]]) -> Tracked[Job]:
        need = jobs[0].need()
        identity = uuid.uuid4().hex[:8]
        spool = Spool.create(self._folder / slug(need.name) / identity)
        (self._index / identity).write_text(str(spool.root))
        if not need.lingers:
            spool.close()
        function = Allocation(
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
        submission, handle = submit(
            need.name, self._cluster, job_name, folder, need.parameters, function
        )
        write_atomically(spool.root / "allocation.json", json.dumps(asdict(submission)))
        self._tell(
            f"Allocation {need.name}: submitted as job {submission.job_id} with "
            f"{_count(len(jobs), 'job')}; log: {submission.log}"
        )
        return Tracked(
            submission,
            spool,
            handle,
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

    def _orphans(self) -> Iterator[Tracked[Job]]:
        """Those that still run; what they have not begun is taken back."""
        for entry in sorted(self._index.iterdir()):
            spool = Spool(Path(entry.read_text()))
            try:
                record = Submission(**json.loads((spool.root / "allocation.json").read_text()))
            except (FileNotFoundError, ValueError, TypeError):
                record = None
            with contextlib.suppress(FileNotFoundError):
                spool.clear()
            if record is None or not self._is_ours(record):
                # Killed while it was submitted, or out of sight from here: should it run, it ends.
                with contextlib.suppress(FileNotFoundError):
                    spool.close()
                entry.unlink()
                continue
            live: Tracked[Job] = Tracked(record, spool, closing=spool.closed)
            live.under_way = spool.under_way()
            # Not through `live`: it has to tell what has been done to those who will ask for it.
            seen: Tracked[Job] = Tracked(record, spool)
            seen.read(self._tell)
            live.process = seen.process
            if seen.ended or self._end_of(seen):
                entry.unlink()
            else:
                yield live

    def _is_ours(self, record: Submission) -> bool:
        here = self._cluster == "slurm" or record.host == socket.gethostname()
        return record.cluster == self._cluster and here

    # allocations end

    def _end_of(self, live: Tracked[Job]) -> str | None:
        if self._cluster == "local" and live.runs_here():
            return None
        return self._liveness.end_of(live.submission)

    def _settle(self, live: Tracked[Job], state: str | None) -> list[Outcome[Job]]:
        """What becomes of the jobs of an allocation that has ended."""
        (self._index / live.spool.root.name).unlink(missing_ok=True)
        if live.ended is None and self._cluster == "local":
            live.kill_here()
        if not live.given:
            return []
        told = live.told_end(state)
        if not live.tickets:
            self._tell(f"{told}.")
            return []
        left = live.left()
        if not live.may_be_continued(state):
            detail = live.ended.data["detail"] if live.ended else ""
            message = "\n".join(filter(None, (f"{told}.", detail)))
            failure = Failure(message, live.submission.log)
            return [Outcome(tuple(queued.job for queued in left), failure)]
        self._tell(f"{told}; {_count(len(left), 'job')} left for a further allocation.")
        self._waiting[live.name] = left + self._waiting.get(live.name, [])
        return []


def slug(name: str) -> str:
    """The name as part of a path and of a Slurm job's name; different names stay different."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:100]
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return plain if plain == name else f"{plain}-{digest}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
