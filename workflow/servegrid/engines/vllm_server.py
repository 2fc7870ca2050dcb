"""The thread that runs vLLM's server, and the start and end of vLLM's processes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from argparse import Namespace
from multiprocessing import resource_tracker
from socket import socket
from typing import Any

import psutil

from servegrid.engines import network
from servegrid.engines.key_guard import KeyGuard
from servegrid.engines.vllm_api import VllmApi, get_config
from servegrid.node import processes
from servegrid.node.reaper import Reaper

DRAIN_S = 5
KEEP_ALIVE_S = 600
_STOP_S = 30.0
WATCH_EVERY_S = 0.5


class EngineExitedError(Exception):
    """vLLM's thread has ended without a call of `stop`; `cause` is its exception, if any."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__(cause)
        self.cause = cause


class VllmServer:
    """vLLM's engine and its HTTP server on `listener`.

    `resolved` is set when `has_engine` returns True. Call all methods in the thread that created
    the object.
    """

    def __init__(
        self, api: VllmApi, arguments: Namespace, listener: socket, reaper: Reaper, api_key: str
    ) -> None:
        self._api_key = api_key
        self.resolved: dict[str, Any] = {}
        self.children: list[psutil.Process] = []
        self._api = api
        self._arguments = arguments
        self._listener = listener
        self._uvicorn: Any = None
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._other_children = processes.descendants()
        self._reaper = reaper
        self._watched_at = 0.0
        self._thread = threading.Thread(target=self._run, name="vllm-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def has_engine(self) -> bool:
        """Whether the engine has started. Raises EngineExitedError if it failed or has ended."""
        if time.monotonic() - self._watched_at > WATCH_EVERY_S:
            self.watch()
        if not self._thread.is_alive():
            raise EngineExitedError(self._error)
        return self._uvicorn is not None

    def watch(self) -> None:
        """Find the engine's processes and make the reaper watch them.

        Call this repeatedly while the engine starts, because the names of its shared memory are
        lost if the start fails. Do not call it later: all new children of this process are taken
        for the engine's.
        """
        self.children = processes.descendants(exclude=self._other_children)
        self._reaper.watch(self.children)
        self._watched_at = time.monotonic()

    def stop(self) -> None:
        """End the server, the engine and all its processes, in any state."""
        self._stopping.set()
        deadline = time.monotonic() + _STOP_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            if self._uvicorn is not None:
                self._uvicorn.should_exit = True
            else:
                # An engine that still starts reacts to nothing else.
                self.watch()
                processes.terminate(self.children, grace_s=0)
            self._thread.join(0.1)
        self._uvicorn = self._error = None
        # Reference cycles keep the engine's client alive, and with it its sockets and queues.
        gc.collect()

    def _run(self) -> None:
        import uvloop

        with processes.block_signals():
            # Start the tracker here: its start unblocks signals, also if the engine starts it.
            resource_tracker.ensure_running()
            with (
                processes.block_signals(),
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                try:
                    runner.run(self._serve())
                except BaseException as error:
                    self._error = error

    async def _serve(self) -> None:
        import uvicorn

        async with self._api.build_engine(self._arguments) as engine:
            config = await get_config(engine)
            self.resolved = {
                **resolved_config(config),
                "attention_backends": await _attention_backends(engine),
            }
            if getattr(self._arguments, "nnodes", 1) > 1:
                self.resolved["network"] = await _network(engine)
            app = await self._api.make_app(engine, self._arguments)
            server = uvicorn.Server(
                uvicorn.Config(
                    KeyGuard(app, self._api_key),
                    log_level="warning",
                    access_log=False,
                    timeout_keep_alive=KEEP_ALIVE_S,
                    timeout_graceful_shutdown=DRAIN_S,
                )
            )
            # vLLM stops the server through this attribute if its engine dies.
            app.state.server = server
            if self._stopping.is_set():
                return
            self._uvicorn = server
            await server.serve(sockets=[self._listener])


def resolved_config(config: Any) -> dict[str, Any]:
    """The settings of a `VllmConfig` as plain data; null if this version of vLLM lacks one."""
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
    parallel = config.parallel_config
    blocks = getattr(cache, "num_gpu_blocks", None)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "max_model_len": model.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": getattr(scheduler, "max_num_batched_tokens", None),
        "chunked_prefill": getattr(scheduler, "enable_chunked_prefill", None),
        "prefix_caching": cache.enable_prefix_caching,
        "kv_cache_dtype": str(cache.cache_dtype),
        "kv_block_tokens": cache.block_size,
        "kv_capacity_tokens": blocks * cache.block_size if blocks else None,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": getattr(parallel, "pipeline_parallel_size", None),
        "data_parallel_size": getattr(parallel, "data_parallel_size", None),
        "expert_parallel": getattr(parallel, "enable_expert_parallel", None),
        "enforce_eager": model.enforce_eager,
        "seed": model.seed,
    }


async def _attention_backends(engine: Any) -> list[str] | None:
    """The backends that the workers report; None if this version of vLLM cannot ask them."""
    with contextlib.suppress(Exception):
        answers = await engine.collective_rpc("servegrid_attention_backends")
        return sorted({name for backends in answers for name in backends})
    return None


async def _network(engine: Any) -> dict[str, Any] | None:
    """What the workers of all nodes use between them; None if one of them does not know."""
    with contextlib.suppress(Exception):
        answers = await engine.collective_rpc("servegrid_network")
        if None not in answers:
            return network.combine(answers)
    return None
