"""Small helpers for sentences that people read. Pure."""

from __future__ import annotations


def pluralize(number: int, noun: str) -> str:
    """The number with its noun; a regular plural.

    >>> pluralize(1, "trial"), pluralize(3, "trial")
    ('1 trial', '3 trials')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
