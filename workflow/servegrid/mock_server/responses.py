"""What the mock server sends, and when: scripts, and the bytes that follow from them."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

MODEL = "mock"
DEFAULT_TOKENS = 16
"""The tokens of a completion if the request has no limit, as in OpenAI's API."""

Metrics = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ResponseScript:
    """How the server responds to each completion. Times in s after it has read the request.

    The response has `max_tokens` tokens, in chunks of `chunk_tokens` tokens, used in turn. Every
    `empty_every`-th chunk has an empty text. `/metrics` shows `gauges` unchanged. Each of its
    `counters` grows by the given value with every completed response.
    """

    ttft_s: float = 0.0
    itl_s: float = 0.0
    slowdown_s: float = 0.0
    """How much later the tokens of each completion are sent than those of the previous one."""
    chunk_tokens: tuple[int, ...] = (1,)
    empty_every: int = 0
    usage: Literal["continuous", "final", "none"] = "continuous"
    newline: str = "\n"
    gauges: Metrics = ()
    counters: Metrics = ()
    unix_socket: str | None = None
    certificate: str | None = None


AnyScript = TypeVar("AnyScript", bound=ResponseScript)


@dataclass(frozen=True)
class TimedResponse:
    """The pieces of a response, each with its time in s after the request was read.

    `end` is what happens to the connection after the last piece.
    """

    pieces: list[tuple[float, bytes]]
    end: Literal["keep", "close", "reset", "hang"] = "keep"


def respond(script: ResponseScript, request_id: str, body: Mapping[str, Any]) -> TimedResponse:
    """The response to one completion, streamed in HTTP chunks."""
    return _stream(script, *parse_token_counts(body))


def parse_token_counts(body: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Prompt tokens (characters of a text), tokens to generate, and whether usage is per chunk."""
    tokens = body.get("max_tokens") or body.get("max_completion_tokens") or DEFAULT_TOKENS
    options = body.get("stream_options") or {}
    return len(body.get("prompt", "")), tokens, bool(options.get("continuous_usage_stats"))


# Cached, so that a thousand simultaneous requests do not wait while responses are built.
@functools.lru_cache
def _stream(
    script: ResponseScript, prompt: int, tokens: int, continuous_usage: bool
) -> TimedResponse:
    events = stream_events(script, prompt, tokens, continuous_usage)
    # Events that are due at the same time are sent in one piece, as servers do at the end.
    pieces = []
    for due, group in itertools.groupby(events, key=lambda event: event[0]):
        texts = [f"data: {text}{script.newline * 2}".encode() for _, text in group]
        pieces.append((due, b"".join(b"%x\r\n%s\r\n" % (len(text), text) for text in texts)))
    pieces[0] = (pieces[0][0], format_head(200, EVENT_STREAM) + pieces[0][1])
    pieces[-1] = (pieces[-1][0], pieces[-1][1] + b"0\r\n\r\n")
    return TimedResponse(pieces)


@functools.lru_cache
def stream_events(
    script: ResponseScript, prompt: int, tokens: int, continuous_usage: bool
) -> list[tuple[float, str]]:
    """The events of a stream, each with the time when it is due."""
    continuous = script.usage == "continuous" and continuous_usage
    events: list[tuple[float, str]] = []
    sizes = itertools.cycle(script.chunk_tokens)
    done = 0
    while done < tokens:
        done = min(done + next(sizes), tokens)
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
                    "finish_reason": "length" if done == tokens else None,
                }
            ],
        }
        if continuous:
            chunk["usage"] = usage_object(prompt, done)
        events.append((script.ttft_s + number * script.itl_s, json.dumps(chunk)))
    last = events[-1][0]
    if script.usage != "none":
        events.append((last, json.dumps({"choices": [], "usage": usage_object(prompt, tokens)})))
    events.append((last, "[DONE]"))
    return events


def usage_object(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


EVENT_STREAM = "text/event-stream; charset=utf-8"
JSON = "application/json"


def format_head(
    status: int, media_type: str, length: int | None = None, closing: bool = False
) -> bytes:
    """The head of a response. `length` None announces chunks, a negative one nothing."""
    lines = [f"HTTP/1.1 {status} Mock", f"content-type: {media_type}"]
    if length is None:
        lines.append("transfer-encoding: chunked")
    elif length >= 0:
        lines.append(f"content-length: {length}")
    if closing:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


def full_response(data: Any, status: int = 200, closing: bool = False) -> TimedResponse:
    """A response in one piece: a string is sent as text, anything else as JSON.

    With `closing`, it announces that the server closes the connection.
    """
    if isinstance(data, str):
        text, media_type = data, "text/plain"
    else:
        text, media_type = json.dumps(data), JSON
    body = text.encode()
    return TimedResponse([(0.0, format_head(status, media_type, len(body), closing) + body)])


def error_response(status: int, message: str, closing: bool = False) -> TimedResponse:
    return full_response({"error": {"message": message, "code": status}}, status, closing)


def script_from_json(kind: type[AnyScript], text: str) -> AnyScript:
    """A script of class `kind` from its fields as JSON. JSON arrays become tuples."""
    return kind(**{key: _as_tuple(value) for key, value in json.loads(text).items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
