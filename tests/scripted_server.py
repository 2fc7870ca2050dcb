"""The process of the scripted server: it serves the script given as JSON until its standard
input is closed. Tests start it through `scripted`.

Only the standard library is imported, as every test waits for this process to be up.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import json
import os
import re
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

MODEL = "scripted"
Fault = Literal[
    "status",  # answers `status`
    "refuse_key",  # answers 400 where the request has `refused_key`
    "reset",  # RST after `fault_after` chunks
    "close",  # FIN after `fault_after` chunks, the response unfinished
    "end_early",  # a well-formed end after `fault_after` chunks, without the stream's own end
    "malformed_json",
    "malformed_chunk",  # the size of an HTTP chunk is no number
    "error_object",  # an error inside the stream after `fault_after` chunks
    "stall",  # nothing more after `fault_after` chunks
    "fewer_tokens",
    "wrong_prompt_usage",
    "not_a_stream",  # the whole answer as one JSON object
]


@dataclass(frozen=True)
class Script:
    """What the server does with every completion, and to which of them the fault happens.

    A request of `max_tokens` is answered in chunks of `chunk_tokens` tokens, in turn; every
    `empty_every`-th chunk has an empty text. `fault_on` is searched in X-Request-Id.
    """

    ttft_s: float = 0.0
    itl_s: float = 0.0
    chunk_tokens: tuple[int, ...] = (1,)
    empty_every: int = 0
    usage: Literal["continuous", "final", "none"] = "continuous"
    framing: Literal["chunked", "length", "close"] = "chunked"
    newline: str = "\n"
    piece_bytes: int = 0
    """Bytes per send, with `itl_s` between the pieces; 0 sends each event at once."""
    close_after: Literal["", "announced", "silently"] = ""
    accept_after_s: float = 0.0
    fault: Fault | None = None
    fault_on: str = r"/\d+$"
    fault_after: int = 0
    status: int = 500
    refused_key: str = ""
    unix_socket: str | None = None
    certificate: str | None = None


@dataclass(frozen=True)
class Answer:
    """What is sent when, in seconds after the request's arrival, and how it ends."""

    pieces: list[tuple[float, bytes]]
    end: Literal["keep", "close", "reset", "hang"]


def answer(script: Script, request_id: str, body: dict[str, Any]) -> Answer:
    """The answer to one completion."""
    fault = script.fault if re.search(script.fault_on, request_id) else None
    if script.fault == "refuse_key" and _has_key(body, script.refused_key):
        return _error(400, f"Extra inputs are not permitted: {script.refused_key}")
    if fault == "status":
        return _error(script.status, f"scripted status {script.status}")
    asked, prompt = body["max_tokens"], len(body["prompt"])
    if fault == "fewer_tokens":
        asked -= 1
    if fault == "wrong_prompt_usage":
        prompt += 1
    if fault == "not_a_stream":
        whole = json.dumps({"choices": [{"text": "x"}], "usage": _usage(prompt, asked)}).encode()
        return Answer([(0.0, _head(200, "application/json", len(whole)) + whole)], "keep")
    asks_continuous = body.get("stream_options", {}).get("continuous_usage_stats", False)
    return _completion(script, fault, prompt, asked, asks_continuous)


# Cached, so that a thousand requests at once are not kept waiting for their texts to be made.
@functools.lru_cache
def _completion(
    script: Script, fault: str | None, prompt: int, asked: int, asks_continuous: bool
) -> Answer:
    continuous = script.usage == "continuous" and asks_continuous
    events: list[tuple[float, str]] = []
    sizes = itertools.cycle(script.chunk_tokens)
    done = 0
    while done < asked:
        done = min(done + next(sizes), asked)
        number = len(events)
        empty = script.empty_every and (number + 1) % script.empty_every == 0
        chunk: dict[str, Any] = {
            "id": "cmpl-0123456789abcdef0123456789abcdef",
            "object": "text_completion",
            "created": 1,
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "text": "" if empty else f" word{number}",
                    "logprobs": None,
                    "finish_reason": "length" if done == asked else None,
                }
            ],
        }
        if continuous:
            chunk["usage"] = _usage(prompt, done)
        events.append((script.ttft_s + number * script.itl_s, json.dumps(chunk)))
    last = events[-1][0]
    if script.usage != "none":
        events.append((last, json.dumps({"choices": [], "usage": _usage(prompt, asked)})))
    events.append((last, "[DONE]"))
    return _with_fault(script, fault, events)


def _with_fault(script: Script, fault: str | None, events: list[tuple[float, str]]) -> Answer:
    end: Literal["keep", "close", "reset", "hang"] = "keep"
    if script.framing == "close" or script.close_after:
        end = "close"
    terminated = True
    cut = script.fault_after
    at = events[min(cut, len(events) - 1)][0]
    if fault in ("reset", "close", "stall", "end_early"):
        events = events[:cut]
        terminated = fault == "end_early"
        end = {"reset": "reset", "close": "close", "stall": "hang", "end_early": end}[fault]
    elif fault == "error_object":
        error = {"error": {"message": "scripted failure", "type": "ServerError", "code": 500}}
        events = [*events[:cut], (at, json.dumps(error)), (at, "[DONE]")]
    elif fault == "malformed_json":
        events = [*events[:cut], (at, '{"choices": ['), (at, "[DONE]")]
    if not events and not terminated:
        return Answer([(script.ttft_s, b"")], end)
    # What is due at one time goes out in one piece, as servers do with the last chunks.
    grouped = [
        (due, [f"data: {text}{script.newline * 2}".encode() for _, text in group])
        for due, group in itertools.groupby(events, key=lambda event: event[0])
    ]
    if script.framing == "length":
        body = b"".join(b"".join(texts) for _, texts in grouped)
        return Answer([(grouped[-1][0], _head(200, _STREAM, len(body)) + body)], end)
    chunked = script.framing == "chunked"
    closing = script.framing == "close" or script.close_after == "announced"
    head = _head(200, _STREAM, None if chunked else -1, closing)
    pieces = [
        (due, b"".join(b"%x\r\n%s\r\n" % (len(text), text) if chunked else text for text in texts))
        for due, texts in grouped
    ]
    if fault == "malformed_chunk":
        pieces.append((pieces[-1][0], b"zz\r\n\r\n"))
    elif chunked and terminated:
        pieces.append((pieces[-1][0], b"0\r\n\r\n"))
    pieces[0] = (pieces[0][0], head + pieces[0][1])
    pieces = [
        (due, b"".join(data for _, data in group))
        for due, group in itertools.groupby(pieces, key=lambda piece: piece[0])
    ]
    if script.piece_bytes:
        pieces = _in_small_pieces(pieces, script)
    return Answer(pieces, end)


def _in_small_pieces(
    pieces: list[tuple[float, bytes]], script: Script
) -> list[tuple[float, bytes]]:
    whole, size = b"".join(data for _, data in pieces), script.piece_bytes
    return [
        (script.ttft_s + number * script.itl_s, whole[start : start + size])
        for number, start in enumerate(range(0, len(whole), size))
    ]


_STREAM = "text/event-stream; charset=utf-8"


def _head(status: int, kind: str, length: int | None, closing: bool = False) -> bytes:
    """`length` None announces chunks, a negative one nothing."""
    lines = [f"HTTP/1.1 {status} Scripted", f"content-type: {kind}"]
    if length is None:
        lines.append("transfer-encoding: chunked")
    elif length >= 0:
        lines.append(f"content-length: {length}")
    if closing:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


def _error(status: int, message: str) -> Answer:
    body = json.dumps({"error": {"message": message, "code": status}}).encode()
    return Answer([(0.0, _head(status, "application/json", len(body)) + body)], "keep")


def _usage(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _has_key(data: Any, key: str) -> bool:
    return isinstance(data, dict) and (
        key in data or any(_has_key(each, key) for each in data.values())
    )


class _Peer:
    """One accepted connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.received = bytearray()


class _Loop:
    """One epoll loop: requests in, pieces out when they are due."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.listener = _listen(script)
        self.epoll = select.epoll()
        self.peers: dict[int, _Peer] = {}
        self.due: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.log: dict[str, list[int]] = {}
        self.requests: list[dict[str, Any]] = []
        self.connections = 0

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.due, (when, next(self.order), action))

    def run(self) -> None:
        listening = self.listener.fileno()
        self.epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self.at(
            time.monotonic() + self.script.accept_after_s,
            lambda: self.epoll.register(listening, select.EPOLLIN),
        )
        while True:
            wait = max(self.due[0][0] - time.monotonic(), 0) if self.due else -1
            for descriptor, _ in self.epoll.poll(wait):
                if descriptor == sys.stdin.fileno():
                    return
                if descriptor == listening:
                    self.accept()
                else:
                    self.receive(self.peers[descriptor])
            now = time.monotonic()
            while self.due and self.due[0][0] <= now:
                heapq.heappop(self.due)[2]()

    def accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self.listener.accept()
                if self.script.unix_socket is None:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.script.certificate is not None:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(self.script.certificate)
                    try:
                        connection = context.wrap_socket(connection, server_side=True)
                    except OSError:
                        connection.close()
                        continue
                connection.setblocking(False)
                self.connections += 1
                self.peers[connection.fileno()] = _Peer(connection)
                self.epoll.register(connection.fileno(), select.EPOLLIN)

    def receive(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(1 << 20)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:
            data = b""
        if not data:
            self.close(peer)
            return
        peer.received += data
        while (request := _request_of(peer.received)) is not None:
            self.serve(peer, *request)

    def serve(self, peer: _Peer, path: str, headers: dict[str, str], body: bytes) -> None:
        now = time.monotonic()
        if path == "/log":
            told = {"sent": self.log, "requests": self.requests, "connections": self.connections}
            text = json.dumps(told).encode()
            self.play(peer, Answer([(0, _head(200, "application/json", len(text)) + text)], "keep"))
        elif path == "/health":
            self.play(peer, Answer([(0, _head(200, "text/plain", 0))], "keep"))
        else:
            request_id = headers.get("x-request-id", "")
            self.requests.append({"headers": headers, "body": json.loads(body), "path": path})
            self.play(peer, answer(self.script, request_id, json.loads(body)), request_id, now)

    def play(self, peer: _Peer, what: Answer, name: str = "", start: float = 0.0) -> None:
        """Send the pieces one after another, each at its time after `start`."""
        pieces = iter(what.pieces)
        times = self.log.setdefault(name, [])

        def end() -> None:
            if what.end == "reset":
                linger = struct.pack("ii", 1, 0)
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            if what.end in ("reset", "close"):
                self.close(peer)

        def send(data: bytes) -> None:
            if self.peers.get(peer.socket.fileno()) is not peer:
                return
            times.append(time.monotonic_ns())
            try:
                while data:
                    try:
                        data = data[peer.socket.send(data) :]
                    except BlockingIOError:
                        select.select([], [peer.socket], [])
            except OSError:
                self.close(peer)
                return
            following()

        def following() -> None:
            piece = next(pieces, None)
            if piece is None:
                end()
            else:
                self.at(start + piece[0], lambda: send(piece[1]))

        following()

    def close(self, peer: _Peer) -> None:
        if self.peers.pop(peer.socket.fileno(), None) is not None:
            peer.socket.close()


def _listen(script: Script) -> socket.socket:
    if script.unix_socket is None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(script.unix_socket)
        listener.listen(4096)
    listener.setblocking(False)
    return listener


def _request_of(received: bytearray) -> tuple[str, dict[str, str], bytes] | None:
    """Take one whole request off the front, if there is one."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = received[:end].decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (li.partition(":") for li in lines)
    }
    total = end + 4 + int(headers.get("content-length", 0))
    if len(received) < total:
        return None
    body = bytes(received[end + 4 : total])
    del received[:total]
    return first.split(" ")[1], headers, body


def main() -> None:
    given = json.loads(sys.argv[1])
    script = replace(Script(**given), chunk_tokens=tuple(given["chunk_tokens"]))
    loop = _Loop(script)
    port = "" if script.unix_socket else loop.listener.getsockname()[1]
    print(port, flush=True)
    loop.run()
    os._exit(0)


if __name__ == "__main__":
    main()
