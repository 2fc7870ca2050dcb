"""Parses a response into a row of `columns.REQUESTS`, after the measurement.

Events are parsed as the WHATWG HTML standard defines server-sent events (section 9.2.6), and chunks
as OpenAI's completions and chat completions APIs define them. Servers and gateways also send events
that are no chunks, for example pings: these are skipped and counted. What could make the counts of
tokens wrong fails the request. vLLM's usage per chunk is used if the server sends it. In a chat,
the text of a reasoning counts as text too, and its tokens are counted apart from the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, NamedTuple
from urllib.parse import urljoin, urlsplit, urlunsplit

from servegrid.client.conversations import Answer
from servegrid.client.failures import Failure, FailureKind
from servegrid.client.http1 import HttpSyntaxError, parse_head
from servegrid.client.prompts import PromptForm
from servegrid.client.transport import Exchange
from servegrid.records.tokens import split_tokens
from servegrid.study.text import printable

# Atomic groups: a line end of CR and LF must not count as two line ends.
_EVENT_END = re.compile(rb"(?>\r\n|\n|\r){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
_READ, _SHOWN = 4096, 200
_MAX_COUNT = 2**31 - 1
"""The columns of token counts have 32 bits."""
_BROKEN_OFF = ("abort", "aborted", "cancelled", "canceled", "error", "timeout")
"""Values of finish_reason of a response that is not complete, although its stream is."""
_ANSWER_KEYS = ("content", "refusal")
_REASONING_KEYS = ("reasoning_content", "reasoning")
"""`reasoning` in newer vLLM and OpenRouter; `reasoning_content` in older vLLM, SGLang, llama.cpp
and TensorRT-LLM."""
_Text = Literal["", "reasoning", "answer"]


@dataclass(frozen=True)
class RequestSpec:
    """What a request asked for. The server's usage must confirm both token counts.

    A server may add tokens to a prompt that is not sent as token ids, and count more. With
    `may_stop_early`, a response may have fewer output tokens, but at least one. An earlier request
    had the first `shared_tokens` of the prompt too. `adapter` is the LoRA adapter that it named.
    `conversation` and `turn` are null without conversations.
    """

    request_id: str
    wave: int
    prompt_tokens: int
    completion_tokens: int
    form: PromptForm = "ids"
    may_stop_early: bool = False
    shared_tokens: int = 0
    adapter: str | None = None
    conversation: int | None = None
    turn: int | None = None


class _ResponseError(Exception):
    """The response is a failure. What was parsed before is kept."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(kind, detail)
        self.failure = Failure(kind, detail)


class _Event(NamedTuple):
    """The name and the data of one event, and the arrival of the read that completed it."""

    arrival_ns: int
    name: bytes
    data: bytes


class _Chunk(NamedTuple):
    """One chunk with a choice: its arrival, its text, and the server's count of tokens so far."""

    arrival_ns: int
    text: _Text
    finished: bool
    tokens_so_far: int | None

    @property
    def has_text(self) -> bool:
        return bool(self.text)


class _Arrivals(NamedTuple):
    """The chunks with tokens, and the tokens of each: None without any usage."""

    chunks: list[_Chunk]
    tokens: list[int] | None
    estimated: bool | None


class _Answer(NamedTuple):
    """Where the answer starts, and the tokens of the reasoning before it."""

    first_ns: int | None = None
    reasoning_tokens: int | None = None
    estimated: bool | None = None


@dataclass
class _Response:
    """What has been parsed of one response so far."""

    chunks: list[_Chunk] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    draft_tokens: int | None = None
    accepted_draft_tokens: int | None = None
    done: bool = False
    finished: bool = False
    """Whether a chunk had a finish_reason."""
    broken_off: str | None = None
    """A finish_reason that says that the server gave up."""
    skipped: list[bytes] = field(default_factory=list)
    """The data of the events that are no chunks."""
    kept: list[dict[str, Any]] | None = None
    """All chunks, if they are wanted."""


class ParsedExchange(NamedTuple):
    """The row of `columns.REQUESTS` of one exchange, and how many events were no chunks."""

    row: dict[str, Any]
    events_skipped: int


def parse_exchange(exchange: Exchange, spec: RequestSpec, key: str | None = None) -> ParsedExchange:
    """Parse one exchange.

    A failed exchange keeps what arrived before the failure. `error` says why it failed, without the
    API `key`.
    """
    response = _Response()
    failure = exchange.failure
    try:
        _parse_response(exchange, response, chat=spec.form == "messages")
    except _ResponseError as error:
        failure = failure or error.failure
    arrivals = _token_arrivals(response)
    token_ns = [chunk.arrival_ns for chunk in arrivals.chunks]
    answer = _find_answer(response, arrivals, chat=spec.form == "messages")
    failure = failure or _check_response(response, spec)
    row = {
        "request_id": spec.request_id,
        "user": exchange.user,
        "wave": spec.wave,
        "scheduled_ns": exchange.scheduled_ns,
        "sent_ns": exchange.sent_ns,
        "first_token_ns": token_ns[0] if token_ns else None,
        "token_ns": token_ns,
        "chunk_tokens": arrivals.tokens,
        "chunk_tokens_estimated": arrivals.estimated,
        "done_ns": exchange.done_ns,
        "status": None if exchange.head is None else exchange.head.status,
        "error": None if failure is None else _describe_failure(failure, key),
        "prompt_tokens": response.prompt_tokens,
        "completion_tokens": response.completion_tokens,
        "requested_tokens": spec.completion_tokens,
        "sent_tokens": spec.prompt_tokens,
        "shared_tokens": spec.shared_tokens,
        "cached_tokens": response.cached_tokens,
        "first_output_token_ns": answer.first_ns,
        "reasoning_tokens": answer.reasoning_tokens,
        "reasoning_tokens_estimated": answer.estimated,
        "draft_tokens": response.draft_tokens,
        "accepted_draft_tokens": response.accepted_draft_tokens,
        "adapter": spec.adapter,
        "conversation": spec.conversation,
        "turn": spec.turn,
    }
    return ParsedExchange(row, len(response.skipped))


def parse_answer(raw: bytes, chat: bool) -> Answer | None:
    """The answer in the bytes of a response; None if it is a failure, or has no tokens or usage.

    In a chat it is the content without the reasoning: chat clients do not send that back.
    """
    response = _Response(kept=[])
    try:
        exchange = Exchange(0, None, None, None, 0, [0], [len(raw)], raw, parse_head(raw), None)
        _parse_response(exchange, response, chat)
    except (_ResponseError, HttpSyntaxError):
        return None
    counts = response.prompt_tokens, response.completion_tokens
    if not response.finished or counts[0] is None or not counts[1]:
        return None
    texts, ids = [], list[int]()
    for chunk in response.kept or ():
        for choice in (chunk.get("choices") or ())[:1]:
            texts.append((choice.get("delta") or {}).get("content") if chat else choice.get("text"))
            ids += choice.get("token_ids") or ()
    text = "".join(text for text in texts if isinstance(text, str))
    if chat:
        text = text.rpartition("</think>")[2]
    has_all = len(ids) == counts[1] and all(type(each) is int for each in ids)
    return Answer(text, ids if has_all else None, counts[0], counts[1])


def _describe_failure(failure: Failure, key: str | None) -> str:
    return str(Failure(failure.kind, _shorten(failure.detail, key)))


def _check_response(response: _Response, spec: RequestSpec) -> Failure | None:
    """The failure of a response that arrived completely, or None."""
    if not response.done and not response.finished:
        detail = "the stream ended without finish_reason and [DONE]"
        if response.skipped:
            detail += f"; an event that is no chunk: {_decode(response.skipped[-1])}"
        return Failure("truncated", detail)
    if response.completion_tokens is None or response.prompt_tokens is None:
        return Failure("usage_missing", "the stream has no usage, although it was requested")
    if response.completion_tokens and not response.chunks:
        return Failure(
            "malformed", f"usage reports {response.completion_tokens} tokens, but none arrived"
        )
    added = response.prompt_tokens - spec.prompt_tokens
    if added < 0 or (added and spec.form == "ids"):
        detail = f"{response.prompt_tokens} counted by the server, {spec.prompt_tokens} sent"
        return Failure("wrong_prompt_tokens", detail)
    if response.completion_tokens != spec.completion_tokens:
        detail = f"{response.completion_tokens} generated, {spec.completion_tokens} requested"
        stopped = 0 < response.completion_tokens < spec.completion_tokens
        if response.broken_off is not None:
            detail += f" (finish_reason {response.broken_off})"
        elif spec.may_stop_early and stopped:
            return None
        return Failure("wrong_completion_tokens", detail)
    return None


def _parse_response(exchange: Exchange, response: _Response, chat: bool) -> None:
    """Parse the exchange into `response`, event by event. Raises _ResponseError."""
    head = exchange.head
    if head is None:
        return
    if head.status != HTTPStatus.OK:
        if (location := head.header(b"location")) is not None and 300 <= head.status < 400:
            target = redirect_target("", location.decode("latin-1"))
            raise _ResponseError("http_status", f"{head.status} redirects to {target}")
        raise _ResponseError("http_status", f"{head.status} {_error_message(exchange)}")
    media_type = (head.header(b"content-type") or b"").split(b";")[0].strip().lower()
    if media_type != b"text/event-stream":
        shown = media_type.decode("latin-1") or "no content type"
        raise _ResponseError("malformed", f"the response is not an event stream, but {shown}")
    coding = (head.header(b"content-encoding") or b"identity").decode("latin-1").lower()
    if coding != "identity":
        raise _ResponseError(
            "malformed", f"the stream is encoded as {coding}, which was not requested"
        )
    for event in _events(exchange):
        if event.data.strip() == _DONE:
            response.done = True
        elif (chunk := _parse_chunk(event)) is None:
            response.skipped.append(event.data)
        else:
            _add_chunk(response, event.arrival_ns, chunk, chat)
            if response.kept is not None:
                response.kept.append(chunk)


def _error_message(exchange: Exchange) -> str:
    """The message of an error response, as far as it arrived."""
    try:
        body = b"".join(exchange.raw[start:end] for start, end in exchange.body_spans())
    except HttpSyntaxError:
        body = b""
    return _find_error_text(body)


def parse_error_body(body: bytes, key: str | None) -> str:
    """The message in the body of an HTTP error: one line, printable, shortened.

    Some servers quote the API key that they refuse, so `key` is taken out.
    """
    return _shorten(_find_error_text(body), key)


def redirect_target(url: str, location: str) -> str:
    """The target of a redirect from `url`: printable, without query and user, which may be secret.

    >>> redirect_target("http://host/v1", "https://me@host/v1?query=x")
    'https://host/v1'
    """
    try:
        parts = urlsplit(urljoin(url, location))
        host = parts.netloc.rpartition("@")[2]
        target = urlunsplit((parts.scheme, host, parts.path, "", ""))
    except ValueError:
        target = ""
    return _shorten(target, None) or "an unknown target"


def _find_error_text(body: bytes) -> str:
    """The message in full: only who removes the API key may shorten it."""
    try:
        return _find_message(json.loads(body))
    except (ValueError, RecursionError):
        return _decode(body)


def _find_message(data: Any) -> str:
    """The message of an error object in one of the usual forms, else all of it as JSON."""
    inner = data.get("error", data) if isinstance(data, dict) else data
    # `detail` is FastAPI's form, which `transformers serve` uses.
    message = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
    return message if isinstance(message, str) else json.dumps(data)


def _events(exchange: Exchange) -> Iterator[_Event]:
    """The events that have data.

    As in the standard, an event that no blank line ends is none. Only the final marker may lack it.
    Raises _ResponseError at a damaged chunk of the transfer coding.
    """
    starts: list[int] = []
    lengths: list[int] = []
    body = bytearray()
    damage: HttpSyntaxError | None = None
    try:
        for start, end in exchange.body_spans():
            starts.append(start)
            body += exchange.raw[start:end]
            lengths.append(len(body))
    except HttpSyntaxError as error:
        damage = error
    arrival_ns, received = exchange.arrival_ns, exchange.received
    event_start = len(_BOM) if body.startswith(_BOM) else 0
    piece = read = 0
    for match in _EVENT_END.finditer(body, event_start):
        length = match.end()
        while lengths[piece] < length:
            piece += 1
        raw_length = starts[piece] + length - (lengths[piece - 1] if piece else 0)
        while received[read] < raw_length:
            read += 1
        named = _parse_event(bytes(body[event_start : match.start()]))
        event_start = length
        if named is not None:
            yield _Event(arrival_ns[read], *named)
    if damage is not None:
        raise _ResponseError("malformed", f"not an HTTP response: {damage}")
    named = _parse_event(bytes(body[event_start:]))
    if named is not None and named[1].strip() == _DONE:
        yield _Event(arrival_ns[-1], *named)


def _parse_event(event: bytes) -> tuple[bytes, bytes] | None:
    """The name and the data of an event; None if it has no data, for example only a comment."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return b"", event[6:]
    name, data = b"", []
    for line in _LINE_END.split(event):
        field_name, _, value = line.partition(b":")
        if field_name == b"data":
            data.append(value.removeprefix(b" "))
        elif field_name == b"event":
            name = value.removeprefix(b" ")
    return (name, b"\n".join(data)) if data else None


def _parse_chunk(event: _Event) -> dict[str, Any] | None:
    """The completion chunk of an event, or None if it is something else, for example a ping.

    Raises _ResponseError if the event is an error, or JSON that is cut off or damaged: it could be
    a chunk.
    """
    data = event.data.strip()
    if event.name == b"error":
        raise _ResponseError("mid_stream_error", _find_error_text(data))
    if not data.startswith((b"{", b"[")):
        return None
    try:
        parsed = json.loads(data.decode(errors="replace"))
    except (ValueError, RecursionError):
        raise _ResponseError("malformed", f"an event is not JSON: {_decode(data)}") from None
    if not isinstance(parsed, dict):
        return None
    if parsed.get("error") or parsed.get("object") == "error":
        raise _ResponseError("mid_stream_error", _find_message(parsed))
    is_chunk = parsed.get("choices") is not None or parsed.get("usage") is not None
    return parsed if is_chunk else None


def _decode(data: bytes) -> str:
    return data.decode(errors="replace")


def _shorten(text: str, key: str | None) -> str:
    """One line of printable characters, without the API key, then shortened.

    In this order: a part of a key would not be found.
    """
    line = printable(" ".join(text[:_READ].split()))
    if key:
        for form in (key, json.dumps(key)[1:-1]):
            line = line.replace(form, "…")
    return line[:_SHOWN]


def _add_chunk(response: _Response, arrival_ns: int, chunk: dict[str, Any], chat: bool) -> None:
    """Add one chunk to the response. Raises _ResponseError if it does not follow the API."""
    try:
        so_far = None
        if (usage := chunk.get("usage")) is not None:
            so_far = _add_usage(response, usage)
        _add_drafts(response, chunk.get("timings"))
        if choices := chunk.get("choices"):
            choice = choices[0]
            # TGI's completions have an empty reason until the last chunk.
            reason = choice.get("finish_reason") or None
            finished = reason is not None
            if reason in _BROKEN_OFF:
                response.broken_off = reason
            text = _text_of(choice, chat)
            # The first chunk of a chat only names the role and carries no token. Some gateways
            # send the usage after the last chunk, with an empty choice.
            is_opening = chat and not (response.chunks or text or finished or so_far)
            is_closing = response.finished and not text
            if not is_opening and not is_closing:
                response.chunks.append(_Chunk(arrival_ns, text, finished, so_far))
            response.finished = response.finished or finished
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        shown = json.dumps(chunk)
        raise _ResponseError("malformed", f"an event is not a completion chunk: {shown}") from None


def _add_usage(response: _Response, usage: dict[str, Any]) -> int | None:
    """Add a usage to the response; returns its output tokens. Raises ValueError if it is wrong."""
    prompt = _parse_count(usage.get("prompt_tokens"))
    tokens = _parse_count(usage.get("completion_tokens"))
    details = usage.get("completion_tokens_details")
    # SGLang has the count beside the others.
    place = details if isinstance(details, dict) else usage
    reasoning = _parse_count(place.get("reasoning_tokens"))
    # xAI counts the reasoning beside the completion tokens; its total has both.
    if reasoning and prompt is not None and tokens is not None:
        is_beside = usage.get("total_tokens") == prompt + tokens + reasoning
        tokens += reasoning if is_beside else 0
    response.prompt_tokens = _latest(prompt, response.prompt_tokens)
    response.completion_tokens = _latest(tokens, response.completion_tokens)
    response.reasoning_tokens = _latest(reasoning, response.reasoning_tokens)
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        cached = _parse_count(details.get("cached_tokens"))
        response.cached_tokens = _latest(cached, response.cached_tokens)
    return tokens


def _add_drafts(response: _Response, timings: Any) -> None:
    """Add llama.cpp's timings, which count the tokens of its speculative decoding.

    Raises ValueError if one is no count.
    """
    if isinstance(timings, dict):
        drafted, accepted = timings.get("draft_n"), timings.get("draft_n_accepted")
        response.draft_tokens = _latest(drafted, response.draft_tokens)
        response.accepted_draft_tokens = _latest(accepted, response.accepted_draft_tokens)


def _text_of(choice: dict[str, Any], chat: bool) -> _Text:
    """What the text of a choice belongs to; in a chat with both, to the answer, which starts there.

    Text and delta may be missing or null. Raises ValueError if the choice is of the other API, and
    TypeError or AttributeError if a value has another type.
    """
    own, other = ("delta", "text") if chat else ("text", "delta")
    content = choice.get(own)
    if content is None:
        if choice.get(other) is not None:
            raise ValueError
        return ""
    if chat:
        if any(content.get(key) for key in _ANSWER_KEYS):
            return "answer"
        return "reasoning" if any(content.get(key) for key in _REASONING_KEYS) else ""
    if not isinstance(content, str):
        raise TypeError
    return "answer" if content else ""


def _latest(value: Any, before: int | None) -> int | None:
    count = _parse_count(value)
    return before if count is None else count


def _parse_count(value: Any) -> int | None:
    """A count of tokens; None if the usage lacks it. Raises ValueError if it is no count."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
        raise ValueError
    return int(value)


def _token_arrivals(response: _Response) -> _Arrivals:
    """The chunks with tokens, and whether their tokens are estimated.

    Without any usage the tokens are None, and the chunks are those with text.
    """
    with_text = [chunk for chunk in response.chunks if chunk.has_text]
    total = response.completion_tokens
    if total is None:
        return _Arrivals(with_text, None, None)
    chunks, counts = response.chunks, _tokens_per_chunk(response.chunks, total)
    estimated = counts is None
    if counts is None:
        chunks = _chunks_with_tokens(response.chunks, with_text, total)
        counts = split_tokens(total, len(chunks))
    tokens = [pair for pair in zip(chunks, counts, strict=True) if pair[1]]
    return _Arrivals([chunk for chunk, _ in tokens], [count for _, count in tokens], estimated)


def _find_answer(response: _Response, arrivals: _Arrivals, chat: bool) -> _Answer:
    """The first token of the answer and the tokens of the reasoning, as far as they are known.

    A chunk without text belongs to what came before it; at the start, to the reasoning if there is
    one. If the server reports 0 reasoning tokens and sends such a text, it does not count them, as
    vLLM with some parsers: then the tokens of these chunks are an estimate. Completions have one
    text for both.
    """
    if not chat:
        return _Answer()
    has_reasoning = any(chunk.text == "reasoning" for chunk in response.chunks)
    part: _Text = "reasoning" if has_reasoning else "answer"
    first_ns, in_chunks = None, 0
    for chunk, tokens in zip(
        arrivals.chunks, arrivals.tokens or [0] * len(arrivals.chunks), strict=True
    ):
        part = chunk.text or part
        if part == "answer" and first_ns is None:
            first_ns = chunk.arrival_ns
        in_chunks += tokens * (part == "reasoning")
    if response.reasoning_tokens or not has_reasoning:
        reported = response.reasoning_tokens
        return _Answer(first_ns, reported, None if reported is None else False)
    return _Answer(first_ns) if arrivals.tokens is None else _Answer(first_ns, in_chunks, True)


def _tokens_per_chunk(chunks: list[_Chunk], total: int) -> list[int] | None:
    """The tokens of each chunk from the server's running count; None without a usable count."""
    counts, before = [], 0
    for chunk in chunks:
        if chunk.tokens_so_far is None or chunk.tokens_so_far < before:
            return None
        if chunk.has_text and not chunk.tokens_so_far:
            return None
        counts.append(chunk.tokens_so_far - before)
        before = chunk.tokens_so_far
    return counts if before == total else None


def _chunks_with_tokens(chunks: list[_Chunk], with_text: list[_Chunk], total: int) -> list[_Chunk]:
    """The chunks that can have carried `total` tokens.

    A token may have no text, for example half of a character. So chunks without text count if
    there are more tokens than texts. The empty last chunk counts only if there is no other.
    """
    if len(with_text) >= total:
        return with_text
    return [chunk for chunk in chunks if chunk.has_text or not chunk.finished] or chunks
