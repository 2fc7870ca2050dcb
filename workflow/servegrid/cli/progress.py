"""A progress bar on the terminal. Without a terminal it writes nothing."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from servegrid.bundle.progress import Report, report_nothing

REFRESHES_PER_S = 2
"""Few, because drawing competes with the load client for the processor."""


@contextlib.contextmanager
def show_progress(title: str, stream: TextIO | None = None) -> Iterator[Report]:
    """Show `title`, a bar and the elapsed time on `stream` (standard error) during the block.

    The block gets a function that reports steps. Until it is called, or if its total is 0, the bar
    has no end. The bar disappears at the end of the block.
    """
    stream = stream or sys.stderr
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield report_nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=Console(file=stream),
        refresh_per_second=REFRESHES_PER_S,
        transient=True,
        # The block's own output must not go through the bar.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = progress.add_task(title, total=None, count="")

    def report(step: str, done: int, total: int) -> None:
        progress.update(
            task,
            description=f"{title}: {step}",
            completed=done,
            total=total or None,
            count=f"{done}/{total}" if total else "",
            refresh=True,
        )

    with progress:
        yield report
