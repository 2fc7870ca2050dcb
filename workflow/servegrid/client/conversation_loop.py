"""The event loop of conversations: a user's next request follows from the last response."""

from __future__ import annotations

import heapq
import math
import select
import time
from collections import deque

from servegrid.client.composer import Composer
from servegrid.client.event_loop import FOREVER_NS, EventLoop
from servegrid.client.inflight import InFlightRequest, PreparedRequest, Timeouts, User
from servegrid.client.sockets import ServerAddress

_REPLY_S = 60.0
"""Wait at most this long for the composer once the load has timed out."""


class ConversationLoop(EventLoop):
    """As EventLoop, for users who play one conversation after another, turn by turn.

    The `composer` builds the next request while the user thinks. At most `most` requests are sent,
    None without a limit; conversations then end in the middle. After a failed turn, the user begins
    the next conversation.
    """

    def __init__(
        self,
        server: ServerAddress,
        users: list[User],
        composer: Composer,
        most: int | None,
        timeouts: Timeouts,
    ) -> None:
        self._next = deque[PreparedRequest]()
        super().__init__(server, users, self._next, timeouts)
        self._composer = composer
        self._ready: dict[int, PreparedRequest] = dict(enumerate(composer.openings))
        self._unasked = math.inf if most is None else most - len(self._ready)
        self._awaited: dict[int, tuple[User | None, int, InFlightRequest | None]] = {}
        self._waits = 0

    @property
    def waits(self) -> int:
        """How often a user's next request was due before it was built."""
        return self._waits

    def _connect_all(self) -> None:
        super()._connect_all()
        self._epoll.register(self._composer.fileno(), select.EPOLLIN)

    def _next_due_ns(self) -> int | None:
        due_ns = super()._next_due_ns()
        if due_ns is None and self._awaited:
            return FOREVER_NS
        return due_ns

    def _continue(self, user: User, previous: InFlightRequest | None) -> None:
        user.request = None
        if previous is None:
            if user.number in self._ready:
                self._start_request(user, None)
            return
        due_ns = time.monotonic_ns() + previous.prepared.think_ns
        if self._unasked <= 0 or due_ns > self._send_until_ns:
            return
        self._unasked -= 1
        self._awaited[user.number] = (user, due_ns, previous)
        end = previous.framing.end
        response = b"" if previous.failure is not None else bytes(previous.buffer[:end])
        self._composer.ask(user.number, response)
        self._watch_composer()

    def _watch_composer(self) -> None:
        events = select.EPOLLIN | (select.EPOLLOUT if self._composer.has_unsent else 0)
        self._epoll.modify(self._composer.fileno(), events)

    def _handle_supply(self) -> None:
        self._composer.flush()
        self._take_replies()
        self._watch_composer()

    def _take_replies(self, timeout_s: float = 0.0) -> None:
        for number, prepared in self._composer.replies(timeout_s):
            user, due_ns, previous = self._awaited.pop(number, (None, 0, None))
            if user is None or prepared is None:
                continue
            self._ready[number] = prepared
            self._waits += due_ns < time.monotonic_ns()
            heapq.heappush(self._thinking, (due_ns, number, user, previous))

    def _start_request(self, user: User, previous: InFlightRequest | None) -> None:
        self._next.append(self._ready.pop(user.number))
        super()._start_request(user, previous)

    def _time_out_all(self) -> None:
        """What is ready and was not sent fails: how many more turns there would be is not known."""
        self._unasked = 0
        deadline = time.monotonic() + _REPLY_S
        while self._awaited and time.monotonic() < deadline:
            self._composer.flush()
            self._take_replies(timeout_s=0.01)
        self._awaited.clear()
        self._next.extend(self._ready.values())
        self._ready.clear()
        super()._time_out_all()
