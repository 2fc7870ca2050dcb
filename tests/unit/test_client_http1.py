"""HTTP/1.1 as bytes, compared with h11, with reads that end at every possible byte."""

from __future__ import annotations

import h11
import httpx
import pytest

from servegrid.client.http1 import (
    Framing,
    HttpSyntaxError,
    body_spans,
    parse_head,
    serialize_request,
)

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
RESPONSES = {
    "chunked": CHUNKED + b"6\r\nabc\n\nd\r\n1A\r\n" + b"z" * 26 + b"\r\n0\r\n\r\n",
    "chunk extensions and trailers": CHUNKED
    + b"3;name=value\r\nabc\r\n0;last\r\nX-Checksum: 1\r\nX-More: 2\r\n\r\n",
    "data that looks like the end": CHUNKED + b"7\r\n\r\n0\r\n\r\n\r\n5\r\n0\r\n\r\n\r\n0\r\n\r\n",
    "empty": CHUNKED + b"0\r\n\r\n",
    "length": HEAD + b"Content-Length: 9\r\n\r\nab\r\n\r\ncde",
    "length 0": HEAD + b"content-length:0\r\n\r\n",
    "after an interim response": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    + HEAD
    + b"Content-Length: 2\r\n\r\nok",
}


def parse_with_h11(response: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(response)
    body, head = b"", None
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        assert event is not h11.NEED_DATA
    assert head is not None
    return head.status_code, list(head.headers), body


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES.keys())
def test_head_and_body_agree_with_h11(response: bytes) -> None:
    head = parse_head(response)
    assert head is not None
    body = b"".join(response[start:end] for start, end in body_spans(response, head))
    assert (head.status, list(head.headers), body) == parse_with_h11(response)


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES.keys())
def test_the_last_byte_completes_the_response_however_it_is_split(response: bytes) -> None:
    for first in range(1, len(response)):
        for second in range(first, len(response)):
            framing, buffer = Framing("POST"), bytearray()
            for read in (response[:first], response[first:second], response[second:]):
                assert not framing.is_complete(buffer)
                buffer += read
            assert framing.is_complete(buffer)
            assert framing.end == len(response)
            assert framing.keep_alive(buffer)


def test_the_last_byte_completes_the_response_read_byte_by_byte() -> None:
    for response in RESPONSES.values():
        framing, buffer = Framing("POST"), bytearray()
        ends = []
        for byte in response:
            buffer.append(byte)
            ends.append(framing.is_complete(buffer))
        assert ends == [False] * (len(response) - 1) + [True]


def test_without_a_length_the_close_ends_the_response() -> None:
    buffer = bytearray(HEAD + b"\r\nabc")
    framing = Framing("POST")
    assert not framing.is_complete(buffer)
    assert framing.is_complete_at_close(buffer)
    assert framing.end == len(buffer)


@pytest.mark.parametrize("response", [RESPONSES["chunked"], RESPONSES["length"]])
def test_a_close_before_the_end_leaves_the_response_incomplete(response: bytes) -> None:
    for length in range(len(response)):
        framing = Framing("POST")
        assert not framing.is_complete_at_close(bytearray(response[:length]))


def test_a_response_to_head_has_no_body() -> None:
    buffer = bytearray(HEAD + b"Content-Length: 9\r\n\r\n")
    assert Framing("HEAD").is_complete(buffer)
    assert not Framing("GET").is_complete(buffer)


@pytest.mark.parametrize(
    ("response", "reusable"),
    [
        (HEAD + b"Content-Length: 0\r\n\r\n", True),
        (HEAD + b"Content-Length: 0\r\nConnection: Close\r\n\r\n", False),
        (HEAD + b"Content-Length: 0\r\n\r\nand more", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
def test_a_connection_is_reused_only_if_the_response_allows_it(
    response: bytes, reusable: bool
) -> None:
    framing, buffer = Framing("POST"), bytearray(response)
    assert framing.is_complete(buffer)
    assert framing.keep_alive(buffer) is reusable


@pytest.mark.parametrize(
    ("response", "named"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "SSH-2.0"),
        (b"HTTP/2 200 OK\r\n\r\n", "HTTP/2"),
        (HEAD + b"no colon\r\n\r\n", "no colon"),
        (HEAD + b" folded: 1\r\n\r\n", "folded"),
        (HEAD + b"Content-Length: -1\r\n\r\n", "Content-Length"),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", "Content-Length"),
        (CHUNKED + b"zz\r\n\r\n", "zz"),
        (CHUNKED + b"-1\r\n\r\n", "-1"),
        (CHUNKED + b"1_0\r\n\r\n", "1_0"),
        (CHUNKED + b"2\r\nabc\r\n0\r\n\r\n", "longer than its size"),
    ],
)
def test_a_damaged_response_is_an_error_that_names_the_damage(response: bytes, named: str) -> None:
    with pytest.raises(HttpSyntaxError, match=named):
        Framing("POST").is_complete(bytearray(response))


def test_the_body_of_an_incomplete_response_is_what_has_arrived() -> None:
    raw = CHUNKED + b"3\r\nabc\r\n5\r\nde"
    head = parse_head(raw)
    assert head is not None
    assert [raw[start:end] for start, end in body_spans(raw, head)] == [b"abc", b"de"]


def test_h11_parses_a_serialized_request_unchanged() -> None:
    client = httpx.Client(base_url="http://host:8000/api", headers={"Authorization": "Bearer k"})
    request = client.build_request("POST", "/v1/completions?x=1", json={"prompt": [1, 2]})
    client.close()
    server = h11.Connection(h11.SERVER)
    server.receive_data(serialize_request(request))
    head, data, end = server.next_event(), server.next_event(), server.next_event()
    assert isinstance(head, h11.Request) and isinstance(data, h11.Data)
    assert (head.method, head.target) == (b"POST", b"/api/v1/completions?x=1")
    headers = dict(head.headers)
    assert headers[b"host"] == b"host:8000" and headers[b"authorization"] == b"Bearer k"
    assert bytes(data.data) == b'{"prompt":[1,2]}'
    assert isinstance(end, h11.EndOfMessage)


def test_an_invalid_request_cannot_be_serialized() -> None:
    with pytest.raises(HttpSyntaxError, match="GET http://host/"):
        serialize_request(httpx.Request("GET", "http://host/", headers={"X": "a\nb"}))
