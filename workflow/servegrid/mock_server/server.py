"""The scripted server's loop: requests in, pieces of answers out when they are due."""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import json
import os
import resource
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from servegrid.mock_server.responses import MODEL, Answer, Script, error, page, plain

_STANDARD_INPUT = 0

Answering = Callable[[Any, str, Mapping[str, Any]], Answer]
"""The answer to a completion: of the script, its X-Request-Id and its body."""


class _Peer:
    """One accepted connection."""

    __slots__ = ("read_ns", "received", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = bytearray()
        self.read_ns = 0


class Loop:
    """One thread, one epoll. `answering` makes the answers to completions.

    What it did is kept by request: `read` when the last byte of it had been read, `sent` when each
    piece of its answer was handed to the kernel, in ns of CLOCK_MONOTONIC. A request is known by
    its X-Request-Id; `#` and its number from 0 is added where it has none, or one that was used
    before.
    """

    def __init__(
        self, script: Script, answering: Answering = plain, accept_after_s: float = 0.0
    ) -> None:
        self.script = script
        self.sent: dict[str, list[int]] = {}
        self.read: dict[str, int] = {}
        self._answering = answering
        self._accept_after_s = accept_after_s
        self._listener = _listen(script)
        self._epoll = select.epoll()
        self._peers: dict[int, _Peer] = {}
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._requests: list[dict[str, Any]] = []
        self._connections = 0
        self._answered = 0

    @property
    def port(self) -> str:
        """The port it listens on; empty for a Unix socket."""
        return "" if self.script.unix_socket else str(self._listener.getsockname()[1])

    def run(self) -> None:
        self._epoll.register(_STANDARD_INPUT, select.EPOLLIN)
        self.at(
            time.monotonic_ns() + int(self._accept_after_s * 1e9),
            lambda: self._epoll.register(self._listener.fileno(), select.EPOLLIN),
        )
        while self._take_in():
            now_ns = time.monotonic_ns()
            while self._due and self._due[0][0] <= now_ns:
                heapq.heappop(self._due)[2]()

    def at(self, when_ns: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when_ns, next(self._order), action))

    def _take_in(self) -> bool:
        """Wait until something comes or is due, and take in what has come; False at the end."""
        wait = None
        if self._due:
            wait = max(self._due[0][0] - time.monotonic_ns(), 0) / 1e9
        # epoll would round up to whole ms.
        if not select.select([self._epoll], [], [], wait)[0]:
            return True
        arrived = []
        # All is read before any of it is understood, so that requests sent together are read
        # nearly together.
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == _STANDARD_INPUT:
                return False
            if descriptor == self._listener.fileno():
                self._accept()
            elif self._receive(peer := self._peers[descriptor]):
                arrived.append(peer)
        for peer in arrived:
            while (request := _request_of(peer.received)) is not None:
                self._serve(peer, *request)
        return True

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._listener.accept()
                if self.script.unix_socket is None:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.script.certificate is not None:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(self.script.certificate)
                    try:
                        connection = context.wrap_socket(connection, server_side=True)
                    except OSError:
                        connection.close()
                        continue
                connection.setblocking(False)
                self._connections += 1
                self._peers[connection.fileno()] = _Peer(connection)
                self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _receive(self, peer: _Peer) -> bool:
        """Read what there is of `peer`; False where that is nothing, or its end."""
        try:
            data = peer.socket.recv(1 << 20)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            data = b""
        peer.read_ns = time.monotonic_ns()
        if not data:
            self.close(peer)
            return False
        peer.received += data
        return True

    def _serve(self, peer: _Peer, path: str, headers: dict[str, str], body: bytes) -> None:
        if path == "/v1/completions":
            self._complete(peer, path, headers, body)
        else:
            _Reply(self, peer, self._page_at(path), peer.read_ns, []).follow()

    def _page_at(self, path: str) -> Answer:
        match path:
            case "/log":
                return page(
                    {
                        "sent": self.sent,
                        "read": self.read,
                        "requests": self._requests,
                        "connections": self._connections,
                    }
                )
            case "/health":
                return page("")
            case "/metrics":
                grown = [(name, growth * self._answered) for name, growth in self.script.counters]
                told = [*self.script.gauges, *grown]
                return page("".join(f"{name} {value}\n" for name, value in told))
            case "/v1/models":
                return page({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        return error(404, f"{path} is not served")

    def _complete(self, peer: _Peer, path: str, headers: dict[str, str], body: bytes) -> None:
        number = len(self._requests)
        try:
            asked = json.loads(body)
        except ValueError as refusal:
            _Reply(self, peer, error(400, str(refusal)), peer.read_ns, []).follow()
            return
        request_id = headers.get("x-request-id", "")
        name = (
            request_id if request_id and request_id not in self.sent else f"{request_id}#{number}"
        )
        self.read[name] = peer.read_ns
        times = self.sent[name] = []
        self._requests.append({"headers": headers, "body": asked, "path": path})
        later_ns = int(number * self.script.slower_s * 1e9)
        what = self._answering(self.script, request_id, asked)
        _Reply(self, peer, what, peer.read_ns + later_ns, times, self._count).follow()

    def _count(self) -> None:
        self._answered += 1

    def has(self, peer: _Peer) -> bool:
        return self._peers.get(peer.socket.fileno()) is peer

    def close(self, peer: _Peer) -> None:
        if self._peers.pop(peer.socket.fileno(), None) is not None:
            peer.socket.close()


class _Reply:
    """An answer on its way: its pieces one after another, each at its time after `start_ns`."""

    __slots__ = ("_answered", "_loop", "_peer", "_place", "_start_ns", "_times", "_what")

    def __init__(
        self,
        loop: Loop,
        peer: _Peer,
        what: Answer,
        start_ns: int,
        times: list[int],
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._peer = peer
        self._what = what
        self._start_ns = start_ns
        self._times = times
        self._answered = answered
        self._place = 0

    def follow(self) -> None:
        """Have the next piece sent when it is due; after the last, end as the answer says."""
        if self._place < len(self._what.pieces):
            due_s, _ = self._what.pieces[self._place]
            self._loop.at(self._start_ns + int(due_s * 1e9), self._send)
        else:
            self._answered()
            self._end()

    def _send(self) -> None:
        if not self._loop.has(self._peer):
            return
        _, data = self._what.pieces[self._place]
        self._place += 1
        connection = self._peer.socket
        self._times.append(time.monotonic_ns())
        try:
            while data:
                try:
                    data = data[connection.send(data) :]
                except BlockingIOError:
                    _wait_for_room(connection)
        except OSError:
            self._loop.close(self._peer)
            return
        self.follow()

    def _end(self) -> None:
        if self._what.end == "reset":
            linger = struct.pack("ii", 1, 0)
            self._peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if self._what.end in ("reset", "close"):
            self._loop.close(self._peer)


def _wait_for_room(connection: socket.socket) -> None:
    """Wait for a client that does not read; no longer than this process is wanted."""
    waiting = select.poll()
    waiting.register(connection, select.POLLOUT)
    waiting.register(_STANDARD_INPUT, select.POLLIN)
    if any(descriptor == _STANDARD_INPUT for descriptor, _ in waiting.poll()):
        raise SystemExit


def _listen(script: Script) -> socket.socket:
    if script.unix_socket is None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(script.unix_socket)
        listener.listen(4096)
    listener.setblocking(False)
    return listener


def _request_of(received: bytearray) -> tuple[str, dict[str, str], bytes] | None:
    """Take one whole request off the front, if there is one."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = received[:end].decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (li.partition(":") for li in lines)
    }
    total = end + 4 + int(headers.get("content-length", 0))
    if len(received) < total:
        return None
    body = bytes(received[end + 4 : total])
    del received[:total]
    return first.split(" ")[1], headers, body


def serve(loop: Loop) -> NoReturn:
    """Tell the port and serve until standard input is closed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(loop.port, flush=True)
    # What has been made up to now stays, and is not to be looked through in between.
    gc.freeze()
    gc.disable()
    with contextlib.suppress(SystemExit):
        loop.run()
    # The interpreter would take long to free thousands of connections one by one.
    os._exit(0)
