"""Only requests with the API key reach an engine, on every path except the health check."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from servegrid.engines.key_guard import KeyGuard

KEY = "a-key"
GOOD = [(b"authorization", b"Bearer a-key")]


def ask(
    path: str, headers: list[tuple[bytes, bytes]], method: str = "POST", kind: str = "http"
) -> tuple[bool, list[MutableMapping[str, Any]]]:
    """Whether the application was reached, and what was sent."""
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": headers}
    asyncio.run(KeyGuard(app, KEY)(scope, receive, send))
    return bool(reached), sent


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/invocations", "/metrics", "/metrics/", "/tokenize", "/docs", "/", "//",
     "/health/../v1/models", "/Health", "/health/", "/scale_elastic_ep", "/ping"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_every_path_requires_the_key(path: str, method: str) -> None:
    for wrong in (
        [],
        [(b"authorization", b"Bearer another")],
        [(b"authorization", b"bearer a-key")],
        [(b"authorization", b"a-key")],
        [(b"x-api-key", b"a-key")],
        [(b"authorization", b"Bearer x"), *GOOD],
    ):
        reached, sent = ask(path, wrong, method)
        assert not reached
        assert sent[0]["status"] == 401
    assert ask(path, GOOD, method) == (True, [])


def test_the_health_check_needs_no_key_for_get_and_head() -> None:
    assert ask("/health", [], "GET") == (True, [])
    assert ask("/health", [], "HEAD") == (True, [])
    assert not ask("/health", [], "POST")[0]


def test_a_websocket_without_the_key_is_closed() -> None:
    reached, sent = ask("/v1/realtime", [], kind="websocket")
    assert not reached
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert ask("/health", [], "GET", kind="websocket")[0] is False


def test_start_and_stop_messages_pass() -> None:
    assert ask("", [], kind="lifespan")[0]
