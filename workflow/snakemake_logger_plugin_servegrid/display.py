"""What a display of a run must be able to do."""

from __future__ import annotations

from typing import Protocol

from snakemake_logger_plugin_servegrid.messages import Message
from snakemake_logger_plugin_servegrid.progress import RunProgress


class Display(Protocol):
    """Shows the progress and the messages of one run."""

    def begin(self, progress: RunProgress) -> None:
        """Show the progress from now on. May be called again."""

    def show(self, message: Message) -> None:
        """Print a message."""

    def refresh(self) -> None:
        """The progress may have changed."""

    def close(self) -> None:
        """Show the progress for the last time and release the terminal. May be called again."""
