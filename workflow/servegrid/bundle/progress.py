"""How packing and verifying report their progress."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""Called before each step with its name, the number of finished steps and that of all steps."""


def report_nothing(step: str, done: int, total: int) -> None:
    """A Report for callers that show no progress."""
