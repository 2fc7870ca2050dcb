"""Runs on each of two nodes: lists their interfaces, and measures TCP between them.

Usage: python -m servegrid.doctor.network_probe FOLDER, as one task per node of a step of Slurm.
Both nodes see FOLDER, which only this user may enter. The first node listens on each of its
interfaces, and the second one measures. Only who knows the key from FOLDER is answered.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import os
import secrets
import selectors
import socket
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

FIRST, SECOND = "first.json", "second.json"
LIMIT_S = 120.0
"""How long the nodes wait for each other."""
HANDSHAKE_S = 5.0
SEND_S, CHUNK_BYTES = 1.0, 1 << 20
PINGS = 100
ECHO, SINK = b"E", b"S"
ARPHRD_INFINIBAND = "32"
"""The hardware type of an IP interface over InfiniBand (linux/if_arp.h)."""

Facts = dict[str, Any]


def describe() -> Facts:
    """This node: its name, its boot, its IPv4 interfaces and its InfiniBand cards."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "boot": boot.read_text(encoding="utf-8").strip() if boot.exists() else None,
        "interfaces": list_interfaces(),
        "cards": list_cards(Path("/sys/class/infiniband")),
    }


def list_interfaces() -> list[Facts]:
    """Each IPv4 address: interface, network, whether it is up, and Mbit/s (null if unknown)."""
    states, found = psutil.net_if_stats(), []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        for each in addresses:
            if each.family != socket.AF_INET:
                continue
            network = ipaddress.ip_interface(f"{each.address}/{each.netmask or 32}").network
            state = states.get(name)
            found.append(
                {
                    "name": name,
                    "address": each.address,
                    "network": str(network),
                    "up": bool(state and state.isup),
                    "mbit_s": (state and state.speed) or None,
                    "infiniband": _read(Path("/sys/class/net") / name / "type")
                    == ARPHRD_INFINIBAND,
                }
            )
    return found


def list_cards(folder: Path) -> list[Facts]:
    """Each port of an RDMA card: its link layer (InfiniBand or Ethernet), rate and state."""
    return [
        {
            "name": f"{port.parent.parent.name}:{port.name}",
            "link_layer": _read(port / "link_layer"),
            "rate": _read(port / "rate"),
            "state": (_read(port / "state") or "").rpartition(" ")[2],
        }
        for port in sorted(folder.glob("*/ports/*"))
    ]


def pair(first: Facts, second: Facts) -> list[tuple[Facts, Facts]]:
    """The interfaces that can reach each other: in the same network, else with the same name.

    Loopback counts only if both nodes are one machine.
    """
    found = []
    for one in first["interfaces"]:
        loopback = ipaddress.ip_address(one["address"]).is_loopback
        if not one["up"] or (loopback and first["boot"] != second["boot"]):
            continue
        others = [each for each in second["interfaces"] if each["up"]]
        same = [each for each in others if each["network"] == one["network"]]
        same = same or [each for each in others if each["name"] == one["name"]]
        if same:
            found.append((one, same[0]))
    return found


def serve(doors: Sequence[socket.socket], key: str, over: threading.Event) -> None:
    """Answer those who know the key, until `over` is set."""
    with selectors.DefaultSelector() as selector:
        for door in doors:
            selector.register(door, selectors.EVENT_READ)
        while not over.is_set():
            for each, _ in selector.select(0.2):
                connection = each.fileobj.accept()[0]  # type: ignore[union-attr]
                threading.Thread(target=_answer, args=(connection, key), daemon=True).start()


def measure(address: tuple[str, int], own: str, key: str) -> Facts:
    """Round trip (median of PINGS, in µs) and Gbit/s of one TCP connection to `address`."""
    with _ask(address, own, key, ECHO) as echo:
        times = []
        for _ in range(PINGS):
            asked = time.perf_counter()
            echo.sendall(b".")
            if not echo.recv(1):
                raise OSError("the other node closed the connection")
            times.append(time.perf_counter() - asked)
    with _ask(address, own, key, SINK) as sink:
        chunk, sent, began = bytes(CHUNK_BYTES), 0, time.perf_counter()
        while time.perf_counter() - began < SEND_S:
            sink.sendall(chunk)
            sent += len(chunk)
        sink.shutdown(socket.SHUT_WR)
        if int(sink.recv(64) or b"0") != sent:
            raise OSError("the other node did not receive everything")
        took = time.perf_counter() - began
    return {
        "round_trip_us": round(1e6 * statistics.median(times), 1),
        "gbit_s": round(8 * sent / took / 1e9, 2),
    }


def main(folder: Path) -> None:
    facts = describe()
    if os.environ.get("SLURM_PROCID", "0") == "0":
        _be_first(folder, facts)
    else:
        _be_second(folder, facts)


def _be_first(folder: Path, facts: Facts) -> None:
    key, over, doors = secrets.token_hex(32), threading.Event(), {}
    with contextlib.ExitStack() as stack:
        for each in facts["interfaces"]:
            if each["up"]:
                door = stack.enter_context(socket.create_server((each["address"], 0)))
                doors[each["address"]] = door
        ports = {address: door.getsockname()[1] for address, door in doors.items()}
        _write(folder / FIRST, facts | {"key": key, "ports": ports})
        threading.Thread(target=serve, args=(list(doors.values()), key, over), daemon=True).start()
        _wait_for(folder / SECOND)
        over.set()


def _be_second(folder: Path, facts: Facts) -> None:
    first = _wait_for(folder / FIRST)
    links = []
    for one, other in pair(first, facts):
        address = (one["address"], first["ports"][one["address"]])
        try:
            found = measure(address, other["address"], first["key"])
        except (OSError, ValueError) as error:
            found = {"error": str(error)}
        names = {"interface": one["name"], "other": other["name"], "network": one["network"]}
        links.append(names | found)
    _write(folder / SECOND, facts | {"links": links})


def _answer(connection: socket.socket, key: str) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(HANDSHAKE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        said = connection.recv(len(key) + 1, socket.MSG_WAITALL)
        if not hmac.compare_digest(said[:-1], key.encode()):
            return
        connection.sendall(b"+")
        received = 0
        while data := connection.recv(CHUNK_BYTES):
            received += len(data)
            if said[-1:] == ECHO:
                connection.sendall(data)
        if said[-1:] == SINK:
            connection.sendall(str(received).encode())


def _ask(address: tuple[str, int], own: str, key: str, what: bytes) -> socket.socket:
    connection = socket.create_connection(address, HANDSHAKE_S, source_address=(own, 0))
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(key.encode() + what)
        if connection.recv(1) != b"+":
            raise OSError("the other node does not answer")
    except BaseException:
        connection.close()
        raise
    return connection


def _wait_for(file: Path) -> Facts:
    deadline = time.monotonic() + LIMIT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{file.name}: the other node did not write it in {LIMIT_S:.0f} s")
        with contextlib.suppress(OSError):
            # Network file systems show new files of other nodes at once only after a change here.
            os.utime(file.parent)
        time.sleep(0.1)
    facts: Facts = json.loads(file.read_text(encoding="utf-8"))
    return facts


def _write(file: Path, facts: Mapping[str, Any]) -> None:
    """Complete or not at all, and for this user only."""
    part = file.with_suffix(".part")
    with os.fdopen(
        os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as output:
        json.dump(facts, output)
    part.rename(file)


def _read(file: Path) -> str | None:
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8").strip()
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
