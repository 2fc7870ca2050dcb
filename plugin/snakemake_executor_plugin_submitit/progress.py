"""Reports the progress of allocations: as text for a log, and as data for logger plugins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from snakemake_executor_plugin_submitit.usage import format_duration, pluralize

PENDING, STARTING, RUNNING = "pending", "starting", "running"
ENDED, FAILED = "ended", "failed"

PERIOD_S = 30.0
"""Seconds between two reports about an allocation whose state does not change."""


@dataclass(frozen=True)
class Progress:
    """The progress of one allocation.

    `state` is `pending` (waiting for the scheduler), `starting` (its service starts), `running`,
    `ended`, or `failed` (it ended, and its remaining jobs fail). `reason` says why it is pending
    or has failed. `done` and `total` count jobs. `eta_s` is the estimated time in seconds until
    all jobs are done. `node`, `reason` and `eta_s` are None if unknown. `text` is a description
    for people.
    """

    name: str
    state: str
    text: str
    done: int = 0
    total: int = 0
    node: str | None = None
    reason: str | None = None
    eta_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The data for logger plugins: everything except `text`."""
        return {
            "name": self.name,
            "state": self.state,
            "node": self.node,
            "reason": self.reason,
            "done": self.done,
            "total": self.total,
            "eta_s": self.eta_s,
        }

    def describe(self) -> str:
        """One line for a log.

        >>> Progress("a", "running", "running on n1", 1, 2, eta_s=61.0).describe()
        'Allocation a: running on n1, 1 of 2 jobs done, about 1 min 1 s left'
        """
        left = f", about {format_duration(self.eta_s)} left" if self.eta_s else ""
        done = f"{self.done} of {pluralize(self.total, 'job')} done"
        return f"Allocation {self.name}: {self.text}, {done}{left}"


class Report(Protocol):
    """Writes a line to the log. `progress` is set if the line is about one allocation."""

    def __call__(self, text: str, progress: Progress | None = None) -> None: ...


class ProgressReporter:
    """Reports a new state at once, and other changes at most every `period_s` seconds."""

    def __init__(
        self,
        report: Report,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._period_s, self._clock = report, period_s, clock
        self._reported: dict[str, tuple[float, Progress]] = {}

    def report(self, progress: Progress, text: str | None = None) -> None:
        """Report now; `text` replaces the description of the progress."""
        self._report(text or progress.describe(), progress)
        if progress.state in (ENDED, FAILED):
            self._reported.pop(progress.name, None)
        else:
            self._reported[progress.name] = self._clock(), progress

    def update(self, current: Iterable[Progress]) -> None:
        """Report those that have changed."""
        for progress in current:
            when, reported = self._reported.get(progress.name, (0.0, None))
            if (
                reported is None
                or _is_new_state(reported, progress)
                or (self._clock() - when >= self._period_s and _has_changed(reported, progress))
            ):
                self.report(progress)


def _is_new_state(old: Progress, new: Progress) -> bool:
    first_reason = old.reason is None and new.reason is not None
    return first_reason or (old.state, old.node) != (new.state, new.node)


def _has_changed(old: Progress, new: Progress) -> bool:
    return (old.done, old.total, old.reason) != (new.done, new.total, new.reason)
