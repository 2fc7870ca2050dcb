"""httpx is the client; this transport moves its bytes, and knows when each of them arrived."""

from __future__ import annotations

import contextlib
import gc
import ssl
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from math import inf

import httpx

from servegrid.client import workers
from servegrid.client.event_loop import Limits, Wave
from servegrid.client.failures import Failure, Kind
from servegrid.client.http1 import Head, WireError, body_spans, render
from servegrid.client.inflight import Flight, Message, User
from servegrid.client.sockets import Server, Stamps, allow_all_open_files, allow_open_files
from servegrid.client.workers import Start

_RAISED: dict[Kind, type[httpx.TransportError]] = {
    "connect": httpx.ConnectError,
    "reset": httpx.ReadError,
    "stalled": httpx.ReadTimeout,
    "timeout": httpx.ReadTimeout,
}


@dataclass(frozen=True)
class Exchange:
    """One request and what came back, unparsed. Times are ns of CLOCK_MONOTONIC.

    `number` is its place among the requests of its wave.

    `arrivals` and `ends` have one entry per read: when it arrived, and how many bytes of `raw`
    had arrived then. `scheduled_ns` is when the request was due: at the start of the wave, or when
    the same user had ended the exchange before and rested, or of an open loop at its own time.
    It, `user` and `sent_ns` are None where the request was never due or never sent. `head` is
    None where no whole head came.
    """

    number: int
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

    There are fewer exchanges than requests where the time for sending was over before the last.
    `stamps` tells whose clock the arrivals are from. `offset_before_ns` and `offset_after_ns` are
    CLOCK_REALTIME minus CLOCK_MONOTONIC. `cpu_s` is the CPU time of each process.
    """

    exchanges: list[Exchange]
    start_ns: int
    stamps: Stamps
    offset_before_ns: int
    offset_after_ns: int
    cpu_s: list[float]


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
        self,
        requests: Sequence[httpx.Request],
        users: int,
        *,
        timeout_s: float,
        idle_timeout_s: float,
        sending_s: float = inf,
        due_s: Sequence[float] | None = None,
        rest_s: Sequence[float] | None = None,
        places: Sequence[Collection[int]] = (),
    ) -> Exchanged:
        """Send `requests`, all to one server, from `users` at once, and keep what comes back.

        Each user sends its first request at the start and another as soon as its last has been
        answered or has failed, until none is left. With `rest_s`, one per request, it rests for
        so long after that one. With `due_s`, one per request and ascending, each is sent at that
        time after the start, by as many more users as it takes. Connections are made and
        requests rendered before; only users who join later connect while the clock runs.

        With several `places`, sets of cores, there is a process for each of them, and requests and
        users are dealt out to them.

        None is begun after `sending_s`. What takes longer than `timeout_s` since the start, or
        shows no byte for `idle_timeout_s`, fails. Raises httpx.ConnectError where the server cannot be
        reached at all, httpx.LocalProtocolError where a request is not HTTP, and LoadError
        where the system does not allow as many open files.
        """
        origins = {_origin(request.url) for request in requests}
        if len(origins) != 1:
            raise ValueError(f"a wave goes to one server, not to {len(origins)}")
        (origin,) = origins
        due = repeat(None) if due_s is None else map(_ns, due_s)
        rest = repeat(0) if rest_s is None else map(_ns, rest_s)
        messages = [_message(*each) for each in zip(requests, due, rest, strict=False)]
        if due_s is None:
            allow_open_files(users)
        else:
            allow_all_open_files()
            users = max(users, len(self._users.get(origin, ())))
        limits = Limits(timeout_s, idle_timeout_s, sending_s)
        server = self._located(requests[0], limits)
        if len(places) > 1:
            crews = len(places)
            shares = workers.run(
                [
                    partial(_share_of, server, messages[part::crews], users, limits, (part, crews))
                    for part in range(crews)
                ],
                places,
            )
            return _joined(shares)
        known = self._known(requests[0], users)
        wave = Wave(server, known[:users], messages, limits)
        exchanged = _measured(wave, server.stamps)
        known += wave.users[users:]
        return exchanged

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """One request, as httpx asks for it; its read timeout is the longest silence."""
        told = request.extensions.get("timeout", {})
        idle_timeout_s = told.get("read") or inf
        wave = self._wave(request, [_message(request)], 1, Limits(inf, idle_timeout_s))
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
        server = self._located(request, limits)
        return Wave(server, self._known(request, users)[:users], messages, limits)

    def _located(self, request: httpx.Request, limits: Limits) -> Server:
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
        return self._servers[origin]

    def _known(self, request: httpx.Request, users: int) -> list[User]:
        """The users of that server, at least so many."""
        known = self._users.setdefault(_origin(request.url), [])
        known += [User(number) for number in range(len(known), users)]
        return known


def _measured(
    wave: Wave, stamps: Stamps, part: _Part = (0, 1), start: Start = time.monotonic_ns
) -> Exchanged:
    with _undisturbed():
        cpu_before = time.process_time()
        wave.run(start)
        cpu_s = time.process_time() - cpu_before
    return Exchanged(
        exchanges=_landed(wave, stamps, part),
        start_ns=wave.start_ns,
        stamps=stamps,
        offset_before_ns=wave.offsets.offsets[0].offset_ns,
        offset_after_ns=wave.offsets.offsets[-1].offset_ns,
        cpu_s=[cpu_s],
    )


def _share_of(
    server: Server, messages: list[Message], users: int, limits: Limits, part: _Part, start: Start
) -> Exchanged:
    """What one process of several does: every so many-th message and user are its own."""
    first, step = part
    own = [User(number) for number in range(len(range(first, users, step)))]
    return _measured(Wave(server, own, messages, limits), server.stamps, part, start)


def _joined(shares: Sequence[Exchanged]) -> Exchanged:
    exchanges = [exchange for share in shares for exchange in share.exchanges]
    return replace(
        shares[0],
        exchanges=sorted(exchanges, key=lambda exchange: exchange.number),
        cpu_s=[cpu_s for share in shares for cpu_s in share.cpu_s],
    )


_Origin = tuple[str, str, int | None]
_Part = tuple[int, int]
"""Which of how many processes."""


def _origin(url: httpx.URL) -> _Origin:
    return url.scheme, url.host, url.port


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _message(request: httpx.Request, due_ns: int | None = None, rest_ns: int = 0) -> Message:
    try:
        return Message(request.method, render(request), due_ns, rest_ns)
    except WireError as error:
        raise httpx.LocalProtocolError(str(error), request=request) from error


def _landed(wave: Wave, stamps: Stamps, part: _Part = (0, 1)) -> list[Exchange]:
    """The flights as exchanges, their times all on CLOCK_MONOTONIC."""
    first, step = part
    done: dict[Flight, int] = {}
    exchanges = []
    for place, flight in enumerate(wave.flights):
        arrivals = flight.stamps
        if stamps == "kernel":
            arrivals = wave.offsets.to_monotonic(arrivals)
        done[flight] = arrivals[-1] if flight.failed_ns is None else flight.failed_ns
        exchanges.append(
            Exchange(
                number=first + place * step,
                user=None if flight.user is None else first + flight.user * step,
                scheduled_ns=None if flight.user is None else _due_ns(wave, flight, done),
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


def _due_ns(wave: Wave, flight: Flight, done: Mapping[Flight, int]) -> int:
    if flight.message.due_ns is not None:
        return wave.start_ns + flight.message.due_ns
    if flight.predecessor is None:
        return wave.start_ns
    return done[flight.predecessor] + flight.predecessor.message.rest_ns


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
