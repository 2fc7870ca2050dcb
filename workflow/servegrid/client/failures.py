"""How a request can fail: the one list of kinds, and a failure as the records keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
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

KINDS: dict[Kind, str] = {
    "connect": "No connection could be made",
    "reset": "The server broke the connection off, or closed it without an answer",
    "truncated": "The response ended before it was complete",
    "malformed": "The response is not HTTP, not an event stream, or not the JSON expected in it",
    "stalled": "No byte came for longer than the load allows",
    "timeout": "The load's limit passed before the response was complete",
    "http_status": "The server answered with another status than 200",
    "mid_stream_error": "The server reported an error inside the stream",
    "usage_missing": "The server did not say how many tokens it processed",
    "wrong_prompt_tokens": "The server counted another number of prompt tokens than was sent",
    "wrong_completion_tokens": "The server generated another number of tokens than was asked",
}
"""The kinds of failure and their meanings."""


@dataclass(frozen=True)
class Failure:
    """Why a request failed. As text it is `kind: detail`, on one line."""

    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {' '.join(self.detail.split())}"
