"""httpx is the client; this transport moves its bytes, and knows when each of them arrived."""

from __future__ import annotations

import contextlib
import gc
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import httpx

from servegrid.load.failure import Failure, Kind
from servegrid.load.flight import Flight, Message, User
from servegrid.load.loop import Limits, Wave
from servegrid.load.sockets import Server, Stamps, allow_open_files
from servegrid.load.wire import Head, WireError, body_spans, render

_RAISED: dict[Kind, type[httpx.TransportError]] = {
    "connect": httpx.ConnectError,
    "reset": httpx.ReadError,
    "stalled": httpx.ReadTimeout,
    "timeout": httpx.ReadTimeout,
}


@dataclass(frozen=True)
class Exchange:
    """One request and what came back, unparsed. Times are ns of CLOCK_MONOTONIC.

    `arrivals` and `ends` have one entry per read: when it arrived, and how many bytes of `raw`
    had arrived then. `scheduled_ns` is the start of the wave, or the end of the exchange that
    the same user had before; it, `user` and `sent_ns` are None where the request was never due
    or never sent. `head` is None where no whole head came.
    """

    user: int | None
    scheduled_ns: int | None
    sent_ns: int | None
    done_ns: int
    arrivals: list[int]
    ends: list[int]
    raw: bytes
    head: Head | None
    failure: Failure | None
    resent: bool

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where in `raw` the pieces of the body are. Raises WireError at a damaged one."""
        return iter(()) if self.head is None else body_spans(self.raw, self.head)


@dataclass(frozen=True)
class Exchanged:
    """A wave that is over: its exchanges in the order of the requests, and how it was measured.

    `stamps` tells whose clock the arrivals are from. `offset_before_ns` and `offset_after_ns` are
    CLOCK_REALTIME minus CLOCK_MONOTONIC. `cpu_s` is the CPU time of this process.
    """

    exchanges: list[Exchange]
    start_ns: int
    stamps: Stamps
    offset_before_ns: int
    offset_after_ns: int
    cpu_s: float


class MeasuringTransport(httpx.BaseTransport):
    """An httpx transport that can also put many requests on a server at once and measure them.

    As the transport of an `httpx.Client` it serves single requests; `exchange` serves a wave.
    Connections stay open in between. `unix_socket` is connected to whatever the URL's host is.
    Certificates are checked as `tls` says, by default against those the system trusts.
    """

    def __init__(self, unix_socket: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._unix_socket = unix_socket
        self._tls = tls
        self._servers: dict[_Origin, Server] = {}
        self._users: dict[_Origin, list[User]] = {}

    def exchange(
        self, requests: Sequence[httpx.Request], users: int, *, timeout_s: float, stall_s: float
    ) -> Exchanged:
        """Send `requests`, all to one server, from `users` at once, and keep what comes back.

        Each user sends its first request at the start and another as soon as its last has been
        answered or has failed, until none is left. Connections are made and requests rendered
        before. What takes longer than `timeout_s` since the start, or shows no byte for
        `stall_s`, fails. Raises httpx.ConnectError where the server cannot be reached at all,
        httpx.LocalProtocolError where a request is not HTTP, and LoadError where the system
        does not allow as many open files.
        """
        origins = {_origin(request.url) for request in requests}
        if len(origins) != 1:
            raise ValueError(f"a wave goes to one server, not to {len(origins)}")
        messages = [_message(request) for request in requests]
        allow_open_files(users)
        wave = self._wave(requests[0], messages, users, Limits(timeout_s, stall_s))
        with _undisturbed():
            cpu_before = time.process_time()
            wave.run()
            cpu_s = time.process_time() - cpu_before
        stamps = self._servers[origins.pop()].stamps
        return Exchanged(
            exchanges=_landed(wave, stamps),
            start_ns=wave.start_ns,
            stamps=stamps,
            offset_before_ns=wave.offsets.offsets[0].offset_ns,
            offset_after_ns=wave.offsets.offsets[-1].offset_ns,
            cpu_s=cpu_s,
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """One request, as httpx asks for it; its read timeout is the longest silence."""
        told = request.extensions.get("timeout", {})
        stall_s = told.get("read") or inf
        wave = self._wave(request, [_message(request)], 1, Limits(inf, stall_s))
        wave.run()
        (exchange,) = _landed(wave, "reader")
        if exchange.failure is not None:
            error = _RAISED.get(exchange.failure.kind, httpx.RemoteProtocolError)
            raise error(str(exchange.failure), request=request)
        assert exchange.head is not None
        body = b"".join(exchange.raw[start:end] for start, end in exchange.spans())
        return httpx.Response(
            exchange.head.status,
            headers=list(exchange.head.headers),
            stream=httpx.ByteStream(body),
            request=request,
        )

    def close(self) -> None:
        for users in self._users.values():
            for user in users:
                user.close()
        self._users.clear()

    def _wave(
        self, request: httpx.Request, messages: list[Message], users: int, limits: Limits
    ) -> Wave:
        origin = _origin(request.url)
        if origin[0] not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"{request.url}: neither http nor https")
        if origin not in self._servers:
            try:
                self._servers[origin] = Server.locate(
                    request.url, self._unix_socket, self._tls, limits.connect_s
                )
            except OSError as error:
                raise httpx.ConnectError(error.strerror or str(error), request=request) from error
        known = self._users.setdefault(origin, [])
        known += [User(number) for number in range(len(known), users)]
        return Wave(self._servers[origin], known[:users], messages, limits)


_Origin = tuple[str, str, int | None]


def _origin(url: httpx.URL) -> _Origin:
    return url.scheme, url.host, url.port


def _message(request: httpx.Request) -> Message:
    try:
        return Message(request.method, render(request))
    except WireError as error:
        raise httpx.LocalProtocolError(str(error), request=request) from error


def _landed(wave: Wave, stamps: Stamps) -> list[Exchange]:
    """The flights as exchanges, their times all on CLOCK_MONOTONIC."""
    done: dict[Flight, int] = {}
    exchanges = []
    for flight in wave.flights:
        arrivals = flight.stamps
        if stamps == "kernel":
            arrivals = wave.offsets.to_monotonic(arrivals)
        done[flight] = arrivals[-1] if flight.failed_ns is None else flight.failed_ns
        before = wave.start_ns if flight.predecessor is None else done[flight.predecessor]
        exchanges.append(
            Exchange(
                user=flight.user,
                scheduled_ns=None if flight.user is None else before,
                sent_ns=flight.sent_ns,
                done_ns=done[flight],
                arrivals=arrivals,
                ends=flight.ends,
                raw=bytes(flight.buffer[: flight.framing.end]),
                head=flight.framing.head,
                failure=flight.failure,
                resent=flight.resent,
            )
        )
    return exchanges


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection: at thousands of objects one takes longer than a token."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
