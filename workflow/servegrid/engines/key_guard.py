"""An ASGI middleware that requires the API key on every path of an engine except its health check.

vLLM's `--api-key` protects only `/v1` and a few other prefixes. On a node that several users share,
another user could send prompts to `/invocations` and read `/metrics` without the key.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})
"""Paths without a key: they only show whether the engine is alive."""
_METHODS = frozenset({"GET", "HEAD"})
_BODY = b'{"error": "a valid API key is required"}'


class KeyGuard:
    """Passes requests with `Authorization: Bearer <key>` to `app`; all others get status 401.

    A WebSocket without the key is closed before `app` sees it. The server's start and stop messages
    always pass.
    """

    def __init__(self, app: App, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(_BODY)).encode()),
                (b"www-authenticate", b"Bearer"),
                (b"connection", b"close"),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _BODY})
        else:
            await send({"type": f"{scope['type']}.close", "code": 1008})

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["path"] in OPEN_PATHS and scope["method"] in _METHODS:
            return True
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
