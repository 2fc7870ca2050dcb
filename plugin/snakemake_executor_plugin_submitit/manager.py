"""The main process's side: submits allocations, gives them jobs, and handles their ends.

This module does not know Snakemake. Jobs enter with `put`, outcomes leave with `poll`. In between,
a job waits for an allocation, runs in one, or, if that has ended early, waits for the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Generic

from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit.allocation import Allocation
from snakemake_executor_plugin_submitit.liveness import (
    GONE,
    HELD,
    Liveness,
    LocalLiveness,
    SlurmLiveness,
)
from snakemake_executor_plugin_submitit.private import NotPrivateError, create_private
from snakemake_executor_plugin_submitit.progress import (
    FAILED,
    PENDING,
    Progress,
    ProgressReporter,
    Report,
)
from snakemake_executor_plugin_submitit.records import write_record
from snakemake_executor_plugin_submitit.registry import Adopted, Registry, write_submission
from snakemake_executor_plugin_submitit.spool import Spool
from snakemake_executor_plugin_submitit.submission import SchedulerUnavailable, cancel, submit
from snakemake_executor_plugin_submitit.tracking import (
    AllocationSpec,
    AllocationState,
    Failure,
    Job,
    Outcome,
    QueuedJob,
)
from snakemake_executor_plugin_submitit.usage import (
    UsageStats,
    format_duration,
    pluralize,
    summarise,
)
from snakemake_executor_plugin_submitit.walltime import Span, choose_span

MAX_IDLE_S = 3.0
"""An allocation without jobs ends after this time if others wait. Snakemake is faster than that."""
SLURM_EXIT_S = 30.0
"""How long the manager waits for the end of Slurm's jobs, to record it."""
ACTIVE_S = 60.0
"""An allocation that has written an event in this time is alive, even if squeue misses it."""
RETRY_S = 20.0
"""Pause before the next submission after the scheduler has not answered."""
LOCAL_EXIT_S = 60.0
"""How long local allocations can take to stop their services before they are killed."""


class AllocationManager(Generic[Job]):
    """All allocations of a run. Thread-safe.

    At most `max_allocations` exist at the same time (None: no limit). `records` is the folder for
    records of ended allocations. See `Allocation` for `idle_timeout`, `preload` and
    `modules`.
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
        modules: str = "",
    ) -> None:
        self._folder, self._cluster, self._records = folder, cluster, records
        self._max_allocations, self._idle_timeout = max_allocations, idle_timeout
        self._report, self._preload, self._modules = report, preload, modules
        self._progress = ProgressReporter(report)
        self._liveness: Liveness = SlurmLiveness() if cluster == "slurm" else LocalLiveness()
        self._lock = threading.RLock()
        self._started = time.monotonic()
        self._is_closing = False
        self._waiting: dict[str, list[QueuedJob[Job]]] = {}
        self._live: dict[str, AllocationState[Job]] = {}
        self._usage: dict[str, UsageStats] = {}
        self._retry_at: dict[str, float] = {}
        self._outcomes: list[Outcome[Job]] = []
        try:
            create_private(folder)
            self._registry = Registry(folder / "live")
            adopted: Adopted[Job] = self._registry.adopt(
                cluster, lambda live: self._end_state(live) is not None
            )
        except NotPrivateError as error:
            raise WorkflowError(f"submitit-folder: {error}") from None
        self._done_before = adopted.done
        for live in adopted.allocations:
            self._live[live.name], self._usage[live.name] = live, live.usage

    def put(self, jobs: Iterable[tuple[str, QueuedJob[Job]]]) -> None:
        """Queue jobs, each with the name of its allocation."""
        with self._lock:
            for live in self._live.values():
                self._outcomes += self._read_events(live)
            for name, queued in jobs:
                usage = self._usage_stats(name)
                usage.jobs.add(queued.task.key)
                if queued.task.key in self._done_before:
                    usage.done.add(queued.task.key)
                    self._outcomes.append(Outcome((queued.job,)))
                else:
                    self._waiting.setdefault(name, []).append(queued)
            self._dispatch()

    def poll(self) -> list[Outcome[Job]]:
        """The jobs that have ended since the last call. Starts and ends allocations as needed."""
        with self._lock:
            if self._is_closing:
                return []
            outcomes, self._outcomes = self._outcomes, []
            for live in list(self._live.values()):
                outcomes += self._read_events(live)
                state = None if live.ended else self._end_state(live)
                if live.ended or state:
                    outcomes += self._read_events(live)  # what it wrote before its end was noticed
                    del self._live[live.name]
                    outcomes += self._handle_end(live, state)
            self._dispatch()
            for line in self._liveness.news():
                self._report(line)
            self._progress.update(self._current_progress())
            return outcomes

    def _read_events(self, live: AllocationState[Job]) -> list[Outcome[Job]]:
        outcomes = live.read_events()
        self._done_before |= live.done_unasked
        return outcomes

    def close(self) -> None:
        """Let all allocations end. Waits for local ones."""
        with self._lock:
            self._shut_down(cancelled=False)

    def cancel(self) -> None:
        """Stop all allocations and their jobs. Waits for local ones."""
        with self._lock:
            self._shut_down(cancelled=True)

    def _shut_down(self, cancelled: bool) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        for live in self._live.values():
            live.spool.clear()
            live.spool.close()
            if cancelled:
                self._cancel(live)
            elif self._cluster == "slurm" and live.assigned:
                self._report(f"Allocation {live.name}: ending; {_describe_jobs(live)}.")
        if self._cluster == "local":
            self._wait_for_local_ends()
        else:
            self._wait_for_slurm_ends()
        self._live.clear()
        seconds = time.monotonic() - self._started
        if lines := summarise(self._usage.values(), seconds, shlex.join(sys.argv)):
            self._report("\n    ".join(["Allocations:", *lines]))

    def _cancel(self, live: AllocationState[Job]) -> None:
        error = cancel(live.submission)
        if error is None:
            self._report(f"Allocation {live.name}: cancelled.")
            return
        submission = live.submission
        clusters = f"--clusters={submission.clusters} " if submission.clusters else ""
        self._report(
            f"Allocation {live.name}: could not be cancelled ({error}). It ends when its running "
            f"job has ended. To end it now: scancel {clusters}{submission.job_id}"
        )

    def _wait_for_local_ends(self) -> None:
        deadline = time.monotonic() + LOCAL_EXIT_S
        for live in self._live.values():
            live.read_events()
            while self._end_state(live) is None and time.monotonic() < deadline:
                time.sleep(0.05)
            live.read_events()
            self._handle_end(live, GONE)

    def _wait_for_slurm_ends(self) -> None:
        deadline = time.monotonic() + SLURM_EXIT_S
        liveness = SlurmLiveness(period=1.0, confirmation=1.0)
        left = dict(self._live)
        while left and time.monotonic() < deadline:
            for name, live in list(left.items()):
                live.read_events()
                if state := liveness.end_state(live.submission):
                    live.read_events()
                    self._write_record(live, state)
                    del left[name]
            time.sleep(0.5 if left else 0)
        for live in left.values():
            self._write_record(live, None)

    # start allocations and give them jobs

    def _dispatch(self) -> None:
        if self._is_closing:
            return
        for name in list(self._waiting):
            if name not in self._live and (self._is_full() or self._must_wait(name)):
                continue
            jobs = self._waiting.pop(name)
            try:
                self._assign(name, jobs)
            except SchedulerUnavailable as error:
                self._waiting[name] = jobs
                self._retry_at[name] = time.monotonic() + RETRY_S
                self._report(
                    f"Allocation {name}: {self._cluster} does not answer ({error}). "
                    f"Next attempt in {RETRY_S:.0f} s."
                )
            except WorkflowError as error:
                self._refuse(name, jobs, error)
        if self._waiting and self._is_full():
            for live in self._live.values():
                if not live.tickets and time.monotonic() - live.last_job_end > MAX_IDLE_S:
                    live.spool.close()
                    live.is_closing = True

    def _refuse(self, name: str, jobs: list[QueuedJob[Job]], error: WorkflowError) -> None:
        usage = self._usage_stats(name)
        usage.in_summary = True
        usage.failures.append(_first_line(error))
        text = "was not submitted"
        progress = Progress(name, FAILED, text, len(usage.done), len(usage.jobs), reason=text)
        failure = Failure(str(error), None, progress)
        self._outcomes.append(Outcome(tuple(queued.job for queued in jobs), failure))

    def _usage_stats(self, name: str) -> UsageStats:
        return self._usage.setdefault(name, UsageStats(name))

    def _must_wait(self, name: str) -> bool:
        return time.monotonic() < self._retry_at.get(name, 0.0)

    def _is_full(self) -> bool:
        return self._max_allocations is not None and len(self._live) >= self._max_allocations

    def _assign(self, name: str, jobs: list[QueuedJob[Job]]) -> None:
        live = self._live.get(name)
        if live is None:
            self._live[name] = self._start(name, jobs)
            return
        if live.handle is None and not live.assigned:
            self._report(
                f"Allocation {name}: job {live.submission.job_id} of an earlier run is still "
                f"active and runs {pluralize(len(jobs), 'job')} of this run."
            )
        room_s = -math.inf if live.is_closing else live.room_s()
        for queued in jobs:
            ticket = live.inherited.pop(queued.task.key, None)
            if ticket is None:
                room_s -= queued.expected_s or 0.0
                if room_s < 0.0:
                    self._waiting.setdefault(name, []).append(queued)
                    continue
            live.assigned += 1
            live.tickets[ticket or live.spool.put(queued.task)] = queued
        if name in self._waiting and not live.tickets:
            live.spool.close()  # another allocation gets what does not fit into this one
            live.is_closing = True

    def _start(self, name: str, jobs: list[QueuedJob[Job]]) -> AllocationState[Job]:
        jobs = sorted(jobs, key=lambda queued: queued.task.order)
        spec = jobs[0].spec()
        span = self._choose_span(spec, jobs)
        jobs, rest = jobs[: span.jobs], jobs[span.jobs :]
        has_service = spec.service is not None
        identity = uuid.uuid4().hex[:8]
        spool = Spool.create(self._folder / slug(spec.name) / identity)
        self._registry.add(spool)
        if not spec.is_reusable:
            spool.close()
        function = Allocation(
            name=spec.name,
            folder=str(spool.root),
            service=spec.service,
            params=spec.params,
            resources=spec.resources,
            idle_timeout=self._idle_timeout,
            time_limit=span.parameters.time_limit_s,
            signal_delay=span.parameters.signal_delay_s,
            preload=self._preload if has_service else (),
            modules=self._modules,
            follower=spec.follower,
            interface=str(span.parameters.values.get("interface", "")),
        )
        tickets = {spool.put(queued.task): queued for queued in jobs}
        job_name = f"{slug(spec.name)[:80]}-{identity}"
        folder = spool.root / "submitit"
        submission, handle = submit(
            spec.name, self._cluster, job_name, folder, span.parameters, function
        )
        submission = replace(
            submission,
            usable_s=span.usable_s,
            start_s=spec.start_s,
            is_shortened=span.is_shortened,
        )
        write_submission(spool, submission, has_service)
        usage = self._usage_stats(spec.name)
        usage.submissions.append(f"job {submission.job_id}")
        usage.in_summary = has_service
        live = AllocationState(
            submission,
            spool,
            handle,
            is_closing=not spec.is_reusable,
            has_service=has_service,
            usage=usage,
            tickets=tickets,
            assigned=len(jobs),
        )
        if rest:
            self._waiting[name] = rest
        time_limit = format_duration(span.parameters.time_limit_s)
        left = pluralize(len(rest), "job")
        split = f", as many as fit into {time_limit}; left: {left}" if rest else ""
        self._progress.report(
            live.progress("", len(jobs) + len(rest)),
            f"Allocation {spec.name}: submitted as job {submission.job_id} with "
            f"{pluralize(len(jobs), 'job')}{split}; log: {submission.log}",
        )
        return live

    def _choose_span(self, spec: AllocationSpec, jobs: list[QueuedJob[Job]]) -> Span:
        """Slurm is asked for the expected time, unless that was too short before."""
        if self._cluster != "slurm" or self._usage_stats(spec.name).was_too_short:
            return Span(len(jobs), spec.parameters)
        return choose_span(spec, [queued.expected_s for queued in jobs])

    # allocations end

    def _end_state(self, live: AllocationState[Job]) -> str | None:
        if self._cluster == "local" and live.runs_locally():
            return None
        state = self._liveness.end_state(live.submission, urgent=live.stopped is not None)
        is_active = time.monotonic() - live.last_event < ACTIVE_S
        if state == GONE and self._cluster == "slurm" and is_active:
            return None  # squeue is wrong: the allocation writes events
        return state

    def _handle_end(self, live: AllocationState[Job], state: str | None) -> list[Outcome[Job]]:
        """Decide what happens to the jobs of an allocation that has ended."""
        self._registry.remove(live.spool)
        if live.ended is None:
            # If it is alive after all, it must not run jobs that another allocation gets.
            with contextlib.suppress(OSError):
                live.spool.clear()
                live.spool.close()
            if self._cluster == "local":
                live.kill_locally()
            elif state in (GONE, HELD):
                cancel(live.submission)
        self._write_record(live, state)
        if not live.assigned:
            return []
        how = live.describe_end(state)
        text = f"Allocation {live.name}: {how}; {_describe_jobs(live)}"
        if not live.tickets:
            self._progress.report(live.final_progress(), f"{text}.")
            return []
        if self._is_closing:
            self._report(f"{text}.")
            return []
        left = live.unfinished_jobs()
        live.usage.was_too_short |= live.was_too_short(state)
        if live.should_continue(state):
            jobs = pluralize(len(left), "remaining job")
            self._progress.report(live.final_progress(), f"{text}. Another allocation runs {jobs}.")
            self._waiting[live.name] = left + self._waiting.get(live.name, [])
            return []
        detail = live.ended.data["detail"] if live.ended else ""
        live.usage.failures.append(_first_line(detail) or text)
        failure = Failure(
            "\n".join(filter(None, (f"{text}.", detail))),
            live.submission.log,
            live.final_progress(FAILED, how),
        )
        return [Outcome(tuple(queued.job for queued in left), failure)]

    def _write_record(self, live: AllocationState[Job], state: str | None) -> None:
        if self._records is None or not live.has_service:
            return
        path = self._records / f"{slug(live.name)}.{live.submission.job_id}.json"
        with contextlib.suppress(OSError):
            write_record(path, live, state)

    # progress

    def _current_progress(self) -> Iterator[Progress]:
        for name, usage in self._usage.items():
            live, waiting = self._live.get(name), len(self._waiting.get(name, []))
            if live and live.has_service:
                cluster_state = self._liveness.describe(live.submission)
                yield live.progress(cluster_state, waiting + len(live.tickets))
            elif waiting and live is None:
                silent = self._must_wait(name)
                reason = f"{self._cluster} does not answer" if silent else "another one is running"
                done, total = len(usage.done), len(usage.jobs)
                yield Progress(name, PENDING, f"waiting: {reason}", done, total, reason=reason)


def slug(name: str) -> str:
    """The name as part of a path and of a Slurm job's name. Different names stay different."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:100]
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return safe if safe == name else f"{safe}-{digest}"


def _describe_jobs(live: AllocationState[Job]) -> str:
    return f"{live.finished} of {pluralize(live.assigned, 'job')} done"


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[0]
