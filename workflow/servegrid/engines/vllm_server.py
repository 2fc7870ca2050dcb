"""The thread in which vLLM serves, from its first process to the last that is left."""

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

from servegrid.engines.vllm_api import Api, get_config
from servegrid.node import processes
from servegrid.node.reaper import Reaper

DRAIN_S = 5
KEEP_ALIVE_S = 600
STOP_S = 30.0
WATCH_EVERY_S = 0.5


class Failed(Exception):
    """The thread has ended by itself; `cause` is what ended it."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__(cause)
        self.cause = cause


class Server:
    """vLLM's engine and its server on `listener`.

    `resolved` is known once `has_engine` is true. All methods are for the thread that made it.
    """

    def __init__(self, api: Api, arguments: Namespace, listener: socket, reaper: Reaper) -> None:
        self.resolved: dict[str, Any] = {}
        self.children: list[psutil.Process] = []
        self._api = api
        self._arguments = arguments
        self._listener = listener
        self._uvicorn: Any = None
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._strangers = processes.descendants()
        self._reaper = reaper
        self._watched_at = 0.0
        self._thread = threading.Thread(target=self._run, name="vllm-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def has_engine(self) -> bool:
        """Raises Failed where the engine never will be up, or is no longer."""
        if time.monotonic() - self._watched_at > WATCH_EVERY_S:
            self.watch()
        if not self._thread.is_alive():
            raise Failed(self._error)
        return self._uvicorn is not None

    def watch(self) -> None:
        """Find the engine's processes and tell the reaper of them.

        To be done while it starts, for a start that fails takes the names of its shared memory
        along, and not after: other children of this process would be taken for the engine's.
        """
        self.children = processes.descendants(exclude=self._strangers)
        self._reaper.watch(self.children)
        self._watched_at = time.monotonic()

    def stop(self) -> None:
        """End the server, the engine and all of its processes, in whatever state they are."""
        self._stopping.set()
        deadline = time.monotonic() + STOP_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            if self._uvicorn is not None:
                self._uvicorn.should_exit = True
            else:
                # An engine that is still starting listens to nothing but its end.
                self.watch()
                processes.terminate(self.children, grace_s=0)
            self._thread.join(0.1)
        self._uvicorn = self._error = None
        # Its cycles hold the engine's client, whose sockets and queues go only with it.
        gc.collect()

    def _run(self) -> None:
        import uvloop

        with processes.block_signals():
            # Starting the tracker unblocks signals, so it must not be left to the engine.
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
                **resolved(config),
                "attention_backends": await _attention_backends(engine),
            }
            app = await self._api.make_app(engine, self._arguments)
            server = uvicorn.Server(
                uvicorn.Config(
                    app,
                    log_level="warning",
                    access_log=False,
                    timeout_keep_alive=KEEP_ALIVE_S,
                    timeout_graceful_shutdown=DRAIN_S,
                )
            )
            # vLLM ends the server through this attribute when its engine has died.
            app.state.server = server
            if self._stopping.is_set():
                return
            self._uvicorn = server
            await server.serve(sockets=[self._listener])


def resolved(config: Any) -> dict[str, Any]:
    """What a `VllmConfig` says that vLLM uses, as plain data; null where a version lacks it."""
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
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
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "enforce_eager": model.enforce_eager,
        "seed": model.seed,
    }


async def _attention_backends(engine: Any) -> list[str] | None:
    """As the workers tell it; None where this vLLM cannot ask them."""
    with contextlib.suppress(Exception):
        answers = await engine.collective_rpc("servegrid_attention_backends")
        return sorted({name for each in answers for name in each})
    return None
