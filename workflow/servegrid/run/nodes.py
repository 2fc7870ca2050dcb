"""What the nodes of one allocation tell each other: their environment, and their samples."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from servegrid.engines import Nodes
from servegrid.errors import EngineError
from servegrid.node import environment, nvml
from servegrid.study.deployment import Deployment
from servegrid.telemetry.sampler import ENGINE

MEET_S = 300.0
"""How long the first node waits until the others have described themselves."""
SEND_EVERY_S = 0.5
CLOCK_EVERY_S = 10.0
"""Two clocks drift apart by up to 0.5 ms per second (adjtimex(2)): 5 ms in this time."""


def describe(deployment: Deployment) -> dict[str, Any]:
    """This node, for the records."""
    gpus = nvml.describe_gpus(os.environ) if deployment.node_gpus else {}
    return environment.describe_node() | gpus


def meet(deployment: Deployment, nodes: Nodes | None) -> list[dict[str, Any]]:
    """On the first node: the environments of the other nodes, in the order of their rank.

    Each has `clock_offset_ns`, its clock minus that of this node, and `clock_uncertainty_ns`; null
    if it did not answer. Raises EngineError if a node does not describe itself, or has other
    packages than this one.
    """
    if nodes is None:
        return []
    found: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + MEET_S
    while len(found) < len(nodes.hosts) - 1:
        if nodes.failure is not None:
            raise EngineError(f"deployment `{deployment.name}`: {nodes.failure}")
        if time.monotonic() > deadline:
            raise EngineError(
                f"deployment `{deployment.name}`: a node did not answer within {MEET_S:.0f} s. "
                "The logs of all nodes are in the same folder as this one."
            )
        if (received := nodes.receive(1.0)) is not None:
            rank, message = received
            found[rank] = message["environment"]
    own = environment.describe_node()
    others = []
    for rank, described in sorted(found.items()):
        _check_same(deployment, own, described)
        offset, uncertainty = nodes.clock_offset_ns(rank) or (None, None)
        kept = {key: value for key, value in described.items() if key != "packages"}
        clock = {"clock_offset_ns": offset, "clock_uncertainty_ns": uncertainty}
        others.append(kept | {"interface": nodes.interface} | clock)
    return others


def _check_same(deployment: Deployment, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    versions, others = one["packages"], other["packages"]
    different = [
        f"{name} {versions.get(name)} and {others.get(name)}"
        for name in sorted(versions.keys() | others.keys())
        if versions.get(name) != others.get(name)
    ]
    if different:
        raise EngineError(
            f"deployment `{deployment.name}`: {one['node']} and {other['node']} have different "
            f"packages: {', '.join(different[:5])}. All nodes need the same environment."
        )


@contextlib.contextmanager
def samples_of_others(nodes: Nodes | None, file: Path) -> Iterator[None]:
    """During the block, append the samples of the other nodes to `file`, in this node's time."""
    if nodes is None:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_receive_samples, args=(nodes, file, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def device_of(rank: int, device: str) -> str:
    """The name of a device of the node `rank`. Only the UUID of a GPU is unique on all nodes.

    >>> device_of(1, "engine"), device_of(2, "index 0"), device_of(1, "GPU-8f1")
    ('engine.1', 'index 0.2', 'GPU-8f1')
    """
    return f"{device}.{rank}" if device == ENGINE or device.startswith("index ") else device


def _receive_samples(nodes: Nodes, file: Path, over: threading.Event) -> None:
    offsets: dict[int, int] = {}
    asked = float("-inf")
    with file.open("ab", buffering=0) as output:
        while not over.is_set():
            if time.monotonic() - asked > CLOCK_EVERY_S:
                for rank in range(1, len(nodes.hosts)):
                    if answer := nodes.clock_offset_ns(rank):
                        offsets[rank] = answer[0]
                asked = time.monotonic()
            received = nodes.receive(0.2)
            if received is None or received[0] not in offsets:
                continue
            rank, message = received
            lines = (
                json.dumps(
                    row
                    | {"time_ns": row["time_ns"] - offsets[rank]}
                    | {"device": device_of(rank, row["device"])}
                )
                for row in message.get("samples", ())
            )
            output.write("".join(f"{line}\n" for line in lines).encode())


@contextlib.contextmanager
def send_samples(nodes: Nodes, file: Path) -> Iterator[None]:
    """On another node: during the block, send the samples in `file` to the first node."""
    over = threading.Event()

    def send() -> None:
        with file.open("rb") as lines:
            pending = b""
            while not over.wait(SEND_EVERY_S):
                *complete, pending = (pending + lines.read()).split(b"\n")
                if rows := [json.loads(line) for line in complete]:
                    nodes.send({"samples": rows}, rank=0)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
