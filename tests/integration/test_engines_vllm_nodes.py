"""The real vLLM on the CPU over two nodes: two processes here that share nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers.another_user import as_another_user
from helpers.demo_model import DemoModel, pad_heads
from helpers.deployments import DEMO_VLLM
from helpers.serving import http_client
from servegrid.study.endpoint import Endpoint

SCRIPT = Path(__file__).parents[1] / "helpers" / "serve_nodes.py"
SEEN_S = 20.0
VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Both nodes are this machine, and would bind their workers to the same cores."""

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def padded(demo_model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pad_heads(demo_model.folder, tmp_path_factory.mktemp("padded") / "model")


class TwoNodes:
    """Both nodes of an engine. Each has its own temporary folder."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        deployment = replace(
            DEMO_VLLM,
            checkpoint=str(model),
            tokenizer=str(model),
            engine_args={"tensor_parallel_size": 2},
        )
        self.temporary = [Path(tempfile.mkdtemp(prefix="sg-")) for _ in range(2)]
        self.processes = []
        for rank in range(2):
            with (folder / f"log-{rank}").open("w") as log:
                words = [str(rank), str(folder / "nodes"), json.dumps(asdict(deployment))]
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(SCRIPT), *words, json.dumps({"models": str(folder)})],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env=os.environ | VARIABLES | {"TMPDIR": str(self.temporary[rank])},
                        start_new_session=True,
                    )
                )
        for rank in range(2):
            self.read(rank)
        self.up, self.part = self.read(0), self.read(1)
        self.all = [psutil.Process(pid) for pid in self.up["pids"] + self.part["pids"]]

    def read(self, rank: int) -> dict[str, Any]:
        stdout = self.processes[rank].stdout
        assert stdout
        line = stdout.readline()
        assert line, (self.folder / f"log-{rank}").read_text()[-4000:]
        message: dict[str, Any] = json.loads(line)
        assert "error" not in message, message
        return message

    def healthy(self) -> bool:
        stdin = self.processes[0].stdin
        assert stdin
        stdin.write("\n")
        stdin.flush()
        return bool(self.read(0)["healthy"])

    def client(self) -> httpx.Client:
        client = http_client(Endpoint(**self.up["endpoint"]))
        client.timeout = httpx.Timeout(600)
        return client

    def assert_nothing_is_left(self, limit_s: float) -> None:
        """Neither a process of the engine nor a temporary file, on either node."""
        began = time.monotonic()
        _, left = psutil.wait_procs(self.all, timeout=limit_s)
        assert left == []
        print(f"nothing is left after {time.monotonic() - began:.1f} s")
        for process in self.processes:
            process.wait(30)
        deadline = time.monotonic() + 30
        while files := [file for each in self.temporary for file in each.glob("servegrid-*")]:
            assert time.monotonic() < deadline, files
            time.sleep(0.1)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        for each in self.all if hasattr(self, "all") else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for folder in self.temporary:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two_nodes(padded: Path, tmp_path: Path) -> Iterator[TwoNodes]:
    nodes = TwoNodes(padded, tmp_path)
    try:
        yield nodes
    finally:
        nodes.close()


def complete(client: httpx.Client, prompt: str, tokens: int) -> str:
    body = {"model": DEMO_VLLM.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    response.raise_for_status()
    text: str = response.json()["choices"][0]["text"]
    return text


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


def test_two_nodes_share_one_model_and_a_killed_node_ends_both(two_nodes: TwoNodes) -> None:
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
    two_nodes.processes[1].send_signal(signal.SIGKILL)
    two_nodes.assert_nothing_is_left(SEEN_S)


def test_a_killed_worker_ends_requests_and_a_killed_first_node_the_other_one(
    two_nodes: TwoNodes,
) -> None:
    with two_nodes.client() as client:
        complete(client, "a b c", 2)
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
