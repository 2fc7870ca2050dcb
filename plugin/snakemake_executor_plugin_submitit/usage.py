"""What the allocations of a run did with their time, and the summary at the end of the run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median

from snakemake_executor_plugin_submitit import spool as events
from snakemake_executor_plugin_submitit.spool import Event, ticket_key


@dataclass
class UsageStats:
    """Usage of all allocations with the same name, added up from their journals.

    `jobs`, `done`, `failed` and `started` contain keys of jobs. `starts` counts every start of a
    job, `finished` every end. `losses` counts the allocations that the cluster has taken away
    since the last finished job. `was_too_short` says whether one of them ran into a time limit that
    was shorter than allowed. Times are seconds: `allocated_s` is the lifetime of the
    allocations' processes, `jobs_s` the part in which a job ran, `work_s` the work that the jobs
    have reported (see allocation.REPORT_VARIABLE), `gaps_s` the times between the work of one job
    and the next.
    """

    name: str
    in_summary: bool = False
    jobs: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    started: set[str] = field(default_factory=set)
    starts: int = 0
    finished: int = 0
    service_starts: int = 0
    losses: int = 0
    was_too_short: bool = False
    allocated_s: float = 0.0
    jobs_s: float = 0.0
    work_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    submissions: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _last_event: float | None = None
    _job_start: float | None = None
    _work_end: float | None = None

    def add(self, event: Event) -> None:
        """Add the next event of a journal."""
        now = float(event.data.get("time", 0.0))
        if event.kind == events.STARTED:
            self._last_event = self._job_start = self._work_end = None
        if self._last_event is not None:
            self.allocated_s += now - self._last_event
        self._last_event = now
        if event.kind == events.SERVICE_STARTED:
            self.service_starts += 1
        elif event.kind == events.JOB_STARTED:
            self.starts += 1
            self.started.add(ticket_key(event.data["ticket"]))
            self._job_start = now
        elif event.kind == events.JOB_FINISHED:
            self.losses = 0
            self.finished += 1
            if self._job_start is not None:
                self.jobs_s += now - self._job_start
            self._add_work(event.data.get("work_span"))

    def _add_work(self, span: tuple[float, float] | None) -> None:
        if span is None:
            self._work_end = None
            return
        start, end = span
        # A clock that was stepped meanwhile gives negative times, which say nothing.
        self.work_s += max(0.0, end - start)
        if self._work_end is not None and start >= self._work_end:
            self.gaps_s.append(start - self._work_end)
        self._work_end = end

    @property
    def repeated_starts(self) -> int:
        """Starts of jobs beyond the first start of each job."""
        return self.starts - len(self.started)

    def mean_job_s(self) -> float | None:
        """Mean duration of the finished jobs in seconds; None without one."""
        return self.jobs_s / self.finished if self.finished else None

    def describe(self) -> str:
        """One line for the summary of a run."""
        parts = [f"{len(self.done)} of {pluralize(len(self.jobs), 'job')} done"]
        if failed := self.failed - self.done:
            parts.append(f"{len(failed)} failed")
        if self.repeated_starts:
            parts.append(pluralize(self.repeated_starts, "job restart"))
        service_starts = pluralize(self.service_starts, "service start")
        parts.append(f"{service_starts} in {self._describe_allocations()}")
        if self.allocated_s:
            parts.append(_describe_time([self]))
        return f"{self.name}: {', '.join(parts)}"

    def _describe_allocations(self) -> str:
        if not self.submissions:
            return "0 allocations"
        count = pluralize(len(self.submissions), "allocation")
        return f"{count} ({', '.join(self.submissions)})"


def summarise(usages: Collection[UsageStats], seconds: float, command: str) -> list[str]:
    """Lines for the end of a run: each allocation, the total, and how to resume.

    `seconds` is the duration of the run. Empty if no allocation is in the summary.
    """
    shown = [usage for usage in usages if usage.in_summary]
    if not shown:
        return []
    jobs = sum(len(usage.jobs) for usage in shown)
    done = sum(len(usage.done) for usage in shown)
    total = [
        f"{done} of {pluralize(jobs, 'job')} done in {format_duration(seconds)}",
        pluralize(sum(usage.service_starts for usage in shown), "service start"),
        pluralize(sum(usage.repeated_starts for usage in shown), "job restart"),
    ]
    if any(usage.allocated_s for usage in shown):
        total.append(_describe_time(shown))
    if gaps := [gap for usage in shown for gap in usage.gaps_s]:
        total.append(f"median gap between the work of two jobs {median(gaps):.2f} s")
    lines = [*(usage.describe() for usage in shown), f"Total: {', '.join(total)}"]
    if done < jobs:
        lines += [
            f"Not done in {usage.name}: {why}"
            for usage in shown
            for why in dict.fromkeys(usage.failures)
        ]
        lines.append(f"To resume, run the same command again: {command}")
    return lines


def _describe_time(usages: Collection[UsageStats]) -> str:
    allocated_s = sum(usage.allocated_s for usage in usages)
    shares = [f"jobs ran for {sum(usage.jobs_s for usage in usages) / allocated_s:.0%} of it"]
    if work_s := sum(usage.work_s for usage in usages):
        shares.append(f"their reported work for {work_s / allocated_s:.0%}")
    return f"{format_duration(allocated_s)} allocated ({', '.join(shares)})"


def format_duration(seconds: float) -> str:
    """
    >>> [format_duration(each) for each in (0.4, 59, 61, 3599, 7260)]
    ['0 s', '59 s', '1 min 1 s', '59 min 59 s', '2 h 1 min']
    """
    full = int(seconds)
    if full < 60:
        return f"{full} s"
    if full < 3600:
        return f"{full // 60} min {full % 60} s" if full % 60 else f"{full // 60} min"
    return f"{full // 3600} h {full % 3600 // 60} min"


def pluralize(number: int, noun: str) -> str:
    """
    >>> pluralize(1, "job"), pluralize(2, "job")
    ('1 job', '2 jobs')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
