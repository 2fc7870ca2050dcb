"""vLLM: its OpenAI server in a thread of this process, its engine in children.

The load must come from another process: it would share this one's interpreter lock.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from servegrid.engines import arguments, compatibility, startup_errors, vllm_api
from servegrid.engines.base import Site
from servegrid.engines.listening import (
    LOOPBACK,
    UNIX_BASE_URL,
    check_socket_path,
    socket_path,
    wait_until,
)
from servegrid.engines.vllm_server import Failed, Server
from servegrid.engines.vllm_worker import Facts
from servegrid.errors import EngineError
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
"""GPUs are counted as NVML does; nothing is sent or fetched; no process with threads is forked."""

PACKAGES = ("torch", "transformers", "tokenizers", "triton", "flashinfer-python", "xformers")
BACKLOG = 2048

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vllm:
    """A vLLM that is up."""

    endpoint: Endpoint
    facts: dict[str, Any]
    server: Server

    def pids(self) -> list[int]:
        return [os.getpid(), *(child.pid for child in self.server.children if child.is_running())]

    def healthy(self) -> bool:
        return self.server.is_alive() and is_healthy(self.endpoint)


@contextlib.contextmanager
def start_engine(deployment: Deployment, site: Site) -> Iterator[Vllm]:
    """See `servegrid.engines.start_engine`."""
    clock = _Clock()
    deadline = clock.started + site.startup_s
    checkpoint = models.locate(deployment.checkpoint, site.models)
    with contextlib.ExitStack() as stack:
        reaper = stack.enter_context(start_reaper())
        path = socket_path(site, reaper.folder)
        check_socket_path(reaper.folder / str(uuid.uuid4()))  # as vLLM names its own sockets
        with _environment(variables(reaper.folder)):
            api = _load(deployment)
            rendered = _rendered(deployment, checkpoint, api)
            listener = stack.enter_context(_listener(path))
            endpoint = Endpoint(
                base_url=_base_url(listener),
                model=deployment.model,
                api_key=secrets.token_urlsafe(24),
                socket=str(path) if path else None,
            )
            hidden = ["--api-key", str(endpoint.api_key), *_worker_extension(api)]
            parsed = api.parse([*rendered, *hidden], deployment.name)
            clock.lap("import")
            if deployment.gpu_count:
                defaults = arguments.default_arguments(deployment, str(checkpoint), None)
                compatibility.check_compatibility(deployment, defaults, checkpoint, api.version)
            server = Server(api, parsed, listener, reaper)
            stack.callback(server.stop)
            try:
                server.start()
                wait_until(server.has_engine, deadline, deployment.name)
                clock.lap("engine")
                wait_until(
                    lambda: server.has_engine() and is_healthy(endpoint), deadline, deployment.name
                )
                server.watch()
                clock.lap("server")
            except Failed as failed:
                raise _explained(deployment, api, failed, reaper.folder) from None
            except BaseException:
                # As long as it goes on starting, it must find its variables.
                server.stop()
                raise
        facts = {
            "engine": "vllm",
            "version": api.version,
            **server.resolved,
            "engine_args": rendered,
            "packages": _versions(PACKAGES),
            "model_files": models.file_digests(checkpoint),
            "bring_up_s": clock.laps,
        }
        yield Vllm(endpoint, facts, server)


def variables(folder: Path) -> dict[str, str]:
    """The environment that vLLM and its processes start in; `folder` takes their files."""
    places = {"TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": str(folder)}
    return ENVIRONMENT | places | startup_errors.logging_variables(folder)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.laps[phase] = round(now - self._last, 3)
        self._last = now


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """`variables` in the environment, which is left as it was found.

    vLLM adds its own while it starts, LD_PRELOAD among them, that no other process should get.
    """
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _load(deployment: Deployment) -> vllm_api.Api:
    try:
        api = vllm_api.load_api()
    except ImportError as error:
        raise EngineError(
            f"deployment `{deployment.name}`: vLLM cannot be imported here ({error}). "
            "Install one that fits the GPU, from the list of workflow/envs made for it."
        ) from error
    if api.device != ("cuda" if deployment.gpu_count else "cpu"):
        raise EngineError(
            f"deployment `{deployment.name}` is for gpu `{deployment.gpu}`, but the installed vLLM "
            f"{api.version} runs on `{api.device or 'no device'}` here. Use the environment made "
            "for that kind, on a node that has it."
        )
    return api


def _rendered(deployment: Deployment, checkpoint: Path, api: vllm_api.Api) -> list[str]:
    kv_cache = None
    if not deployment.gpu_count:
        config = checkpoint / "config.json"
        kv_cache = arguments.kv_cache_bytes(
            deployment,
            json.loads(config.read_text()) if config.exists() else {},
            psutil.virtual_memory().total,
        )
    defaults = arguments.default_arguments(deployment, str(checkpoint), kv_cache)
    return arguments.format_arguments(deployment, defaults, api.options, api.version)


def _worker_extension(api: vllm_api.Api) -> list[str]:
    option = "--worker-extension-cls"
    if option not in api.options:
        return []
    return [option, f"{Facts.__module__}.{Facts.__qualname__}"]


@contextlib.contextmanager
def _listener(path: Path | None) -> Iterator[socket.socket]:
    """The socket to serve on: at `path`, or at a free port of the loopback."""
    with socket.socket(socket.AF_UNIX if path else socket.AF_INET) as listener:
        listener.bind(str(path) if path else (LOOPBACK, 0))
        listener.listen(BACKLOG)
        yield listener


def _base_url(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return UNIX_BASE_URL
    return f"http://{LOOPBACK}:{listener.getsockname()[1]}"


def _explained(
    deployment: Deployment, api: vllm_api.Api, failed: Failed, folder: Path
) -> EngineError:
    logger.error("vLLM did not start", exc_info=failed.cause)
    cause = startup_errors.first_error(folder) or startup_errors.describe_failure(failed.cause)
    return EngineError(
        f"deployment `{deployment.name}`: vLLM {api.version} did not start: "
        f"{startup_errors.shorten(cause)} (The whole story is in the log.)"
    )


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
