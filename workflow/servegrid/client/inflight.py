"""The data of the event loop: timeouts, prepared requests, requests in flight, and users."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from servegrid.client.failures import Failure
from servegrid.client.http1 import Framing
from servegrid.client.sockets import Connection

CONNECT_TIMEOUT_S = 20.0
_CHECK_S = 1.0
_SHORTEST_CHECK_S = 0.005


@dataclass(frozen=True)
class Timeouts:
    """The limits of one wave, in seconds.

    `timeout_s`: for the whole wave. `idle_timeout_s`: without a byte for a request.
    `send_duration_s`: after this no further request is sent, and the remaining ones are dropped.
    """

    timeout_s: float
    idle_timeout_s: float
    send_duration_s: float = inf

    @property
    def connect_s(self) -> float:
        return min(CONNECT_TIMEOUT_S, self.idle_timeout_s, self.timeout_s)

    @property
    def check_s(self) -> float:
        """Time between two checks of the timeouts: a timeout is noticed this much late at most."""
        return max(min(_CHECK_S, self.connect_s / 4), _SHORTEST_CHECK_S)


class Turn(NamedTuple):
    """Which turn of a conversation a request is, and what it asks for.

    `conversation` counts from 0 and `number`, the user's turn in it, from 1. `input_len` are the
    tokens of its prompt with the history, `output_len` those of its answer, and `shared_len` those
    at the start of its prompt that an unlimited prefix cache has from earlier requests.
    """

    conversation: int
    number: int
    input_len: int
    output_len: int
    shared_len: int

    @property
    def name(self) -> str:
        """Its name in the workload: `12.1` is the first turn of conversation 12."""
        return f"{self.conversation}.{self.number}"


@dataclass(frozen=True)
class PreparedRequest:
    """A request as bytes, and when it is due.

    In an open loop it is due `due_ns` after the start. Otherwise the next free user sends it, and
    thinks for `think_ns` after the response. `turn` is None unless it is one of a conversation.
    """

    method: str
    data: bytes
    due_ns: int | None = None
    think_ns: int = 0
    turn: Turn | None = None


class InFlightRequest:
    """One request in flight: what was sent and received when, unparsed.

    `stamps` and `received` have one entry per read: the arrival in ns, on the clock of the
    server's timestamps, and the number of bytes received so far. `sent_ns` and `failed_ns` are
    CLOCK_MONOTONIC. `user` is None if the request was never due. `previous` is the request that
    the same user sent before.
    """

    __slots__ = (
        "buffer",
        "failed_ns",
        "failure",
        "framing",
        "prepared",
        "previous",
        "received",
        "resent",
        "sent_ns",
        "stamps",
        "unsent",
        "user",
    )

    def __init__(
        self, prepared: PreparedRequest, user: int | None, previous: InFlightRequest | None
    ) -> None:
        self.prepared = prepared
        self.user = user
        self.previous = previous
        self.framing = Framing(prepared.method)
        self.buffer = bytearray()
        self.stamps: list[int] = []
        self.received: list[int] = []
        self.resent = False
        self.failure: Failure | None = None
        self.failed_ns: int | None = None
        self.unsent = memoryview(prepared.data)
        self.sent_ns: int | None = None

    def rewind(self) -> None:
        """Prepare to send it again from its first byte."""
        self.unsent = memoryview(self.prepared.data)
        self.sent_ns = None


class User:
    """One of the concurrent users, with a connection that stays open between waves."""

    __slots__ = (
        "bytes_seen",
        "connected",
        "connection",
        "number",
        "progress_at",
        "request",
        "reused",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.connection: Connection | None = None
        self.connected = False
        """Whether the connection can carry requests."""
        self.reused = False
        """Whether the connection has already carried a complete response."""
        self.request: InFlightRequest | None = None
        self.bytes_seen = -1
        """Bytes of the response at the last check of the timeouts."""
        self.progress_at = 0.0
        """When `bytes_seen` last changed, or connecting began; seconds of CLOCK_MONOTONIC."""

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None
        self.connected = self.reused = False
