"""Which network the workers of an engine on several nodes really use between the nodes.

NCCL says so in its log (`NCCL_DEBUG=INFO`). Gloo has no such log; its connections are TCP, and the
kernel knows their addresses.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

INFINIBAND, ROCE, TCP = "infiniband", "roce", "tcp"
NCCL, GLOO = "nccl", "gloo"
LOG = "NCCL_DEBUG_FILE"
MAX_WARNINGS = 20
"""The warnings of one process that are shown."""

_LINK_LAYERS = {"IB": INFINIBAND, "RoCE": ROCE}
# The lines are those of NCCL 2.30: src/transport/net.cc, net_socket.cc and net_ib/init.cc. A rail
# and a plane may follow the port; older versions write neither.
_CHANNEL = re.compile(r"\[(?:send|receive)\] via NET/([^/]+)/(\d+)(?:\(\d+\))?(/GDRDMA)?")
_SOCKET_DEVICE = re.compile(r"\[(\d+)\]([^\s:]+):")
_IB_DEVICE = re.compile(r"\[(\d+)\]([^\s:]+):[\d:]*/(\w+)")
_MERGED_DEVICE = re.compile(r"NET/IB : Made virtual device \[(\d+)\] name=(\S+)")

Link = dict[str, Any]
"""One way between nodes: `transport`, `interface` (null if unknown) and `gpu_direct` (whether the
network card reads the GPU's memory; null for Gloo)."""


def nccl_variables(folder: Path) -> dict[str, str]:
    """Environment variables that make each process write NCCL's choices to a file in `folder`."""
    return {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET",
        LOG: str(folder / "nccl-%p.log"),  # NCCL writes the pid for %p
    }


@contextlib.contextmanager
def warnings_shown(folder: Path) -> Iterator[None]:
    """After the block, print NCCL's warnings to the log of the allocation.

    With `nccl_variables`, NCCL writes them to the files in `folder` only, which does not stay.
    """
    try:
        yield
    finally:
        for file in sorted(folder.glob("nccl-*.log")):
            text = file.read_text(encoding="utf-8", errors="replace")
            warnings = [line for line in text.splitlines() if " NCCL WARN " in line]
            print(*warnings[:MAX_WARNINGS], sep="\n", end="\n" if warnings else "", flush=True)


def observe(library: str) -> dict[str, Any]:
    """The `library` of this process and its `links` to other nodes, as JSON data."""
    if library == NCCL:
        file = Path(os.environ[LOG].replace("%p", str(os.getpid())))
        links = parse_nccl(file.read_text(encoding="utf-8", errors="replace"))
    else:
        links = list(_tcp_links(os.environ["VLLM_HOST_IP"]))
    return {"library": library, "links": merge(links)}


def combine(answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What all workers have observed, as one."""
    found = list(answers)
    libraries = sorted({each["library"] for each in found})
    links = merge(link for each in found for link in each["links"])
    return {"library": "+".join(libraries), "links": links}


def merge(links: Iterable[Link]) -> list[Link]:
    """Each different link once, in a fixed order."""
    return [dict(link) for link in sorted({tuple(sorted(link.items())) for link in links}, key=str)]


def parse_nccl(log: str) -> list[Link]:
    """The links in a log of NCCL with `INFO`; none if all its GPUs are in one node.

    A card that NCCL has found is no link; only a channel that it has opened is.
    """
    sockets: dict[int, str] = {}
    cards: dict[int, str] = {}
    layers: dict[str, str] = {}
    for line in log.splitlines():
        _, is_socket, listed = line.partition("NET/Socket : Using")
        if is_socket:
            sockets |= {int(number): name for number, name in _SOCKET_DEVICE.findall(listed)}
        _, is_card, listed = line.partition("NET/IB : Using")
        if is_card:
            for number, name, layer in _IB_DEVICE.findall(listed):
                cards.setdefault(int(number), name)
                layers[name] = layer
        if merged := _MERGED_DEVICE.search(line):
            cards[int(merged[1])] = merged[2]
    links = []
    for net, number, direct in _CHANNEL.findall(log):
        if net == "Socket":
            transport, interface = TCP, sockets.get(int(number))
        elif net.startswith("IB"):  # also IBext, a plugin of Nvidia
            interface = cards.get(int(number))
            layer = layers.get((interface or "").split("+")[0], "unknown")
            transport = _LINK_LAYERS.get(layer, f"{net} with link layer {layer}")
        else:
            transport, interface = net, None
        links.append({"transport": transport, "interface": interface, "gpu_direct": bool(direct)})
    return links


def _tcp_links(own_address: str) -> Iterator[Link]:
    """The interfaces of this process's TCP connections.

    Loopback counts only if the nodes themselves talk over it, as in tests.
    """
    names = {
        each.address: name for name, all_of in psutil.net_if_addrs().items() for each in all_of
    }
    with_loopback = ipaddress.ip_address(own_address).is_loopback
    for each in psutil.Process().net_connections("tcp"):
        if each.status != psutil.CONN_ESTABLISHED:
            continue
        address = each.laddr.ip.removeprefix("::ffff:")
        if with_loopback or not ipaddress.ip_address(address).is_loopback:
            yield {"transport": TCP, "interface": names.get(address), "gpu_direct": None}
