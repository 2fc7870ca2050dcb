"""The live view on a terminal: a progress bar per deployment, messages above it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from servegrid.study.text import pluralize
from snakemake_logger_plugin_servegrid.capture import TerminalCapture, no_control_echo
from snakemake_logger_plugin_servegrid.messages import Level, Message, format_seconds
from snakemake_logger_plugin_servegrid.progress import (
    DONE,
    FAILED,
    PENDING,
    RUNNING,
    STARTING,
    STOPPED,
    DeploymentProgress,
    RunProgress,
)

STYLES = {
    PENDING: "dim",
    STARTING: "yellow",
    RUNNING: "cyan",
    DONE: "green",
    FAILED: "red",
    STOPPED: "yellow",
}
MESSAGE_STYLES = {Level.INFO: "", Level.WARNING: "yellow", Level.ERROR: "red"}
FREE_LINES = 6
"""Lines of the terminal that are left to messages."""


class LiveDisplay:
    """Redraws itself twice a second, in a thread of rich's. Captures `descriptors` meanwhile."""

    def __init__(self, console: Console, descriptors: tuple[int, ...] = ()) -> None:
        self._console = console
        self._descriptors = descriptors
        self._cleanup = contextlib.ExitStack()
        self._progress: RunProgress | None = None

    @classmethod
    def on_terminal(cls, stream: TextIO, color: bool) -> LiveDisplay:
        """A display on the terminal of `stream`."""
        terminal = os.fdopen(
            os.dup(stream.fileno()), "w", buffering=1, encoding=stream.encoding, errors="replace"
        )
        console = Console(file=terminal, force_terminal=True, no_color=not color, highlight=False)
        return cls(console, tuple(each for each in (1, 2) if os.isatty(each)))

    def begin(self, progress: RunProgress) -> None:
        if self._progress is not None:
            return
        self._progress = progress
        live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        if self._descriptors:
            self._cleanup.enter_context(no_control_echo(self._console.file.fileno()))
        live.start()
        self._cleanup.callback(live.stop)
        if self._descriptors:
            capture = TerminalCapture(self._descriptors, self._print_line)
            self._cleanup.callback(capture.close)

    def show(self, message: Message) -> None:
        if message.level in MESSAGE_STYLES:
            text = Text(message.text, style=MESSAGE_STYLES[message.level])
            self._console.print(text, soft_wrap=True)

    def refresh(self) -> None:
        """Nothing to do: the view redraws itself."""

    def close(self) -> None:
        self._cleanup.close()

    def _print_line(self, line: str) -> None:
        self._console.print(Text.from_ansi(line), soft_wrap=True)

    def _render(self) -> RenderableType:
        assert self._progress is not None
        return render(self._progress, self._console.width, self._console.height - FREE_LINES)


def render(progress: RunProgress, width: int, height: int) -> Table:
    """The view in at most `height` lines of `width` columns."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(16, width * 2 // 5))
    table.add_column(width=max(8, min(30, width // 6)))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    shown, hidden = choose_rows(progress.deployments(), max(2, height - 1))
    for each in shown:
        style = STYLES[each.state]
        table.add_row(
            Text(each.name),
            _bar(each.done, each.total, style),
            f"{each.done}/{each.total}",
            Text(each.status, style=style),
        )
    if hidden:
        table.add_row(Text(describe_hidden(hidden), style="dim"), "", "", "")
    if progress.other_total:
        done, total = progress.other_done, progress.other_total
        style = DONE if done == total else RUNNING if done else PENDING
        table.add_row(
            "tables, figures, page",
            _bar(done, total, STYLES[style]),
            f"{done}/{total}",
            Text(f"{format_seconds(time.monotonic() - progress.started)} elapsed", style="dim"),
        )
    return table


def choose_rows(
    deployments: list[DeploymentProgress], rows: int
) -> tuple[list[DeploymentProgress], list[DeploymentProgress]]:
    """The deployments that are shown in their order, and those that find no room.

    What runs matters most, what is done least.
    """
    if len(deployments) <= rows:
        return deployments, []
    rank = {RUNNING: 0, STARTING: 1, FAILED: 2, STOPPED: 3, PENDING: 4, DONE: 5}
    by_rank = sorted(range(len(deployments)), key=lambda index: rank[deployments[index].state])
    chosen = set(by_rank[: max(1, rows - 1)])
    return (
        [each for index, each in enumerate(deployments) if index in chosen],
        [each for index, each in enumerate(deployments) if index not in chosen],
    )


def describe_hidden(deployments: Iterable[DeploymentProgress]) -> str:
    """One line for deployments without a row of their own."""
    states = [each.state for each in deployments]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"and {pluralize(len(states), 'deployment')}: {counts}"


def _bar(done: int, total: int, style: str) -> ProgressBar:
    return ProgressBar(
        total=max(1, total), completed=done, complete_style=style, finished_style=style
    )
