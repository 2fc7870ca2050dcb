"""Non-blocking connections to one server; each read also returns the arrival time."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from servegrid.errors import LoadError
from servegrid.node.network import Proxy

StampSource = Literal["kernel", "reader"]
"""Who takes the arrival timestamps: the kernel, or the client when it reads."""

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""Nothing to read or no room to write at the moment. Catch these before OSError."""

_SPARE_FILES = 64
_SHOWN = 60
_READ_SIZE = 65536
_ANCILLARY_SIZE = 64
# Python's socket module has no SO_TIMESTAMPNS. Linux numbers it 35 on every architecture except
# SPARC and PA-RISC.
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("ll")


@dataclass(frozen=True)
class ServerAddress:
    """Where a server listens, and what a connection to it needs."""

    host: str
    family: socket.AddressFamily
    address: Any
    tls: ssl.SSLContext | None
    tunnel: bytes | None = None
    """The request for a tunnel to the server, if `address` is that of a proxy."""

    @classmethod
    def resolve(
        cls,
        url: httpx.URL,
        unix_socket: str | None,
        tls: ssl.SSLContext | None,
        timeout_s: float,
        proxy: Proxy | None = None,
    ) -> ServerAddress:
        """The server of `url`, or the `proxy` to it.

        Raises OSError if none of its addresses accepts a connection.
        """
        encrypted = None
        if url.scheme == "https":
            encrypted = tls or ssl.create_default_context()
        if unix_socket is not None:
            return cls(url.host, socket.AF_UNIX, unix_socket, encrypted)
        port = url.port or (80 if encrypted is None else 443)
        to, tunnel = (url.host, port), None
        if proxy is not None:
            to = (proxy.host, proxy.port)
            tunnel = None if encrypted is None else _tunnel_request(url.host, port, proxy)
        with socket.create_connection(to, timeout_s) as connected:
            return cls(url.host, connected.family, connected.getpeername(), encrypted, tunnel)

    def new_connection(self) -> Connection:
        """A new connection, not yet connected."""
        if self.tls is not None:
            return TlsConnection(self, self.tls)
        return Connection(self) if self.family == socket.AF_UNIX else TcpConnection(self)

    @property
    def stamps(self) -> StampSource:
        """Who takes the arrival timestamps."""
        tcp = self.family != socket.AF_UNIX and self.tls is None
        return "kernel" if tcp else "reader"


def _tunnel_request(host: str, port: int, proxy: Proxy) -> bytes:
    """The request for a tunnel through a proxy (RFC 9110, 9.3.6)."""
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    headers = {"Host": authority, **proxy.headers}
    lines = [
        f"CONNECT {authority} HTTP/1.1",
        *(f"{key}: {value}" for key, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Connection:
    """One non-blocking socket.

    `connect` and `advance` return the epoll events to wait for before the next call of `advance`,
    or 0 once requests can be sent. They raise OSError if the connection fails.
    """

    def __init__(self, server: ServerAddress) -> None:
        self._server = server
        self._socket = socket.socket(server.family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        if server.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def connect(self) -> int:
        """Start to connect. Raises BlockingIOError if the queue of a Unix socket is full."""
        code = self._socket.connect_ex(self._server.address)
        if code == errno.EINPROGRESS:
            return select.EPOLLOUT
        if code:
            raise OSError(code, os.strerror(code))
        return self.advance()

    def advance(self) -> int:
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        return 0

    def send(self, data: memoryview) -> int:
        return self._socket.send(data)

    def receive(self) -> tuple[int, bytes]:
        """Arrival time in ns, and the data. The data is empty at the end of the connection.

        The time is when this process reads, on CLOCK_MONOTONIC.
        """
        data = self._socket.recv(_READ_SIZE)
        return time.monotonic_ns(), data

    def close(self) -> None:
        self._socket.close()


class TcpConnection(Connection):
    """Over TCP the kernel timestamps arrivals, so a late reader still gets the right time."""

    def __init__(self, server: ServerAddress) -> None:
        super().__init__(server)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)

    def receive(self) -> tuple[int, bytes]:
        """As in Connection, but the time is when the kernel received it, on CLOCK_REALTIME."""
        data, ancillary, _, _ = self._socket.recvmsg(_READ_SIZE, _ANCILLARY_SIZE)
        if not ancillary:
            return time.time_ns(), data
        seconds, nanoseconds = _TIMESPEC.unpack_from(ancillary[0][2])
        return seconds * 1_000_000_000 + nanoseconds, data


class TlsConnection(Connection):
    """Over TLS the reader takes the time: the content is known only after decryption."""

    def __init__(self, server: ServerAddress, context: ssl.SSLContext) -> None:
        super().__init__(server)
        self._context = context
        self._tls: ssl.SSLSocket | None = None
        self._tunnel = server.tunnel or b""
        self._proxy_answer = b""

    def advance(self) -> int:
        if self._tls is None:
            super().advance()
            if self._server.tunnel is not None and (events := self._advance_tunnel()):
                return events
            self._socket = self._tls = self._context.wrap_socket(
                self._socket, server_hostname=self._server.host, do_handshake_on_connect=False
            )
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return select.EPOLLIN
        except ssl.SSLWantWriteError:
            return select.EPOLLOUT
        return 0

    def _advance_tunnel(self) -> int:
        try:
            while self._tunnel:
                self._tunnel = self._tunnel[self._socket.send(self._tunnel) :]
        except BlockingIOError:
            return select.EPOLLOUT
        try:
            # The server behind the proxy waits for the client, so nothing follows the answer.
            while b"\r\n\r\n" not in self._proxy_answer:
                data = self._socket.recv(_READ_SIZE)
                if not data or len(self._proxy_answer) > _READ_SIZE:
                    raise OSError("the proxy gives no answer")
                self._proxy_answer += data
        except BlockingIOError:
            return select.EPOLLIN
        status_line = self._proxy_answer.partition(b"\r\n")[0].decode("latin-1")
        if status_line.split(" ")[1:2] != ["200"]:
            raise OSError(f"the proxy refuses a tunnel: {status_line[:_SHOWN]}")
        return 0

    def receive(self) -> tuple[int, bytes]:
        data = self._socket.recv(_READ_SIZE)
        # epoll does not report data that the TLS layer has already decrypted.
        while self._tls is not None and (pending := self._tls.pending()):
            data += self._tls.recv(pending)
        return time.monotonic_ns(), data


def raise_open_file_limit(connections: int) -> None:
    """Raise this process's limit of open files to what `connections` need.

    Raises LoadError if the system does not allow that many.
    """
    needed = connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LoadError(
            f"{connections} concurrent requests need {needed} open files, but this system allows "
            f"{hard}. Raise the hard limit (`ulimit -Hn`), or lower the concurrency."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def maximise_open_file_limit() -> None:
    """Raise this process's limit of open files to the most that the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
