"""Which network an engine on several nodes uses, from NCCL's log and from the kernel."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from servegrid.engines import network

HEAD = "node1:4242:4300 [0] NCCL INFO "
IB_FOUND = "NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/RoCE [RO]; OOB ib0:10.7.0.1<0>"
SOCKET_FOUND = "NET/Socket : Using [0]eth0:192.0.2.1<0> [1]ib0:10.7.0.1<0>"


def log(*lines: str) -> str:
    return "".join(f"{HEAD}{line}\n" for line in lines)


def link(transport: str, interface: str | None, gpu_direct: bool = False) -> dict[str, Any]:
    return {"transport": transport, "interface": interface, "gpu_direct": gpu_direct}


# The forms of the lines are those of NCCL's source, from 2.7 (`Channel 00 :`, bus ids) to 2.30.
CASES = {
    "InfiniBand that reads the GPU's memory": (
        log(
            IB_FOUND,
            "Using network IB",
            "Channel 00/0 : 0[0] -> 2[0] [send] via NET/IB/0/GDRDMA",
            "Channel 00/0 : 2[0] -> 0[0] [receive] via NET/IB/0/GDRDMA(PCI)/Shared",
        ),
        [link("infiniband", "mlx5_0", True)],
    ),
    "InfiniBand of an old version, through another process": (
        log(
            "NET/IB : Using [0]mlx5_0:1/IB ; OOB ib0:10.7.0.1<0>",
            "Channel 01 : 2[c7000] -> 0[87000] [send] via NET/IB/0(3)",
        ),
        [link("infiniband", "mlx5_0")],
    ),
    "a rail and a plane behind the port": (
        log(
            "NET/IB : Using [0]mlx5_4:1:2:0/IB ; OOB ib0:10.7.0.1<0>",
            "Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0",
        ),
        [link("infiniband", "mlx5_4")],
    ),
    "two cards as one": (
        log(
            "NET/IB : Made virtual device [2] name=mlx5_0+mlx5_2 speed=200000 ndevs=2",
            "NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_2:1/IB [RO]; OOB ib0:10.7.0.1<0>",
            "Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/2",
        ),
        [link("infiniband", "mlx5_0+mlx5_2")],
    ),
    "RDMA over Ethernet": (
        log(IB_FOUND, "Channel 00/0 : 0[0] -> 2[0] [send] via NET/IB/1/GDRDMA"),
        [link("roce", "mlx5_1", True)],
    ),
    "sockets although there is InfiniBand": (
        log(
            IB_FOUND,
            SOCKET_FOUND,
            "Using network Socket",
            "Channel 00/0 : 0[0] -> 2[0] [send] via NET/Socket/1",
        ),
        [link("tcp", "ib0")],
    ),
    "Nvidia's plugin": (
        log(
            "NET/IB : Using [0]mlx5_0:1/IB/SHARP [RO]; OOB ib0:10.7.0.1<0>",
            "Channel 00/0 : 0[0] -> 2[0] [send] via NET/IBext_v8/0/GDRDMA",
        ),
        [link("infiniband", "mlx5_0", True)],
    ),
    "another plugin": (
        log("Channel 00/0 : 0[0] -> 1[0] [send] via NET/AWS Libfabric/0/GDRDMA"),
        [link("AWS Libfabric", None, True)],
    ),
    "a card that NCCL did not list": (
        log("Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0"),
        [link("IB with link layer unknown", None)],
    ),
    "one node": (
        log(
            IB_FOUND,
            SOCKET_FOUND,
            "Using network IB",
            "Channel 00/0 : 0[0] -> 1[1] via P2P/IPC",
            "Channel 01 : 1[1] -> 0[0] via SHM/direct/direct",
        ),
        [],
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_what_nccl_chose_is_read_from_its_channels(what: str) -> None:
    text, expected = CASES[what]
    assert network.merge(network.parse_nccl(text)) == expected


def test_each_process_has_its_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in network.nccl_variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    channel = "Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0"
    (tmp_path / f"nccl-{os.getpid()}.log").write_text(log(SOCKET_FOUND, channel))
    assert network.observe("nccl") == {"library": "nccl", "links": [link("tcp", "eth0")]}


def test_gloo_uses_the_interfaces_of_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()),
    ):
        found = network.observe("gloo")
        assert found == {
            "library": "gloo",
            "links": [{"transport": "tcp", "interface": "lo", "gpu_direct": None}],
        }
        # Between real nodes, a connection inside this one says nothing.
        monkeypatch.setenv("VLLM_HOST_IP", "192.0.2.1")
        assert network.observe("gloo") == {"library": "gloo", "links": []}


def test_all_workers_count() -> None:
    one, two = link("infiniband", "mlx5_0", True), link("tcp", "eth0")
    answers = [{"library": "nccl", "links": [one]}, {"library": "nccl", "links": [two, one]}]
    combined = network.combine(answers)
    assert combined["library"] == "nccl"
    assert sorted(each["transport"] for each in combined["links"]) == ["infiniband", "tcp"]


def test_warnings_of_nccl_reach_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warning = "node1:4242:4300 [0] net_ib.cc:818 NCCL WARN NET/IB : Got completion with error 12"
    with pytest.raises(RuntimeError), network.warnings_shown(tmp_path):
        (tmp_path / "nccl-17.log").write_text(log(IB_FOUND) + warning + "\n")
        (tmp_path / "nccl-18.log").write_text(log(SOCKET_FOUND))
        raise RuntimeError("the engine failed")
    assert capsys.readouterr().out == warning + "\n"
