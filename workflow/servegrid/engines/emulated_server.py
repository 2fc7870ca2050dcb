"""The server of the emulated engine: OpenAI's streaming completions with simulated latencies.

It runs in a thread of the allocation's process. Requests share the engine as in a real one: the
current number of requests in flight decides how fast each request advances. With several replicas,
each has requests of its own: a new request goes to the one with the fewest in flight, and equal
ones take turns, as in vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from servegrid.engines.emulated_timing import Timing
from servegrid.engines.listening import BACKLOG
from servegrid.study.endpoint import Endpoint

QUIET_S, PATIENCE_S = 0.01, 0.1
"""The requests of a burst arrive one after another. They start together when no request has arrived
for QUIET_S, or when the first has waited for PATIENCE_S. The wait counts as processing time."""
TICK_S = 0.0005
_STOP_S = 10.0

FAULTS = {
    "refuse": "the connection is closed without a response",
    "http_500": "HTTP 500",
    "stall": "no output after the first token; the connection stays open",
    "oom": "HTTP 500 (out of memory), then the engine dies",
    "die": "the engine dies and all connections close",
}
"""Faults of requests, with their effects."""


@dataclass(frozen=True)
class Fault:
    """A fault that the engine shows on purpose.

    It affects requests with at least `input_len` prompt tokens while at least `concurrency` are in
    flight on their replica. `seconds` is the extra time of a slow start.
    """

    kind: str
    concurrency: int = 0
    input_len: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class _Request:
    """A completion in flight. `position` is its number of output tokens; below 1 is the prefill."""

    input_len: int
    output_len: int
    arrived: float
    replica: int = 0
    position: float = 0.0
    stalled: bool = False
    refusal: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def advance(self, seconds: float, ttft_s: float, itl_s: float) -> None:
        if self.position < 1:
            needed = (1 - self.position) * ttft_s
            if seconds < needed:
                self.position += seconds / ttft_s
                return
            seconds -= needed
            self.position = 1.0
        self.position = min(self.position + seconds / itl_s, self.output_len)

    def due_in(self, ttft_s: float, itl_s: float) -> float:
        """Seconds until the next token."""
        if self.position < 1:
            return (1 - self.position) * ttft_s
        return (math.floor(self.position) + 1 - self.position) * itl_s


class EmulatedServer:
    """Serves on `listener` from `start` until `stop`, or until a fault ends it.

    `timing` is that of one of the `replicas`.
    """

    def __init__(
        self,
        listener: socket.socket,
        timing: Timing,
        faults: Sequence[Fault],
        endpoint: Endpoint,
        replicas: int = 1,
    ) -> None:
        self._listener, self._timing, self._faults = listener, timing, faults
        self._endpoint = endpoint
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="emulated engine", daemon=True)
        self._ready = threading.Event()
        self._over = asyncio.Event()
        self._arrived = asyncio.Event()
        self._waiting: list[_Request] = []
        self._active: list[_Request] = []
        self._in_flight = [0] * replicas
        self._first_asked = 0
        self._transports: set[asyncio.Transport] = set()

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Stop the server; does nothing if it has already ended."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(_STOP_S)

    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._over.is_set()

    # The methods below run in the server's thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._check_key])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        site = web.SockSite(runner, self._listener, backlog=BACKLOG)
        await site.start()
        self._ready.set()
        scheduler = asyncio.ensure_future(self._schedule())
        await self._over.wait()
        scheduler.cancel()
        for transport in self._transports:
            transport.abort()
        await site.stop()
        # Requests that are still in flight are cut off.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(runner.cleanup(), 1.0)

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("authorization", "")
        if request.path == "/health" or given == f"Bearer {self._endpoint.api_key}":
            return await handler(request)
        return _refusal(401, "The API key is missing or wrong.")

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self._endpoint.model}]})

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        assert isinstance(http.transport, asyncio.Transport)
        body = await http.json()
        lengths = _tokens(body["prompt"]), int(body["max_tokens"])
        request = _Request(*lengths, time.monotonic(), self._choose_replica())
        self._transports.add(http.transport)
        self._waiting.append(request)
        self._arrived.set()
        try:
            return await self._answer(http, body, request)
        finally:
            self._transports.discard(http.transport)
            self._remove(request)

    def _choose_replica(self) -> int:
        """The replica for a new request, which counts as in flight there until `_remove`."""
        count = len(self._in_flight)
        order = [(self._first_asked + number) % count for number in range(count)]
        self._first_asked = (self._first_asked + 1) % count
        chosen = min(order, key=lambda replica: self._in_flight[replica])
        self._in_flight[chosen] += 1
        return chosen

    def _remove(self, request: _Request) -> None:
        for queue in (self._waiting, self._active):
            if request in queue:
                queue.remove(request)
                self._in_flight[request.replica] -= 1

    async def _answer(
        self, http: web.Request, body: dict[str, Any], request: _Request
    ) -> web.StreamResponse:
        while request.position < 1 and request.refusal is None:
            await request.changed.wait()
            request.changed.clear()
        if request.refusal == "refuse":
            assert http.transport is not None
            http.transport.close()
        if request.refusal is not None:
            status = 503 if request.refusal.startswith("The table") else 500
            return _refusal(status, request.refusal)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(http)
        sent = 0
        while sent < request.output_len:
            out = math.floor(request.position)
            if out == sent or (request.stalled and sent):
                await request.changed.wait()
                request.changed.clear()
                continue
            until = 1 if request.stalled else out
            texts = [self._event(body, request, number + 1) for number in range(sent, until)]
            await response.write("".join(texts).encode())
            sent = until
        usage = _usage(request, request.output_len)
        await response.write(f"data: {_json(choices=[], usage=usage)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    def _event(self, body: dict[str, Any], request: _Request, number: int) -> str:
        last = number == request.output_len
        choice = {"index": 0, "text": " x", "finish_reason": "length" if last else None}
        chunk: dict[str, Any] = {"model": self._endpoint.model, "choices": [choice]}
        if body.get("stream_options", {}).get("continuous_usage_stats"):
            chunk["usage"] = _usage(request, number)
        return f"data: {_json(**chunk)}\n\n"

    async def _schedule(self) -> None:
        """Advance all requests, each time a token is due or a request arrives or ends."""
        before = time.monotonic()
        while True:
            if not self._active and not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                before = time.monotonic()
            if self._waiting and self._may_start():
                for request in self._waiting:
                    # It waited for the rest of its burst; this wait counts as processing time.
                    self._advance(request, max(before - request.arrived, 0.0))
                self._active += self._waiting
                self._waiting = []
            now = time.monotonic()
            pause = QUIET_S
            for request in list(self._active):
                pause = min(pause, self._advance(request, now - before))
            before = now
            await asyncio.sleep(max(pause, TICK_S))

    def _may_start(self) -> bool:
        now = time.monotonic()
        return (
            now - self._waiting[-1].arrived >= QUIET_S
            or now - self._waiting[0].arrived >= PATIENCE_S
        )

    def _advance(self, request: _Request, seconds: float) -> float:
        """Advance a request by `seconds`; returns the seconds until its next token."""
        in_flight = self._in_flight[request.replica]
        times = self._timing(in_flight, request.input_len)
        if request.position < 1:
            self._apply_faults(request, in_flight, times is None)
        if times is None or request.refusal is not None:
            return math.inf
        before = math.floor(request.position)
        request.advance(seconds, times.ttft_s, times.itl_s)
        if math.floor(request.position) > before:
            request.changed.set()
        if request.position >= request.output_len and request in self._active:
            self._remove(request)
        return request.due_in(times.ttft_s, times.itl_s)

    def _apply_faults(self, request: _Request, in_flight: int, unknown: bool) -> None:
        for fault in self._faults:
            if in_flight < fault.concurrency or request.input_len < fault.input_len:
                continue
            if fault.kind == "stall":
                request.stalled = True
            elif fault.kind == "die":
                self._over.set()
            elif fault.kind == "oom":
                request.refusal = "CUDA out of memory (emulated)"
                # Send the answer before the engine dies.
                self._loop.call_later(0.1, self._over.set)
            elif fault.kind == "http_500":
                request.refusal = "Internal server error (emulated)"
            elif fault.kind == "refuse":
                request.refusal = "refuse"
        if unknown and request.refusal is None:
            request.refusal = (
                f"The table has no value for {in_flight} requests with prompts of "
                f"{request.input_len} tokens."
            )
        if request.refusal is not None:
            request.changed.set()


def _tokens(prompt: Any) -> int:
    """The number of token ids, or of words if the prompt is text."""
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def _usage(request: _Request, out: int) -> dict[str, int]:
    total = request.input_len + out
    return {"prompt_tokens": request.input_len, "completion_tokens": out, "total_tokens": total}


def _json(**data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)
