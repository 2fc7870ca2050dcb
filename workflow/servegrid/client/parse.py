"""From the bytes of a response to its row of `columns.REQUESTS`: all that is parsed, afterwards.

Events are read as the WHATWG's HTML standard defines server-sent events, chunks as OpenAI's
completions and chat completions APIs define them, with vLLM's usage per chunk where the server
gives it, and the names that vLLM and llama.cpp have for a model's thoughts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple

from servegrid.client.failures import Failure, Kind
from servegrid.client.http1 import WireError
from servegrid.client.prompts import Form
from servegrid.client.transport import Exchange
from servegrid.records.tokens import shared_out

_EVENT_END = re.compile(rb"\n\n|\r\n\r\n|\r\r")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_DONE = b"[DONE]"
_SHOWN = 200
_TEXTS_OF_A_CHAT = ("content", "reasoning_content", "reasoning")


@dataclass(frozen=True)
class Asked:
    """What a request asked for: the server must confirm both numbers.

    To a prompt that is not sent as token ids it may add some, and count more.
    """

    request_id: str
    wave: int
    prompt_tokens: int
    completion_tokens: int
    form: Form = "ids"


class _Failed(Exception):
    """The response is a failure; what was read of it before is kept."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(kind, detail)
        self.failure = Failure(kind, detail)


class _Chunk(NamedTuple):
    """One chunk with a choice: its arrival, and the server's count of tokens so far."""

    arrival_ns: int
    has_text: bool
    finished: bool
    tokens_so_far: int | None


@dataclass
class _Answer:
    """What has been read of one response so far."""

    chunks: list[_Chunk] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    done: bool = False


def row_of(exchange: Exchange, asked: Asked) -> dict[str, Any]:
    """The row of `columns.REQUESTS` of one exchange.

    A failed exchange keeps what came before it failed, with `error` saying why.
    """
    answer = _Answer()
    failure = exchange.failure
    try:
        _read(exchange, answer, chat=asked.form == "messages")
    except _Failed as failed:
        failure = failure or failed.failure
    token_ns, chunk_tokens, estimated = _tokens_of(answer)
    failure = failure or _shortcoming(answer, asked)
    return {
        "request_id": asked.request_id,
        "user": exchange.user,
        "wave": asked.wave,
        "scheduled_ns": exchange.scheduled_ns,
        "sent_ns": exchange.sent_ns,
        "first_token_ns": token_ns[0] if token_ns else None,
        "token_ns": token_ns,
        "chunk_tokens": chunk_tokens,
        "chunk_tokens_estimated": estimated,
        "done_ns": exchange.done_ns,
        "status": None if exchange.head is None else exchange.head.status,
        "error": None if failure is None else str(failure),
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "asked_tokens": asked.completion_tokens,
    }


def _shortcoming(answer: _Answer, asked: Asked) -> Failure | None:
    """What is wrong with an answer that came through whole."""
    if not answer.done and not any(chunk.finished for chunk in answer.chunks):
        return Failure("truncated", "the stream ended without finish_reason and [DONE]")
    if answer.completion_tokens is None or answer.prompt_tokens is None:
        return Failure("usage_missing", "no usage in the stream, although it was asked for")
    if answer.completion_tokens and not answer.chunks:
        return Failure("malformed", f"{answer.completion_tokens} tokens counted, none came")
    more = answer.prompt_tokens - asked.prompt_tokens
    if more < 0 or (more and asked.form == "ids"):
        detail = f"{answer.prompt_tokens} counted by the server, {asked.prompt_tokens} sent"
        return Failure("wrong_prompt_tokens", detail)
    if answer.completion_tokens != asked.completion_tokens:
        detail = f"{answer.completion_tokens} generated, {asked.completion_tokens} asked"
        return Failure("wrong_completion_tokens", detail)
    return None


def _read(exchange: Exchange, answer: _Answer, chat: bool) -> None:
    """Read the response into `answer`, event by event. Raises _Failed."""
    head = exchange.head
    if head is None:
        return
    if head.status != HTTPStatus.OK:
        raise _Failed("http_status", f"{head.status} {_message_of(exchange)}")
    kind = (head.header(b"content-type") or b"").split(b";")[0].strip().lower()
    if kind != b"text/event-stream":
        shown = kind.decode("latin-1") or "nothing"
        raise _Failed("malformed", f"an event stream was asked for, {shown} came")
    coding = (head.header(b"content-encoding") or b"identity").decode("latin-1")
    if coding != "identity":
        raise _Failed("malformed", f"the stream is encoded as {coding}, which was not asked for")
    for arrival_ns, data in _events(exchange):
        if data == _DONE:
            answer.done = True
        else:
            _take(answer, arrival_ns, _object_of(data), chat)


def _message_of(exchange: Exchange) -> str:
    """What the body of an error says, as far as it came."""
    try:
        body = b"".join(exchange.raw[start:end] for start, end in exchange.spans())
    except WireError:
        body = b""
    return text_of_error(body)


def text_of_error(body: bytes) -> str:
    """What the body of an HTTP error says, on one line and not too long."""
    try:
        text = _message_in(json.loads(body))
    except ValueError:
        text = body.decode(errors="replace")
    return " ".join(text.split())[:_SHOWN]


def _message_in(told: Any) -> str:
    """The message in an error object in one of its customary forms, else the whole as JSON."""
    inner = told.get("error", told) if isinstance(told, dict) else told
    message = inner.get("message") if isinstance(inner, dict) else inner
    return message if isinstance(message, str) else json.dumps(told)


def _events(exchange: Exchange) -> Iterator[tuple[int, bytes]]:
    """The data of each event, with the arrival of the read in which it became complete.

    Raises _Failed at a damaged chunk of the transfer coding.
    """
    places: list[int] = []
    lengths: list[int] = []
    body = bytearray()
    damage: WireError | None = None
    try:
        for start, end in exchange.spans():
            places.append(start)
            body += exchange.raw[start:end]
            lengths.append(len(body))
    except WireError as error:
        damage = error
    arrivals, ends = exchange.arrivals, exchange.ends
    begin = piece = read = 0
    for match in _EVENT_END.finditer(body):
        length = match.end()
        while lengths[piece] < length:
            piece += 1
        raw_length = places[piece] + length - (lengths[piece - 1] if piece else 0)
        while ends[read] < raw_length:
            read += 1
        data = _data_of(bytes(body[begin : match.start()]))
        begin = length
        if data is not None:
            yield arrivals[read], data
    if damage is not None:
        raise _Failed("malformed", f"not an HTTP response: {damage}")


def _data_of(event: bytes) -> bytes | None:
    """The data of an event, None where it has none (a comment that keeps a connection open)."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return event[6:]
    lines = [
        line[5:].removeprefix(b" ") for line in _LINE_END.split(event) if line.startswith(b"data:")
    ]
    return b"\n".join(lines) if lines else None


def _object_of(data: bytes) -> dict[str, Any]:
    try:
        told = json.loads(data)
    except ValueError:
        raise _Failed("malformed", f"an event is no JSON: {_shown(data)}") from None
    if not isinstance(told, dict):
        raise _Failed("malformed", f"an event is no JSON object: {_shown(data)}")
    if told.get("error") is not None or told.get("object") == "error":
        raise _Failed("mid_stream_error", _message_in(told)[:_SHOWN])
    return told


def _shown(data: bytes) -> str:
    return data[:_SHOWN].decode(errors="replace")


def _take(answer: _Answer, arrival_ns: int, chunk: dict[str, Any], chat: bool) -> None:
    """Add one chunk to the answer. Raises _Failed where it is not as the API says."""
    try:
        so_far = None
        if (usage := chunk.get("usage")) is not None:
            answer.prompt_tokens = _count(usage["prompt_tokens"])
            answer.completion_tokens = so_far = _count(usage["completion_tokens"])
        if choices := chunk["choices"]:
            choice = choices[0]
            finished = choice.get("finish_reason") is not None
            has_text = _is_said(choice["delta"]) if chat else bool(choice["text"])
            # A chat begins with a chunk that only says whose words will come.
            opens = chat and not (answer.chunks or has_text or finished or so_far)
            if not opens:
                answer.chunks.append(_Chunk(arrival_ns, has_text, finished, so_far))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        shown = json.dumps(chunk)[:_SHOWN]
        raise _Failed("malformed", f"an event is no completion chunk: {shown}") from None


def _is_said(delta: dict[str, Any]) -> bool:
    """Whether a chunk of a chat has text; a model's thoughts before its answer count."""
    return any(delta.get(key) for key in _TEXTS_OF_A_CHAT)


def _count(told: Any) -> int:
    if not isinstance(told, int) or told < 0:
        raise ValueError
    return told


def _tokens_of(answer: _Answer) -> tuple[list[int], list[int] | None, bool | None]:
    """Arrival and tokens of each chunk that has tokens, and whether they are estimated.

    Without any usage the tokens are None, and the arrivals those of the chunks with text.
    """
    with_text = [chunk for chunk in answer.chunks if chunk.has_text]
    total = answer.completion_tokens
    if total is None:
        return [chunk.arrival_ns for chunk in with_text], None, None
    carriers, counts = answer.chunks, _counted(answer.chunks, total)
    estimated = counts is None
    if counts is None:
        carriers = _carriers(answer.chunks, with_text, total)
        counts = shared_out(total, len(carriers))
    tokens = [(chunk.arrival_ns, count) for chunk, count in zip(carriers, counts, strict=True)]
    return (
        [arrival for arrival, count in tokens if count],
        [count for _, count in tokens if count],
        estimated,
    )


def _counted(chunks: list[_Chunk], total: int) -> list[int] | None:
    """The tokens of each chunk from the server's running count, None where it is no such."""
    counts, before = [], 0
    for chunk in chunks:
        if chunk.tokens_so_far is None or chunk.tokens_so_far < before:
            return None
        if chunk.has_text and not chunk.tokens_so_far:
            return None
        counts.append(chunk.tokens_so_far - before)
        before = chunk.tokens_so_far
    return counts if before == total else None


def _carriers(chunks: list[_Chunk], with_text: list[_Chunk], total: int) -> list[_Chunk]:
    """The chunks that can have carried `total` tokens.

    A token may have no text, such as half of a character: chunks without text count where
    there are more tokens than texts, the bare end of the stream only where nothing else is.
    """
    if len(with_text) >= total:
        return with_text
    return [chunk for chunk in chunks if chunk.has_text or not chunk.finished] or chunks
