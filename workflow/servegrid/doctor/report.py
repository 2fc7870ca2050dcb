"""Findings of the checks, and how a terminal shows them. Pure."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from servegrid.study.text import pluralize

MAX_SUBJECT_WIDTH = 48


class Status(StrEnum):
    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Finding:
    """The result of one check: what was checked, what was found, and the remedy."""

    group: str
    subject: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Group:
    """Creates the findings of one group."""

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
    """The findings of one group below its name, in lines of at most `width` characters.

    Without a width, every finding and every remedy is one line.
    """
    longest = max((len(finding.subject) for finding in findings), default=0)
    column = min(longest, MAX_SUBJECT_WIDTH)
    indent = " " * (2 + 6 + column + 2)
    lines = [findings[0].group] if findings else []
    for finding in findings:
        head = f"  {finding.status:<6}{finding.subject:<{column}}  "
        lines.append(_wrap(head, finding.found, indent, width))
        if finding.remedy:
            lines.append(_wrap(f"{indent}remedy: ", finding.remedy, f"{indent}  ", width))
    return "\n".join(lines)


def format_counts(findings: Iterable[Finding]) -> str:
    """The last line of the report."""
    counts = Counter(finding.status for finding in findings)
    return ", ".join(
        (
            f"{counts[Status.OK]} ok",
            pluralize(counts[Status.WARN], "warning"),
            pluralize(counts[Status.FAIL], "failure"),
        )
    )


def exit_status(findings: Iterable[Finding]) -> int:
    """1 if a check failed, else 0."""
    return int(any(finding.status is Status.FAIL for finding in findings))


def _wrap(head: str, text: str, indent: str, width: int | None) -> str:
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
