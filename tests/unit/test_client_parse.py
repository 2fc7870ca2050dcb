"""Parsing of responses: tokens, their arrivals, and every kind of failure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest

from servegrid.client.failures import FAILURE_KINDS, Failure, FailureKind
from servegrid.client.http1 import parse_head
from servegrid.client.parse import RequestSpec, parse_exchange
from servegrid.client.prompts import PromptForm
from servegrid.client.transport import Exchange

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SPEC = RequestSpec("cell/0", 2, prompt_tokens=7, completion_tokens=4)
Reads = Sequence[tuple[int, bytes]]


def row(
    reads: Reads,
    failure: Failure | None = None,
    spec: RequestSpec = SPEC,
    key: str | None = None,
) -> dict[str, Any]:
    raw, received = b"", []
    for _, data in reads:
        raw += data
        received.append(len(raw))
    exchange = Exchange(
        number=0,
        user=3,
        scheduled_ns=90,
        sent_ns=95,
        done_ns=reads[-1][0] if reads else 99,
        arrival_ns=[arrival for arrival, _ in reads],
        received=received,
        raw=raw,
        head=parse_head(raw),
        failure=failure,
        resent=False,
    )
    return parse_exchange(exchange, spec, key).row


def usage(completion: int, prompt: int = 7) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def chunk(text: str, tokens: int | None = None, finish: str | None = None) -> str:
    parsed: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    return json.dumps(parsed if tokens is None else parsed | {"usage": usage(tokens)})


def event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def http(*events: bytes) -> bytes:
    """One HTTP chunk per event."""
    return b"".join(b"%x\r\n%s\r\n" % (len(data), data) for data in events)


def stream(*data: str, end: bytes = b"0\r\n\r\n") -> Reads:
    """One read per event, at 100, 200, …; the first one also has the head."""
    pieces = [http(event(text)) for text in data]
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


def test_usage_per_chunk_counts_the_tokens_of_each_chunk_even_without_text() -> None:
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
        "requested_tokens": 4,
        "sent_tokens": 7,
        "shared_tokens": 0,
        "cached_tokens": None,
        "first_output_token_ns": None,  # completions do not tell reasoning and answer apart
        "reasoning_tokens": None,
        "reasoning_tokens_estimated": None,
        "draft_tokens": None,
        "accepted_draft_tokens": None,
        "adapter": None,
        "conversation": None,
        "turn": None,
    }


def test_a_chunk_without_new_tokens_counts_as_no_token() -> None:
    result = row(stream(chunk(" a", 1), chunk("", 1), chunk(" b", 4, "length"), "[DONE]"))
    assert tokens_of(result) == [(100, 1), (300, 3)]
    assert result["error"] is None


@pytest.mark.parametrize(
    ("texts", "tokens"),
    [
        # As many texts as tokens: the empty last chunk carries none.
        ((" a", " b", " c", " d"), [(100, 1), (200, 1), (300, 1), (400, 1)]),
        # Fewer texts than tokens: chunks without text carry tokens too.
        ((" a", "", "", " d"), [(100, 1), (200, 1), (300, 1), (400, 1)]),
        # Fewer chunks than tokens: divided evenly, earlier chunks get the remainder.
        ((" a", " b", " c"), [(100, 2), (200, 1), (300, 1)]),
        ((" a",), [(100, 4)]),
        # More chunks than tokens.
        (
            (" a", " b", " c", " d", " e", " f", " g", " h"),
            [(100, 1), (300, 1), (500, 1), (700, 1)],
        ),
        # Only the last chunk.
        ((), [(100, 4)]),
    ],
)
def test_without_usage_per_chunk_the_final_count_is_divided_and_marked_as_estimated(
    texts: tuple[str, ...], tokens: list[tuple[int, int]]
) -> None:
    result = row(stream(*map(chunk, texts), chunk("", finish="length"), FINAL, "[DONE]"))
    assert tokens_of(result) == tokens
    assert result["chunk_tokens_estimated"] is True
    assert result["error"] is None


def test_usage_per_chunk_that_stays_0_is_not_used() -> None:
    result = row(stream(chunk(" a", 0), chunk(" b", 0), chunk(" c", 4, "length"), FINAL, "[DONE]"))
    assert tokens_of(result) == [(100, 2), (200, 1), (300, 1)]
    assert result["chunk_tokens_estimated"] is True


def test_usage_per_chunk_below_the_final_count_is_not_used() -> None:
    result = row(stream(chunk(" a", 1), chunk(" b", 2, "length"), FINAL, "[DONE]"))
    assert tokens_of(result) == [(100, 2), (200, 2)]
    assert result["chunk_tokens_estimated"] is True


def test_all_events_of_one_read_have_its_arrival() -> None:
    body = HEAD + http(*map(event, CONTINUOUS)) + b"0\r\n\r\n"
    assert tokens_of(row([(100, body)])) == [(100, 1), (100, 1), (100, 2)]


def test_one_http_chunk_can_have_several_events() -> None:
    body = HEAD + http(b"".join(map(event, CONTINUOUS))) + b"0\r\n\r\n"
    assert tokens_of(row([(100, body)])) == [(100, 1), (100, 1), (100, 2)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_an_event_arrives_with_the_read_that_completes_it(newline: bytes) -> None:
    """The response is split at every byte. The expected reads follow from the last bytes."""
    events = [event(data).replace(b"\n", newline) for data in CONTINUOUS]
    body = HEAD + http(*events) + b"0\r\n\r\n"
    last_bytes = [body.index(data) + len(data) for data in events]
    for split in range(1, len(body)):
        result = row([(100, body[:split]), (200, body[split:])])
        expected = [100 if last <= split else 200 for last in last_bytes[:3]]
        assert result["token_ns"] == expected
        assert result["chunk_tokens"] == [1, 1, 2]
        assert (result["error"], result["done_ns"]) == (None, 200)


def test_comments_other_fields_and_multi_line_data_follow_the_standard() -> None:
    first, second, third, *_ = CONTINUOUS
    halves = second.replace('"choices"', '\ndata:"choices"')
    reads = [
        (100, HEAD + http(b": ping\n\n")),
        (200, http(event(f"{first}\nid: 1\nevent: x"))),
        (300, http(b": ping\nretry: 5\n" + event(halves))),
        (400, http(event(third), event("[DONE]")) + b"0\r\n\r\n"),
    ]
    result = row(reads)
    assert tokens_of(result) == [(200, 1), (300, 1), (400, 2)]
    assert result["error"] is None


def test_a_response_without_chunks_is_parsed_the_same_way() -> None:
    events = b"".join(map(event, CONTINUOUS))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n"
    length = b"Content-Length: %d\r\n" % len(events)
    for framing in (b"", length):
        result = row([(100, head + framing + b"\r\n" + events)])
        assert tokens_of(result) == [(100, 1), (100, 1), (100, 2)]
        assert result["error"] is None


ERROR = json.dumps({"error": {"message": "out of\nmemory", "code": 500}})
PLAIN = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 38\r\n\r\n"


@pytest.mark.parametrize("before", range(150, 230, 7))
def test_no_part_of_a_key_that_a_server_quotes_is_in_a_row(before: int) -> None:
    body = b"x" * before + b" sk-secret"
    result = row([(100, b"HTTP/1.1 401 X\r\n\r\n" + body)], key="sk-secret")
    assert "sk" not in result["error"]


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
        (stream(CONTINUOUS[0], '{"choices": ['), 'malformed: an event is not JSON: {"choices": ['),
        (stream('{"choices": [{"delta": {}}]}'), "malformed: an event is not a completion chunk"),
        (
            stream('{"id": "x"}'),
            "truncated: the stream ended without finish_reason and [DONE]; an event that is no "
            'chunk: {"id": "x"}',
        ),
        (stream('{"choices": [1]}'), "malformed: an event is not a completion chunk"),
        (stream('{"choices": [{"text": 1}]}'), "malformed: an event is not a completion chunk"),
        (
            stream('{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": "4"}}'),
            "malformed: an event is not a completion chunk",
        ),
        (
            [(100, HEAD + http(event(CONTINUOUS[0])) + b"zz\r\n\r\n")],
            "malformed: not an HTTP response: a chunk size is",
        ),
        (
            [(100, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}")],
            "malformed: the response is not an event stream, but application/json",
        ),
        (
            [(100, HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"))],
            "malformed: the stream is encoded as gzip",
        ),
        (stream(FINAL, "[DONE]"), "malformed: usage reports 4 tokens, but none arrived"),
        (stream(chunk(" a"), chunk("", finish="length"), "[DONE]"), "usage_missing: "),
        (
            stream(chunk(" a", 4, "stop").replace("7", "8"), "[DONE]"),
            "wrong_prompt_tokens: 8 counted by the server, 7 sent",
        ),
        (
            stream(chunk(" a", 3, "stop"), "[DONE]"),
            "wrong_completion_tokens: 3 generated, 4 requested",
        ),
        (
            stream(chunk(" a", 5, "stop"), "[DONE]"),
            "wrong_completion_tokens: 5 generated, 4 requested",
        ),
    ],
)
def test_each_failure_has_its_kind_and_a_detail(reads: Reads, error: str) -> None:
    result = row(reads)
    assert result["error"].startswith(error)
    assert "\n" not in result["error"]


CHAT = RequestSpec("cell/0", 2, prompt_tokens=7, completion_tokens=4, form="messages")


def chat_chunk(delta: dict[str, Any], tokens: int | None = None, finish: str | None = None) -> str:
    parsed: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return json.dumps(parsed if tokens is None else parsed | {"usage": usage(tokens)})


@pytest.mark.parametrize("opening", [{"role": "assistant", "content": None}, {"content": ""}])
@pytest.mark.parametrize("tokens", [(None,) * 4, (0, 1, 2, 4)])
def test_a_chat_is_parsed_from_its_deltas_and_the_role_chunk_has_no_token(
    opening: dict[str, Any], tokens: tuple[int | None, ...]
) -> None:
    texts = [{"reasoning_content": "a"}, {"content": ""}, {"content": "c"}]
    chunks = [
        chat_chunk(delta, count) for delta, count in zip([opening, *texts], tokens, strict=True)
    ]
    result = row(stream(*chunks, chat_chunk({}, tokens[-1], "length"), FINAL, "[DONE]"), spec=CHAT)
    assert result["error"] is None
    assert result["chunk_tokens_estimated"] is (tokens[0] is None)
    # Without usage per chunk, four tokens are divided among three chunks.
    expected = [(200, 2), (300, 1), (400, 1)] if tokens[0] is None else None
    assert tokens_of(result) == (expected or [(200, 1), (300, 1), (400, 2)])


def test_a_first_chunk_of_a_chat_with_text_has_a_token() -> None:
    both = chat_chunk({"role": "assistant", "content": "a"})
    result = row(stream(both, *[chat_chunk({"content": "b"})] * 3, FINAL, "[DONE]"), spec=CHAT)
    assert tokens_of(result) == [(100, 1), (200, 1), (300, 1), (400, 1)]


def reasoning_of(result: dict[str, Any]) -> tuple[int | None, int | None, bool | None]:
    assert result["error"] is None
    keys = ("first_output_token_ns", "reasoning_tokens", "reasoning_tokens_estimated")
    first, tokens, estimated = (result[key] for key in keys)
    return first, tokens, estimated


THINK = [{"reasoning": "a"}, {"content": ""}, {"reasoning": "b"}, {"content": "c"}]


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize(
    ("counts", "reported", "found"),
    [
        # The server counts. A marker between reasoning and answer is in neither.
        ((1, 2, 3, 4), {"completion_tokens_details": {"reasoning_tokens": 2}}, (400, 2, False)),
        ((1, 2, 3, 4), {"reasoning_tokens": 2}, (400, 2, False)),
        # It does not: by the chunks. That without text belongs to the reasoning before it.
        ((1, 2, 3, 4), {}, (400, 3, True)),
        ((1, 1, 2, 4), {}, (400, 2, True)),
        ((None,) * 4, {}, (400, 3, True)),
        # A count of 0 beside a text of a reasoning is none.
        ((1, 2, 3, 4), {"completion_tokens_details": {"reasoning_tokens": 0}}, (400, 3, True)),
    ],
)
def test_the_reasoning_is_told_apart_from_the_answer(
    key: str,
    counts: tuple[int | None, ...],
    reported: dict[str, Any],
    found: tuple[int, int, bool],
) -> None:
    deltas = [json.loads(json.dumps(each).replace("reasoning", key)) for each in THINK]
    chunks = map(chat_chunk, deltas, counts)
    final = json.dumps({"choices": [], "usage": usage(4) | reported})
    result = row(stream(*chunks, final, "[DONE]"), spec=CHAT)
    assert reasoning_of(result) == found
    # The first token of any kind, and all tokens.
    assert (result["first_token_ns"], result["completion_tokens"]) == (100, 4)
    assert sum(result["chunk_tokens"]) == 4


@pytest.mark.parametrize(
    ("deltas", "found"),
    [
        # No reasoning: the answer starts with the first token, even if that has no text.
        ([{"content": ""}, *[{"content": "a"}] * 3], (100, None, None)),
        ([{"refusal": "no"}] * 4, (100, None, None)),
        # A first token without text, such as half of a character, is part of the reasoning.
        ([{"content": ""}, {"reasoning": "a"}, *[{"content": "b"}] * 2], (300, 2, True)),
        # Only a reasoning: the limit of tokens cut it off.
        ([{"reasoning": "a"}] * 4, (None, 4, True)),
        # vLLM sends the end of the reasoning and the start of the answer in one chunk.
        ([{"reasoning": "a"}, {"reasoning": "b", "content": "c"}, *[{"content": "d"}] * 2],
         (200, 1, True)),
        # Between two parts of an answer.
        ([{"reasoning": "a"}, {"content": "b"}, {"reasoning": "c"}, {"content": "d"}],
         (200, 2, True)),
    ],
)  # fmt: skip
def test_the_answer_starts_with_its_first_token(
    deltas: list[dict[str, Any]], found: tuple[int | None, int | None, bool | None]
) -> None:
    chunks = map(chat_chunk, deltas, (1, 2, 3, 4))
    assert reasoning_of(row(stream(*chunks, FINAL, "[DONE]"), spec=CHAT)) == found


def test_a_reasoning_that_is_not_sent_is_known_by_the_usage() -> None:
    final = json.dumps(
        {
            "choices": [],
            "usage": usage(4) | {"completion_tokens_details": {"reasoning_tokens": 3}},
        }
    )
    result = row(stream(chat_chunk({"content": "a"}), final, "[DONE]"), spec=CHAT)
    assert reasoning_of(result) == (100, 3, False)
    assert tokens_of(result) == [(100, 4)]


@pytest.mark.parametrize(("total", "completion"), [(11, 1), (8, 4), (None, 4)])
def test_a_server_may_count_the_reasoning_beside_the_answer(
    total: int | None, completion: int
) -> None:
    """As xAI does: 7 prompt tokens, 1 of the answer and 3 of the reasoning are 11."""
    counts = usage(completion) | {"completion_tokens_details": {"reasoning_tokens": 3}}
    final = json.dumps({"choices": [], "usage": counts | {"total_tokens": total}})
    result = row(stream(chat_chunk({"content": "a"}), final, "[DONE]"), spec=CHAT)
    assert (result["error"], result["completion_tokens"]) == (None, 4)


@pytest.mark.parametrize("count", [-1, 1.5, "3", True])
def test_a_count_of_reasoning_tokens_that_is_none_is_malformed(count: Any) -> None:
    wrong = usage(4) | {"completion_tokens_details": {"reasoning_tokens": count}}
    final = json.dumps({"choices": [], "usage": wrong})
    result = row(stream(chat_chunk({"content": "a"}), final, "[DONE]"), spec=CHAT)
    assert result["error"].startswith("malformed: an event is not a completion chunk")


@pytest.mark.parametrize("chunk", ['{"choices": [{"text": " a"}]}', '{"choices": [{"delta": 1}]}'])
def test_an_invalid_chat_chunk_is_malformed(chunk: str) -> None:
    error = row(stream(chunk), spec=CHAT)["error"]
    assert error.startswith("malformed: an event is not a completion chunk")


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
def test_a_server_may_add_prompt_tokens_to_a_text_but_not_remove_any(
    form: PromptForm, counted: int, error: str | None
) -> None:
    one = chat_chunk({"content": "a"}) if form == "messages" else chunk("a")
    final = json.dumps({"choices": [], "usage": usage(4, counted)})
    result = row(stream(*[one] * 4, final, "[DONE]"), spec=replace(SPEC, form=form))
    assert (result["error"], result["prompt_tokens"]) == (error, counted)


def test_a_connection_failure_takes_precedence_and_keeps_what_arrived_before() -> None:
    result = row(stream(*CONTINUOUS[:2], end=b""), Failure("stalled", "no byte for 5 s"))
    assert result["error"] == "stalled: no byte for 5 s"
    assert tokens_of(result) == [(100, 1), (200, 1)]
    assert (result["first_token_ns"], result["completion_tokens"], result["status"]) == (
        100,
        2,
        200,
    )


def test_tokens_are_unknown_without_usage() -> None:
    result = row(stream(chunk(" a"), chunk(" b"), end=b""), Failure("reset", "by the server"))
    assert (result["token_ns"], result["first_token_ns"]) == ([100, 200], 100)
    assert (result["chunk_tokens"], result["chunk_tokens_estimated"]) == (None, None)
    assert (result["prompt_tokens"], result["completion_tokens"]) == (None, None)


def test_a_request_without_a_response_has_only_its_end_time() -> None:
    result = row([], Failure("connect", "Connection refused"))
    assert (result["status"], result["first_token_ns"], result["token_ns"]) == (None, None, [])
    assert (result["done_ns"], result["error"]) == (99, "connect: Connection refused")


def test_every_kind_of_failure_has_a_meaning() -> None:
    assert set(FAILURE_KINDS) == set(get_args(FailureKind))
