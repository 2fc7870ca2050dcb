"""What the scripted server answers, and when: scripts, and the bytes that follow from them."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

MODEL = "scripted"
DEFAULT_TOKENS = 16
"""What OpenAI's completions give where a request does not say how many it wants."""

Numbers = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Script:
    """What the server does with every completion. Times in s after the request was read.

    A request of `max_tokens` is answered in chunks of `chunk_tokens` tokens, in turn; every
    `empty_every`-th chunk has an empty text. `/metrics` shows `gauges` as they are, and
    `counters` grown by so much with each completion that was answered.
    """

    ttft_s: float = 0.0
    itl_s: float = 0.0
    slower_s: float = 0.0
    """By how much later each completion's tokens come than those of the one before it."""
    chunk_tokens: tuple[int, ...] = (1,)
    empty_every: int = 0
    usage: Literal["continuous", "final", "none"] = "continuous"
    newline: str = "\n"
    gauges: Numbers = ()
    counters: Numbers = ()
    unix_socket: str | None = None
    certificate: str | None = None


AnyScript = TypeVar("AnyScript", bound=Script)


@dataclass(frozen=True)
class Answer:
    """What is sent when, in s after the request was read, and what happens to the connection."""

    pieces: list[tuple[float, bytes]]
    end: Literal["keep", "close", "reset", "hang"] = "keep"


def plain(script: Script, request_id: str, body: Mapping[str, Any]) -> Answer:
    """The answer to one completion as the script says, streamed in HTTP chunks."""
    return _streamed(script, *numbers_of(body))


def numbers_of(body: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Prompt tokens (characters of a text), tokens asked for, and whether with usage per chunk."""
    asked = body.get("max_tokens") or body.get("max_completion_tokens") or DEFAULT_TOKENS
    options = body.get("stream_options") or {}
    return len(body.get("prompt", "")), asked, bool(options.get("continuous_usage_stats"))


# Cached, so that a thousand requests at once are not kept waiting for their texts to be made.
@functools.lru_cache
def _streamed(script: Script, prompt: int, asked: int, asks_continuous: bool) -> Answer:
    events = events_of(script, prompt, asked, asks_continuous)
    # What is due at one time goes out in one piece, as servers do with the last chunks.
    pieces = []
    for due, group in itertools.groupby(events, key=lambda event: event[0]):
        texts = [f"data: {text}{script.newline * 2}".encode() for _, text in group]
        pieces.append((due, b"".join(b"%x\r\n%s\r\n" % (len(text), text) for text in texts)))
    pieces[0] = (pieces[0][0], head(200, STREAM) + pieces[0][1])
    pieces[-1] = (pieces[-1][0], pieces[-1][1] + b"0\r\n\r\n")
    return Answer(pieces)


@functools.lru_cache
def events_of(
    script: Script, prompt: int, asked: int, asks_continuous: bool
) -> list[tuple[float, str]]:
    """The events of a stream, each with the time at which it is due."""
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
            chunk["usage"] = usage(prompt, done)
        events.append((script.ttft_s + number * script.itl_s, json.dumps(chunk)))
    last = events[-1][0]
    if script.usage != "none":
        events.append((last, json.dumps({"choices": [], "usage": usage(prompt, asked)})))
    events.append((last, "[DONE]"))
    return events


def usage(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


STREAM = "text/event-stream; charset=utf-8"
JSON = "application/json"


def head(status: int, kind: str, length: int | None = None, closing: bool = False) -> bytes:
    """The head of a response; `length` None announces chunks, a negative one nothing."""
    lines = [f"HTTP/1.1 {status} Scripted", f"content-type: {kind}"]
    if length is None:
        lines.append("transfer-encoding: chunked")
    elif length >= 0:
        lines.append(f"content-length: {length}")
    if closing:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


def page(data: Any, status: int = 200) -> Answer:
    """A whole answer at once: a string as text, anything else as JSON."""
    text, kind = (data, "text/plain") if isinstance(data, str) else (json.dumps(data), JSON)
    body = text.encode()
    return Answer([(0.0, head(status, kind, len(body)) + body)])


def error(status: int, message: str) -> Answer:
    return page({"error": {"message": message, "code": status}}, status)


def from_json(kind: type[AnyScript], text: str) -> AnyScript:
    """A script of that kind from its fields as JSON, where tuples are lists."""
    return kind(**{key: _as_tuple(value) for key, value in json.loads(text).items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
