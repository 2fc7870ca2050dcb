"""The doctor's probe of the network between two nodes, and its judgement."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from servegrid.doctor import network, network_probe
from servegrid.doctor.profile import Profile
from servegrid.doctor.report import Group, Status
from servegrid.doctor.shell import CommandResult
from servegrid.errors import ConfigError

GROUP = Group("network of kind a100")
PLACE = "`a100` in kinds.yaml"


def node(host: str, *interfaces: tuple[str, str, str], boot: str = "", **more: Any) -> Any:
    listed = [
        {"name": name, "address": address, "network": net, "up": True}
        | {"mbit_s": None, "infiniband": name.startswith("ib")}
        for name, address, net in interfaces
    ]
    return {"host": host, "boot": boot or host, "interfaces": listed, "cards": []} | more


LO = ("lo", "127.0.0.1", "127.0.0.0/8")


def test_interfaces_are_paired_by_network_then_by_name() -> None:
    first = node(
        "n1",
        LO,
        ("eth0", "192.0.2.1", "192.0.2.0/24"),
        ("ib0", "10.7.1.1", "10.7.1.0/24"),
        ("eth9", "198.51.100.1", "198.51.100.0/24"),
    )
    second = node(
        "n2", LO, ("eno1", "192.0.2.2", "192.0.2.0/24"), ("ib0", "10.7.2.1", "10.7.2.0/24")
    )
    pairs = [(one["name"], other["name"]) for one, other in network_probe.pair(first, second)]
    assert pairs == [("eth0", "eno1"), ("ib0", "ib0")]
    # Loopback leads to another node only if both are one machine.
    same = network_probe.pair(first | {"boot": "b"}, second | {"boot": "b"})
    assert same[0][0]["name"] == "lo"
    first["interfaces"][1]["up"] = False
    assert len(network_probe.pair(first, second)) == 1


def test_only_who_has_the_key_is_answered() -> None:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=network_probe.serve, args=([door], "k" * 64, over))
        thread.start()
        address = door.getsockname()
        try:
            with pytest.raises(OSError, match="does not answer"):
                network_probe.measure(address, "127.0.0.1", "x" * 64)
            found = network_probe.measure(address, "127.0.0.1", "k" * 64)
        finally:
            over.set()
            thread.join()
    assert found["gbit_s"] > 0 and found["round_trip_us"] > 0


def test_what_the_probe_writes_is_for_this_user_only(tmp_path: Path) -> None:
    network_probe._write(tmp_path / "first.json", {"key": "k"})
    assert stat.S_IMODE((tmp_path / "first.json").stat().st_mode) == 0o600


def test_cards_are_listed_with_their_link_layer(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0/ports/1"
    port.mkdir(parents=True)
    for name, text in (
        ("link_layer", "InfiniBand"),
        ("rate", "100 Gb/sec (4X EDR)"),
        ("state", "4: ACTIVE"),
    ):
        (port / name).write_text(f"{text}\n")
    assert network_probe.list_cards(tmp_path) == [
        {
            "name": "mlx5_0:1",
            "link_layer": "InfiniBand",
            "rate": "100 Gb/sec (4X EDR)",
            "state": "ACTIVE",
        }
    ]


def link(name: str, net: str, gbit_s: float, other: str | None = None) -> dict[str, Any]:
    return {
        "interface": name,
        "other": other or name,
        "network": net,
        "gbit_s": gbit_s,
        "round_trip_us": 20.0,
    }


ETH, IB = link("eth0", "192.0.2.0/24", 9.4), link("ib0", "10.7.0.0/16", 40.0)


@pytest.mark.parametrize(
    ("links", "setting", "status", "words"),
    [
        ([ETH, IB], None, Status.WARN, "Write `interface: ib0` for `a100` in kinds.yaml"),
        ([ETH, IB], "ib0", Status.OK, "as fast as any"),
        ([ETH, IB], "10.0.0.0/8", Status.OK, "as fast as any"),
        ([ETH, IB], "eth0", Status.WARN, "`eth0` has 9.4 Gbit/s, ib0 has 40"),
        ([ETH, IB], "ib7", Status.FAIL, "`ib7` connects no two nodes"),
        ([link("ib0", "10.7.0.0/16", 40.0, "ib1")], None, Status.WARN, "`interface: 10.7.0.0/16`"),
        ([ETH | {"gbit_s": 21.0}, IB], "eth0", Status.OK, "as fast as any"),
        ([], "ib0", Status.FAIL, "no interface of the two nodes can reach the other"),
    ],
)
def test_an_interface_is_proposed(
    links: list[dict[str, Any]], setting: str | None, status: Status, words: str
) -> None:
    last = list(network.judge(GROUP, node("n1"), node("n2", links=links), setting, PLACE))[-1]
    assert last.status is status
    assert words in f"{last.found} {last.remedy}"


def test_both_nodes_and_each_link_are_shown() -> None:
    card = {"name": "mlx5_0:1", "link_layer": "InfiniBand", "rate": "100 Gb/sec", "state": "ACTIVE"}
    first = node("n1", ("ib0", "10.7.0.1", "10.7.0.0/16"), cards=[card])
    failed = {"interface": "eth0", "other": "eth0", "network": "192.0.2.0/24", "error": "refused"}
    found = list(network.judge(GROUP, first, node("n2", links=[failed, IB]), "ib0", PLACE))
    assert [each.subject for each in found] == [
        *("n1", "n2", "eth0 192.0.2.0/24", "ib0 10.7.0.0/16", "interface"),
    ]
    assert found[0].found == (
        "ib0 10.7.0.1 (10.7.0.0/16, up, infiniband); "
        "RDMA: mlx5_0:1 (InfiniBand, 100 Gb/sec, ACTIVE)"
    )
    assert found[2].status is Status.SKIP
    assert found[3].found == "40 Gbit/s in one TCP connection, 20 µs round trip"


def test_one_machine_is_no_network() -> None:
    found = list(network.judge(GROUP, node("a", boot="b"), node("c", boot="b", links=[]), "", ""))
    assert any("both are one machine" in each.found for each in found)


class Slurm:
    """Answers as Slurm's programs would; `result` is what the nodes write."""

    def __init__(self, result: Any = None, refusal: str = "") -> None:
        self.result, self.refusal = result, refusal
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> CommandResult:
        self.commands.append(list(command))
        if command[0] == "sbatch" and self.refusal:
            return CommandResult(1, stderr=self.refusal)
        if command[0] == "sbatch" and self.result:
            folder = Path(command[-1]).parent
            for name, facts in zip(("first.json", "second.json"), self.result, strict=True):
                (folder / name).write_text(json.dumps(facts))
        return CommandResult(0, stdout="17\n" if command[0] == "sbatch" else "")


def profile(folder: Path) -> Profile:
    return Profile(
        folder / "config.yaml",
        {},
        folder / "kinds.yaml",
        {"a100": {"slurm_partition": "gpus", "timeout_min": 600, "interface": "ib0"}},
    )


def test_the_probe_runs_on_two_nodes_for_minutes_and_leaves_nothing(tmp_path: Path) -> None:
    slurm = Slurm((node("n1"), node("n2", links=[IB])))
    found = list(network.check_network(profile(tmp_path), "a100", tmp_path, slurm))
    assert found[-1].status is Status.OK
    submit, cancel = slurm.commands
    assert "--partition=gpus" in submit
    # Of options that are given twice, Slurm takes the last.
    assert [each for each in submit if each.startswith(("--nodes", "--time"))][-2:] == [
        *("--nodes=2", "--time=5"),
    ]
    assert cancel == ["scancel", "17"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("slurm", "words"),
    [
        (Slurm(refusal="sbatch: error: invalid partition"), "invalid partition"),
        (Slurm(), "the job 17 ended without a result"),
    ],
)
def test_a_probe_that_fails_is_a_finding(
    tmp_path: Path, slurm: Slurm, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "ASK_S", 0.0)
    monkeypatch.setattr(network, "POLL_S", 0.0)
    (only,) = network.check_network(profile(tmp_path), "a100", tmp_path, slurm)
    assert only.status is Status.FAIL
    assert words in only.found


def test_an_unknown_kind_is_refused_before_anything_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--network: .*kinds.yaml has no kind `v100`.*: a100"):
        network.check_kind_name(profile(tmp_path), "v100")
