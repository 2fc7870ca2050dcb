"""The httpx transport of the load client. It knows when each byte of a response arrived."""

from __future__ import annotations

import contextlib
import gc
import ssl
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from math import inf

import httpx

from servegrid.client import workers
from servegrid.client.composer import Composer, Prepare, Read
from servegrid.client.conversation_loop import ConversationLoop
from servegrid.client.conversations import Composed, Dialogues
from servegrid.client.event_loop import EventLoop
from servegrid.client.failures import Failure, FailureKind
from servegrid.client.http1 import (
    HttpSyntaxError,
    ResponseHead,
    Span,
    body_spans,
    serialize_request,
)
from servegrid.client.inflight import InFlightRequest, PreparedRequest, Timeouts, Turn, User
from servegrid.client.sockets import (
    ServerAddress,
    StampSource,
    maximise_open_file_limit,
    raise_open_file_limit,
)
from servegrid.client.supply import RequestSupply
from servegrid.client.workers import WaitForStart
from servegrid.node.network import Proxy, find_proxy

_HTTPX_ERRORS: dict[FailureKind, type[httpx.TransportError]] = {
    "connect": httpx.ConnectError,
    "reset": httpx.ReadError,
    "stalled": httpx.ReadTimeout,
    "timeout": httpx.ReadTimeout,
}


@dataclass(frozen=True)
class Exchange:
    """One request and its response, unparsed. Times are ns of CLOCK_MONOTONIC.

    `number` is the position of the request in its wave. `turn` is None without conversations.

    `arrival_ns` and `received` have one entry per read: when it arrived, and how many bytes of
    `raw` had arrived by then. `scheduled_ns` is when the request was due: at the start of the
    wave, or when the same user had ended its previous exchange and its think time, or in an open
    loop at the request's own time. `scheduled_ns` and `user` are None if the request was never
    due, `sent_ns` if it was never sent, `head` if no complete head arrived.
    """

    number: int
    user: int | None
    scheduled_ns: int | None
    sent_ns: int | None
    done_ns: int
    arrival_ns: list[int]
    received: list[int]
    raw: bytes
    head: ResponseHead | None
    failure: Failure | None
    resent: bool = False
    turn: Turn | None = None

    def body_spans(self) -> Iterator[Span]:
        """Positions of the body's pieces in `raw`. Raises HttpSyntaxError at a damaged chunk."""
        return iter(()) if self.head is None else body_spans(self.raw, self.head)


@dataclass(frozen=True)
class WaveResult:
    """A finished wave: its exchanges in the order of the requests, and how it was measured.

    There are fewer exchanges than requests if the time for sending ended before the last request.
    `stamps` is who took the arrival timestamps. `offset_before_ns` and `offset_after_ns` are
    CLOCK_REALTIME minus CLOCK_MONOTONIC. `cpu_s` is the CPU time of each process. `left` is the
    number of requests that were ready and not sent, and `waits` how often none was ready.
    `conversations_cut` and `rows_left_out` are those of `Dialogues`.
    """

    exchanges: list[Exchange]
    start_ns: int
    stamps: StampSource
    offset_before_ns: int
    offset_after_ns: int
    cpu_s: list[float]
    left: int = 0
    waits: int = 0
    conversations_cut: int = 0
    rows_left_out: int = 0


class MeasuringTransport(httpx.BaseTransport):
    """An httpx transport that can also send many concurrent requests and measure them.

    As the transport of an `httpx.Client` it handles single requests; `send_wave` handles a wave.
    Connections stay open in between. With `unix_socket` it connects to this socket and ignores
    the URL's host. `tls` verifies certificates; by default the system's trusted ones are used. It
    uses the proxies of the environment.
    """

    def __init__(self, unix_socket: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._unix_socket = unix_socket
        self._tls = tls
        self._servers: dict[_Origin, ServerAddress] = {}
        self._users: dict[_Origin, list[User]] = {}

    def send_wave(
        self,
        requests: Iterable[httpx.Request],
        users: int,
        *,
        timeout_s: float,
        idle_timeout_s: float,
        send_duration_s: float = inf,
        due_s: Iterable[float] | None = None,
        think_s: Iterable[float] | None = None,
        cpu_sets: Sequence[Collection[int]] = (),
        ahead: int | None = None,
    ) -> WaveResult:
        """Send `requests`, all to one server, with `users` concurrent users.

        Each user sends its first request at the start, and the next one as soon as the last one
        has ended, until none is left. With `think_s`, one value per request, the user first waits
        that long after the response. With `due_s`, one ascending value per request, each request
        is sent at that time after the start, by additional users if all are busy. Users connect
        and requests are serialized before the start; only additional users connect later.

        With `ahead`, only so many requests are prepared before the start. A process of its own
        prepares the others during the wave (see `RequestSupply`), so `requests` may have no end.

        With several `cpu_sets`, one process per CPU set sends its share of the requests and users.

        No request is sent after `send_duration_s`. A request fails if it is not complete
        `timeout_s` after the start, or if no byte arrives for `idle_timeout_s`. Raises
        httpx.ConnectError if the server cannot be reached at all, httpx.LocalProtocolError if a
        request is not valid HTTP, and LoadError if the system does not allow enough open files.
        """
        every = iter(requests)
        first = next(every)
        origin = _origin(first.url)
        due = repeat(None) if due_s is None else map(_ns, due_s)
        think = repeat(0) if think_s is None else map(_ns, think_s)
        headers = self._proxy_headers(first.url)

        def prepare() -> Iterator[PreparedRequest]:
            for request, due_ns, think_ns in zip(chain([first], every), due, think, strict=False):
                if _origin(request.url) != origin:
                    raise ValueError("a wave goes to one server")
                yield _prepare(request, due_ns, think_ns, headers)

        prepared: Iterable[PreparedRequest] = prepare() if ahead is not None else list(prepare())
        if due_s is None:
            raise_open_file_limit(users)
        else:
            maximise_open_file_limit()
            users = max(users, len(self._users.get(origin, ())))
        timeouts = Timeouts(timeout_s, idle_timeout_s, send_duration_s)
        server = self._resolve(first, timeouts)
        if len(cpu_sets) > 1:
            count = len(cpu_sets)
            tasks = [
                partial(_run_share, server, prepared, users, timeouts, (index, count), ahead)
                for index in range(count)
            ]
            return _merge(workers.run_parallel(tasks, cpu_sets))
        pool = self._user_pool(first, users)
        with _supply(prepared, ahead) as ready:
            loop = EventLoop(server, pool[:users], ready, timeouts)
            result = _run(loop, server.stamps)
        pool += loop.users[users:]
        return result

    def send_conversations(
        self,
        load: ConversationLoad,
        users: int,
        *,
        timeout_s: float,
        idle_timeout_s: float,
        send_duration_s: float = inf,
        cpu_sets: Sequence[Collection[int]] = (),
    ) -> WaveResult:
        """Let `users` play the conversations of `load`, each one after another.

        Users connect and their first requests are built before the start. A process of its own
        builds the others from the responses (see `Composer`). Otherwise as `send_wave`.
        """
        headers = self._proxy_headers(load.first.url)

        def prepare(composed: Composed) -> PreparedRequest:
            request = _prepare(load.build(composed), None, _ns(composed.think_s), headers)
            return replace(request, turn=composed.turn)

        raise_open_file_limit(users)
        timeouts = Timeouts(timeout_s, idle_timeout_s, send_duration_s)
        server = self._resolve(load.first, timeouts)
        if len(cpu_sets) > 1:
            tasks = [
                partial(
                    _converse,
                    *(load, prepare, server, timeouts, (index, len(cpu_sets))),
                    [User(number) for number in range(len(range(index, users, len(cpu_sets))))],
                )
                for index in range(len(cpu_sets))
            ]
            return _merge(workers.run_parallel(tasks, cpu_sets))
        pool = self._user_pool(load.first, users)[:users]
        return _converse(load, prepare, server, timeouts, _ALL, pool)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Handle one request for httpx. Its read timeout limits the time for the whole response."""
        timeout_s = request.extensions.get("timeout", {}).get("read") or inf
        timeouts = Timeouts(timeout_s, timeout_s)
        server = self._resolve(request, timeouts)
        prepared = deque([_prepare(request, None, 0, self._proxy_headers(request.url))])
        loop = EventLoop(server, self._user_pool(request, 1)[:1], prepared, timeouts)
        loop.run()
        (exchange,) = _exchanges(loop, "reader")
        if exchange.failure is not None:
            error = _HTTPX_ERRORS.get(exchange.failure.kind, httpx.RemoteProtocolError)
            raise error(str(exchange.failure), request=request)
        assert exchange.head is not None
        body = b"".join(exchange.raw[start:end] for start, end in exchange.body_spans())
        return httpx.Response(
            exchange.head.status,
            # httpx must not decompress: nothing compressed was requested, and a few bytes can
            # unpack to gigabytes.
            headers=[each for each in exchange.head.headers if each[0] != b"content-encoding"],
            stream=httpx.ByteStream(body),
            request=request,
        )

    def close(self) -> None:
        for users in self._users.values():
            for user in users:
                user.close()
        self._users.clear()

    def _resolve(self, request: httpx.Request, timeouts: Timeouts) -> ServerAddress:
        origin = _origin(request.url)
        if origin[0] not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"{request.url}: neither http nor https")
        if origin not in self._servers:
            try:
                self._servers[origin] = ServerAddress.resolve(
                    request.url,
                    self._unix_socket,
                    self._tls,
                    timeouts.connect_s,
                    self._proxy(request.url),
                )
            except OSError as error:
                raise httpx.ConnectError(error.strerror or str(error), request=request) from error
        return self._servers[origin]

    def _proxy(self, url: httpx.URL) -> Proxy | None:
        return None if self._unix_socket is not None else find_proxy(str(url))

    def _proxy_headers(self, url: httpx.URL) -> Mapping[str, str] | None:
        """The headers for a proxy that reads the requests; None if none does."""
        proxy = self._proxy(url) if url.scheme == "http" else None
        return None if proxy is None else proxy.headers

    def _user_pool(self, request: httpx.Request, users: int) -> list[User]:
        """The users of the request's server; there are at least `users` of them."""
        pool = self._users.setdefault(_origin(request.url), [])
        pool += [User(number) for number in range(len(pool), users)]
        return pool


_Origin = tuple[str, str, int | None]
_Share = tuple[int, int]
"""Index of this process, and number of processes."""
_ALL: _Share = (0, 1)


@dataclass(frozen=True)
class ConversationLoad:
    """What users send who play conversations.

    `dialogues` makes the share of one process: its index and the number of processes. `build` makes
    requests, all to the server of `first`. `read` takes the bytes of a response. At most `most`
    requests are sent in all; None without a limit.
    """

    dialogues: Callable[[tuple[int, int]], Dialogues]
    build: Callable[[Composed], httpx.Request]
    read: Read
    first: httpx.Request
    most: int | None


def _converse(
    load: ConversationLoad,
    prepare: Prepare,
    server: ServerAddress,
    timeouts: Timeouts,
    share: _Share,
    users: list[User],
    wait_for_start: WaitForStart = time.monotonic_ns,
) -> WaveResult:
    """The share of one process: every `count`-th conversation and user from `index`."""
    index, count = share
    most = None if load.most is None else len(range(index, load.most, count))
    positions = [index + user.number * count for user in users]
    composer = Composer(load.dialogues(share), prepare, load.read, positions)
    with composer:
        loop = ConversationLoop(server, users, composer, most, timeouts)
        result = _run(loop, server.stamps, share, wait_for_start)
    return replace(result, conversations_cut=composer.cut, rows_left_out=composer.rows_left_out)


def _run(
    loop: EventLoop,
    stamps: StampSource,
    share: _Share = _ALL,
    wait_for_start: WaitForStart = time.monotonic_ns,
) -> WaveResult:
    with _no_garbage_collection():
        cpu_before = time.process_time()
        loop.run(wait_for_start)
        cpu_s = time.process_time() - cpu_before
    return WaveResult(
        exchanges=_exchanges(loop, stamps, share),
        start_ns=loop.start_ns,
        stamps=stamps,
        offset_before_ns=loop.offsets.offsets[0].offset_ns,
        offset_after_ns=loop.offsets.offsets[-1].offset_ns,
        cpu_s=[cpu_s],
        left=loop.left,
        waits=loop.waits,
    )


def _run_share(
    server: ServerAddress,
    prepared: Iterable[PreparedRequest],
    users: int,
    timeouts: Timeouts,
    share: _Share,
    ahead: int | None,
    wait_for_start: WaitForStart,
) -> WaveResult:
    """The share of one of several processes: every `count`-th request and user from `index`."""
    index, count = share
    pool = [User(number) for number in range(len(range(index, users, count)))]
    own = islice(prepared, index, None, count)
    with _supply(own, None if ahead is None else -(-ahead // count)) as ready:
        loop = EventLoop(server, pool, ready, timeouts)
        return _run(loop, server.stamps, share, wait_for_start)


@contextlib.contextmanager
def _supply(
    prepared: Iterable[PreparedRequest], ahead: int | None
) -> Iterator[RequestSupply | deque[PreparedRequest]]:
    if ahead is None:
        yield deque(prepared)
    else:
        with RequestSupply(iter(prepared), ahead) as supply:
            yield supply


def _merge(results: Sequence[WaveResult]) -> WaveResult:
    exchanges = [exchange for result in results for exchange in result.exchanges]
    return replace(
        results[0],
        exchanges=sorted(exchanges, key=lambda exchange: exchange.number),
        cpu_s=[cpu_s for result in results for cpu_s in result.cpu_s],
        left=sum(result.left for result in results),
        waits=sum(result.waits for result in results),
        conversations_cut=sum(result.conversations_cut for result in results),
        rows_left_out=sum(result.rows_left_out for result in results),
    )


def _origin(url: httpx.URL) -> _Origin:
    return url.scheme, url.host, url.port


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _prepare(
    request: httpx.Request,
    due_ns: int | None,
    think_ns: int,
    proxy_headers: Mapping[str, str] | None,
) -> PreparedRequest:
    try:
        data = serialize_request(request, proxy_headers)
        return PreparedRequest(request.method, data, due_ns, think_ns)
    except HttpSyntaxError as error:
        raise httpx.LocalProtocolError(str(error), request=request) from error


def _exchanges(loop: EventLoop, stamps: StampSource, share: _Share = _ALL) -> list[Exchange]:
    """The loop's requests as exchanges, with all times on CLOCK_MONOTONIC."""
    index, count = share
    done: dict[InFlightRequest, int] = {}
    exchanges = []
    for position, request in enumerate(loop.requests):
        arrival_ns = request.stamps
        if stamps == "kernel":
            arrival_ns = loop.offsets.to_monotonic(arrival_ns)
        done[request] = arrival_ns[-1] if request.failed_ns is None else request.failed_ns
        exchanges.append(
            Exchange(
                number=index + position * count,
                user=None if request.user is None else index + request.user * count,
                scheduled_ns=None if request.user is None else _due_ns(loop, request, done),
                sent_ns=request.sent_ns,
                done_ns=done[request],
                arrival_ns=arrival_ns,
                received=request.received,
                raw=bytes(request.buffer[: request.framing.end]),
                head=request.framing.head,
                failure=request.failure,
                resent=request.resent,
                turn=request.prepared.turn,
            )
        )
    return exchanges


def _due_ns(loop: EventLoop, request: InFlightRequest, done: Mapping[InFlightRequest, int]) -> int:
    if request.prepared.due_ns is not None:
        return loop.start_ns + request.prepared.due_ns
    if request.previous is None:
        return loop.start_ns
    return done[request.previous] + request.previous.prepared.think_ns


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: with thousands of objects it takes longer than a token."""
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
