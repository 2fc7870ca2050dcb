"""From the bytes of a response to a row: tokens, their arrivals, and every kind of failure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest

from servegrid.client.failures import KINDS, Failure, Kind
from servegrid.client.http1 import head_of
from servegrid.client.parse import Asked, row_of
from servegrid.client.prompts import Form
from servegrid.client.transport import Exchange

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ASKED = Asked("cell/0", 2, prompt_tokens=7, completion_tokens=4)
Reads = Sequence[tuple[int, bytes]]


def row(reads: Reads, failure: Failure | None = None, asked: Asked = ASKED) -> dict[str, Any]:
    raw, ends = b"", []
    for _, data in reads:
        raw += data
        ends.append(len(raw))
    exchange = Exchange(
        number=0,
        user=3,
        scheduled_ns=90,
        sent_ns=95,
        done_ns=reads[-1][0] if reads else 99,
        arrivals=[arrival for arrival, _ in reads],
        ends=ends,
        raw=raw,
        head=head_of(raw),
        failure=failure,
        resent=False,
    )
    return row_of(exchange, asked)


def usage(completion: int, prompt: int = 7) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def chunk(text: str, tokens: int | None = None, finish: str | None = None) -> str:
    told: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    return json.dumps(told if tokens is None else told | {"usage": usage(tokens)})


def event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def http(*events: bytes) -> bytes:
    """The events as one HTTP chunk each."""
    return b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in events)


def stream(*data: str, end: bytes = b"0\r\n\r\n") -> Reads:
    """Each event in a read of its own, at 100, 200, …; the head with the first."""
    pieces = [http(event(each)) for each in data]
    pieces[0] = HEAD + pieces[0]
    pieces[-1] += end
    return [(100 * number, piece) for number, piece in enumerate(pieces, 1)]


FINAL = json.dumps({"choices": [], "usage": usage(4)})
CONTINUOUS = (
    chunk(" a", 1),
    chunk("", 2),
    chunk(" b", 4, "length"),
    FINAL,
    "[DONE]",
)


def tokens_of(row: dict[str, Any]) -> list[tuple[int, int]]:
    return list(zip(row["token_ns"], row["chunk_tokens"], strict=True))


def test_usage_per_chunk_gives_each_chunk_its_tokens_also_without_text() -> None:
    assert row(stream(*CONTINUOUS)) == {
        "request_id": "cell/0",
        "user": 3,
        "wave": 2,
        "scheduled_ns": 90,
        "sent_ns": 95,
        "first_token_ns": 100,
        "token_ns": [100, 200, 300],
        "chunk_tokens": [1, 1, 2],
        "chunk_tokens_estimated": False,
        "done_ns": 500,
        "status": 200,
        "error": None,
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "asked_tokens": 4,
    }


def test_a_chunk_without_new_tokens_is_not_counted_as_one() -> None:
    told = row(stream(chunk(" a", 1), chunk("", 1), chunk(" b", 4, "length"), "[DONE]"))
    assert tokens_of(told) == [(100, 1), (300, 3)]
    assert told["error"] is None


@pytest.mark.parametrize(
    ("texts", "tokens"),
    [
        # As many texts as tokens: the bare end of the stream carries none.
        ((" a", " b", " c", " d"), [(100, 1), (200, 1), (300, 1), (400, 1)]),
        # Fewer texts: chunks without text are tokens too.
        ((" a", "", "", " d"), [(100, 1), (200, 1), (300, 1), (400, 1)]),
        # Fewer chunks than tokens: shared out, the earlier never less than the later.
        ((" a", " b", " c"), [(100, 2), (200, 1), (300, 1)]),
        ((" a",), [(100, 4)]),
        # More chunks than tokens.
        (
            (" a", " b", " c", " d", " e", " f", " g", " h"),
            [(100, 1), (300, 1), (500, 1), (700, 1)],
        ),
        # Nothing but the end.
        ((), [(100, 4)]),
    ],
)
def test_the_final_usage_is_shared_out_over_the_chunks_and_marked(
    texts: tuple[str, ...], tokens: list[tuple[int, int]]
) -> None:
    told = row(stream(*map(chunk, texts), chunk("", finish="length"), FINAL, "[DONE]"))
    assert tokens_of(told) == tokens
    assert told["chunk_tokens_estimated"] is True
    assert told["error"] is None


def test_usage_that_is_told_but_not_counted_up_is_only_a_final_one() -> None:
    told = row(stream(chunk(" a", 0), chunk(" b", 0), chunk(" c", 4, "length"), FINAL, "[DONE]"))
    assert tokens_of(told) == [(100, 2), (200, 1), (300, 1)]
    assert told["chunk_tokens_estimated"] is True


def test_usage_that_falls_short_of_the_final_one_is_not_believed_per_chunk() -> None:
    told = row(stream(chunk(" a", 1), chunk(" b", 2, "length"), FINAL, "[DONE]"))
    assert tokens_of(told) == [(100, 2), (200, 2)]
    assert told["chunk_tokens_estimated"] is True


def test_several_events_in_one_read_have_its_arrival() -> None:
    body = HEAD + http(*map(event, CONTINUOUS)) + b"0\r\n\r\n"
    assert tokens_of(row([(100, body)])) == [(100, 1), (100, 1), (100, 2)]


def test_several_events_in_one_http_chunk_are_told_apart() -> None:
    body = HEAD + http(b"".join(map(event, CONTINUOUS))) + b"0\r\n\r\n"
    assert tokens_of(row([(100, body)])) == [(100, 1), (100, 1), (100, 2)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_an_event_arrives_with_the_read_that_completes_it(newline: bytes) -> None:
    """Split in two at every byte, by a table of where each event's last byte lies."""
    events = [event(data).replace(b"\n", newline) for data in CONTINUOUS]
    body = HEAD + http(*events) + b"0\r\n\r\n"
    last_bytes = [body.index(each) + len(each) for each in events]
    for split in range(1, len(body)):
        told = row([(100, body[:split]), (200, body[split:])])
        expected = [100 if last <= split else 200 for last in last_bytes[:3]]
        assert told["token_ns"] == expected
        assert told["chunk_tokens"] == [1, 1, 2]
        assert (told["error"], told["done_ns"]) == (None, 200)


def test_comments_other_fields_and_data_over_several_lines_are_read_as_the_standard_says() -> None:
    first, second, third, *_ = CONTINUOUS
    halves = second.replace('"choices"', '\ndata:"choices"')
    reads = [
        (100, HEAD + http(b": ping\n\n")),
        (200, http(event(f"{first}\nid: 1\nevent: x"))),
        (300, http(b": ping\nretry: 5\n" + event(halves))),
        (400, http(event(third), event("[DONE]")) + b"0\r\n\r\n"),
    ]
    told = row(reads)
    assert tokens_of(told) == [(200, 1), (300, 1), (400, 2)]
    assert told["error"] is None


def test_responses_without_chunked_coding_are_read_alike() -> None:
    events = b"".join(map(event, CONTINUOUS))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n"
    length = b"Content-Length: %d\r\n" % len(events)
    for framing in (b"", length):
        told = row([(100, head + framing + b"\r\n" + events)])
        assert tokens_of(told) == [(100, 1), (100, 1), (100, 2)]
        assert told["error"] is None


ERROR = json.dumps({"error": {"message": "out of\nmemory", "code": 500}})
PLAIN = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 38\r\n\r\n"


@pytest.mark.parametrize(
    ("reads", "error"),
    [
        (
            [(100, PLAIN + b'{"error": {"message": "slow \\n down"} }')],
            "http_status: 429 slow down",
        ),
        ([(100, b"HTTP/1.1 503 X\r\n\r\n<h1>busy</h1>")], "http_status: 503 <h1>busy</h1>"),
        ([(100, b"HTTP/1.1 204 X\r\n\r\n")], "http_status: 204"),
        (stream(CONTINUOUS[0], ERROR, "[DONE]"), "mid_stream_error: out of memory"),
        (
            stream(CONTINUOUS[0], '{"object": "error", "message": "old form"}', "[DONE]"),
            "mid_stream_error: old form",
        ),
        (stream(CONTINUOUS[0], '{"error": "plain"}'), "mid_stream_error: plain"),
        (stream(*CONTINUOUS[:2]), "truncated: the stream ended without finish_reason and [DONE]"),
        ([(100, HEAD + b"0\r\n\r\n")], "truncated: the stream ended without"),
        (stream(CONTINUOUS[0], '{"choices": ['), 'malformed: an event is no JSON: {"choices": ['),
        (stream(CONTINUOUS[0], "[1]"), "malformed: an event is no JSON object: [1]"),
        (stream('{"choices": [{"delta": {}}]}'), "malformed: an event is no completion chunk"),
        (stream('{"id": "x"}'), "malformed: an event is no completion chunk"),
        (
            stream('{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": "4"}}'),
            "malformed: an event is no completion chunk",
        ),
        (
            [(100, HEAD + http(event(CONTINUOUS[0])) + b"zz\r\n\r\n")],
            "malformed: not an HTTP response: a chunk size is",
        ),
        (
            [(100, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}")],
            "malformed: an event stream was asked for, application/json came",
        ),
        (
            [(100, HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"))],
            "malformed: the stream is encoded as gzip",
        ),
        (stream(FINAL, "[DONE]"), "malformed: 4 tokens counted, none came"),
        (stream(chunk(" a"), chunk("", finish="length"), "[DONE]"), "usage_missing: "),
        (
            stream(chunk(" a", 4, "stop").replace("7", "8"), "[DONE]"),
            "wrong_prompt_tokens: 8 counted by the server, 7 sent",
        ),
        (
            stream(chunk(" a", 3, "stop"), "[DONE]"),
            "wrong_completion_tokens: 3 generated, 4 asked",
        ),
        (stream(chunk(" a", 5, "stop"), "[DONE]"), "wrong_completion_tokens: 5 generated, 4 asked"),
    ],
)
def test_each_failure_has_its_kind_and_tells_what_happened(reads: Reads, error: str) -> None:
    told = row(reads)
    assert told["error"].startswith(error)
    assert "\n" not in told["error"]


CHAT = Asked("cell/0", 2, prompt_tokens=7, completion_tokens=4, form="messages")


def said(delta: dict[str, Any], tokens: int | None = None, finish: str | None = None) -> str:
    told: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return json.dumps(told if tokens is None else told | {"usage": usage(tokens)})


@pytest.mark.parametrize("opening", [{"role": "assistant", "content": None}, {"content": ""}])
@pytest.mark.parametrize("tokens", [(None,) * 4, (0, 1, 2, 4)])
def test_a_chat_is_read_by_its_deltas_of_which_the_first_has_no_token(
    opening: dict[str, Any], tokens: tuple[int | None, ...]
) -> None:
    texts = [{"reasoning_content": "a"}, {"content": ""}, {"content": "c"}]
    chunks = [said(delta, count) for delta, count in zip([opening, *texts], tokens, strict=True)]
    told = row(stream(*chunks, said({}, tokens[-1], "length"), FINAL, "[DONE]"), asked=CHAT)
    assert told["error"] is None
    assert told["chunk_tokens_estimated"] is (tokens[0] is None)
    # Four tokens in three chunks are shared out where they are not counted.
    expected = [(200, 2), (300, 1), (400, 1)] if tokens[0] is None else None
    assert tokens_of(told) == (expected or [(200, 1), (300, 1), (400, 2)])


def test_a_first_chunk_of_a_chat_with_text_is_a_token() -> None:
    both = said({"role": "assistant", "content": "a"})
    told = row(stream(both, *[said({"content": "b"})] * 3, FINAL, "[DONE]"), asked=CHAT)
    assert tokens_of(told) == [(100, 1), (200, 1), (300, 1), (400, 1)]


@pytest.mark.parametrize("chunk", ['{"choices": [{"text": " a"}]}', '{"choices": [{"delta": 1}]}'])
def test_what_is_no_chunk_of_a_chat_is_told(chunk: str) -> None:
    error = row(stream(chunk), asked=CHAT)["error"]
    assert error.startswith("malformed: an event is no completion chunk")


@pytest.mark.parametrize(
    ("form", "counted", "error"),
    [
        ("ids", 8, "wrong_prompt_tokens: 8 counted by the server, 7 sent"),
        ("ids", 6, "wrong_prompt_tokens: 6 counted by the server, 7 sent"),
        ("text", 8, None),
        ("text", 6, "wrong_prompt_tokens: 6 counted by the server, 7 sent"),
        ("messages", 37, None),
        ("messages", 6, "wrong_prompt_tokens: 6 counted by the server, 7 sent"),
    ],
)
def test_a_server_may_add_to_a_text_and_never_take_away(
    form: Form, counted: int, error: str | None
) -> None:
    one = said({"content": "a"}) if form == "messages" else chunk("a")
    final = json.dumps({"choices": [], "usage": usage(4, counted)})
    told = row(stream(*[one] * 4, final, "[DONE]"), asked=replace(ASKED, form=form))
    assert (told["error"], told["prompt_tokens"]) == (error, counted)


def test_a_failure_of_the_connection_outweighs_and_keeps_what_came_before_it() -> None:
    told = row(stream(*CONTINUOUS[:2], end=b""), Failure("stalled", "no byte for 5 s"))
    assert told["error"] == "stalled: no byte for 5 s"
    assert tokens_of(told) == [(100, 1), (200, 1)]
    assert (told["first_token_ns"], told["completion_tokens"], told["status"]) == (100, 2, 200)


def test_tokens_are_unknown_where_the_server_told_no_number() -> None:
    told = row(stream(chunk(" a"), chunk(" b"), end=b""), Failure("reset", "by the server"))
    assert (told["token_ns"], told["first_token_ns"]) == ([100, 200], 100)
    assert (told["chunk_tokens"], told["chunk_tokens_estimated"]) == (None, None)
    assert (told["prompt_tokens"], told["completion_tokens"]) == (None, None)


def test_a_request_without_response_has_no_times_but_its_end() -> None:
    told = row([], Failure("connect", "Connection refused"))
    assert (told["status"], told["first_token_ns"], told["token_ns"]) == (None, None, [])
    assert (told["done_ns"], told["error"]) == (99, "connect: Connection refused")


def test_every_kind_of_failure_is_explained() -> None:
    assert set(KINDS) == set(get_args(Kind))
