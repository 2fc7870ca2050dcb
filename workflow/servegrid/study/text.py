"""Small helpers for sentences that people read. Pure."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with control characters and lone surrogates as escapes, as Python writes them.

    For texts of servers, bundles and models: they must not move the cursor of a terminal, and every
    file can store them.

    >>> printable("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def format_count(number: int) -> str:
    """A number of things; from five digits on, with separators.

    >>> format_count(2193), format_count(50_000)
    ('2193', '50,000')
    """
    return f"{number:,}" if number >= 10_000 else f"{number}"


def pluralize(number: int, noun: str) -> str:
    """The number with its noun; a regular plural.

    >>> pluralize(1, "trial"), pluralize(3, "trial")
    ('1 trial', '3 trials')
    """
    return f"{format_count(number)} {noun}" + ("" if number == 1 else "s")
