"""How the time was used: usage of all allocations of one name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median

from snakemake_executor_plugin_submitit import spool as events
from snakemake_executor_plugin_submitit.spool import Event, key_of


@dataclass
class UsageStats:
    """Filled from the journals of all allocations that had the name, one event at a time.

    Times are seconds: `allocated` from the start of the allocations' processes to their ends,
    `under_jobs` with a job under way, `at_work` while one did what it exists for, by its own word,
    `gaps` from the end of one's work to the beginning of the next one's.
    `given`, `done`, `failed` and `keys` (of those begun) are the jobs' keys, `begun` counts every
    start of one, `lost` the allocations that the cluster took away since the last job was done.
    """

    name: str
    shown: bool = False
    given: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    begun: int = 0
    ended: int = 0
    bring_ups: int = 0
    lost: int = 0
    allocated: float = 0.0
    under_jobs: float = 0.0
    at_work: float = 0.0
    gaps: list[float] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    _last: float | None = None
    _began: float | None = None
    _worked_until: float | None = None

    def note(self, event: Event) -> None:
        now = float(event.data.get("time", 0.0))
        if event.kind == events.STARTED:
            self._last = self._began = self._worked_until = None
        if self._last is not None:
            self.allocated += now - self._last
        self._last = now
        if event.kind == events.UP:
            self.bring_ups += 1
        elif event.kind == events.BEGAN:
            self.begun += 1
            self.keys.add(key_of(event.data["ticket"]))
            self._began = now
        elif event.kind == events.DONE:
            self.lost = 0
            self.ended += 1
            if self._began is not None:
                self.under_jobs += now - self._began
            self._note_work(event.data.get("at_work"))

    def _note_work(self, times: tuple[float, float] | None) -> None:
        if times is None:
            self._worked_until = None
            return
        began, ended = times
        self.at_work += ended - began
        if self._worked_until is not None:
            self.gaps.append(began - self._worked_until)
        self._worked_until = ended

    @property
    def repeated(self) -> int:
        """Starts of jobs beyond the first of each."""
        return self.begun - len(self.keys)

    def job_s(self) -> float | None:
        """Mean time that a job takes."""
        return self.under_jobs / self.ended if self.ended else None

    def describe(self) -> str:
        """The account in one line."""
        parts = [f"{len(self.done)} of {pluralize(len(self.given), 'job')} done"]
        if failed := self.failed - self.done:
            parts.append(f"{len(failed)} failed")
        if self.repeated:
            parts.append(f"{pluralize(self.repeated, 'start')} repeated")
        parts.append(f"up {pluralize(self.bring_ups, 'time')} in {self._describe_jobs()}")
        if self.allocated:
            parts.append(_describe_shares([self]))
        return f"{self.name}: {', '.join(parts)}"

    def _describe_jobs(self) -> str:
        if not self.jobs:
            return "no allocation"
        return f"{pluralize(len(self.jobs), 'allocation')} ({', '.join(self.jobs)})"


def summary(accounts: Collection[UsageStats], seconds: float, command: str) -> list[str]:
    """Lines for the end of a run: the usage of each allocation, the sum, and what is left to do."""
    shown = [each for each in accounts if each.shown]
    if not shown:
        return []
    lines = [each.describe() for each in shown]
    gaps = [gap for each in shown for gap in each.gaps]
    given = sum(len(each.given) for each in shown)
    done = sum(len(each.done) for each in shown)
    together = [
        f"{done} of {pluralize(given, 'job')} done in {duration(seconds)}",
        pluralize(sum(each.bring_ups for each in shown), "bring-up"),
        f"{pluralize(sum(each.repeated for each in shown), 'start')} repeated",
    ]
    if sum(each.allocated for each in shown):
        together.append(_describe_shares(shown))
    if gaps:
        together.append(f"{median(gaps):.2f} s from one's work to the next one's (median)")
    lines.append(f"Together: {', '.join(together)}")
    if done < given:
        lines += [
            f"Not done in {each.name}: {why}"
            for each in shown
            for why in dict.fromkeys(each.failures)
        ]
        lines.append(f"To resume, run the same command again: {command}")
    return lines


def _describe_shares(accounts: Collection[UsageStats]) -> str:
    allocated = sum(each.allocated for each in accounts)
    under_jobs = sum(each.under_jobs for each in accounts) / allocated
    at_work = sum(each.at_work for each in accounts) / allocated
    text = f"{duration(allocated)} allocated, {under_jobs:.0%} of it under jobs"
    return f"{text}, {at_work:.0%} at work" if at_work else text


@dataclass(frozen=True)
class Progress:
    """The progress of one allocation, as text and as data.

    `state` is `pending`, `starting`, `running`, `ended` or `failed`. `node` is the host that it
    runs on, `reason` the cluster's reason why it is pending, `eta_s` the estimated seconds until
    its jobs are done; each is None if it is unknown. `text` describes all of that.
    """

    name: str
    state: str
    text: str
    done: int = 0
    total: int = 0
    node: str | None = None
    reason: str | None = None
    eta_s: float | None = None

    def describe(self) -> str:
        """One line for a log.

        >>> Progress("a", "running", "running on n1", 1, 2, eta_s=61.0).describe()
        'Allocation a: 1 of 2 jobs done, running on n1, about 1 min 1 s left'
        """
        left = f", about {duration(self.eta_s)} left" if self.eta_s else ""
        return (
            f"Allocation {self.name}: {self.done} of {pluralize(self.total, 'job')} done, "
            f"{self.text}{left}"
        )


def duration(seconds: float) -> str:
    """
    >>> [duration(each) for each in (0.4, 59, 61, 3599, 7260)]
    ['0 s', '59 s', '1 min 1 s', '59 min 59 s', '2 h 1 min']
    """
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def pluralize(number: int, noun: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
