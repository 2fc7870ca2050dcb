"""HTTP/1.1 as bytes: serializes requests before the measurement, and finds the end of responses.

h11 writes the requests. Responses are read here, because the client must detect the end of a
response by looking at its last four bytes only, and needs the positions of the chunks afterwards.
Sources: RFC 9112, sections 4 (status line), 6 (body length) and 7.1 (chunks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import h11
import httpx

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_BLANK = b"\r\n\r\n"
_SHOWN = 60
_LENGTH_DIGITS = 15
_HEAD_BYTES = 2**16
"""Allowed size of a head, with the interim (1xx) responses before it."""

Span = tuple[int, int]
"""Start and end of a piece of the body within the bytes of the response."""


class HttpSyntaxError(Exception):
    """The bytes are not HTTP/1.1."""


def serialize_request(
    request: httpx.Request, proxy_headers: Mapping[str, str] | None = None
) -> bytes:
    """The complete request as bytes. Raises HttpSyntaxError if it is not valid HTTP.

    With `proxy_headers`, it is for an HTTP proxy, which needs the whole URL (RFC 9112, 3.2.2).
    """
    connection = h11.Connection(h11.CLIENT)
    body = request.read()
    try:
        head = h11.Request(
            method=request.method,
            target=request.url.raw_path if proxy_headers is None else str(request.url),
            headers=[
                *request.headers.raw,
                *((name.encode(), value.encode()) for name, value in (proxy_headers or {}).items()),
            ],
        )
        parts = [head, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        return b"".join(connection.send(part) or b"" for part in parts)
    except h11.LocalProtocolError as error:
        raise HttpSyntaxError(f"{request.method} {request.url}: {error}") from error


@dataclass(frozen=True)
class ResponseHead:
    """Status and headers of a final (not 1xx) response. Its body starts at `body_start`."""

    status: int
    minor_version: int
    headers: tuple[tuple[bytes, bytes], ...]
    body_start: int

    def header(self, name: bytes) -> bytes | None:
        """The value of the header with this lower-case name; commas join repeated headers."""
        values = [value for key, value in self.headers if key == name]
        return b", ".join(values) if values else None

    @property
    def chunked(self) -> bool:
        codings = self.header(b"transfer-encoding")
        return codings is not None and codings.lower().split(b",")[-1].strip() == b"chunked"

    @property
    def keep_alive(self) -> bool:
        options = (self.header(b"connection") or b"").split(b",")
        tokens = {option.strip().lower() for option in options}
        return b"close" not in tokens and (self.minor_version == 1 or b"keep-alive" in tokens)

    @property
    def length(self) -> int | None:
        """Content-Length, or None if it is missing. Raises HttpSyntaxError if not a number."""
        value = self.header(b"content-length")
        if value is None:
            return None
        if not value.isdigit() or len(value) > _LENGTH_DIGITS:
            raise HttpSyntaxError(f"Content-Length is {value[:_SHOWN]!r}")
        return int(value)


def parse_head(raw: bytes | bytearray) -> ResponseHead | None:
    """The head of a response, or None while it is incomplete. Raises HttpSyntaxError."""
    start = 0
    while (end := raw.find(_BLANK, start)) >= 0:
        status_line, *lines = bytes(raw[start:end]).split(b"\r\n")
        match = _STATUS_LINE.fullmatch(status_line)
        if match is None:
            raise HttpSyntaxError(f"it begins with {status_line[:_SHOWN]!r}")
        if not match[2].startswith(b"1"):
            headers = tuple(_parse_header(line) for line in lines)
            return ResponseHead(int(match[2]), int(match[1]), headers, end + len(_BLANK))
        start = end + len(_BLANK)
    return None


def _parse_header(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon or not name or name != name.strip():
        raise HttpSyntaxError(f"a header line is {line[:_SHOWN]!r}")
    return name.lower(), value.strip()


class Framing:
    """Detects the end of one response while its bytes arrive.

    This is cheap during streaming: the chunks are walked, each once, only when the last bytes
    look like the end of a response.
    """

    __slots__ = ("_chunk_at", "_length", "_method", "end", "head")

    def __init__(self, method: str) -> None:
        self._method = method
        self._chunk_at = 0
        self._length: int | None = None
        self.head: ResponseHead | None = None
        self.end: int | None = None
        """Where the response ends, once that is known."""

    def is_complete(self, buffer: bytearray) -> bool:
        """Whether `buffer`, all bytes so far, holds the full response. Raises HttpSyntaxError."""
        if self._chunk_at:
            return buffer.endswith(_BLANK) and self._walk_chunks(buffer)
        if self.head is None:
            self.head = parse_head(buffer)
            if self.head is None:
                if len(buffer) > _HEAD_BYTES:
                    raise HttpSyntaxError(f"its head is larger than {_HEAD_BYTES:,} bytes")
                return False
            if self._method == "HEAD" or self.head.status in (204, 304):
                self._length = 0
            elif self.head.chunked:
                self._chunk_at = self.head.body_start
                return self._walk_chunks(buffer)
            else:
                self._length = self.head.length
        if self._length is None:
            return False
        self.end = self.head.body_start + self._length
        return len(buffer) >= self.end

    def is_complete_at_close(self, buffer: bytearray) -> bool:
        """Whether the response is complete if the server closes now. Raises HttpSyntaxError."""
        if self.is_complete(buffer):
            return True
        if self._chunk_at:
            return self._walk_chunks(buffer)
        if self.head is None or self._length is not None:
            return False
        self.end = len(buffer)
        return True

    def keep_alive(self, buffer: bytearray) -> bool:
        """Whether the connection can carry another request after this response."""
        return self.head is not None and self.head.keep_alive and self.end == len(buffer)

    def _walk_chunks(self, buffer: bytearray) -> bool:
        while (match := _match_chunk_line(buffer, self._chunk_at)) is not None:
            size = int(match[1], 16)
            if size == 0:
                blank = buffer.find(_BLANK, match.end() - 2)
                self.end = None if blank < 0 else blank + len(_BLANK)
                return blank >= 0
            following = match.end() + size + 2
            if following > len(buffer):
                return False
            if buffer[following - 2 : following] != b"\r\n":
                raise HttpSyntaxError(f"the chunk at byte {self._chunk_at} is longer than its size")
            self._chunk_at = following
        return False


def _match_chunk_line(raw: bytes | bytearray, start: int) -> re.Match[bytes] | None:
    match = _CHUNK_LINE.match(raw, start)
    if match is None and raw.find(b"\r\n", start) >= 0:
        raise HttpSyntaxError(f"a chunk size is {bytes(raw[start : start + _SHOWN])!r}")
    return match


def body_spans(raw: bytes, head: ResponseHead) -> Iterator[Span]:
    """The positions of the body's pieces in the bytes of one response, in order.

    The last piece of an incomplete response may be cut short. Raises HttpSyntaxError at a damaged
    chunk.
    """
    if not head.chunked:
        yield head.body_start, len(raw)
        return
    at = head.body_start
    while (match := _match_chunk_line(raw, at)) is not None:
        size = int(match[1], 16)
        if size == 0:
            return
        at = match.end() + size + 2
        yield match.end(), min(match.end() + size, len(raw))
