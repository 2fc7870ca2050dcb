"""The event loop of the mock server: reads requests and sends responses when they are due."""

from __future__ import annotations

import contextlib
import gc
import heapq
import hmac
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

from servegrid.mock_server.responses import (
    MODEL,
    ResponseScript,
    TimedResponse,
    error_response,
    full_response,
    respond,
)

_STANDARD_INPUT = 0
KEY_VARIABLE = "SERVEGRID_MOCK_SERVER_KEY"
"""The environment variable with the API key. Other users can read arguments, but not this."""
_HEAD_BYTES, _BODY_BYTES = 2**16, 2**26

Respond = Callable[[Any, str, Mapping[str, Any]], TimedResponse]
"""Takes the script, the X-Request-Id and the body of a completion; returns its response."""


class _Peer:
    """One accepted connection."""

    __slots__ = ("read_ns", "received", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = bytearray()
        self.read_ns = 0


class MockServerLoop:
    """One thread, one epoll. `respond` makes the responses to completions.

    The log has times in ns of CLOCK_MONOTONIC by request: `read` is when its last byte was read,
    `sent` when each piece of its response was handed to the kernel. A request is logged under its
    X-Request-Id. If that is missing or used before, `#` and the request's number from 0 are added.
    Connections that send something else than HTTP are closed.
    """

    def __init__(
        self,
        script: ResponseScript,
        respond: Respond = respond,
        accept_after_s: float = 0.0,
    ) -> None:
        self.script = script
        self.sent: dict[str, list[int]] = {}
        self.read: dict[str, int] = {}
        self._respond = respond
        self._accept_after_s = accept_after_s
        self._key = os.environ.get(KEY_VARIABLE)
        self._listener = _listen(script)
        self._epoll = select.epoll()
        self._peers: dict[int, _Peer] = {}
        self._scheduled: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._requests: list[dict[str, Any]] = []
        self._connections = 0
        self._completed = 0

    @property
    def port(self) -> str:
        """The port on which it listens; empty for a Unix socket."""
        return "" if self.script.unix_socket else str(self._listener.getsockname()[1])

    def run(self) -> None:
        self._epoll.register(_STANDARD_INPUT, select.EPOLLIN)
        self.call_at(
            time.monotonic_ns() + int(self._accept_after_s * 1e9),
            lambda: self._epoll.register(self._listener.fileno(), select.EPOLLIN),
        )
        while self._handle_events():
            now_ns = time.monotonic_ns()
            while self._scheduled and self._scheduled[0][0] <= now_ns:
                heapq.heappop(self._scheduled)[2]()

    def call_at(self, when_ns: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._scheduled, (when_ns, next(self._order), action))

    def _handle_events(self) -> bool:
        """Wait until data arrives or an action is due, and read the data. False at the end."""
        timeout_s = None
        if self._scheduled:
            timeout_s = max(self._scheduled[0][0] - time.monotonic_ns(), 0) / 1e9
        # epoll would round up to whole ms.
        if not select.select([self._epoll], [], [], timeout_s)[0]:
            return True
        arrived = []
        # Read everything before parsing any of it, so that requests that were sent together are
        # read almost together.
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == _STANDARD_INPUT:
                return False
            if descriptor == self._listener.fileno():
                self._accept()
            elif self._receive(peer := self._peers[descriptor]):
                arrived.append(peer)
        for peer in arrived:
            self._serve_all(peer)
        return True

    def _serve_all(self, peer: _Peer) -> None:
        try:
            while (request := _pop_request(peer.received, self._is_allowed)) is not None:
                self._serve(peer, *request)
        except PermissionError:
            self._reject(peer, 401, "a valid API key is required")
        except ValueError as error:
            self._reject(peer, 400, str(error))

    def _is_allowed(self, path: str, headers: Mapping[str, str]) -> bool:
        if self._key is None or path == "/health":
            return True
        given = headers.get("authorization", "").encode("latin-1")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())

    def _reject(self, peer: _Peer, status: int, message: str) -> None:
        """Respond with an error and close the connection, without reading the rest."""
        with contextlib.suppress(OSError):
            peer.socket.send(error_response(status, message, closing=True).pieces[0][1])
        self.close(peer)

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
        """Read what `peer` has sent. False if that is nothing, or the end of the connection."""
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
            _Reply(self, peer, self._get(path), peer.read_ns, []).schedule_next()

    def _get(self, path: str) -> TimedResponse:
        match path:
            case "/log":
                return full_response(
                    {
                        "sent": self.sent,
                        "read": self.read,
                        "requests": self._requests,
                        "connections": self._connections,
                    }
                )
            case "/health":
                return full_response("")
            case "/metrics":
                counters = [(name, step * self._completed) for name, step in self.script.counters]
                metrics = [*self.script.gauges, *counters]
                return full_response("".join(f"{name} {value}\n" for name, value in metrics))
            case "/v1/models":
                models = [{"id": MODEL, "object": "model"}]
                return full_response({"object": "list", "data": models})
        return error_response(404, f"the mock server has no {path}")

    def _complete(self, peer: _Peer, path: str, headers: dict[str, str], body: bytes) -> None:
        number = len(self._requests)
        try:
            parsed = json.loads(body)
            if not isinstance(parsed, dict):
                raise ValueError("the body is not a JSON object")
        except (ValueError, RecursionError) as error:
            response = error_response(400, str(error))
            _Reply(self, peer, response, peer.read_ns, []).schedule_next()
            return
        request_id = headers.get("x-request-id", "")
        name = (
            request_id if request_id and request_id not in self.sent else f"{request_id}#{number}"
        )
        self.read[name] = peer.read_ns
        times = self.sent[name] = []
        self._requests.append({"headers": headers, "body": parsed, "path": path})
        delay_ns = int(number * self.script.slowdown_s * 1e9)
        response = self._respond(self.script, request_id, parsed)
        start_ns = peer.read_ns + delay_ns
        _Reply(self, peer, response, start_ns, times, self._count).schedule_next()

    def _count(self) -> None:
        self._completed += 1

    def has(self, peer: _Peer) -> bool:
        return self._peers.get(peer.socket.fileno()) is peer

    def close(self, peer: _Peer) -> None:
        if self._peers.pop(peer.socket.fileno(), None) is not None:
            peer.socket.close()


class _Reply:
    """Sends the pieces of a response one after another, each at its time after `start_ns`."""

    __slots__ = ("_loop", "_on_end", "_peer", "_position", "_response", "_start_ns", "_times")

    def __init__(
        self,
        loop: MockServerLoop,
        peer: _Peer,
        response: TimedResponse,
        start_ns: int,
        times: list[int],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._peer = peer
        self._response = response
        self._start_ns = start_ns
        self._times = times
        self._on_end = on_end
        self._position = 0

    def schedule_next(self) -> None:
        """Schedule the next piece. After the last one, end as the response says."""
        if self._position < len(self._response.pieces):
            due_s, _ = self._response.pieces[self._position]
            self._loop.call_at(self._start_ns + int(due_s * 1e9), self._send)
        else:
            self._on_end()
            self._end()

    def _send(self) -> None:
        if not self._loop.has(self._peer):
            return
        _, data = self._response.pieces[self._position]
        self._position += 1
        connection = self._peer.socket
        self._times.append(time.monotonic_ns())
        try:
            while data:
                try:
                    data = data[connection.send(data) :]
                except BlockingIOError:
                    _wait_until_writable(connection)
        except OSError:
            self._loop.close(self._peer)
            return
        self.schedule_next()

    def _end(self) -> None:
        if self._response.end == "reset":
            linger = struct.pack("ii", 1, 0)
            self._peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if self._response.end in ("reset", "close"):
            self._loop.close(self._peer)


def _wait_until_writable(connection: socket.socket) -> None:
    """Wait for a client that does not read, until standard input is closed at the latest."""
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    poll.register(_STANDARD_INPUT, select.POLLIN)
    if any(descriptor == _STANDARD_INPUT for descriptor, _ in poll.poll()):
        raise SystemExit


def _listen(script: ResponseScript) -> socket.socket:
    if script.unix_socket is None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(script.unix_socket)
        listener.listen(4096)
    listener.setblocking(False)
    return listener


def _pop_request(
    received: bytearray, is_allowed: Callable[[str, Mapping[str, str]], bool]
) -> tuple[str, dict[str, str], bytes] | None:
    """Remove one complete request from the front and return its path, headers and body.

    Raises PermissionError if `is_allowed` refuses path and headers, ValueError if it is not HTTP
    or too large.
    """
    end = received.find(b"\r\n\r\n", 0, _HEAD_BYTES)
    if end < 0:
        if len(received) >= _HEAD_BYTES:
            raise ValueError("the request's head is too large")
        return None
    first, *lines = received[:end].decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    path = first.split(" ")[1] if first.count(" ") == 2 else ""
    length = headers.get("content-length", "0")
    if not path or not (length.isascii() and length.isdigit() and len(length) < 12):
        raise ValueError("this is not an HTTP request")
    if not is_allowed(path, headers):
        raise PermissionError(path)
    if int(length) > _BODY_BYTES:
        raise ValueError("the request's body is too large")
    total = end + 4 + int(length)
    if len(received) < total:
        return None
    body = bytes(received[end + 4 : total])
    del received[:total]
    return path, headers, body


def serve(loop: MockServerLoop) -> NoReturn:
    """Print the port and serve until standard input is closed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(loop.port, flush=True)
    # Existing objects stay; the garbage collector must not pause the server to look through them.
    gc.freeze()
    gc.disable()
    with contextlib.suppress(SystemExit):
        loop.run()
    # The interpreter would take long to free thousands of connections one by one.
    os._exit(0)
