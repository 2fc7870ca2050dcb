"""The nodes of one allocation: an authenticated connection from each of them to the first.

The first node (rank 0) runs the jobs. It listens on the site's interface, and writes its address
and a random key to a file with mode 0600 in the spool, which is on a file system that all nodes
share. The other nodes prove that they have the key, and the first node proves it to them. The
connection then stays: its end is the end of the service on the other side. The kernel's keepalive
finds a node that is gone, also while an interpreter is busy. Messages are JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from snakemake_executor_plugin_submitit.spool import write_atomically

JOIN_S = 120.0
"""How long the first node waits for the others, and they for it."""
HANDSHAKE_S = 5.0
LEAVE_S = 20.0
"""How long the first node waits until the service has ended on the others."""
PROBE_S, PROBES = 3, 4
"""A peer that does not answer this number of the kernel's probes is gone: after 15 s."""
PINGS = 20
MAX_MESSAGE_BYTES = 1 << 24
_POLL_S = 0.1

Message = dict[str, Any]


class NodesError(Exception):
    """Another node did not come, or is gone. The text names it."""


class Link:
    """A connection whose two ends have proved that they have the key."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, PROBE_S),
            (socket.TCP_KEEPINTVL, PROBE_S),
            (socket.TCP_KEEPCNT, PROBES),
            (socket.TCP_USER_TIMEOUT, 1000 * PROBE_S * (PROBES + 1)),
            (socket.TCP_NODELAY, 1),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.name = name
        self.ended = threading.Event()
        self.failure: str | None = None
        self._connection, self._lines = connection, connection.makefile("rb")
        self._sending = threading.Lock()
        self._pongs: queue.Queue[Message] = queue.Queue()

    def send(self, kind: str, **data: Any) -> None:
        """Raises NodesError if the other side is gone."""
        line = json.dumps({"kind": kind, **data}).encode() + b"\n"
        try:
            with self._sending:
                self._connection.sendall(line)
        except OSError as error:
            raise NodesError(f"{self.name} is gone ({error.strerror or error})") from None

    def listen(self, take: Callable[[Message], None], end: Callable[[str], None]) -> None:
        """Start a thread that gives each message to `take`, and calls `end` after the last."""
        threading.Thread(target=self._listen, args=(take, end), daemon=True).start()

    def clock_offset_ns(self, limit_s: float = 5.0) -> tuple[int, int] | None:
        """The other node's CLOCK_MONOTONIC minus this one's, and its uncertainty, in ns.

        Of several questions, the fastest answer counts: its time lies within the round trip
        (Cristian's algorithm). None without an answer. Raises NodesError if the node is gone.
        """
        found: list[tuple[int, int]] = []
        deadline = time.monotonic() + limit_s
        for number in range(PINGS):
            asked = time.monotonic_ns()
            self.send("ping", number=number)
            answer: Message = {}
            while answer.get("number") != number:
                try:
                    answer = self._pongs.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    return None
            half = (answer["received_ns"] - asked + 1) // 2
            found.append((half, int(answer["time_ns"]) - asked - half))
        uncertainty, offset = min(found)
        return offset, uncertainty

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _listen(self, take: Callable[[Message], None], end: Callable[[str], None]) -> None:
        why = "its connection was closed"
        try:
            while line := self._lines.readline(MAX_MESSAGE_BYTES):
                message = json.loads(line)
                if message["kind"] == "ping":
                    self.send("pong", number=message["number"], time_ns=time.monotonic_ns())
                elif message["kind"] == "pong":
                    self._pongs.put(message | {"received_ns": time.monotonic_ns()})
                else:
                    take(message)
        except (OSError, ValueError, KeyError, TypeError, NodesError) as error:
            why = getattr(error, "strerror", None) or str(error)
        finally:
            self._lines.close()
            self.ended.set()
            end(f"{self.name} is gone ({why})")


class Nodes:
    """What a service knows of its nodes. `links` are the connections of this node, by rank.

    `hosts` and `addresses` are those of all nodes, by rank. `interface` is this node's part of the
    network between them. All nodes see `folder`, which only this user may enter.
    """

    def __init__(
        self,
        rank: int,
        hosts: tuple[str, ...],
        addresses: tuple[str, ...],
        interface: str,
        folder: Path,
        links: Mapping[int, Link],
        interrupt: Callable[[str], None],
    ) -> None:
        self.rank, self.hosts, self.addresses = rank, hosts, addresses
        self.interface, self.folder = interface, folder
        self.failure: str | None = None
        """Why the service of another node does not work any more; None as long as all do."""
        self._links, self._interrupt = links, interrupt
        self._is_ending = False
        self._messages: queue.Queue[tuple[int, Any]] = queue.Queue()
        for peer, link in links.items():
            link.listen(partial(self._take, peer), self._end)

    def send(self, message: Any, rank: int | None = None) -> None:
        """Send JSON data to one node; without `rank`, from the first node to all others.

        The other nodes send to the first node only. A node that is gone gets nothing; its
        allocation ends by itself.
        """
        for link in [self._links[rank]] if rank is not None else self._links.values():
            with contextlib.suppress(NodesError):
                link.send("message", message=message)

    def receive(self, limit_s: float) -> tuple[int, Any] | None:
        """The next message with the rank of its sender; None if none comes within `limit_s`."""
        try:
            return self._messages.get(timeout=limit_s)
        except queue.Empty:
            return None

    def clock_offset_ns(self, rank: int) -> tuple[int, int] | None:
        """The clock of another node minus that of the first node, and its uncertainty, in ns.

        Only the first node can ask. The clock is CLOCK_MONOTONIC. None if the node does not
        answer.
        """
        with contextlib.suppress(NodesError):
            return self._links[rank].clock_offset_ns()
        return None

    # for the allocation, not for services

    def report_failure(self, why: str) -> None:
        """Tell the first node that the service of this node does not work."""
        with contextlib.suppress(NodesError):
            self._links[0].send("failed", why=why)

    def end(self) -> None:
        """Let the services of the other nodes end."""
        self._is_ending = True
        for link in self._links.values():
            with contextlib.suppress(NodesError):
                link.send("end")

    def close(self) -> None:
        """Close the connections. The first node waits until the others have left."""
        self._is_ending = True
        deadline = time.monotonic() + LEAVE_S
        for link in self._links.values():
            if self.rank == 0:
                link.ended.wait(max(0.0, deadline - time.monotonic()))
            link.close()

    def _take(self, peer: int, message: Message) -> None:
        if message["kind"] == "message":
            self._messages.put((peer, message["message"]))
        elif message["kind"] == "failed" and self.failure is None:
            self.failure = f"{self._links[peer].name}: {message['why']}"
        elif message["kind"] == "end" and not self._is_ending:
            self._is_ending = True
            self._interrupt("")

    def _end(self, why: str) -> None:
        # After the report of a failure, a node leaves.
        if not self._is_ending and self.failure is None:
            self._is_ending = True
            self._interrupt(why)


@contextlib.contextmanager
def gather(
    count: int, host: str, setting: str, folder: Path, interrupt: Callable[[str], None]
) -> Iterator[Nodes]:
    """On the first of `count` nodes: wait for the others. `folder` is the same on all of them.

    `interrupt` is called, in another thread, with the reason if a node is lost. Raises NodesError
    if a node does not come within JOIN_S.
    """
    interface, address = find_interface(setting)
    key = secrets.token_bytes(32)
    joined: queue.Queue[tuple[int, str, str, Link]] = queue.Queue()
    found: dict[int, tuple[str, str, Link]] = {}
    deadline = time.monotonic() + JOIN_S
    file = rendezvous(folder)
    with socket.create_server((address, 0), backlog=256) as door, contextlib.ExitStack() as stack:
        door.settimeout(_POLL_S)
        _write_private(file, {"door": door.getsockname(), "key": key.hex()})
        stack.callback(file.unlink, missing_ok=True)
        while len(found) < count - 1:
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, count)) - found.keys())
                raise NodesError(
                    f"the nodes with rank {', '.join(map(str, missing))} did not come to {host} "
                    f"within {JOIN_S:.0f} s. Their logs are beside this one."
                )
            with contextlib.suppress(TimeoutError):
                connection = door.accept()[0]
                # Each in a thread: somebody who says nothing holds up nobody.
                threading.Thread(
                    target=_admit, args=(connection, key, count, joined), daemon=True
                ).start()
            with contextlib.suppress(queue.Empty):
                rank, *rest = joined.get_nowait()
                found.setdefault(rank, tuple(rest))  # type: ignore[arg-type]
    others = [found[rank] for rank in range(1, count)]
    hosts = (host, *(name for name, _, _ in others))
    addresses = (address, *(each for _, each, _ in others))
    links = {rank: link for rank, (_, _, link) in enumerate(others, 1)}
    for link in links.values():
        link.send("welcome", hosts=hosts, addresses=addresses)
    nodes = Nodes(0, hosts, addresses, interface, folder, links, interrupt)
    try:
        yield nodes
    finally:
        nodes.end()
        nodes.close()


@contextlib.contextmanager
def join(
    rank: int,
    host: str,
    setting: str,
    folder: Path,
    interrupt: Callable[[str], None],
    has_ended: Callable[[], bool] = lambda: False,
) -> Iterator[Nodes]:
    """On another node: find the first node, and wait until all nodes are there.

    `interrupt` is called, in another thread, if the service must end: with a reason if the first
    node is lost, else with an empty text. Raises NodesError if the first node is not found within
    JOIN_S, or at once if `has_ended`.
    """
    interface, address = find_interface(setting)
    first = _read_rendezvous(rendezvous(folder), has_ended)
    with contextlib.ExitStack() as stack:
        try:
            connection = socket.create_connection(
                (first["door"][0], first["door"][1]),
                HANDSHAKE_S,
                source_address=(address, 0),
            )
            stack.enter_context(connection)
            _enter(connection, bytes.fromhex(first["key"]), rank, host)
            connection.settimeout(JOIN_S)
            welcome = _read_line(connection)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NodesError(f"the first node does not let {host} in ({error})") from None
        stack.pop_all()
    hosts, addresses = tuple(welcome["hosts"]), tuple(welcome["addresses"])
    link = Link(connection, f"the first node ({hosts[0]})")
    nodes = Nodes(rank, hosts, addresses, interface, folder, {0: link}, interrupt)
    try:
        yield nodes
    finally:
        nodes.close()


def find_interface(setting: str) -> tuple[str, str]:
    """Name and IPv4 address of the interface with this name, or in this network.

    Raises NodesError, with the interfaces of this node, if there is none.
    """
    found = {
        name: [each.address for each in addresses if each.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    for name, addresses in found.items():
        for address in addresses:
            if name == setting or ("/" in setting and _is_in(address, setting)):
                return name, address
    listed = ", ".join(f"{name} ({', '.join(each)})" for name, each in found.items() if each)
    raise NodesError(
        f"interface: {socket.gethostname()} has no interface `{setting}` with an IPv4 address. "
        f"It has: {listed}. Correct `interface` of this kind of node."
    )


def rendezvous(folder: Path) -> Path:
    """The file with address and key. A requeued job has another one."""
    return folder / f"rendezvous-{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _is_in(address: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _write_private(file: Path, data: Any) -> None:
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.unlink(missing_ok=True)
    write_atomically(file, json.dumps(data), mode=0o600)


def _read_rendezvous(file: Path, has_ended: Callable[[], bool]) -> Message:
    deadline = time.monotonic() + JOIN_S
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found: Message = json.loads(file.read_text(encoding="utf-8"))
            return found
        if has_ended():
            raise NodesError("the allocation has ended")
        if time.monotonic() > deadline:
            raise NodesError(f"the first node did not write {file} within {JOIN_S:.0f} s")
        with contextlib.suppress(OSError):
            # Network file systems show new files of other nodes at once only after a change here.
            os.utime(file.parent)
        time.sleep(_POLL_S)


def _admit(
    connection: socket.socket,
    key: bytes,
    count: int,
    joined: queue.Queue[tuple[int, str, str, Link]],
) -> None:
    """The first node's part of the handshake: each side proves that it has the key."""
    try:
        connection.settimeout(HANDSHAKE_S)
        ours = secrets.token_hex(32)
        _send_line(connection, {"nonce": ours})
        hello = _read_line(connection)
        rank, host, theirs = hello["rank"], str(hello["host"]), str(hello["nonce"])
        expected = _proof(key, "other", ours, theirs, rank, host)
        if not hmac.compare_digest(str(hello["proof"]).encode(), expected.encode()):
            raise ValueError("wrong key")
        if not isinstance(rank, int) or not 0 < rank < count:
            raise ValueError("wrong rank")
        _send_line(connection, {"proof": _proof(key, "first", ours, theirs, rank, host)})
        link = Link(connection, f"node {rank} ({host})")
        joined.put((rank, host, connection.getpeername()[0], link))
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()


def _enter(connection: socket.socket, key: bytes, rank: int, host: str) -> None:
    """The other nodes' part of the handshake. Raises ValueError if the key is not the same."""
    theirs, ours = str(_read_line(connection)["nonce"]), secrets.token_hex(32)
    proof = _proof(key, "other", theirs, ours, rank, host)
    _send_line(connection, {"nonce": ours, "rank": rank, "host": host, "proof": proof})
    expected = _proof(key, "first", theirs, ours, rank, host)
    if not hmac.compare_digest(str(_read_line(connection)["proof"]).encode(), expected.encode()):
        raise ValueError("wrong key")


def _proof(key: bytes, side: str, *words: object) -> str:
    """`side` is part of it, so that nobody can send a proof back."""
    return hmac.new(key, json.dumps([side, *words]).encode(), hashlib.sha256).hexdigest()


def _send_line(connection: socket.socket, message: Message) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read_line(connection: socket.socket, limit: int = 1 << 16) -> Message:
    """One line, byte by byte: what follows it belongs to the next reader."""
    line = b""
    deadline = time.monotonic() + (connection.gettimeout() or HANDSHAKE_S)
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) >= limit or time.monotonic() > deadline:
            raise ValueError("the connection was closed")
        line += byte
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not a mapping")
    return message
