"""A server whose answers are written by the test: heads, streams and pauses, byte by byte.

with scripted_server(lambda request: stream(*DATA)) as server:
    measure(Endpoint(server.url, "m"), ...)
    server.requests[0].body["max_tokens"]
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The pieces are sent one after another, each after its pause in seconds."""

    pieces: Sequence[tuple[float, bytes]] = ()
    status: int = 200
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    before_s: float = 0.0


Respond = Callable[[Request], Answer]


@dataclass(frozen=True)
class ScriptedServer:
    url: str
    requests: list[Request]


def data(value: Any, status: int = 200, **headers: str) -> Answer:
    """One JSON value, or a text."""
    text = value if isinstance(value, str) else json.dumps(value)
    return Answer([(0.0, text.encode())], status, headers=headers)


def refusal(message: str, status: int = 400) -> Answer:
    return data({"error": {"message": message, "type": "invalid_request_error"}}, status)


def completion(
    request: Request, tokens: int | None = None, prompt_tokens: int | None = None, itl_s: float = 0
) -> Answer:
    """A stream with one chunk per token; as many as asked for, unless `tokens` says otherwise.

    A text counts as one token per word.
    """
    body = request.body
    chat = "messages" in body
    prompt = body["messages"][0]["content"] if chat else body["prompt"]
    if prompt_tokens is None:
        prompt_tokens = len(prompt.split() if isinstance(prompt, str) else prompt)
    if tokens is None:
        tokens = body.get("max_tokens") or body["max_completion_tokens"]
    text: dict[str, Any] = {"delta": {"content": " a"}} if chat else {"text": " a"}
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, **text}]} for _ in range(tokens)]
    if chunks:
        chunks[-1]["choices"][0]["finish_reason"] = "stop"
    chunks.append(
        {
            "choices": [],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": tokens},
        }
    )
    events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
    return Answer(
        [*((itl_s, each) for each in events), (0.0, b"data: [DONE]\n\n")], 200, EVENT_STREAM
    )


@contextmanager
def scripted_server(
    respond: Respond, tls: ssl.SSLContext | None = None
) -> Iterator[ScriptedServer]:
    """Answer each request with what `respond` returns, and close the connection."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(raw) if raw else {}
            request = Request(self.command, self.path, dict(self.headers.items()), body)
            requests.append(request)
            answer = respond(request)
            time.sleep(answer.before_s)
            self.close_connection = True
            try:
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.media_type)
                self.send_header("Connection", "close")
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for pause_s, piece in answer.pieces:
                    time.sleep(pause_s)
                    self.wfile.write(piece)
                    self.wfile.flush()
            except OSError:
                pass  # the client has left

        do_GET = do_POST = do_CONNECT = answer

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *arguments: object) -> None:
            pass  # a client may leave at any time

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield ScriptedServer(f"{scheme}://127.0.0.1:{server.server_port}", requests)
        finally:
            server.shutdown()
            thread.join()
