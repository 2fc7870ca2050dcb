"""Snakemake logger plugin: shows a run as one progress bar per deployment, or as a few lines.

Snakemake imports this module in every process, so the display's libraries are imported late.
`--verbose`, `--quiet`, `--printshellcmds` and `--debug-dag` bring Snakemake's own output back.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import TextIO

from snakemake_interface_logger_plugins.base import LogHandlerBase

from snakemake_logger_plugin_servegrid.display import Display
from snakemake_logger_plugin_servegrid.messages import Message
from snakemake_logger_plugin_servegrid.outcome import dry_run_lines, outcome_lines
from snakemake_logger_plugin_servegrid.progress import HOLD_S, RunProgress

__all__ = ["LogHandler"]


class LogHandler(LogHandlerBase):  # type: ignore[misc]
    """Handles all records of one Snakemake run, in the thread of Snakemake's queue listener."""

    def __post_init__(self) -> None:
        settings = self.common_settings
        self._launch_folder = Path.cwd()  # before --directory
        self._progress = RunProgress(show_failed_logs=settings.show_failed_logs)
        self._default: logging.Handler | None = None
        self._display: Display | None = None
        if settings.verbose or settings.quiet or settings.printshellcmds or settings.debug_dag:
            self._default = _snakemake_handler(settings)
        else:
            stream = sys.stdout if settings.stdout else sys.stderr
            self._display = _choose_display(stream, color=not settings.nocolor)
        self._timer: threading.Timer | None = None
        self._closed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            messages = self._progress.update(record)
            if self._default is not None:
                self._default.handle(record)
            elif self._display is not None:
                if self._progress.begun and not self.common_settings.dryrun:
                    self._display.begin(self._progress)
                self._show([*messages, *self._progress.failures()])
                self._display.refresh()
                self._show_later()
        except Exception:
            self.handleError(record)

    def _show(self, messages: list[Message]) -> None:
        if self._display is not None:
            for message in messages:
                self._display.show(message)

    def _show_later(self) -> None:
        """Show a failure even if no further record comes."""
        if self._progress.holds_failures and self._timer is None:
            self._timer = threading.Timer(HOLD_S + 0.1, self._show_failures)
            self._timer.daemon = True
            self._timer.start()

    def _show_failures(self, older_than_s: float = HOLD_S) -> None:
        self.acquire()  # not while a record is handled
        try:
            self._timer = None
            self._show(self._progress.failures(older_than_s))
            self._show_later()
        finally:
            self.release()

    def close(self) -> None:
        """End the display and print the outcome of the run. May be called again.

        Python's logging calls this at the latest when the process exits.
        """
        if self._closed:
            return
        self._closed = True
        if self._display is not None:
            self._show_failures(older_than_s=0.0)
            self._progress.stop()
            self._display.close()
        if not self.common_settings.quiet:
            for line in self._last_lines():
                print(line, file=sys.stdout if self.common_settings.stdout else sys.stderr)
        super().close()

    def _last_lines(self) -> list[str]:
        if self.common_settings.dryrun:
            return [] if self._default is not None else dry_run_lines(self._progress)
        return outcome_lines(self._progress, self._launch_folder)

    @property
    def writes_to_stream(self) -> bool:
        return True

    @property
    def writes_to_file(self) -> bool:
        return False

    @property
    def has_filter(self) -> bool:
        return True

    @property
    def has_formatter(self) -> bool:
        return True

    @property
    def needs_rulegraph(self) -> bool:
        return False


def _choose_display(stream: TextIO, color: bool) -> Display:
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from snakemake_logger_plugin_servegrid.live import LiveDisplay

        return LiveDisplay.on_terminal(stream, color)
    from snakemake_logger_plugin_servegrid.plain import PlainDisplay

    return PlainDisplay(stream)


def _snakemake_handler(settings: object) -> logging.Handler:
    """The handler that Snakemake uses without any plugin."""
    from snakemake.logging import ColorizingTextHandler, DefaultFilter, DefaultFormatter

    def get(name: str) -> object:
        return getattr(settings, name)

    handler: logging.Handler = ColorizingTextHandler(
        nocolor=get("nocolor"),
        stream=sys.stdout if get("stdout") else sys.stderr,
        formatter=DefaultFormatter(get("quiet"), get("show_failed_logs")),
        filter=DefaultFilter(
            *(get(name) for name in ("quiet", "debug_dag", "verbose", "dryrun", "printshellcmds"))
        ),
    )
    return handler
