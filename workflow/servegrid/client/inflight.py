"""What the hot loop works on: a request under way, and the user who sent it."""

from __future__ import annotations

from dataclasses import dataclass

from servegrid.client.failures import Failure
from servegrid.client.http1 import Framing
from servegrid.client.sockets import Connection


@dataclass(frozen=True)
class Message:
    """A request as bytes, and when it is due.

    Of an open loop it is `due_ns` after the clock has started. Otherwise it is whenever a user is
    free, who then rests for `rest_ns` after the answer to it.
    """

    method: str
    data: bytes
    due_ns: int | None = None
    rest_ns: int = 0


class Flight:
    """One request under way: what was sent when, and what came back when, unparsed.

    `stamps` and `ends` have one entry per read: the arrival in ns, on the clock of the server's
    stamps, and the number of bytes received until then. `sent_ns` and `failed_ns` are
    CLOCK_MONOTONIC. `user` is None where the request was never due.
    """

    __slots__ = (
        "buffer",
        "ends",
        "failed_ns",
        "failure",
        "framing",
        "message",
        "predecessor",
        "resent",
        "sent_ns",
        "stamps",
        "unsent",
        "user",
    )

    def __init__(self, message: Message, user: int | None, predecessor: Flight | None) -> None:
        self.message = message
        self.user = user
        self.predecessor = predecessor
        self.framing = Framing(message.method)
        self.buffer = bytearray()
        self.stamps: list[int] = []
        self.ends: list[int] = []
        self.resent = False
        self.failure: Failure | None = None
        self.failed_ns: int | None = None
        self.unsent = memoryview(message.data)
        self.sent_ns: int | None = None

    def rewind(self) -> None:
        """Make it ready to be sent from its first byte."""
        self.unsent = memoryview(self.message.data)
        self.sent_ns = None


class User:
    """One of the concurrent users, with the connection that stays open between waves."""

    __slots__ = ("connection", "flight", "number", "progress", "ready", "served", "since")

    def __init__(self, number: int) -> None:
        self.number = number
        self.connection: Connection | None = None
        self.ready = False
        """Whether the connection can carry requests."""
        self.served = False
        """Whether the connection has carried a whole response already."""
        self.flight: Flight | None = None
        self.progress = -1
        """Bytes of the flight that had come when it was last looked at."""
        self.since = 0.0
        """When that changed, or when connecting began; seconds of CLOCK_MONOTONIC."""

    def close(self) -> None:
        """Drop the connection; the next request opens another."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None
        self.ready = self.served = False
