"""The kinds of request failures, and a failure as the records keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from servegrid.study.text import printable

FailureKind = Literal[
    "connect",
    "reset",
    "truncated",
    "malformed",
    "stalled",
    "timeout",
    "http_status",
    "mid_stream_error",
    "usage_missing",
    "wrong_prompt_tokens",
    "wrong_completion_tokens",
]

FAILURE_KINDS: dict[FailureKind, str] = {
    "connect": "The connection failed",
    "reset": "The server reset the connection, or closed it without a response",
    "truncated": "The response ended before it was complete",
    "malformed": "The response is not HTTP, not an event stream, or not the expected JSON",
    "stalled": "No byte arrived for longer than `idle_timeout_s`",
    "timeout": "`timeout_s` passed before the response was complete",
    "http_status": "The HTTP status of the response is not 200",
    "mid_stream_error": "The server reported an error inside the stream",
    "usage_missing": "The server did not report how many tokens it processed",
    "wrong_prompt_tokens": "The server counted more or fewer prompt tokens than were sent",
    "wrong_completion_tokens": "The server generated more or fewer tokens than requested",
}
"""The kinds of failure and their meanings."""


@dataclass(frozen=True)
class Failure:
    """Why a request failed. As text it is `kind: detail`, on one line of printable characters."""

    kind: FailureKind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {printable(' '.join(self.detail.split()))}"
