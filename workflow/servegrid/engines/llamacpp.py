"""llama.cpp serves a GGUF file, through the package xllamacpp, in a separate process.

The library could also serve inside the calling process. But then a model that loads too slowly
cannot be stopped, a failed assertion ends the allocation, and the engine's memory and CPU time
cannot be separated from servegrid's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from servegrid.engines.base import Site
from servegrid.engines.extras import find_extras
from servegrid.engines.listening import LOOPBACK, UNIX_BASE_URL, socket_path, wait_until
from servegrid.engines.startup_errors import startup_error
from servegrid.errors import ConfigError, EngineError, ModelError
from servegrid.node import processes
from servegrid.node.reaper import start_reaper
from servegrid.study import models
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment
from servegrid.telemetry.server import http_get, is_healthy

PACKAGE = "xllamacpp"
GGUF_MAGIC = b"GGUF"
HTTP_THREADS = 512
"""Each open request occupies one thread: as long as one is free, /health is answered at once."""

_DEPLOYMENT_KEYS = {
    "model.path": "checkpoint",
    "model_alias": "model",
    "n_ctx": "max_model_len",
    "n_parallel": "max_num_seqs",
    "chat_template": "chat_template",
}
_SITE_KEYS = ("hostnames", "port", "api_keys")

MAX_ERRORS = 2
_GRACE_S = 5.0


@dataclass(frozen=True)
class LlamaCppEngine:
    """A running llama.cpp server."""

    endpoint: Endpoint
    facts: dict[str, Any]
    process: subprocess.Popen[str]
    errors: None = None

    def pids(self) -> list[int]:
        return [self.process.pid]

    def healthy(self) -> bool:
        return self.process.poll() is None and is_healthy(self.endpoint)


@contextlib.contextmanager
def start_engine(deployment: Deployment, site: Site) -> Iterator[LlamaCppEngine]:
    """See `servegrid.engines.start_engine`."""
    started = time.monotonic()
    _check_package(deployment)
    extras = find_extras(deployment)
    settings = llamacpp_settings(
        deployment, find_gguf(deployment, site.models, site.revisions), compute_threads()
    )
    # Not part of `settings`, which are recorded: the record names the file and its digest.
    template = {} if extras.template is None else {"chat_template": extras.template_text}
    key = secrets.token_urlsafe(24)
    with start_reaper() as reaper:
        socket = socket_path(site, reaper.folder)
        address = {"hostnames": [str(socket or LOOPBACK)], "port": 0, "api_keys": [key]}
        server = _Server(deployment.name, settings | template | address)
        try:
            reaper.watch([psutil.Process(server.process.pid)])
            wait_until(server.is_listening, started + site.startup_s, deployment.name)
            _check_gpus(deployment, server.reported["gpus"])
            endpoint = Endpoint(
                base_url=UNIX_BASE_URL if socket else server.reported["address"],
                model=deployment.model,
                api_key=key,
                socket=str(socket) if socket else None,
                api=deployment.api,
                started_here=True,
            )
            wait_until(lambda: is_healthy(endpoint), started + site.startup_s, deployment.name)
            facts = {
                "engine": "llamacpp",
                "version": metadata.version(PACKAGE),
                **_resolved(deployment, endpoint),
                "prefix_caching": bool(settings["cache_prompt"]),
                "engine_args": settings,
                "system": server.reported["system"],
                "gpus": server.reported["gpus"],
                "model_files": models.file_digests(Path(settings["model.path"])),
                "bring_up_s": {"engine": round(time.monotonic() - started, 3)},
                **extras.facts,
            }
            yield LlamaCppEngine(endpoint, facts, server.process)
        finally:
            server.stop()


def find_gguf(
    deployment: Deployment, cache: Path, revisions: Mapping[str, str] | None = None
) -> Path:
    """The GGUF file of the deployment's checkpoint: a file, or a folder with exactly one.

    Raises ModelError if there is no such file.
    """
    path = models.locate(deployment.checkpoint, cache, revisions)
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise ModelError(
                f"checkpoint `{deployment.checkpoint}`: {path} contains {len(found)} GGUF files. "
                "llama.cpp serves one file: set `checkpoint` to the path of a GGUF file."
            )
        path = found[0]
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelError(
                f"checkpoint `{deployment.checkpoint}`: {path} is not a GGUF file. "
                "llama.cpp serves only GGUF files. For safetensors, use `engine: vllm`."
            )
    return path


def compute_threads() -> int:
    """The number of compute threads: all cores but one, as in vLLM.

    The server and the load client use that core. Compute threads wait for each other by spinning:
    one thread without a free core delays all of them.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def llamacpp_settings(deployment: Deployment, checkpoint: Path, threads: int) -> dict[str, Any]:
    """A deployment as attributes of llama.cpp's `common_params`, by dotted name.

    llama.cpp divides `n_ctx` among its slots, so each slot gets `max_model_len` tokens. All prompt
    caches are off: every prompt is processed in full. The deployment's `engine_args` override these
    settings. Raises ConfigError if `engine_args` sets something that servegrid sets itself.
    """
    for key in deployment.engine_args:
        where = f"deployment `{deployment.name}`: engine_args.{key} is set by"
        if key in _DEPLOYMENT_KEYS:
            raise ConfigError(
                f"{where} the deployment's own key `{_DEPLOYMENT_KEYS[key]}`. "
                "Set that key and remove the argument."
            )
        if key in _SITE_KEYS:
            raise ConfigError(f"{where} servegrid. Remove the argument.")
    return {
        "model.path": str(checkpoint),
        "model_alias": [deployment.model],
        "n_parallel": deployment.max_num_seqs,
        "n_ctx": deployment.max_model_len * deployment.max_num_seqs,
        "fit_params": False,
        "n_gpu_layers": -1 if deployment.gpu_count else 0,
        "cpuparams.n_threads": threads,
        "cpuparams_batch.n_threads": threads,
        "cache_prompt": False,
        "cache_ram_mib": 0,
        "cache_idle_slots": False,
        "n_cache_reuse": 0,
        "slot_prompt_similarity": 0.0,
        "endpoint_metrics": True,
        "n_threads_http": HTTP_THREADS,
        "ui": False,
        "verbosity": 2,
        **deployment.engine_args,
    }


class _Server:
    """The server process: its standard output is JSON for servegrid, its standard error the log."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.reported: dict[str, Any] = {}
        self._errors: list[str] = []
        with processes.block_signals():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "servegrid.engines.llamacpp_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                # The GPU order of NVML, which samples them.
                env=os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            )
        self._readers = [
            threading.Thread(target=read, daemon=True)
            for read in (self._read_messages, self._read_log)
        ]
        for reader in self._readers:
            reader.start()
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stream:
            json.dump(settings, stream)

    def is_listening(self) -> bool:
        """Whether it listens. Raises ConfigError or EngineError if its process has ended."""
        if self.process.poll() is not None:
            self._finish_reading()
            if refused := self.reported.get("refused"):
                raise ConfigError(f"deployment `{self.name}`: {refused}")
            cause = "; ".join(self._errors[:MAX_ERRORS])
            raise startup_error(
                f"deployment `{self.name}`: llama.cpp did not start: "
                f"{cause or f'its process ended with status {self.process.returncode}'}. "
                "Its complete output is in the log.",
                cause,
            )
        return "address" in self.reported

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._finish_reading()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream
            stream.close()

    def _finish_reading(self) -> None:
        for reader in self._readers:
            reader.join()

    def _read_messages(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.reported.update(json.loads(line))

    def _read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            sys.stderr.write(line)
            _, is_error, text = line.partition(" E ")
            if is_error:
                self._errors.append(" ".join(text.split()))


def _check_package(deployment: Deployment) -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        raise EngineError(
            f"deployment `{deployment.name}`: the package {PACKAGE}, which contains llama.cpp, "
            "is not installed here. Install it from the list in workflow/envs that contains it."
        )


def _check_gpus(deployment: Deployment, gpus: list[str]) -> None:
    if len(gpus) < deployment.gpu_count:
        raise EngineError(
            f"deployment `{deployment.name}` needs {deployment.gpu_count} GPUs of kind "
            f"`{deployment.gpu}`, but the installed llama.cpp sees {len(gpus)} here. Use a build "
            "of llama.cpp for this kind of GPU, on a node that has these GPUs."
        )


def _resolved(deployment: Deployment, endpoint: Endpoint) -> dict[str, Any]:
    """The server's resolved settings. Raises ConfigError if the model's context is too short."""
    properties = json.loads(http_get(endpoint, "/props")[1])
    (model,) = json.loads(http_get(endpoint, "/v1/models")[1])["data"]
    longest = model["meta"]["n_ctx_train"]
    if deployment.max_model_len > longest:
        raise ConfigError(
            f"deployment `{deployment.name}`: max_model_len {deployment.max_model_len} is more "
            f"than the model's context length, {longest} tokens. Lower it."
        )
    context = properties["default_generation_settings"]["n_ctx"]
    return {
        "quantization": properties["model_ftype"],
        "max_model_len": context,
        "max_num_seqs": properties["total_slots"],
        "kv_capacity_tokens": context * properties["total_slots"],
        "parameters": model["meta"]["n_params"],
    }
