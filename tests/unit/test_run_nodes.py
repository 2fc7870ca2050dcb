"""What the nodes of an allocation tell each other, with a network that is a list."""

from __future__ import annotations

import json
import queue
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.deployments import SMALL_VLLM
from servegrid.errors import EngineError
from servegrid.run import nodes as run_nodes
from servegrid.run.nodes import meet, samples_of_others, send_samples
from servegrid.telemetry import sampler

DEPLOYMENT = replace(SMALL_VLLM, engine="emulated")
AHEAD_NS = 7_000_000_000


class FakeNodes:
    """The first of three nodes. The clock of the third is 7 s ahead."""

    rank = 0
    hosts = ("a", "b", "c")
    addresses = ("10.7.0.1", "10.7.0.2", "10.7.0.3")
    interface = "ib0"
    failure: str | None = None

    def __init__(self) -> None:
        self.inbox: queue.Queue[tuple[int, Any]] = queue.Queue()
        self.sent: list[tuple[Any, int | None]] = []

    def send(self, message: Any, rank: int | None = None) -> None:
        self.sent.append((json.loads(json.dumps(message)), rank))

    def receive(self, limit_s: float) -> tuple[int, Any] | None:
        try:
            return self.inbox.get(timeout=limit_s)
        except queue.Empty:
            return None

    def clock_offset_ns(self, rank: int) -> tuple[int, int] | None:
        return {1: (0, 2000), 2: (AHEAD_NS, 3000)}[rank]


def described(node: str, **packages: str) -> dict[str, Any]:
    return {"node": node, "packages": packages, "gpus": [{"uuid": f"GPU-{node}", "name": "A100"}]}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> FakeNodes:
    monkeypatch.setattr(
        run_nodes.environment, "describe_node", lambda: described("a", vllm="0.32.0")
    )
    return FakeNodes()


def test_the_record_has_all_nodes_and_their_clocks(nodes: FakeNodes) -> None:
    for rank, host in ((2, "c"), (1, "b")):
        nodes.inbox.put((rank, {"environment": described(host, vllm="0.32.0")}))
    first, second = meet(DEPLOYMENT, nodes)
    assert first == {
        "node": "b",
        "gpus": [{"uuid": "GPU-b", "name": "A100"}],
        "interface": "ib0",
        "clock_offset_ns": 0,
        "clock_uncertainty_ns": 2000,
    }
    assert (second["node"], second["clock_offset_ns"]) == ("c", AHEAD_NS)
    assert meet(DEPLOYMENT, None) == []


def test_nodes_with_other_packages_are_refused(nodes: FakeNodes) -> None:
    nodes.inbox.put((1, {"environment": described("b", vllm="0.32.0")}))
    nodes.inbox.put((2, {"environment": described("c", vllm="0.31.0", torch="2.9")}))
    with pytest.raises(
        EngineError, match=r"a and c .*torch None and 2\.9, vllm 0\.32\.0 and 0\.31"
    ):
        meet(DEPLOYMENT, nodes)


def test_a_node_whose_part_failed_ends_the_start(nodes: FakeNodes) -> None:
    nodes.failure = "node 1 (b): no memory"
    with pytest.raises(EngineError, match=r"node 1 \(b\): no memory"):
        meet(DEPLOYMENT, nodes)


def test_samples_of_other_nodes_come_in_the_time_of_the_first(
    nodes: FakeNodes, tmp_path: Path
) -> None:
    file = tmp_path / "telemetry.jsonl"
    file.write_text('{"time_ns": 50, "device": "engine"}\n')
    rows = [
        {"time_ns": AHEAD_NS + 100, "device": "engine", "cpu_s": 1.5},
        {"time_ns": AHEAD_NS + 101, "device": "GPU-c", "power_w": 250.0},
        {"time_ns": AHEAD_NS + 102, "device": "index 0"},
    ]
    with samples_of_others(nodes, file):
        nodes.inbox.put((2, {"samples": rows}))
        sampler.wait_for(file, 0, 100, ["engine.2"], 10)
        nodes.inbox.put((1, {"samples": [{"time_ns": 120, "device": "engine"}]}))
        sampler.wait_for(file, 0, 120, ["engine.1"], 10)
    assert sampler.read_samples(file, 0, 0, 1000) == [
        {"time_ns": 50, "device": "engine"},
        {"time_ns": 100, "device": "engine.2", "cpu_s": 1.5},
        {"time_ns": 101, "device": "GPU-c", "power_w": 250.0},
        {"time_ns": 102, "device": "index 0.2"},
        {"time_ns": 120, "device": "engine.1"},
    ]


def test_a_node_sends_complete_samples_once(
    nodes: FakeNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_nodes, "SEND_EVERY_S", 0.01)
    file = tmp_path / "telemetry.jsonl"
    file.write_bytes(b'{"time_ns": 1}\n{"time_')
    with send_samples(nodes, file):
        while not nodes.sent:
            time.sleep(0.01)
        with file.open("ab") as more:
            more.write(b'ns": 2}\n')
        while len(nodes.sent) < 2:
            time.sleep(0.01)
    assert nodes.sent == [({"samples": [{"time_ns": 1}]}, 0), ({"samples": [{"time_ns": 2}]}, 0)]


def test_missing_samples_delay_a_cell_no_longer_than_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "telemetry.jsonl"
    file.write_text('{"time_ns": 99, "device": "engine.1"}\n')
    began = time.monotonic()
    sampler.wait_for(file, 0, 100, ["engine.1"], 0.3)
    assert 0.3 <= time.monotonic() - began < 5
