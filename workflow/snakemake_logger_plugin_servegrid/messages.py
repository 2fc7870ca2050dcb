"""The messages that a display prints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How a message is shown. A change is printed only if there are no progress bars."""

    CHANGE = "change"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Message:
    """One message of one or more lines."""

    level: Level
    text: str


def format_seconds(seconds: float) -> str:
    """
    >>> [format_seconds(each) for each in (0.4, 59, 61, 3600, 7260)]
    ['0 s', '59 s', '1 min 1 s', '1 h', '2 h 1 min']
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    if minutes:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{rest} s"
