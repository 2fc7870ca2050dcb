"""The result of one check of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from servegrid.study.text import printable

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
_MAX_LISTED = 10
_MAX_LETTERS = 400


@dataclass(frozen=True)
class Check:
    """The result of one check. `details` name a file or a trial each; for FAIL, the problems."""

    name: str
    status: str
    summary: str
    details: Sequence[str] = ()

    def format(self) -> str:
        """Lines for people: status, name and summary, then up to ten details."""
        lines = [f"{self.status}  {self.name:<13} {_escape(self.summary)}"]
        lines += [f"      {_escape(detail)}" for detail in self.details[:_MAX_LISTED]]
        if len(self.details) > _MAX_LISTED:
            lines.append(f"      … and {len(self.details) - _MAX_LISTED} more")
        return "\n".join(lines)


def _escape(text: str) -> str:
    """`text` without control characters: text from a bundle must not move the cursor."""
    shown = printable(text)
    return shown if len(shown) <= _MAX_LETTERS else f"{shown[:_MAX_LETTERS]}…"
