"""The connections between the nodes of an allocation: who is let in, and how an end is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.another_user import as_another_user
from snakemake_executor_plugin_submitit import nodes as module
from snakemake_executor_plugin_submitit.nodes import (
    Nodes,
    NodesError,
    find_interface,
    gather,
    join,
    rendezvous,
)

LOOPBACK = "127.0.0.0/8"


class Member(threading.Thread):
    """One node, in a thread; it leaves when `leave` is set."""

    def __init__(self, rank: int, count: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.rank, self.count, self.folder = rank, count, folder
        self.nodes: queue.Queue[Nodes | NodesError] = queue.Queue()
        self.interrupts: queue.Queue[str] = queue.Queue()
        self.leave = threading.Event()
        self.start()

    def run(self) -> None:
        host, put = f"host{self.rank}", self.interrupts.put
        try:
            with (
                gather(self.count, host, LOOPBACK, self.folder, put)
                if self.rank == 0
                else join(self.rank, host, LOOPBACK, self.folder, put)
            ) as nodes:
                self.nodes.put(nodes)
                self.leave.wait(60)
        except NodesError as error:
            self.nodes.put(error)

    def wait(self) -> Nodes:
        found = self.nodes.get(timeout=30)
        if isinstance(found, NodesError):
            raise found
        return found


@contextlib.contextmanager
def members(count: int, folder: Path) -> Iterator[list[Member]]:
    everyone = [Member(rank, count, folder) for rank in range(count)]
    try:
        yield everyone
    finally:
        for member in reversed(everyone):  # the first node waits for the others
            member.leave.set()
        for member in everyone:
            member.join(60)
            assert not member.is_alive()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "nodes"


def test_all_nodes_know_each_other_and_exchange_messages(folder: Path) -> None:
    with members(3, folder) as everyone:
        first, second, third = (member.wait() for member in everyone)
        assert first.hosts == second.hosts == third.hosts == ("host0", "host1", "host2")
        assert [each.rank for each in (first, second, third)] == [0, 1, 2]
        assert first.addresses == ("127.0.0.1",) * 3
        first.send({"word": "hello"})
        assert second.receive(10) == third.receive(10) == (0, {"word": "hello"})
        third.send([1, "ä"], rank=0)
        assert first.receive(10) == (2, [1, "ä"])
        first.send("you", rank=1)
        assert second.receive(10) == (0, "you")
        assert third.receive(0.01) is None


def test_the_offset_between_two_clocks_is_within_its_uncertainty(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with members(2, folder) as everyone:
        first, second = (member.wait() for member in everyone)
        offset, uncertainty = first.clock_offset_ns(1) or (0, 0)
        assert abs(offset) <= uncertainty < 1_000_000_000  # it is the same clock
        send = second._links[0].send

        def five_seconds_ahead(kind: str, **data: Any) -> None:
            send(kind, **data | {"time_ns": data["time_ns"] + 5 * 10**9})

        monkeypatch.setattr(second._links[0], "send", five_seconds_ahead)
        offset, uncertainty = first.clock_offset_ns(1) or (0, 0)
        assert abs(offset - 5 * 10**9) <= uncertainty < 1_000_000_000


def test_the_key_is_private_and_does_not_stay(folder: Path) -> None:
    first = Member(0, 2, folder)
    file = rendezvous(folder)
    while not file.exists():
        time.sleep(0.01)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    second = Member(1, 2, folder)
    first.wait(), second.wait()
    assert not file.exists()
    for member in (second, first):
        member.leave.set()
        member.join(60)


def test_a_requeued_job_meets_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rendezvous(folder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert rendezvous(folder) != before


def test_strangers_get_nothing_and_hold_nobody_up(folder: Path) -> None:
    first = Member(0, 2, folder)
    file = rendezvous(folder)
    while not file.exists():
        time.sleep(0.01)
    door = tuple(json.loads(file.read_text())["door"])
    with contextlib.ExitStack() as stack:
        for _ in range(20):  # they say nothing
            stack.enter_context(socket.create_connection(door))
        liar = stack.enter_context(socket.create_connection(door, 10))
        with liar.makefile("rb") as lines:
            nonce = json.loads(lines.readline())["nonce"]
        hello = {"nonce": nonce, "rank": 1, "host": "evil", "proof": nonce}
        liar.sendall(json.dumps(hello).encode() + b"\n")
        assert liar.recv(100) == b""  # closed without an answer
        mumbler = stack.enter_context(socket.create_connection(door, 10))
        mumbler.sendall(b"[1]\n\x00garbage\n")
        began = time.monotonic()
        second = Member(1, 2, folder)
        assert first.wait().hosts == second.wait().hosts == ("host0", "host1")
        assert time.monotonic() - began < module.HANDSHAKE_S
    for member in (second, first):
        member.leave.set()
        member.join(60)


def pry(folder: str, file: str) -> list[str]:
    """What a stranger can do with the files of a rendezvous."""
    done = []
    for name, act in {
        "list": lambda: os.listdir(folder),
        "read": lambda: Path(file).read_bytes(),
        "replace": lambda: Path(file).unlink(),
        "add": lambda: Path(folder, "rendezvous-1").touch(),
        "touch": lambda: os.utime(folder),
    }.items():
        with contextlib.suppress(PermissionError):
            act()
            done.append(name)
    return done


def guess(door: tuple[str, int]) -> str:
    """What a stranger gets who knows the protocol, but not the key."""
    with socket.create_connection(door, 10) as connection:
        theirs = str(module._read_line(connection)["nonce"])
        proof = module._proof(b"a guess", "other", theirs, "aa", 1, "evil")
        module._send_line(connection, {"nonce": "aa", "rank": 1, "host": "evil", "proof": proof})
        return connection.recv(100).decode()


def test_another_user_of_the_node_gets_nothing_from_the_rendezvous() -> None:
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)  # the folder itself must keep strangers out
        folder = Path(parent, "nodes")
        first = Member(0, 2, folder)
        file = rendezvous(folder)
        while not file.exists():
            time.sleep(0.01)
        door = tuple(json.loads(file.read_text())["door"])
        if os.geteuid() == 0:
            assert as_another_user(pry, str(folder), str(file)) == []
        assert as_another_user(guess, door) == ""
        second = Member(1, 2, folder)
        assert first.wait().hosts == second.wait().hosts == ("host0", "host1")
        for member in (second, first):
            member.leave.set()
            member.join(60)


def test_a_first_node_without_the_key_is_not_believed(folder: Path) -> None:
    """Somebody who listens on the address of a first node that has ended."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        module._write_private(rendezvous(folder), {"door": door.getsockname(), "key": "00" * 32})
        second = Member(1, 2, folder)
        connection = door.accept()[0]
        with connection, connection.makefile("rb") as lines:
            connection.sendall(b'{"nonce": "aa"}\n')
            proof = json.loads(lines.readline())["proof"]
            connection.sendall(json.dumps({"proof": proof}).encode() + b"\n")  # sent back
            with pytest.raises(NodesError, match=r"does not let host1 in \(wrong key\)"):
                second.wait()
    second.join(60)


def test_a_lost_node_is_noticed_at_once(folder: Path) -> None:
    with members(3, folder) as everyone:
        first, _, third = (member.wait() for member in everyone)
        third._links[0]._connection.shutdown(socket.SHUT_RDWR)  # as the kernel of a killed process
        assert "node 2 (host2) is gone" in everyone[0].interrupts.get(timeout=10)
        assert "the first node (host0) is gone" in everyone[2].interrupts.get(timeout=10)
        first.send("are you there?", rank=2)  # raises nothing
        assert first.clock_offset_ns(2) is None


def test_the_end_of_the_first_node_is_no_loss(folder: Path) -> None:
    with members(2, folder) as everyone:
        first, _ = (member.wait() for member in everyone)
        first.end()
        assert everyone[1].interrupts.get(timeout=10) == ""
        everyone[1].leave.set()
        everyone[1].join(60)
        assert first._links[1].ended.wait(10)
        assert everyone[0].interrupts.empty()


def test_a_failed_part_of_the_service_is_a_failure_and_no_loss(folder: Path) -> None:
    with members(2, folder) as everyone:
        first, second = (member.wait() for member in everyone)
        second.report_failure("no memory")
        everyone[1].leave.set()
        everyone[1].join(60)
        assert first._links[1].ended.wait(10)
        assert first.failure == "node 1 (host1): no memory"
        assert everyone[0].interrupts.empty()


def test_a_node_that_does_not_come_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_S", 0.5)
    first = Member(0, 3, folder)
    with pytest.raises(NodesError, match="the nodes with rank 1, 2 did not come to host0"):
        first.wait()
    first.join(60)
    second = Member(1, 2, folder)
    with pytest.raises(NodesError, match="the first node did not write"):
        second.wait()
    second.join(60)


def test_the_kernel_ends_a_connection_to_a_silent_node_within_15_s(folder: Path) -> None:
    with members(2, folder) as everyone:
        first, _ = (member.wait() for member in everyone)
        connection = first._links[1]._connection

        def option(name: int) -> int:
            return connection.getsockopt(socket.IPPROTO_TCP, name)

        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        probes = option(socket.TCP_KEEPCNT) * option(socket.TCP_KEEPINTVL)
        assert option(socket.TCP_KEEPIDLE) + probes == 15
        assert option(socket.TCP_USER_TIMEOUT) == 15_000


@pytest.mark.parametrize("setting", ["lo", "127.0.0.0/8", "127.0.0.1/8"])
def test_an_interface_has_a_name_or_a_network(setting: str) -> None:
    assert find_interface(setting) == ("lo", "127.0.0.1")


@pytest.mark.parametrize("setting", ["ib7", "203.0.113.0/24", "10.0.0.0/99", "127.0.0.1"])
def test_an_unknown_interface_is_refused_with_those_of_the_node(setting: str) -> None:
    with pytest.raises(NodesError, match=rf"no interface `{setting}`.*It has: .*lo \(127.0.0.1\)"):
        find_interface(setting)
