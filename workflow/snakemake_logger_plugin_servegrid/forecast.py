"""What the workflow expects of its measurements. The Snakefile sets it, the dry run shows it."""

from __future__ import annotations

from collections.abc import Callable, Collection

MAX_MEASUREMENTS = 100
"""The libraries of a prediction take a second, which is a third of a larger dry run."""

source: Callable[[Collection[str]], str | None] | None = None
"""Gives a text for the paths of trials, `<deployment>/<cell>/trial-<number>`."""


def lines(targets: Collection[str]) -> list[str]:
    """The text for these trials in lines; a hint if there are many of them."""
    if source is None or not targets:
        return []
    if len(targets) > MAX_MEASUREMENTS:
        return ["`servegrid plan --configfile STUDY` predicts what they take."]
    try:
        text = source(targets)
    except Exception as error:
        # Logging ends silently at a ValueError here, and the dry run would show nothing at all.
        text = f"The time cannot be predicted ({type(error).__name__}: {error})."
    return (text or "").splitlines()
