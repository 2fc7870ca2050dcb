"""The real vLLM on the CPU over two nodes: two processes here that share nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers.another_user import as_another_user
from helpers.demo_model import DemoModel, pad_heads
from helpers.two_nodes import TwoNodes, complete

SEEN_S = 20.0
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def padded(demo_model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pad_heads(demo_model.folder, tmp_path_factory.mktemp("padded") / "model")


@pytest.fixture
def two_nodes(padded: Path, tmp_path: Path) -> Iterator[TwoNodes]:
    nodes = TwoNodes(padded, tmp_path)
    try:
        yield nodes
    finally:
        nodes.close()


def bother(ports: list[list[Any]]) -> list[list[Any]]:
    """A stranger's bytes for every port: noise, HTTP, and messages of ZeroMQ. Returns the ports
    that a subscriber of ZeroMQ can read."""
    import zmq

    context = zmq.Context()
    subscribers = []
    for host, port in ports:
        for noise in (b"POST /shutdown HTTP/1.1\r\nContent-Length: 0\r\n\r\n", os.urandom(4096)):
            with contextlib.suppress(OSError), socket.create_connection((host, port), 5) as each:
                each.sendall(noise)
                each.settimeout(0.2)
                each.recv(4096)
        sender = context.socket(zmq.DEALER)
        sender.setsockopt(zmq.LINGER, 500)
        sender.connect(f"tcp://{host}:{port}")
        with contextlib.suppress(zmq.ZMQError):
            sender.send_multipart([b"\x00", b"cgarbage\n."], zmq.NOBLOCK)
        sender.close()
        subscriber = context.socket(zmq.SUB)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.setsockopt(zmq.LINGER, 0)
        subscriber.connect(f"tcp://{host}:{port}")
        subscribers.append((subscriber, [host, port]))
    time.sleep(3)  # meanwhile the test sends a request
    read = [address for each, address in subscribers if each.poll(100)]
    context.destroy(linger=0)
    return read


def listening(nodes: TwoNodes) -> list[list[Any]]:
    """The TCP ports on which the engine listens, on both nodes."""
    found = {
        (each.laddr.ip.removeprefix("::ffff:"), each.laddr.port)
        for process in nodes.all
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }
    return [list(each) for each in sorted(found)]


def test_two_nodes_share_one_model_and_the_end_of_one_ends_the_other(two_nodes: TwoNodes) -> None:
    facts = two_nodes.up["facts"]
    assert (facts["tensor_parallel_size"], facts["nodes"]) == (2, 2)
    assert facts["attention_backends"] == ["CPU_ATTN"]
    # Both workers are on this machine, and the test names `lo` as the network between the nodes.
    links = [{"transport": "tcp", "interface": "lo", "gpu_direct": None}]
    assert facts["network"] == {"library": "gloo", "links": links}
    # One worker on each node, besides its own process and the engine's scheduler on the first.
    assert (len(two_nodes.up["pids"]), len(two_nodes.part["pids"])) == (3, 2)
    with two_nodes.client() as client:
        assert complete(client, "The capital of France is", 3).startswith(" Paris")
        # Another user can connect to the ports, but cannot stop the engine by what it sends.
        ports = listening(two_nodes)
        assert {host for host, _ in ports} == {"127.0.0.1"}  # the interface, and no other address
        request = threading.Timer(1.5, complete, (client, "a b c", 3))
        request.start()
        read = as_another_user(bother, ports)
        request.join()
        print(f"{len(ports)} ports; a stranger can read from {len(read)} of them")
        assert complete(client, "The capital of France is", 3).startswith(" Paris")
        assert two_nodes.healthy()
        # A killed worker of the other node ends the requests.
        os.kill(two_nodes.part["pids"][-1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(httpx.HTTPError):
            while time.monotonic() - began < SEEN_S:
                complete(client, "a b c", 100)
        print(f"requests fail after {time.monotonic() - began:.1f} s")
    assert not two_nodes.healthy()
    # The end of the first node ends the other one, here even with a broken engine.
    two_nodes.processes[0].send_signal(signal.SIGKILL)
    two_nodes.assert_nothing_is_left(SEEN_S)


@pytest.mark.chaos
def test_a_killed_node_ends_the_first_one(two_nodes: TwoNodes) -> None:
    assert two_nodes.healthy()
    two_nodes.processes[1].send_signal(signal.SIGKILL)
    two_nodes.assert_nothing_is_left(SEEN_S)
