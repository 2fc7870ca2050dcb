"""Output that is not a terminal, such as a log file: one line for what has changed."""

from __future__ import annotations

import time
from typing import TextIO

from servegrid.study.text import pluralize
from snakemake_logger_plugin_servegrid.messages import Level, Message, format_seconds
from snakemake_logger_plugin_servegrid.progress import RUNNING, RunProgress

PROGRESS_S = 60.0
"""Seconds between two lines of progress; in long runs a fiftieth of the time so far."""
LISTED = 3
"""Deployments that a line of progress names."""


class PlainDisplay:
    """Writes lines to a stream, with the time of day once the run has begun."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: RunProgress | None = None
        self._reported = time.monotonic()
        self._announced = False
        self._last = ""

    def begin(self, progress: RunProgress) -> None:
        self._progress = progress

    def show(self, message: Message) -> None:
        self._announce()
        if message.level in (Level.ERROR, Level.WARNING):
            self._write(f"{message.level.upper()}: {message.text}")
        else:
            self._write(message.text)

    def refresh(self) -> None:
        if self._progress is None:
            return
        if any(each.done for each in self._progress.deployments()) or self._progress.other_done:
            self._announce()
        now = time.monotonic()
        if now - self._reported < max(PROGRESS_S, (now - self._progress.started) / 50):
            return
        self._reported = now
        line = describe_progress(self._progress)
        if line != self._last:
            self._last = line
            self._write(line)

    def close(self) -> None:
        self._stream.flush()

    def _announce(self) -> None:
        """Say what will be done, as soon as all jobs that can start have been announced."""
        if self._progress is not None and not self._announced:
            self._announced = True
            self._write(describe_plan(self._progress))

    def _write(self, text: str) -> None:
        prefix = "" if self._progress is None else time.strftime("%H:%M:%S ")
        self._stream.write(f"{prefix}{text}\n")
        self._stream.flush()


def describe_plan(progress: RunProgress) -> str:
    """What the run is going to do, in a line."""
    deployments, (_, cells) = progress.deployments(), progress.cells()
    parts = []
    if cells:
        where = f" on {pluralize(len(deployments), 'deployment')}" if deployments else ""
        parts.append(f"{pluralize(cells, 'measurement')}{where}")
    if progress.other_total:
        parts.append(f"tables, figures and the page ({pluralize(progress.other_total, 'job')})")
    return f"To do: {', then '.join(parts)}."


def describe_progress(progress: RunProgress) -> str:
    """How far the run is, in a line."""
    done, total = progress.cells()
    if done == total:
        return f"Tables, figures, page: {progress.other_done} of {progress.other_total} jobs done"
    running = [each for each in progress.deployments() if each.state == RUNNING]
    parts = []
    for each in running[:LISTED]:
        seconds = each.seconds_left
        left = f", about {format_seconds(seconds)} left" if seconds else ""
        parts.append(f"{each.name} {each.done}/{each.total}{left}")
    if len(running) > LISTED:
        parts.append(f"{len(running) - LISTED} more are running")
    return "; ".join([f"{done} of {pluralize(total, 'measurement')} done", *parts])
