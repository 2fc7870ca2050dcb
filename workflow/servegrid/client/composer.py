"""A process that builds the next request of each user of a load of conversations.

A prompt with a long history takes milliseconds to build: the response is parsed, its text is
tokenized, and JSON is written. In the event loop this would delay what other users send and
receive. So the loop hands over the bytes of a response, and gets the bytes of the next request
back while the user thinks.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from servegrid.client.conversations import Answer, Composed, Dialogues
from servegrid.client.inflight import PreparedRequest, Turn
from servegrid.client.workers import end_helper, raise_killed, start_helper
from servegrid.errors import ServegridError

_ASKED = struct.Struct("=II")
"""A user, and the size of a response; 0 if the request failed."""
_REPLY = struct.Struct("=I?q5IIII")
"""A user, whether there is a request, its `think_ns` and turn, how many conversations were cut and
how many rows were left out so far, and the size of the request."""
_READ = 1 << 18
_METHOD = "POST"

Prepare = Callable[[Composed], PreparedRequest]
Read = Callable[[bytes], Answer | None]
"""Takes the bytes of a response; returns the answer, or None if it is a failure."""


class Composer:
    """Builds requests of `dialogues`. `openings` are the first ones of the users, in their order.

    `positions` are those of this process's users among all users. There are fewer openings if there
    are fewer conversations. Use it as a context manager: it ends the process. Raises LoadError if a
    first request cannot be made.
    """

    def __init__(
        self, dialogues: Dialogues, prepare: Prepare, read: Read, positions: Sequence[int]
    ) -> None:
        self.cut = self.rows_left_out = 0
        self._dialogues, self._prepare, self._answer = dialogues, prepare, read
        self._users = len(positions)
        composed = (dialogues.begin(*each) for each in enumerate(positions))
        self.openings = [prepare(each) for each in composed if each is not None]
        self.rows_left_out = dialogues.rows_left_out
        self._unsent = bytearray()
        self._received = bytearray()
        self._socket: socket.socket | None = None
        self._pid: int | None = None

    def __enter__(self) -> Self:
        self._socket, other = socket.socketpair()
        self._pid = start_helper(partial(self._serve, other), other.fileno())
        other.close()
        self._socket.setblocking(False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pid is not None:
            end_helper(self._pid)
            self._pid = None

    # In the process of the event loop.

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether `flush` must be called when the descriptor can be written."""
        return bool(self._unsent)

    def ask(self, user: int, response: bytes) -> None:
        """Ask for the next request of a user, after this response; empty if the request failed."""
        self._unsent += _ASKED.pack(user, len(response)) + response
        self.flush()

    def flush(self) -> None:
        """Send what the process can take now. Raises LoadError if the process was killed."""
        assert self._socket is not None
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            raise_killed()

    def replies(self, timeout_s: float = 0.0) -> list[tuple[int, PreparedRequest | None]]:
        """Users with their next requests that are ready; None if there is no conversation left.

        Waits for `timeout_s`. Raises LoadError if the process was killed.
        """
        assert self._socket is not None
        if timeout_s:
            select.select([self._socket], [], [], timeout_s)
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise_killed()
        self._received += data
        found, at = [], 0
        while (reply := self._parse_reply(at)) is not None:
            user, request, at = reply
            found.append((user, request))
        del self._received[:at]
        return found

    def _parse_reply(self, start: int) -> tuple[int, PreparedRequest | None, int] | None:
        """The user, the request and the end of the reply at `start`; None if it is incomplete."""
        if len(self._received) < (begin := start + _REPLY.size):
            return None
        user, found, think_ns, *turn, cut, left_out, size = _REPLY.unpack_from(
            self._received, start
        )
        if len(self._received) < (end := begin + size):
            return None
        self.cut, self.rows_left_out = cut, left_out
        request = bytes(self._received[begin:end])
        made = PreparedRequest(_METHOD, request, None, think_ns, Turn(*turn)) if found else None
        return user, made, end

    # In its own process.

    def _serve(self, connection: socket.socket) -> None:
        while (asked := self._receive(connection)) is not None:
            user, response = asked
            request = self._compose(user, response)
            turn = (0,) * 5 if request is None or request.turn is None else request.turn
            data = b"" if request is None else request.data
            counts = self._dialogues.cut, self._dialogues.rows_left_out, len(data)
            think_ns = 0 if request is None else request.think_ns
            head = _REPLY.pack(user, request is not None, think_ns, *turn, *counts)
            connection.sendall(head + data)

    def _compose(self, user: int, response: bytes) -> PreparedRequest | None:
        answer = self._answer(response) if response else None
        try:
            composed = self._dialogues.follow(user, answer)
        except ServegridError:
            return None  # There are no more prompts of this kind.
        return None if composed is None else self._prepare(composed)

    def _receive(self, connection: socket.socket) -> tuple[int, bytes] | None:
        """The next user that waits, and its response. Makes conversations ready while none does."""
        while not select.select([connection], [], [], 0)[0]:
            if self._dialogues.stocked >= self._users or not self._stock():
                break
        if (head := _receive_exactly(connection, _ASKED.size)) is None:
            return None
        user, size = _ASKED.unpack(head)
        response = _receive_exactly(connection, size)
        return None if response is None else (user, response)

    def _stock(self) -> bool:
        with contextlib.suppress(ServegridError):
            return self._dialogues.stock()
        return False


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    """So many bytes; None if the other end was closed before."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
