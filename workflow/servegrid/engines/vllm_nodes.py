"""vLLM on several nodes: its own multi-node start, with the multiprocessing executor and no Ray.

The first node has the server, the scheduler and its workers; each other node has workers only, as
`vllm serve --headless` starts them. vLLM tells nobody that a node or a worker on another node is
gone, so the allocation's connections do that, and servegrid ends the engine on every node.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import psutil

from servegrid.engines.base import Nodes
from servegrid.engines.vllm_api import VllmApi
from servegrid.errors import EngineError
from servegrid.node import processes
from servegrid.node.reaper import Reaper
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment
from servegrid.telemetry.server import check_health

POLL_S, HEALTH_S = 0.2, 1.0
STOP_S = 10.0


def node_environment(address: str, interface: str) -> dict[str, str]:
    """What vLLM, torch, Gloo and NCCL would otherwise guess from host names, each in its own way.

    `address` is this node's, on `interface`.
    """
    return {
        "VLLM_HOST_IP": address,
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",  # without `=`, NCCL takes a name for a prefix
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # see meeting_point
    }


def node_arguments(rank: int, nodes: int, address: str, port: int) -> list[str]:
    """vLLM's arguments for the node `rank`; `address` and `port` are those of the first node."""
    return [
        *("--nnodes", str(nodes), "--node-rank", str(rank)),
        *("--master-addr", address, "--master-port", str(port)),
        *("--distributed-executor-backend", "mp"),
    ]


def visible_devices(environment: Mapping[str, str], workers: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES with as many GPUs as this node has workers: vLLM expects that."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else list(map(str, range(workers)))
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[:workers])}


def check_api(deployment: Deployment, api: VllmApi) -> None:
    """Raise EngineError if this vLLM cannot start on several nodes."""
    if "--nnodes" not in api.options:
        raise EngineError(
            f"deployment `{deployment.name}`: vLLM {api.version} cannot start on several nodes. "
            "Use vLLM 0.12 or newer, or a kind of node with enough GPUs."
        )


def meeting_point(address: str) -> Any:
    """The store in which torch's processes find each other, on `address` alone.

    The first worker would make it otherwise, minutes later, on a port that may be taken by then,
    and on all interfaces. Keep the result as long as the engine runs.
    """
    from torch.distributed import TCPStore

    listener = socket.create_server((address, 0), backlog=2048)
    port, descriptor = listener.getsockname()[1], listener.detach()
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    )


def check_parts(deployment: Deployment, nodes: Nodes | None) -> None:
    """Raise EngineError if the engine's part on another node does not work."""
    if nodes is not None and nodes.failure is not None:
        raise EngineError(f"deployment `{deployment.name}`: {nodes.failure}")


class Guard(threading.Thread):
    """Ends the processes of the engine on the first node if another part of it is lost.

    Requests in flight then fail at once; otherwise they would wait for 300 s. If a worker of the
    first node dies, only the server's health shows it.
    """

    def __init__(
        self, nodes: Nodes, endpoint: Endpoint, children: Sequence[psutil.Process]
    ) -> None:
        super().__init__(name="vllm-guard", daemon=True)
        self._nodes, self._endpoint, self._children = nodes, endpoint, children
        self._is_over = threading.Event()

    def stop(self) -> None:
        """End the engine now: in a collective operation it would wait for the other nodes."""
        self._is_over.set()
        processes.terminate(self._children, grace_s=0)

    def run(self) -> None:
        asked = time.monotonic()
        while not self._is_over.wait(POLL_S):
            reason = self._nodes.failure
            if reason is None and time.monotonic() - asked > HEALTH_S:
                health = check_health(self._endpoint)
                # A busy server may answer late; one that is dead says so.
                if (health.status or 0) >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    reason = str(health)
                asked = time.monotonic()
            if reason is not None:
                print(f"The engine ends on all nodes: {reason}", flush=True)
                self.stop()


@dataclass(frozen=True)
class VllmPart:
    """The running workers of another node."""

    workers: Workers

    def pids(self) -> list[int]:
        return [os.getpid(), *(each.pid for each in self.workers.children if each.is_running())]

    def healthy(self) -> bool:
        return self.workers.are_alive()


class Workers:
    """This node's part of an engine whose scheduler is on another node.

    Call all methods in the thread that created the object.
    """

    def __init__(self, arguments: Namespace, reaper: Reaper) -> None:
        self.children: list[psutil.Process] = []
        self.error: BaseException | None = None
        self._arguments, self._reaper = arguments, reaper
        self._other_children = processes.descendants()
        self._executor: Any = None
        self._thread = threading.Thread(target=self._run, name="vllm-workers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def are_up(self) -> bool:
        """Whether all workers of all nodes have started. Raises EngineError if they cannot."""
        if self._executor is None and not self._thread.is_alive():
            raise EngineError(f"vLLM did not start on {socket.gethostname()}: {self.error!r}")
        self.children = processes.descendants(exclude=self._other_children)
        self._reaper.watch(self.children)
        return self._executor is not None

    def are_alive(self) -> bool:
        return all(worker.proc.is_alive() for worker in self._executor.workers)

    def stop(self) -> None:
        """End the workers in any state."""
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            started = processes.descendants(exclude=self._other_children)
            processes.terminate(started, grace_s=0)
            self._thread.join(POLL_S)
            if not self._thread.is_alive():
                return

    def _run(self) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        try:
            with processes.block_signals():
                engine = AsyncEngineArgs.from_cli_args(self._arguments)
                config = engine.create_engine_config(headless=True)
                # Not monitored by vLLM, which would end this whole process.
                self._executor = MultiprocExecutor(config, monitor_workers=False)
        except BaseException as error:
            self.error = error


def receive_start(nodes: Nodes, deadline: float, name: str) -> dict[str, Any]:
    """What the first node says about the start: `words` and `port`. Raises EngineError."""
    while time.monotonic() < deadline:
        received = nodes.receive(1.0)
        if received is not None:
            message: dict[str, Any] = received[1]
            return message
    raise EngineError(f"deployment `{name}`: the first node did not say how to start vLLM in time.")


@contextlib.contextmanager
def running(workers: Workers, ready: Callable[[], None]) -> Iterator[VllmPart]:
    """The workers during the block; `ready` waits until they are up."""
    with contextlib.ExitStack() as stack:
        stack.callback(workers.stop)
        workers.start()
        ready()
        yield VllmPart(workers)
