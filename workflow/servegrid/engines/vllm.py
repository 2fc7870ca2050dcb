"""vLLM: its OpenAI-compatible server runs in a thread of this process, its engine in children.

The load client must run in another process: in this one it would compete for Python's global lock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from servegrid.engines import (
    arguments,
    compatibility,
    network,
    startup_errors,
    vllm_api,
    vllm_nodes,
)
from servegrid.engines.base import Nodes, Site
from servegrid.engines.extras import Extras, find_extras
from servegrid.engines.listening import (
    BACKLOG,
    LOOPBACK,
    UNIX_BASE_URL,
    check_socket_path,
    socket_path,
    wait_until,
)
from servegrid.engines.vllm_nodes import VllmPart
from servegrid.engines.vllm_server import EngineExitedError, VllmServer
from servegrid.engines.vllm_worker import WorkerExtension
from servegrid.errors import EngineError
from servegrid.node import processes
from servegrid.node.environment import hardware_threads, set_environment
from servegrid.node.reaper import start_reaper
from servegrid.study import models
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment
from servegrid.telemetry.server import is_healthy

ENVIRONMENT = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""The GPU order of NVML; no usage reports and no downloads; no fork of a process with threads."""

CORES_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"

RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "triton",
    "flashinfer-python",
    "xformers",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VllmEngine:
    """A running vLLM."""

    endpoint: Endpoint
    facts: dict[str, Any]
    server: VllmServer
    nodes: Nodes | None = None
    errors: Path | None = None

    def pids(self) -> list[int]:
        return [os.getpid(), *(child.pid for child in self.server.children if child.is_running())]

    def healthy(self) -> bool:
        is_whole = self.nodes is None or self.nodes.failure is None
        return is_whole and self.server.is_alive() and is_healthy(self.endpoint)


@contextlib.contextmanager
def start_engine(deployment: Deployment, site: Site) -> Iterator[VllmEngine]:
    """See `servegrid.engines.start_engine`."""
    clock, nodes = _Clock(), site.nodes
    deadline = clock.started + site.startup_s
    checkpoint = models.locate(deployment.checkpoint, site.models, site.revisions)
    extras = find_extras(deployment)
    with contextlib.ExitStack() as stack:
        reaper = stack.enter_context(start_reaper())
        stack.enter_context(network.warnings_shown(reaper.folder))
        path = socket_path(site, reaper.folder)
        check_socket_path(reaper.folder / str(uuid.uuid4()))  # vLLM names its sockets like this
        with set_environment(engine_environment(reaper.folder, nodes) | _cores(deployment)):
            api = _load_api(deployment)
            words = _command_line(deployment, checkpoint, extras, api)
            listener = stack.enter_context(_listener(path))
            endpoint = Endpoint(
                base_url=_base_url(listener),
                model=deployment.model,
                api_key=secrets.token_urlsafe(24),
                socket=str(path) if path else None,
                api=deployment.api,
                started_here=True,
                adapters=tuple(deployment.lora),
            )
            clock.lap("import")
            _check_gpus(deployment, site, checkpoint, api)
            shared = [*words, *_worker_extension(api)]
            store = None
            if nodes is not None:
                vllm_nodes.check_api(deployment, api)
                store = vllm_nodes.meeting_point(nodes.addresses[0])
                nodes.send({"words": shared, "port": store.port})
            parsed = api.parse([*shared, *_node_arguments(nodes, store)], deployment.name)
            server = VllmServer(api, parsed, listener, reaper, str(endpoint.api_key))
            stack.callback(server.stop)

            def has_engine() -> bool:
                vllm_nodes.check_parts(deployment, nodes)
                return server.has_engine()

            try:
                server.start()
                wait_until(has_engine, deadline, deployment.name)
                clock.lap("engine")
                wait_until(lambda: has_engine() and is_healthy(endpoint), deadline, deployment.name)
                server.watch()
                clock.lap("server")
            except EngineExitedError as error:
                vllm_nodes.check_parts(deployment, nodes)
                raise _startup_error(deployment, api, error, reaper.folder) from None
            except BaseException:
                # Stop it before the environment is reset: processes that still start need it.
                if nodes is not None:
                    processes.terminate(server.children, grace_s=0)
                server.stop()
                raise
        if nodes is not None:
            guard = vllm_nodes.Guard(nodes, endpoint, server.children)
            stack.callback(guard.stop)
            guard.start()
        facts = {
            "engine": "vllm",
            "version": api.version,
            **server.resolved,
            "engine_args": words,
            "packages": _versions(RECORDED_PACKAGES),
            "model_files": models.file_digests(checkpoint),
            **extras.facts,
            "bring_up_s": clock.laps,
        }
        if nodes is not None:
            facts["nodes"] = len(nodes.hosts)
        errors = reaper.folder / startup_errors.ERRORS_FILE
        yield VllmEngine(endpoint, facts, server, nodes, errors)
        del store  # torch's processes need it until here


@contextlib.contextmanager
def start_part(deployment: Deployment, site: Site) -> Iterator[VllmPart]:
    """See `servegrid.engines.start_part`."""
    deadline, nodes = time.monotonic() + site.startup_s, site.nodes
    assert nodes is not None
    checkpoint = models.locate(deployment.checkpoint, site.models, site.revisions)
    with (
        start_reaper() as reaper,
        network.warnings_shown(reaper.folder),
        set_environment(engine_environment(reaper.folder, nodes)),
    ):
        api = _load_api(deployment)
        vllm_nodes.check_api(deployment, api)
        _check_gpus(deployment, site, checkpoint, api)
        start = vllm_nodes.receive_start(nodes, deadline, deployment.name)
        address, port = nodes.addresses[0], start["port"]
        own = vllm_nodes.node_arguments(nodes.rank, len(nodes.hosts), address, port)
        parsed = api.parse([*start["words"], *own], deployment.name)
        workers = vllm_nodes.Workers(parsed, reaper)
        with vllm_nodes.running(
            workers, lambda: wait_until(workers.are_up, deadline, deployment.name)
        ) as part:
            yield part


def engine_environment(folder: Path, nodes: Nodes | None = None) -> dict[str, str]:
    """Environment variables for vLLM and its processes; they put their files into `folder`."""
    folders = {
        "TMPDIR": str(folder),
        "VLLM_RPC_BASE_PATH": str(folder),
        # The default is a folder in /tmp with a name that every other user can predict.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "torchinductor"),
    }
    found = ENVIRONMENT | folders | startup_errors.logging_variables(folder)
    if nodes is not None:
        found |= vllm_nodes.node_environment(nodes.addresses[nodes.rank], nodes.interface)
        found |= network.nccl_variables(folder)
    return found


def _cores(deployment: Deployment) -> dict[str, str]:
    """On a CPU, each replica gets cores of its own, unless the variable says which."""
    if deployment.gpu_count or deployment.replicas == 1 or CORES_VARIABLE in os.environ:
        return {}
    cores, workers = os.sched_getaffinity(0), deployment.parallelism.workers
    return {CORES_VARIABLE: arguments.worker_cores(cores, workers, hardware_threads)}


class _Clock:
    """Measures the seconds of each phase of a start."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.laps[phase] = round(now - self._last, 3)
        self._last = now


def _load_api(deployment: Deployment) -> vllm_api.VllmApi:
    try:
        api = vllm_api.load_api()
    except ImportError as error:
        raise EngineError(
            f"deployment `{deployment.name}`: vLLM cannot be imported here ({error}). "
            "Install it from the list in workflow/envs for this kind of GPU."
        ) from error
    if api.device != ("cuda" if deployment.gpu_count else "cpu"):
        raise EngineError(
            f"deployment `{deployment.name}` needs gpu `{deployment.gpu}`, but the installed vLLM "
            f"{api.version} runs on `{api.device or 'no device'}` here. Use the environment for "
            "this kind of GPU, on a node that has it."
        )
    return api


def _check_gpus(
    deployment: Deployment, site: Site, checkpoint: Path, api: vllm_api.VllmApi
) -> None:
    if deployment.gpu_count:
        defaults = arguments.default_arguments(deployment, str(checkpoint), None)
        nodes = 1 if site.nodes is None else len(site.nodes.hosts)
        compatibility.check_compatibility(deployment, defaults, checkpoint, api.version, nodes)


def _node_arguments(nodes: Nodes | None, store: Any) -> list[str]:
    if nodes is None:
        return []
    return vllm_nodes.node_arguments(0, len(nodes.hosts), nodes.addresses[0], store.port)


def _command_line(
    deployment: Deployment, checkpoint: Path, extras: Extras, api: vllm_api.VllmApi
) -> list[str]:
    kv_cache = None
    if not deployment.gpu_count:
        config = checkpoint / "config.json"
        kv_cache = arguments.kv_cache_bytes(
            deployment,
            json.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
            psutil.virtual_memory().total,
        )
    defaults = arguments.default_arguments(deployment, str(checkpoint), kv_cache)
    defaults |= extras.vllm_arguments
    return arguments.format_arguments(deployment, defaults, api.options, api.version)


def _worker_extension(api: vllm_api.VllmApi) -> list[str]:
    option = "--worker-extension-cls"
    if option not in api.options:
        return []
    return [option, f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"]


@contextlib.contextmanager
def _listener(path: Path | None) -> Iterator[socket.socket]:
    """The socket to serve on: the Unix socket `path`, or a free TCP port of the loopback."""
    with socket.socket(socket.AF_UNIX if path else socket.AF_INET) as listener:
        listener.bind(str(path) if path else (LOOPBACK, 0))
        listener.listen(BACKLOG)
        yield listener


def _base_url(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return UNIX_BASE_URL
    return f"http://{LOOPBACK}:{listener.getsockname()[1]}"


def _startup_error(
    deployment: Deployment, api: vllm_api.VllmApi, error: EngineExitedError, folder: Path
) -> EngineError:
    logger.error("vLLM did not start", exc_info=error.cause)
    cause = startup_errors.first_error(folder) or startup_errors.describe_failure(error.cause)
    return startup_errors.startup_error(
        f"deployment `{deployment.name}`: vLLM {api.version} did not start: "
        f"{startup_errors.shorten(cause)} (The complete error is in the log.)",
        cause,
    )


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
