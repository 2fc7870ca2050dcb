"""The progress of allocations, as text and as data for logger plugins."""

from __future__ import annotations

from dataclasses import replace

from snakemake_executor_plugin_submitit.progress import Progress, ProgressReporter

PENDING = Progress("b", "pending", "job 8 pending (Resources) for 2 min", 0, 1, reason="Resources")
RUNNING = Progress("a", "running", "running on n1 (job 7)", 1, 2, "n1", eta_s=61.0)


def test_progress_is_described_in_one_line() -> None:
    text = "Allocation a: running on n1 (job 7), 1 of 2 jobs done, about 1 min 1 s left"
    assert RUNNING.describe() == text
    assert PENDING.describe() == (
        "Allocation b: job 8 pending (Resources) for 2 min, 0 of 1 job done"
    )


def test_logger_plugins_get_exactly_these_keys() -> None:
    assert RUNNING.to_dict() == {
        "name": "a",
        "state": "running",
        "node": "n1",
        "reason": None,
        "done": 1,
        "total": 2,
        "eta_s": 61.0,
    }


class Log:
    """A reporter with a clock that stands still, and what it has reported."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[tuple[str, Progress | None]] = []
        self.reporter = ProgressReporter(self._report, period_s=30, clock=lambda: self.now)

    def _report(self, text: str, progress: Progress | None = None) -> None:
        self.lines.append((text, progress))

    def update(self, progress: Progress, after_s: float = 0.0) -> int:
        """The number of lines that the update adds."""
        self.now += after_s
        before = len(self.lines)
        self.reporter.update([progress])
        return len(self.lines) - before


def test_a_new_state_node_or_first_reason_is_reported_at_once() -> None:
    log = Log()
    assert log.update(replace(PENDING, reason=None)) == 1
    assert log.update(PENDING) == 1
    assert log.update(PENDING) == 0
    assert log.update(replace(PENDING, state="starting", reason=None, node="n1")) == 1
    assert log.update(replace(PENDING, state="starting", reason=None, node="n2")) == 1
    assert log.lines[1] == (PENDING.describe(), PENDING)


def test_other_changes_are_reported_once_per_period() -> None:
    log = Log()
    assert log.update(RUNNING) == 1
    more = replace(RUNNING, done=2)
    assert log.update(more, after_s=29) == 0
    assert log.update(more, after_s=1) == 1
    assert log.update(replace(more, eta_s=3.0), after_s=60) == 0  # nothing has been done
    assert log.update(replace(PENDING, name="a", reason="Priority")) == 1
    assert log.update(replace(PENDING, name="a", reason="Resources"), after_s=29) == 0


def test_after_its_end_an_allocation_starts_anew() -> None:
    log = Log()
    log.update(RUNNING)
    log.reporter.report(replace(RUNNING, state="ended"), "Allocation a: ended.")
    assert log.lines[-1][0] == "Allocation a: ended."
    assert log.update(RUNNING) == 1
