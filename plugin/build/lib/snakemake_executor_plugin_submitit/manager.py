"""The main process's side: which allocations there are, what each has to do, how it ended.

Nothing here knows Snakemake. Jobs go in by `put`, outcomes come out of `poll`; between the two
they wait for an allocation, are under way in one, or, when one has ended early, wait for the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic

import psutil
from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit import spool as spool_events
from snakemake_executor_plugin_submitit.allocation import Allocation
from snakemake_executor_plugin_submitit.history import slurm_record
from snakemake_executor_plugin_submitit.liveness import (
    GONE,
    HELD,
    Liveness,
    LocalLiveness,
    SlurmLiveness,
    Submission,
)
from snakemake_executor_plugin_submitit.spool import Spool, write_atomically
from snakemake_executor_plugin_submitit.submission import SchedulerUnavailable, cancel, submit
from snakemake_executor_plugin_submitit.tracking import (
    AllocationState,
    Failure,
    Job,
    Outcome,
    Queued,
)
from snakemake_executor_plugin_submitit.usage import Progress, UsageStats, summary

YIELD_S = 3.0
"""How long an allocation without jobs may keep others waiting: Snakemake's next job takes less."""
SLURM_EXIT_S = 30.0
"""How long the end of Slurm's jobs is waited for, so that it can be recorded."""
HEARD_S = 60.0
"""For so long after an allocation has last written, squeue's not knowing it is not believed."""
RETRY_S = 20.0
"""How long after a cluster has not answered it is asked again."""
PROGRESS_S = (10.0, 60.0)
"""Seconds until the first report of progress; the pauses then double up to the second."""
LOCAL_EXIT_S = 60.0
"""How long local allocations have to take their services down before they are killed."""


Report = Callable[..., None]
"""Called with a line of text and, if it is about the state of one allocation, `asdict` of its
`Progress`."""


class AllocationManager(Generic[Job]):
    """All allocations of a run. `report` gets one line at a time, see `Report`.

    At most `max_allocations` are up at once (None: any number). Thread-safe.
    """

    def __init__(
        self,
        folder: Path,
        cluster: str,
        max_allocations: int | None,
        idle_timeout: float,
        report: Report,
        records: Path | None = None,
        preload: tuple[str, ...] = (),
    ) -> None:
        self._folder, self._cluster, self._max_allocations, self._idle_timeout = (
            folder,
            cluster,
            max_allocations,
            idle_timeout,
        )
        self._report_line, self._records, self._preload = report, records, preload
        self._began = time.monotonic()
        self._usage: dict[str, UsageStats] = {}
        self._not_before: dict[str, float] = {}
        self._reported, self._report_after = self._began, PROGRESS_S[0]
        self._shown: dict[str, Progress] = {}
        self._liveness: Liveness = SlurmLiveness() if cluster == "slurm" else LocalLiveness()
        self._guard = threading.RLock()
        self._waiting: dict[str, list[Queued[Job]]] = {}
        self._settled: list[Outcome[Job]] = []
        self._ending = False
        self._live: dict[str, AllocationState[Job]] = {}
        self._done_meanwhile: set[str] = set()
        for orphan in self._orphans():
            self._live[orphan.submission.name] = orphan

    def put(self, jobs: Iterable[tuple[str, Queued[Job]]]) -> None:
        """Queue jobs, each with the name of its allocation."""
        with self._guard:
            for name, queued in jobs:
                account = self._usage_of(name)
                account.given.add(queued.task.key)
                if queued.task.key in self._done_meanwhile:
                    account.done.add(queued.task.key)
                    self._settled.append(Outcome((queued.job,)))
                else:
                    self._waiting.setdefault(name, []).append(queued)
            self._dispatch()

    def poll(self) -> list[Outcome[Job]]:
        """What has come to its end since the last call; allocations go on or begin as needed."""
        with self._guard:
            if self._ending:
                return []
            outcomes, self._settled = self._settled, []
            for live in list(self._live.values()):
                outcomes += live.read(self._report_line)
                state = None if live.ended else self._end_of(live)
                if live.ended or state:
                    outcomes += live.read(
                        self._report_line
                    )  # what it wrote before it was seen to end
                    del self._live[live.name]
                    outcomes += self._settle(live, state)
            self._dispatch()
            self._report()
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
        if self._ending:
            return
        self._ending = True
        for live in self._live.values():
            live.spool.clear()
            live.spool.close()
            if cancelled:
                cancel(live.submission)
                self._report_line(f"Allocation {live.name}: cancelled.")
            elif self._cluster == "slurm" and live.given:
                done = f"{live.finished} of {live.given} jobs done"
                self._report_line(f"Allocation {live.name}: {done}; ends now.")
        if self._cluster == "local":
            deadline = time.monotonic() + LOCAL_EXIT_S
            for live in self._live.values():
                live.read(self._report_line)
                while self._end_of(live) is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                live.read(self._report_line)
                live.tickets.clear()
                self._settle(live, GONE)
        else:
            self._see_off()
        self._live.clear()
        seconds = time.monotonic() - self._began
        lines = summary(self._usage.values(), seconds, shlex.join(sys.argv))
        if lines:
            self._report_line("\n    ".join(["Allocations:", *lines]))

    def _see_off(self) -> None:
        """Wait a moment until Slurm's jobs are gone, so that their ends can be kept."""
        deadline = time.monotonic() + SLURM_EXIT_S
        liveness = SlurmLiveness(period=1.0, confirmation=1.0)
        left = dict(self._live)
        while left and time.monotonic() < deadline:
            for name, live in list(left.items()):
                live.read(self._report_line)
                if state := liveness.end_of(live.submission):
                    live.read(self._report_line)
                    self._keep(live, state)
                    del left[name]
            time.sleep(0.5 if left else 0)
        for live in left.values():
            self._keep(live, None)

    # allocations begin

    def _dispatch(self) -> None:
        if self._ending:
            return
        for name in list(self._waiting):
            if name not in self._live and (self._full() or self._later(name)):
                continue
            jobs = self._waiting.pop(name)
            try:
                self._assign(name, jobs)
            except SchedulerUnavailable as error:
                self._waiting[name] = jobs
                self._not_before[name] = time.monotonic() + RETRY_S
                self._report_line(
                    f"Allocation {name}: {self._cluster} does not answer ({error}); "
                    f"once more in {RETRY_S:.0f} s."
                )
            except WorkflowError as error:
                refused = tuple(queued.job for queued in jobs)
                account = self._usage_of(name)
                account.shown = True
                account.failures.append(_first_line(error))
                self._settled.append(Outcome(refused, Failure(str(error), None)))
        if self._waiting and self._full():
            for live in self._live.values():
                if not live.tickets and time.monotonic() - live.busy > YIELD_S:
                    live.spool.close()
                    live.closing = True

    def _usage_of(self, name: str) -> UsageStats:
        return self._usage.setdefault(name, UsageStats(name))

    def _later(self, name: str) -> bool:
        return time.monotonic() < self._not_before.get(name, 0.0)

    def _full(self) -> bool:
        return self._max_allocations is not None and len(self._live) >= self._max_allocations

    def _assign(self, name: str, jobs: list[Queued[Job]]) -> None:
        live = self._live.get(name)
        if live is None:
            self._live[name] = self._begin(jobs)
            return
        if live.handle is None and not live.given:
            self._report_line(
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

    def _begin(self, jobs: list[Queued[Job]]) -> AllocationState[Job]:
        need = jobs[0].need()
        identity = uuid.uuid4().hex[:8]
        spool = Spool.create(self._folder / slug(need.name) / identity)
        (self._index / identity).write_text(str(spool.root))
        if not need.is_reusable:
            spool.close()
        function = Allocation(
            name=need.name,
            folder=str(spool.root),
            service=need.service,
            params=need.params,
            resources=need.resources,
            idle_timeout=self._idle_timeout,
            limit=need.parameters.limit_s,
            warned=need.parameters.warned_s,
            preload=self._preload if need.service else (),
        )
        tickets = {spool.put(queued.task): queued for queued in jobs}
        job_name = f"{slug(need.name)[:80]}-{identity}"
        folder = spool.root / "submitit"
        submission, handle = submit(
            need.name, self._cluster, job_name, folder, need.parameters, function
        )
        write_atomically(spool.root / "allocation.json", json.dumps(asdict(submission)))
        self._report_line(
            f"Allocation {need.name}: submitted as job {submission.job_id} with "
            f"{_count(len(jobs), 'job')}; log: {submission.log}"
        )
        account = self._usage_of(need.name)
        account.jobs.append(f"job {submission.job_id}")
        account.shown = need.service is not None
        return AllocationState(
            submission,
            spool,
            handle,
            closing=not need.is_reusable,
            announced=need.service is not None,
            account=account,
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

    def _orphans(self) -> Iterator[AllocationState[Job]]:
        """Those that still run; what they have not begun is taken back."""
        began = psutil.Process().create_time()
        for entry in sorted(self._index.iterdir()):
            spool = Spool(Path(entry.read_text()))
            try:
                record = Submission(**json.loads((spool.root / "allocation.json").read_text()))
            except (FileNotFoundError, ValueError, TypeError):
                record = None
            with contextlib.suppress(FileNotFoundError):
                spool.clear()
            # Done since Snakemake looked for what is missing, or was about to look.
            self._done_meanwhile |= spool.done_since(began)
            if record is None or not self._is_ours(record):
                # Killed while it was submitted, or out of sight from here: should it run, it ends.
                with contextlib.suppress(FileNotFoundError):
                    spool.close()
                entry.unlink()
                continue
            account = UsageStats(record.name, shown=True, jobs=[f"job {record.job_id}, adopted"])
            live: AllocationState[Job] = AllocationState(
                record, spool, closing=spool.closed, account=account
            )
            live.under_way = spool.under_way()
            # Not through `live`: it has to tell what has been done to those who will ask for it.
            seen: AllocationState[Job] = AllocationState(record, spool)
            seen.read(self._report_line)
            live.process, live.up = seen.process, seen.up
            if seen.ended or self._end_of(seen):
                entry.unlink()
            else:
                self._usage[record.name] = account
                yield live

    def _is_ours(self, record: Submission) -> bool:
        here = self._cluster == "slurm" or record.host == socket.gethostname()
        return record.cluster == self._cluster and here

    # allocations end

    def _end_of(self, live: AllocationState[Job]) -> str | None:
        if self._cluster == "local" and live.runs_here():
            return None
        state = self._liveness.end_of(live.submission, urgent=live.stopped is not None)
        if state == GONE and self._cluster == "slurm" and time.monotonic() - live.heard < HEARD_S:
            return None  # squeue may be wrong; whoever writes is alive
        return state

    def _settle(self, live: AllocationState[Job], state: str | None) -> list[Outcome[Job]]:
        """What becomes of the jobs of an allocation that has ended."""
        (self._index / live.spool.root.name).unlink(missing_ok=True)
        if live.ended is None:
            # Should it be alive after all, it does no more of what others will do now.
            with contextlib.suppress(OSError):
                live.spool.clear()
                live.spool.close()
            if self._cluster == "local":
                live.kill_here()
            elif state in (GONE, HELD):
                cancel(live.submission)
        self._keep(live, state)
        if not live.given:
            return []
        ended = live.describe_end(state)
        self._shown.pop(live.name, None)
        if not live.tickets:
            self._report_line(f"{ended}.", self._ended(live, "ended"))
            return []
        left = live.left()
        if not live.may_be_continued(state):
            detail = live.ended.data["detail"] if live.ended else ""
            message = "\n".join(filter(None, (f"{ended}.", detail)))
            live.account.failures.append(_first_line(detail or ended))
            failure = Failure(message, live.submission.log)
            self._report_line(f"{ended}.", self._ended(live, "failed"))
            return [Outcome(tuple(queued.job for queued in left), failure)]
        text = f"{ended}; {_count(len(left), 'job')} left for another allocation."
        self._report_line(text, self._ended(live, "ended"))
        self._waiting[live.name] = left + self._waiting.get(live.name, [])
        return []

    def _ended(self, live: AllocationState[Job], state: str) -> dict[str, Any]:
        done, total = len(live.account.done), len(live.account.given)
        return asdict(Progress(live.name, state, state, done, total))

    def _keep(self, live: AllocationState[Job], state: str | None) -> None:
        """Keep what is known of an allocation that has ended: our account and Slurm's record."""
        if self._records is None or not live.announced:
            return
        record = {
            "allocation": asdict(live.submission),
            "state": state,
            "reason": live.reason or (live.stopped.data["reason"] if live.stopped else None),
            "jobs_given": live.given,
            "jobs_finished": live.finished,
            "journal": [
                {"event": event.kind, **event.data}
                for event in live.spool.journal().new()
                if event.kind not in (spool_events.BEGAN, spool_events.DONE)
            ],
        }
        if self._cluster == "slurm":
            record["slurm"] = slurm_record(live.submission.job_id)
        name = f"{slug(live.name)}.{live.submission.job_id}.json"
        with contextlib.suppress(OSError):
            self._records.mkdir(parents=True, exist_ok=True)
            write_atomically(self._records / name, json.dumps(record, indent=2) + "\n")

    # what people see

    def _report(self) -> None:
        """Report allocations whose state has changed and, from time to time, their progress."""
        due = time.monotonic() - self._reported >= self._report_after
        for each in self._progress_now():
            shown = self._shown.get(each.name)
            changed = shown is None or (shown.state, shown.node, shown.reason) != (
                each.state,
                each.node,
                each.reason,
            )
            if changed or (due and shown is not None and shown.done != each.done):
                self._report_line(each.describe(), asdict(each))
                self._shown[each.name] = each
        if due:
            self._reported = time.monotonic()
            self._report_after = min(2 * self._report_after, PROGRESS_S[1])

    def _progress_now(self) -> Iterator[Progress]:
        for name, usage in self._usage.items():
            live, waiting = self._live.get(name), len(self._waiting.get(name, []))
            left = waiting + (len(live.tickets) if live else 0)
            if live and live.announced:
                yield live.progress(self._liveness.describe(live.submission), left)
            elif left and live is None:
                done, total = len(usage.done), len(usage.given)
                text = "waits until another allocation ends"
                yield Progress(name, "pending", text, done, total, reason=text)


def slug(name: str) -> str:
    """The name as part of a path and of a Slurm job's name; different names stay different."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:100]
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return plain if plain == name else f"{plain}-{digest}"


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[0]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
