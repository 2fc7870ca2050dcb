"""Connections to one server: opened without blocking, read together with the arrival time."""

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

Stamps = Literal["kernel", "reader"]

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""Nothing to be had, or no room, at this moment. To be caught before OSError."""

_SPARE_FILES = 64
_READ_SIZE = 65536
_ANCILLARY_SIZE = 64
# Linux gives SO_TIMESTAMPNS the number 35 on every architecture but SPARC and PA-RISC; Python's
# socket module does not name it.
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("ll")


@dataclass(frozen=True)
class Server:
    """Where a server listens, and what a connection to it needs."""

    host: str
    family: socket.AddressFamily
    address: Any
    tls: ssl.SSLContext | None

    @classmethod
    def locate(
        cls, url: httpx.URL, unix_socket: str | None, tls: ssl.SSLContext | None, limit_s: float
    ) -> Server:
        """The server of `url`. Raises OSError where none of its addresses answers in time."""
        encrypted = None
        if url.scheme == "https":
            encrypted = tls or ssl.create_default_context()
        if unix_socket is not None:
            return cls(url.host, socket.AF_UNIX, unix_socket, encrypted)
        port = url.port or (80 if encrypted is None else 443)
        with socket.create_connection((url.host, port), limit_s) as answering:
            return cls(url.host, answering.family, answering.getpeername(), encrypted)

    def connection(self) -> Connection:
        """A new connection, not yet connected."""
        if self.tls is not None:
            return TlsConnection(self, self.tls)
        return Connection(self) if self.family == socket.AF_UNIX else TcpConnection(self)

    @property
    def stamps(self) -> Stamps:
        """Whose clock tells when something arrived."""
        tcp = self.family != socket.AF_UNIX and self.tls is None
        return "kernel" if tcp else "reader"


class Connection:
    """One socket, driven by readiness: its methods never block.

    `connect` and `advance` give the epoll events to wait for before `advance` is called (again),
    0 once requests can be sent. They raise OSError where no connection can be made.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._socket = socket.socket(server.family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        if server.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def connect(self) -> int:
        """Begin to connect. Raises BlockingIOError where a Unix socket's queue is full."""
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
        """When it arrived, in ns, and what; no bytes at the end of the connection.

        The time is CLOCK_MONOTONIC, of the moment of reading.
        """
        data = self._socket.recv(_READ_SIZE)
        return time.monotonic_ns(), data

    def close(self) -> None:
        self._socket.close()


class TcpConnection(Connection):
    """Over TCP the kernel stamps arrivals, so that a late reader still gets the right time."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)

    def receive(self) -> tuple[int, bytes]:
        """As in Connection, but the time is CLOCK_REALTIME, of the kernel's reception."""
        data, ancillary, _, _ = self._socket.recvmsg(_READ_SIZE, _ANCILLARY_SIZE)
        if not ancillary:
            return time.time_ns(), data
        seconds, nanoseconds = _TIMESPEC.unpack_from(ancillary[0][2])
        return seconds * 1_000_000_000 + nanoseconds, data


class TlsConnection(Connection):
    """Over TLS the reader's clock must do: what a packet holds is known after decryption only."""

    def __init__(self, server: Server, context: ssl.SSLContext) -> None:
        super().__init__(server)
        self._context = context
        self._tls: ssl.SSLSocket | None = None

    def advance(self) -> int:
        if self._tls is None:
            super().advance()
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

    def receive(self) -> tuple[int, bytes]:
        data = self._socket.recv(_READ_SIZE)
        # What the TLS layer has decrypted already would make no socket readable again.
        while self._tls is not None and (held := self._tls.pending()):
            data += self._tls.recv(held)
        return time.monotonic_ns(), data


def allow_open_files(connections: int) -> None:
    """Raise this process's limit of open files as far as `connections` need it.

    Raises LoadError where the system does not allow as many.
    """
    needed = connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LoadError(
            f"{connections} concurrent requests need {needed} open files, this system allows "
            f"{hard}. Raise the hard limit (`ulimit -Hn`), or lower the concurrency."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def allow_all_open_files() -> None:
    """Raise this process's limit of open files as far as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
