"""What a check found, and how it is shown on a terminal. Pure."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from servegrid.study.text import pluralize

WIDEST_SUBJECT = 48


class Status(StrEnum):
    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, what was found there, and what to do about it."""

    group: str
    subject: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Group:
    """Makes the findings of one group."""

    name: str

    def ok(self, subject: str, found: str) -> Finding:
        return Finding(self.name, subject, Status.OK, found)

    def warn(self, subject: str, found: str, remedy: str) -> Finding:
        return Finding(self.name, subject, Status.WARN, found, remedy)

    def fail(self, subject: str, found: str, remedy: str) -> Finding:
        return Finding(self.name, subject, Status.FAIL, found, remedy)

    def skip(self, subject: str, found: str) -> Finding:
        return Finding(self.name, subject, Status.SKIP, found)


def format_findings(findings: Sequence[Finding], width: int | None = None) -> str:
    """The findings of one group under its name, with lines of at most `width` characters.

    Without a width every finding, and every remedy, is one line.
    """
    longest = max((len(each.subject) for each in findings), default=0)
    column = min(longest, WIDEST_SUBJECT)
    indent = " " * (2 + 6 + column + 2)
    lines = [findings[0].group] if findings else []
    for each in findings:
        head = f"  {each.status:<6}{each.subject:<{column}}  "
        lines.append(_wrapped(head, each.found, indent, width))
        if each.remedy:
            lines.append(_wrapped(f"{indent}remedy: ", each.remedy, f"{indent}  ", width))
    return "\n".join(lines)


def summary(findings: Iterable[Finding]) -> str:
    """The last line of all."""
    counts = Counter(each.status for each in findings)
    return ", ".join(
        (
            f"{counts[Status.OK]} ok",
            pluralize(counts[Status.WARN], "warning"),
            pluralize(counts[Status.FAIL], "failure"),
        )
    )


def exit_status(findings: Iterable[Finding]) -> int:
    """1 where something failed, else 0."""
    return int(any(each.status is Status.FAIL for each in findings))


def _wrapped(head: str, text: str, indent: str, width: int | None) -> str:
    text = " ".join(text.split())
    if width is None or width < len(indent) + 30:
        return f"{head}{text}"
    return textwrap.fill(
        text,
        width,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
