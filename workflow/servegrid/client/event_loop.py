"""The hot loop: requests out, bytes in, each with the time of its arrival.

One thread, one epoll, no parsing beyond what shows the end of a response. The messages of a
wave are served by users: each takes the next message when its last has been answered, on a
connection of its own. As many users as messages make a burst, fewer make a closed loop. The
messages of an open loop have times of their own, at which a user who is free takes them, or one
more user who joins.
"""

from __future__ import annotations

import heapq
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from servegrid.client.clock import OffsetLog
from servegrid.client.failures import Failure, Kind
from servegrid.client.http1 import WireError
from servegrid.client.inflight import Flight, Message, User
from servegrid.client.sockets import WOULD_BLOCK, Connection, Server

CONNECT_LIMIT_S = 20.0
_TICK_S = 1.0
_SHORTEST_TICK_S = 0.005
_QUEUE_RETRY_S = 0.01
_FOREVER_NS = 10**18


@dataclass(frozen=True)
class Limits:
    """Seconds for the whole wave, seconds that may pass without a byte for a request, and seconds
    after which no further request is begun: the rest of the messages is left."""

    timeout_s: float
    idle_timeout_s: float
    sending_s: float = inf

    @property
    def connect_s(self) -> float:
        return min(CONNECT_LIMIT_S, self.idle_timeout_s, self.timeout_s)

    @property
    def tick_s(self) -> float:
        """How often the limits are looked at: they are exceeded by this at most."""
        return max(min(_TICK_S, self.connect_s / 4), _SHORTEST_TICK_S)


class Wave:
    """The messages of one wave on their way.

    `run` connects the users who are not connected, starts the clock and returns when every
    message has been answered or has failed; `flights` are then in the order of the messages.
    Messages that would be due after `limits.sending_s` have none. Users may join `users`.
    """

    def __init__(
        self, server: Server, users: list[User], messages: Sequence[Message], limits: Limits
    ) -> None:
        self.flights: list[Flight] = []
        self.offsets = OffsetLog()
        self.start_ns = 0
        self._server = server
        self.users = users
        self._limits = limits
        self._waiting = deque(messages)
        self._open_loop = any(message.due_ns is not None for message in messages)
        self._under_way = 0
        self._failed: deque[User] = deque()
        self._free: list[User] = []
        self._resting: list[tuple[int, int, User, Flight | None]] = []
        self._sending_until_ns = 0
        self._queue_full: list[User] = []
        self._by_descriptor: dict[int, User] = {}
        self._epoll = select.epoll()

    def run(self, start: Callable[[], int] = time.monotonic_ns) -> None:
        """`start` tells the time at which the clock starts, and may wait for it."""
        try:
            self._connect_all()
            self.offsets.take()
            self.start_ns = start()
            self._serve_all()
        finally:
            self._epoll.close()
            for user in self.users:
                if user.flight is not None or not user.ready:
                    user.flight = None
                    user.close()

    def _connect_all(self) -> None:
        for user in self.users:
            if user.connection is not None and not self._still_open(user, user.connection):
                self._close(user)
            if user.connection is None:
                self._open(user)
        deadline = time.monotonic() + self._limits.connect_s
        while any(user.connection is not None and not user.ready for user in self.users):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._handle_events(left)

    def _still_open(self, user: User, connection: Connection) -> bool:
        """Whether the server has left the connection alone since the last wave."""
        try:
            connection.receive()
        except WOULD_BLOCK:
            self._watch(user, connection, select.EPOLLIN)
            return True
        except OSError:
            pass
        return False

    def _serve_all(self) -> None:
        now = self.start_ns / 1e9
        deadline, next_tick = now + self._limits.timeout_s, now + self._limits.tick_s
        self._sending_until_ns = self.start_ns + int(min(self._limits.sending_s * 1e9, _FOREVER_NS))
        if self._limits.timeout_s <= 0:
            self._time_out()
        if self._open_loop:
            self._free = list(reversed(self.users))
        else:
            for user in self.users:
                self._take_next(user, None)
        while self._under_way or self._failed or self._next_due_ns() is not None:
            self._handle_events(self._patience(next_tick))
            self._begin_due()
            while self._failed:
                user = self._failed.popleft()
                self._take_next(user, user.flight)
            now = time.monotonic()
            if now >= deadline:
                self._time_out()
            elif now >= next_tick:
                self._tick(now)
                next_tick = now + self._limits.tick_s
        self.offsets.take()

    # When messages are due.

    def _next_due_ns(self) -> int | None:
        """When something is due for which no answer is awaited; None where nothing is."""
        if self._resting:
            return self._resting[0][0]
        if not self._open_loop or not self._waiting:
            return None
        due_ns = self._waiting[0].due_ns
        assert due_ns is not None
        if self.start_ns + due_ns > self._sending_until_ns:
            self._waiting.clear()
            return None
        return self.start_ns + due_ns

    def _patience(self, next_tick: float) -> float:
        """Seconds to wait for events. epoll counts whole ms: the last before a due time is spun."""
        if self._failed:
            return 0.0
        patience = next_tick - time.monotonic()
        due_ns = self._next_due_ns()
        if due_ns is None:
            return patience
        left_ms = (due_ns - time.monotonic_ns()) // 1_000_000
        return min(patience, max(left_ms, 0) / 1e3)

    def _begin_due(self) -> None:
        while (due_ns := self._next_due_ns()) is not None and due_ns <= time.monotonic_ns():
            if self._resting:
                _, _, user, predecessor = heapq.heappop(self._resting)
                self._begin(user, predecessor)
            else:
                self._begin(self._free.pop() if self._free else self._joining(), None)

    def _joining(self) -> User:
        user = User(len(self.users))
        self.users.append(user)
        return user

    def _handle_events(self, limit_s: float) -> None:
        if self._queue_full:
            limit_s = min(limit_s, _QUEUE_RETRY_S)
            waiting, self._queue_full = self._queue_full, []
            for user in waiting:
                assert user.connection is not None
                self._connect(user, user.connection)
        for descriptor, events in self._epoll.poll(max(limit_s, 0)):
            user = self._by_descriptor[descriptor]
            connection, flight = user.connection, user.flight
            assert connection is not None
            if not user.ready:
                self._advance(user, connection)
            elif flight is None:
                # The server has closed an idle connection, or speaks out of turn.
                self._close(user)
            elif events == select.EPOLLOUT:
                self._send(user, connection, flight)
            else:
                self._receive(user, connection, flight)

    # Connections.

    def _open(self, user: User) -> None:
        user.since = time.monotonic()
        try:
            user.connection = self._server.connection()
        except OSError as error:
            self._unreachable(user, error)
        else:
            self._connect(user, user.connection)

    def _connect(self, user: User, connection: Connection) -> None:
        try:
            events = connection.connect()
        except BlockingIOError:
            self._queue_full.append(user)
        except OSError as error:
            self._unreachable(user, error)
        else:
            self._await_or_begin(user, connection, events)

    def _advance(self, user: User, connection: Connection) -> None:
        try:
            events = connection.advance()
        except OSError as error:
            self._unreachable(user, error)
        else:
            self._await_or_begin(user, connection, events)

    def _await_or_begin(self, user: User, connection: Connection, events: int) -> None:
        self._watch(user, connection, events or select.EPOLLIN)
        user.ready = not events
        if user.ready and user.flight is not None:
            self._send(user, connection, user.flight)

    def _watch(self, user: User, connection: Connection, events: int) -> None:
        descriptor = connection.fileno()
        if descriptor in self._by_descriptor:
            self._epoll.modify(descriptor, events)
        else:
            self._by_descriptor[descriptor] = user
            self._epoll.register(descriptor, events)

    def _close(self, user: User) -> None:
        if user.connection is not None:
            self._by_descriptor.pop(user.connection.fileno(), None)
        if user in self._queue_full:
            self._queue_full.remove(user)
        user.close()

    def _unreachable(self, user: User, error: OSError) -> None:
        self._close(user)
        if user.flight is not None:
            self._fail(user, user.flight, "connect", error.strerror or str(error))

    # Requests and responses.

    def _take_next(self, user: User, predecessor: Flight | None) -> None:
        """What `user` does once its last request has ended, or the clock has started."""
        user.flight = None
        if self._open_loop:
            self._free.append(user)
            return
        if not self._waiting:
            return
        rest_ns = 0 if predecessor is None else predecessor.message.rest_ns
        due_ns = time.monotonic_ns() + rest_ns
        if due_ns > self._sending_until_ns:
            return
        if rest_ns:
            heapq.heappush(self._resting, (due_ns, user.number, user, predecessor))
        else:
            self._begin(user, predecessor)

    def _begin(self, user: User, predecessor: Flight | None) -> None:
        if not self._waiting:
            return
        user.flight = flight = Flight(self._waiting.popleft(), user.number, predecessor)
        user.progress = -1
        self.flights.append(flight)
        self._under_way += 1
        if user.connection is None:
            self._open(user)
        elif user.ready:
            self._send(user, user.connection, flight)

    def _send(self, user: User, connection: Connection, flight: Flight) -> None:
        whole = flight.sent_ns is None
        if whole:
            flight.sent_ns = time.monotonic_ns()
        try:
            sent = connection.send(flight.unsent)
        except WOULD_BLOCK:
            sent = 0
        except OSError as error:
            if not self._send_again(user, flight):
                self._fail(user, flight, "reset", error.strerror or str(error))
            return
        flight.unsent = flight.unsent[sent:]
        if flight.unsent:
            self._watch(user, connection, select.EPOLLIN | select.EPOLLOUT)
        elif not whole:
            self._watch(user, connection, select.EPOLLIN)

    def _receive(self, user: User, connection: Connection, flight: Flight) -> None:
        try:
            stamp, data = connection.receive()
        except WOULD_BLOCK:
            return
        except OSError as error:
            self._fail(user, flight, "reset", error.strerror or str(error))
            return
        try:
            if data:
                flight.buffer += data
                flight.stamps.append(stamp)
                flight.ends.append(len(flight.buffer))
                ended = flight.framing.ended(flight.buffer)
            elif flight.buffer:
                ended = flight.framing.ended_by_close(flight.buffer)
            else:
                ended = False
        except WireError as error:
            self._fail(user, flight, "malformed", f"not an HTTP response: {error}")
            return
        if ended:
            self._finish(user, flight, open_still=bool(data))
        elif not data:
            self._closed_early(user, flight)

    def _finish(self, user: User, flight: Flight, open_still: bool) -> None:
        if open_still and not flight.unsent and flight.framing.reusable(flight.buffer):
            user.served = True
        else:
            self._close(user)
        self._under_way -= 1
        self._take_next(user, flight)

    def _closed_early(self, user: User, flight: Flight) -> None:
        if flight.buffer:
            detail = f"the server closed after {len(flight.buffer)} bytes of the response"
            self._fail(user, flight, "truncated", detail)
        elif not self._send_again(user, flight):
            self._fail(user, flight, "reset", "the server closed without an answer")

    def _send_again(self, user: User, flight: Flight) -> bool:
        """Send a request once more that met a connection which the server was just closing.

        Servers may end a connection after any response (RFC 9112, 9.3 and 9.6), and the request
        then never reached them. Once, so that a server that dies of it is seen.
        """
        if not user.served or flight.resent:
            return False
        flight.resent = True
        flight.rewind()
        self._close(user)
        self._open(user)
        return True

    # Failures and limits.

    def _fail(self, user: User, flight: Flight, kind: Kind, detail: str) -> None:
        flight.failure = Failure(kind, detail)
        flight.failed_ns = time.monotonic_ns()
        self._close(user)
        self._under_way -= 1
        self._failed.append(user)

    def _tick(self, now: float) -> None:
        self.offsets.take()
        for user in self.users:
            flight = user.flight
            if flight is None:
                continue
            if not user.ready:
                if now - user.since > self._limits.connect_s:
                    detail = f"no connection within {self._limits.connect_s:g} s"
                    self._fail(user, flight, "connect", detail)
            elif len(flight.buffer) != user.progress:
                user.progress, user.since = len(flight.buffer), now
            elif now - user.since > self._limits.idle_timeout_s:
                detail = f"no byte for {self._limits.idle_timeout_s:g} s"
                self._fail(user, flight, "stalled", detail)

    def _time_out(self) -> None:
        for user in self.users:
            if user.flight is not None:
                self._fail(
                    user,
                    user.flight,
                    "timeout",
                    "the load's time was up before the answer was complete",
                )
        self._resting.clear()
        for message in self._waiting:
            flight = Flight(message, None, None)
            flight.failure = Failure("timeout", "the load's time was up before it was sent")
            flight.failed_ns = time.monotonic_ns()
            self.flights.append(flight)
        self._waiting.clear()
