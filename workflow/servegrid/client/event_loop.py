"""The event loop of the measurement: sends requests and records when each response byte arrives.

It uses one thread and one epoll, and parses only what shows the end of a response. It sends the
requests of one wave. Each user has its own connection, and sends its next request when the last one
has ended. A burst has as many users as requests; a closed loop has fewer. The requests of an open
loop have due times of their own: a free user sends each one, or a new user if none is free.
"""

from __future__ import annotations

import heapq
import select
import time
from collections import deque
from collections.abc import Callable

import psutil

from servegrid.client.clock import OffsetLog
from servegrid.client.failures import Failure, FailureKind
from servegrid.client.http1 import HttpSyntaxError
from servegrid.client.inflight import InFlightRequest, PreparedRequest, Timeouts, User
from servegrid.client.sockets import WOULD_BLOCK, Connection, ServerAddress
from servegrid.client.supply import RequestSupply

_QUEUE_RETRY_S = 0.01
FOREVER_NS = 10**18
MAX_RESPONSE_BYTES = 2**26
"""Allowed size of one response. A chunk of vLLM has 0.3 kB, so this is over 100,000 tokens. All
responses together may take half of the memory that is free at the start."""
TOO_LARGE = (
    f"the response is larger than {MAX_RESPONSE_BYTES:,} bytes, or all of them fill the memory"
)


class EventLoop:
    """Sends the requests of one wave and collects their responses.

    `run` connects the users that are not connected, starts the clock and returns when every
    request has a response or has failed. `requests` are then in the order of `prepared`, without
    those that would be due after `timeouts.send_duration_s`: `left` counts those of them that were
    ready. `users` may have grown.
    """

    def __init__(
        self,
        server: ServerAddress,
        users: list[User],
        prepared: deque[PreparedRequest] | RequestSupply,
        timeouts: Timeouts,
    ) -> None:
        self.requests: list[InFlightRequest] = []
        self.offsets = OffsetLog()
        self.start_ns = 0
        self.users = users
        self._server = server
        self._timeouts = timeouts
        self.left = 0
        self._unsent = prepared
        self._open_loop = bool(prepared) and prepared[0].due_ns is not None
        self._in_flight = 0
        self._failed_users: deque[User] = deque()
        self._free_users: list[User] = []
        self._thinking: list[tuple[int, int, User, InFlightRequest | None]] = []
        self._send_until_ns = 0
        self._queue_full: list[User] = []
        self._by_descriptor: dict[int, User] = {}
        self._epoll = select.epoll()
        self._memory_left = psutil.virtual_memory().available // 2

    @property
    def waits(self) -> int:
        """How often the next request was not ready."""
        return self._unsent.waits if isinstance(self._unsent, RequestSupply) else 0

    def run(self, wait_for_start: Callable[[], int] = time.monotonic_ns) -> None:
        """`wait_for_start` returns the start time in ns of CLOCK_MONOTONIC, and may block."""
        try:
            self._connect_all()
            self.offsets.sample()
            self.start_ns = wait_for_start()
            self._send_all()
            self.left += len(self._unsent)
        finally:
            self._epoll.close()
            for user in self.users:
                if user.request is not None or not user.connected:
                    user.request = None
                    user.close()

    def _connect_all(self) -> None:
        for user in self.users:
            if user.connection is not None and not self._is_still_open(user, user.connection):
                self._close(user)
            if user.connection is None:
                self._open(user)
        deadline = time.monotonic() + self._timeouts.connect_s
        while any(user.connection is not None and not user.connected for user in self.users):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._handle_events(left)

    def _is_still_open(self, user: User, connection: Connection) -> bool:
        """Whether the server has kept the connection open since the last wave."""
        try:
            connection.receive()
        except WOULD_BLOCK:
            self._register(user, connection, select.EPOLLIN)
            return True
        except OSError:
            pass
        return False

    def _send_all(self) -> None:
        now = self.start_ns / 1e9
        deadline, next_check = now + self._timeouts.timeout_s, now + self._timeouts.check_s
        self._send_until_ns = self.start_ns + int(
            min(self._timeouts.send_duration_s * 1e9, FOREVER_NS)
        )
        if self._timeouts.timeout_s <= 0:
            self._time_out_all()
        if self._open_loop:
            self._free_users = list(reversed(self.users))
        else:
            for user in self.users:
                self._continue(user, None)
        while self._in_flight or self._failed_users or self._next_due_ns() is not None:
            self._handle_events(self._poll_timeout_s(next_check))
            self._send_due()
            while self._failed_users:
                user = self._failed_users.popleft()
                self._continue(user, user.request)
            now = time.monotonic()
            if now >= deadline:
                self._time_out_all()
            elif now >= next_check:
                self._check_timeouts(now)
                next_check = now + self._timeouts.check_s
        self.offsets.sample()

    # When requests are due.

    def _next_due_ns(self) -> int | None:
        """When the next request is due that waits for no response; None if there is none."""
        if self._thinking:
            return self._thinking[0][0]
        if not self._open_loop or not self._unsent:
            return None
        due_ns = self._unsent[0].due_ns
        assert due_ns is not None
        if self.start_ns + due_ns > self._send_until_ns:
            self.left += len(self._unsent)
            self._unsent.clear()
            return None
        return self.start_ns + due_ns

    def _poll_timeout_s(self, next_check: float) -> float:
        """Seconds to wait in epoll. epoll counts whole ms, so the last ms is a busy wait."""
        if self._failed_users:
            return 0.0
        timeout_s = next_check - time.monotonic()
        due_ns = self._next_due_ns()
        if due_ns is None:
            return timeout_s
        left_ms = (due_ns - time.monotonic_ns()) // 1_000_000
        return min(timeout_s, max(left_ms, 0) / 1e3)

    def _send_due(self) -> None:
        while (due_ns := self._next_due_ns()) is not None and due_ns <= time.monotonic_ns():
            if self._thinking:
                _, _, user, previous = heapq.heappop(self._thinking)
                self._start_request(user, previous)
            else:
                user = self._free_users.pop() if self._free_users else self._add_user()
                self._start_request(user, None)

    def _add_user(self) -> User:
        user = User(len(self.users))
        self.users.append(user)
        return user

    def _handle_events(self, timeout_s: float) -> None:
        if self._queue_full:
            timeout_s = min(timeout_s, _QUEUE_RETRY_S)
            waiting, self._queue_full = self._queue_full, []
            for user in waiting:
                assert user.connection is not None
                self._connect(user, user.connection)
        for descriptor, events in self._epoll.poll(max(timeout_s, 0)):
            try:
                user = self._by_descriptor[descriptor]
            except KeyError:  # costs nothing where all descriptors are of connections
                self._handle_supply()
                continue
            connection, request = user.connection, user.request
            assert connection is not None
            if not user.connected:
                self._advance(user, connection)
            elif request is None:
                # The server has closed an idle connection, or sends without a request.
                self._close(user)
            elif events == select.EPOLLOUT:
                self._send(user, connection, request)
            else:
                self._receive(user, connection, request)

    def _handle_supply(self) -> None:
        """Take what a supply of requests has sent that has a descriptor of its own."""

    # Connections.

    def _open(self, user: User) -> None:
        user.progress_at = time.monotonic()
        try:
            user.connection = self._server.new_connection()
        except OSError as error:
            self._connection_failed(user, error)
        else:
            self._connect(user, user.connection)

    def _connect(self, user: User, connection: Connection) -> None:
        try:
            events = connection.connect()
        except BlockingIOError:
            self._queue_full.append(user)
        except OSError as error:
            self._connection_failed(user, error)
        else:
            self._wait_or_send(user, connection, events)

    def _advance(self, user: User, connection: Connection) -> None:
        try:
            events = connection.advance()
        except OSError as error:
            self._connection_failed(user, error)
        else:
            self._wait_or_send(user, connection, events)

    def _wait_or_send(self, user: User, connection: Connection, events: int) -> None:
        self._register(user, connection, events or select.EPOLLIN)
        user.connected = not events
        if user.connected and user.request is not None:
            self._send(user, connection, user.request)

    def _register(self, user: User, connection: Connection, events: int) -> None:
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

    def _connection_failed(self, user: User, error: OSError) -> None:
        self._close(user)
        if user.request is not None:
            self._fail(user, user.request, "connect", error.strerror or str(error))

    # Requests and responses.

    def _continue(self, user: User, previous: InFlightRequest | None) -> None:
        """Give `user` its next task, at the start or after its `previous` request has ended."""
        user.request = None
        if self._open_loop:
            self._free_users.append(user)
            return
        if not self._unsent:
            return
        think_ns = 0 if previous is None else previous.prepared.think_ns
        due_ns = time.monotonic_ns() + think_ns
        if due_ns > self._send_until_ns:
            return
        if think_ns:
            heapq.heappush(self._thinking, (due_ns, user.number, user, previous))
        else:
            self._start_request(user, previous)

    def _start_request(self, user: User, previous: InFlightRequest | None) -> None:
        if not self._unsent:
            return
        user.request = request = InFlightRequest(self._unsent.popleft(), user.number, previous)
        user.bytes_seen = -1
        self.requests.append(request)
        self._in_flight += 1
        if user.connection is None:
            self._open(user)
        elif user.connected:
            self._send(user, user.connection, request)

    def _send(self, user: User, connection: Connection, request: InFlightRequest) -> None:
        is_first = request.sent_ns is None
        if is_first:
            request.sent_ns = time.monotonic_ns()
        try:
            sent = connection.send(request.unsent)
        except WOULD_BLOCK:
            sent = 0
        except OSError as error:
            if not self._resend(user, request):
                self._fail(user, request, "reset", error.strerror or str(error))
            return
        request.unsent = request.unsent[sent:]
        if request.unsent:
            self._register(user, connection, select.EPOLLIN | select.EPOLLOUT)
        elif not is_first:
            self._register(user, connection, select.EPOLLIN)

    def _receive(self, user: User, connection: Connection, request: InFlightRequest) -> None:
        try:
            stamp, data = connection.receive()
        except WOULD_BLOCK:
            return
        except OSError as error:
            if request.buffer or not self._resend(user, request):
                self._fail(user, request, "reset", error.strerror or str(error))
            return
        try:
            if data:
                request.buffer += data
                request.stamps.append(stamp)
                request.received.append(len(request.buffer))
                self._memory_left -= len(data)
                if len(request.buffer) > MAX_RESPONSE_BYTES or self._memory_left < 0:
                    self._fail(user, request, "malformed", TOO_LARGE)
                    return
                ended = request.framing.is_complete(request.buffer)
            elif request.buffer:
                ended = request.framing.is_complete_at_close(request.buffer)
            else:
                ended = False
        except HttpSyntaxError as error:
            self._fail(user, request, "malformed", f"not an HTTP response: {error}")
            return
        if ended:
            self._finish(user, request, still_open=bool(data))
        elif not data:
            self._handle_early_close(user, request)

    def _finish(self, user: User, request: InFlightRequest, still_open: bool) -> None:
        if still_open and not request.unsent and request.framing.keep_alive(request.buffer):
            user.reused = True
        else:
            self._close(user)
        self._in_flight -= 1
        self._continue(user, request)

    def _handle_early_close(self, user: User, request: InFlightRequest) -> None:
        if request.buffer:
            received = f"{len(request.buffer)} bytes of the response"
            detail = f"the server closed the connection after {received}"
            self._fail(user, request, "truncated", detail)
        elif not self._resend(user, request):
            detail = "the server closed the connection without a response"
            self._fail(user, request, "reset", detail)

    def _resend(self, user: User, request: InFlightRequest) -> bool:
        """Send the request again if the server was just closing the reused connection.

        A server may close a connection after any response (RFC 9112, 9.3 and 9.6), and then never
        receives the request. Only once, so that a server that dies of the request is noticed.
        """
        if not user.reused or request.resent:
            return False
        request.resent = True
        request.rewind()
        self._close(user)
        self._open(user)
        return True

    # Failures and timeouts.

    def _fail(self, user: User, request: InFlightRequest, kind: FailureKind, detail: str) -> None:
        request.failure = Failure(kind, detail)
        request.failed_ns = time.monotonic_ns()
        self._close(user)
        self._in_flight -= 1
        self._failed_users.append(user)

    def _check_timeouts(self, now: float) -> None:
        self.offsets.sample()
        for user in self.users:
            request = user.request
            if request is None:
                continue
            if not user.connected:
                if now - user.progress_at > self._timeouts.connect_s:
                    detail = f"no connection within {self._timeouts.connect_s:g} s"
                    self._fail(user, request, "connect", detail)
            elif len(request.buffer) != user.bytes_seen:
                user.bytes_seen, user.progress_at = len(request.buffer), now
            elif now - user.progress_at > self._timeouts.idle_timeout_s:
                detail = f"no byte for {self._timeouts.idle_timeout_s:g} s"
                self._fail(user, request, "stalled", detail)

    def _time_out_all(self) -> None:
        for user in self.users:
            if user.request is not None:
                self._fail(
                    user,
                    user.request,
                    "timeout",
                    "the workload's timeout passed before the response was complete",
                )
        self._thinking.clear()
        if time.monotonic_ns() > self._send_until_ns:
            return
        for prepared in self._unsent:
            request = InFlightRequest(prepared, None, None)
            request.failure = Failure(
                "timeout", "the workload's timeout passed before the request was sent"
            )
            request.failed_ns = time.monotonic_ns()
            self.requests.append(request)
        self._unsent.clear()
