"""HTTP/1.1 as bytes: requests rendered before the clock starts, and where responses end.

Requests are written by h11. Responses are read here, because a load must see the end of a
response at the cost of looking at its last four bytes, and needs the places of the chunks
afterwards. Sources: RFC 9112, sections 4 (status line), 6 (body length) and 7.1 (chunks).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import h11
import httpx

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
_BLANK = b"\r\n\r\n"
_SHOWN = 60

Span = tuple[int, int]
"""Start and end of a piece of the body within the response's bytes."""


class WireError(Exception):
    """The bytes are not an HTTP/1.1 response."""


def render(request: httpx.Request) -> bytes:
    """The bytes of a request, whole and ready to send. Raises WireError where it is no HTTP."""
    connection = h11.Connection(h11.CLIENT)
    body = request.read()
    try:
        head = h11.Request(
            method=request.method,
            target=request.url.raw_path,
            headers=request.headers.raw,
        )
        parts = [head, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        return b"".join(connection.send(part) or b"" for part in parts)
    except h11.LocalProtocolError as error:
        raise WireError(f"{request.method} {request.url}: {error}") from error


@dataclass(frozen=True)
class Head:
    """Status and headers of a final (not 1xx) response; its body begins at `body_start`."""

    status: int
    minor_version: int
    headers: tuple[tuple[bytes, bytes], ...]
    body_start: int

    def header(self, name: bytes) -> bytes | None:
        """The value of the header of that lower-case name; several are joined by commas."""
        values = [value for key, value in self.headers if key == name]
        return b", ".join(values) if values else None

    @property
    def chunked(self) -> bool:
        codings = self.header(b"transfer-encoding")
        return codings is not None and codings.lower().split(b",")[-1].strip() == b"chunked"

    @property
    def keep_alive(self) -> bool:
        tokens = {each.strip().lower() for each in (self.header(b"connection") or b"").split(b",")}
        return b"close" not in tokens and (self.minor_version == 1 or b"keep-alive" in tokens)

    @property
    def length(self) -> int | None:
        """Content-Length, None where there is none. Raises WireError where it is no number."""
        told = self.header(b"content-length")
        if told is None:
            return None
        if not told.isdigit():
            raise WireError(f"Content-Length is {told[:_SHOWN]!r}")
        return int(told)


def head_of(raw: bytes | bytearray) -> Head | None:
    """The head of a response, None while it is incomplete. Raises WireError where it is none."""
    start = 0
    while (end := raw.find(_BLANK, start)) >= 0:
        status_line, *lines = bytes(raw[start:end]).split(b"\r\n")
        match = _STATUS_LINE.fullmatch(status_line)
        if match is None:
            raise WireError(f"it begins with {status_line[:_SHOWN]!r}")
        if not match[2].startswith(b"1"):
            headers = tuple(_header(line) for line in lines)
            return Head(int(match[2]), int(match[1]), headers, end + len(_BLANK))
        start = end + len(_BLANK)
    return None


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, colon, value = line.partition(b":")
    if not colon or not name or name != name.strip():
        raise WireError(f"a header line is {line[:_SHOWN]!r}")
    return name.lower(), value.strip()


class Framing:
    """Sees the end of one response while its bytes come in.

    Cheap as long as it streams: the chunks are only walked, each once, when the bytes end as a
    response can end.
    """

    __slots__ = ("_chunk_at", "_length", "_method", "end", "head")

    def __init__(self, method: str) -> None:
        self._method = method
        self._chunk_at = 0
        self._length: int | None = None
        self.head: Head | None = None
        self.end: int | None = None
        """Where the response ends, once that is known."""

    def ended(self, buffer: bytearray) -> bool:
        """Whether `buffer`, all bytes so far, holds the whole response. Raises WireError."""
        if self._chunk_at:
            return buffer.endswith(_BLANK) and self._walk(buffer)
        if self.head is None:
            self.head = head_of(buffer)
            if self.head is None:
                return False
            if self._method == "HEAD" or self.head.status in (204, 304):
                self._length = 0
            elif self.head.chunked:
                self._chunk_at = self.head.body_start
                return self._walk(buffer)
            else:
                self._length = self.head.length
        if self._length is None:
            return False
        self.end = self.head.body_start + self._length
        return len(buffer) >= self.end

    def ended_by_close(self, buffer: bytearray) -> bool:
        """Whether the response is whole, now that the server has closed. Raises WireError."""
        if self.ended(buffer):
            return True
        if self._chunk_at:
            return self._walk(buffer)
        if self.head is None or self._length is not None:
            return False
        self.end = len(buffer)
        return True

    def reusable(self, buffer: bytearray) -> bool:
        """Whether the connection can carry another request after this response."""
        return self.head is not None and self.head.keep_alive and self.end == len(buffer)

    def _walk(self, buffer: bytearray) -> bool:
        while (match := _chunk_line(buffer, self._chunk_at)) is not None:
            size = int(match[1], 16)
            if size == 0:
                blank = buffer.find(_BLANK, match.end() - 2)
                self.end = None if blank < 0 else blank + len(_BLANK)
                return blank >= 0
            following = match.end() + size + 2
            if following > len(buffer):
                return False
            if buffer[following - 2 : following] != b"\r\n":
                raise WireError(f"the chunk at byte {self._chunk_at} is longer than its size")
            self._chunk_at = following
        return False


def _chunk_line(raw: bytes | bytearray, start: int) -> re.Match[bytes] | None:
    match = _CHUNK_LINE.match(raw, start)
    if match is None and raw.find(b"\r\n", start) >= 0:
        raise WireError(f"a chunk size is {bytes(raw[start : start + _SHOWN])!r}")
    return match


def body_spans(raw: bytes, head: Head) -> Iterator[Span]:
    """The pieces of the body in the bytes of one response, in order, as far as they came.

    Raises WireError at a damaged chunk.
    """
    if not head.chunked:
        yield head.body_start, len(raw)
        return
    at = head.body_start
    while (match := _chunk_line(raw, at)) is not None:
        size = int(match[1], 16)
        if size == 0:
            return
        at = match.end() + size + 2
        yield match.end(), min(match.end() + size, len(raw))
