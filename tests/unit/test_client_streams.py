"""Event streams: the cases of the WHATWG standard, and what servers and gateways really send.

Each stream in STREAMS answers a prompt of 7 tokens with 4 output tokens. They are written by hand,
not recorded. Above each stands what it was compared with: the source of the server at a commit or
version, the types and the documentation of an API that has no public source, or issues in which
users show what they received; and what of it is not verified. Keys that servegrid does not read may
be missing.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from servegrid.client.http1 import parse_head
from servegrid.client.parse import ParsedExchange, RequestSpec, parse_exchange
from servegrid.client.prompts import PromptForm
from servegrid.client.transport import Exchange

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"


def parse(*reads: bytes, form: PromptForm = "text") -> ParsedExchange:
    """The exchange whose body arrived in these reads, at 100, 200, …"""
    reads = (HEAD + reads[0], *reads[1:])
    raw = b"".join(reads)
    exchange = Exchange(
        number=0,
        user=0,
        scheduled_ns=1,
        sent_ns=1,
        done_ns=100 * len(reads),
        arrival_ns=[100 * number for number in range(1, len(reads) + 1)],
        received=[len(b"".join(reads[:number])) for number in range(1, len(reads) + 1)],
        raw=raw,
        head=parse_head(raw),
        failure=None,
        resent=False,
    )
    return parse_exchange(exchange, RequestSpec("r/0", 0, 7, 4, form))


def tokens_of(parsed: ParsedExchange) -> list[tuple[int, int]]:
    assert parsed.row["error"] is None
    return list(zip(parsed.row["token_ns"], parsed.row["chunk_tokens"], strict=True))


def text(content: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"text": content, "finish_reason": finish}]})


USAGE = '"usage": {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}'
FINAL = f'{{"choices": [], {USAGE}}}'
CHUNKS = [text(" a"), text(" b"), text(" c"), text(" d", "length"), FINAL, "[DONE]"]
ONE_EACH = [(100, 1), (200, 1), (300, 1), (400, 1)]


def events(*data: str) -> list[bytes]:
    return [f"data: {each}\n\n".encode() for each in data]


ENDS = [b"\n", b"\r\n", b"\r"]
# CR followed by LF is one line end, not two.
PAIRS = [(end, blank) for end in ENDS for blank in ENDS if end + blank != b"\r\n"]


@pytest.mark.parametrize(("line_end", "blank"), PAIRS)
def test_line_ends_can_be_mixed_in_one_stream(line_end: bytes, blank: bytes) -> None:
    reads = [
        b"event: x" + line_end + b"data: " + each.encode() + line_end + blank for each in CHUNKS
    ]
    assert tokens_of(parse(*reads)) == ONE_EACH


def test_a_line_end_of_cr_and_lf_ends_no_event() -> None:
    """Were it a blank line, the JSON in two lines would be cut off."""
    halves = [f"data: {each[:12]}\r\ndata: {each[12:]}\r\n\r\n".encode() for each in CHUNKS[:-1]]
    assert tokens_of(parse(*halves, b"data: [DONE]\r\n\r\n")) == ONE_EACH


def test_a_byte_order_mark_before_the_first_event_is_ignored() -> None:
    first, *others = events(*CHUNKS)
    assert tokens_of(parse(b"\xef\xbb\xbf" + first, *others)) == ONE_EACH


@pytest.mark.parametrize(
    ("before", "skipped"),
    [
        (b": OPENROUTER PROCESSING\n\n", 0),  # a comment is no event
        (b":\n\n", 0),
        (b":keep-alive\r\n\r\n", 0),
        (b"\n\n\n", 0),  # blank lines dispatch nothing
        (b"event: ping\n\n", 0),  # an event without data is not dispatched
        (b"id: 7\nretry: 3000\n\n", 0),
        (b"foo: bar\n\n", 0),  # unknown fields are ignored
        (b"database: x\n\n", 0),
        (b" data: x\n\n", 0),  # the field is called " data"
        (b"data:\n\n", 1),
        (b"data\n\n", 1),
        (b"data\ndata\n\n", 1),
        (b'event: ping\ndata: {"type": "ping"}\n\n', 1),
        (b"event: ping\ndata: 2026-11-29 10:00:00\n\n", 1),
        (b"event:heartbeat\ndata:{}\n\n", 1),
        (b"data: ping\n\n", 1),
        (b"data: null\n\ndata: 1\n\ndata: []\n\n", 3),
        (b'data: {"choices": null}\n\n', 1),
        (b'data: {"object": "chat.completion.processing", "error": null}\n\n', 1),
        (b'data: {"choices": [], "prompt_filter_results": []}\n\n', 0),  # Azure OpenAI's first
    ],
)
def test_what_is_no_chunk_is_skipped_and_counted(before: bytes, skipped: int) -> None:
    """Also in the middle of a stream, where it must not move a token."""
    parsed = parse(*[before + each for each in events(*CHUNKS)])
    assert tokens_of(parsed) == ONE_EACH
    assert parsed.events_skipped == skipped * len(CHUNKS)
    assert parsed.row["first_token_ns"] == 100


def test_a_field_needs_no_space_and_loses_only_one() -> None:
    """The standard removes one space. JSON and the marker ignore the others."""
    reads = [f"data:{each}\n\n".encode() for each in CHUNKS[:3]]
    reads += [f"data:   {each}\n\n".encode() for each in CHUNKS[3:]]
    assert tokens_of(parse(*reads)) == ONE_EACH


@pytest.mark.parametrize("marker", ["data: [DONE] \n\n", "data:[DONE]\t\r\n\r\n", "data: [DONE]"])
def test_the_final_marker_can_have_white_space_or_lack_its_blank_line(marker: str) -> None:
    chunks = [text(" a"), text(" b"), text(" c"), text(" d"), FINAL]
    assert tokens_of(parse(*events(*chunks), marker.encode())) == ONE_EACH


def test_an_event_that_no_blank_line_ends_is_none() -> None:
    parsed = parse(*events(*CHUNKS[:4]), f"data: {FINAL}\n".encode())
    assert parsed.row["error"].startswith("usage_missing")


def test_bytes_that_are_not_utf_8_are_replaced() -> None:
    first, *others = events(*CHUNKS)
    assert tokens_of(parse(first.replace(b" a", b" \xc3"), *others)) == ONE_EACH


@pytest.mark.parametrize(
    "last",
    [
        '{"choices": [{"index": 0, "finish_reason": "length"}]}',
        '{"choices": [{"text": null, "finish_reason": "length"}]}',
        '{"choices": [{"delta": null, "finish_reason": "length"}], "usage": null}',
    ],
)
def test_a_choice_without_text_ends_the_stream_and_has_no_token(last: str) -> None:
    chunks = [text(" a"), text(" b"), text(" c"), text(" d"), last, FINAL]
    assert tokens_of(parse(*events(*chunks))) == ONE_EACH


@pytest.mark.parametrize(
    "final",
    [
        f"{{{USAGE}}}",  # no choices
        f'{{"choices": null, {USAGE}}}',
        # LiteLLM's usage has a choice.
        f'{{"choices": [{{"index": 0, "text": "", "finish_reason": null}}], {USAGE}}}',
        f'{{"choices": [{{"index": 0, "finish_reason": "length"}}], {USAGE}}}',
    ],
)
@pytest.mark.parametrize("texts", [4, 3])
def test_usage_is_read_from_every_form_of_the_last_chunk(final: str, texts: int) -> None:
    """It carries no token, also if there are fewer texts than tokens."""
    chunks = [text(" x")] * (texts - 1) + [text(" x", "length"), final, "[DONE]"]
    expected = ONE_EACH if texts == 4 else [(100, 2), (200, 1), (300, 1)]
    assert tokens_of(parse(*events(*chunks))) == expected


def test_a_usage_without_a_count_keeps_the_count_before() -> None:
    chunks = [*CHUNKS[:5], '{"usage": {"total_tokens": 11, "prompt_tokens": null}}', "[DONE]"]
    assert tokens_of(parse(*events(*chunks))) == ONE_EACH


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (b'event: error\ndata: {"message": "overloaded"}\n\n', "mid_stream_error: overloaded"),
        (b"event: error\ndata: upstream gone\n\n", "mid_stream_error: upstream gone"),
        # TGI's error, and transformers'.
        (b'data:{"error":"busy","error_type":"overloaded"}\n\n', "mid_stream_error: busy"),
        (b'data: {"choices": [{"te\n\n', "malformed: an event is not JSON"),
        (b'data: {"choices": {"text": "a"}}\n\n', "malformed: an event is not a completion chunk"),
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "malformed: an event is not a"),
        (b'data: {"usage": {"completion_tokens": -1}}\n\n', "malformed: an event is not a"),
    ],
)
def test_what_could_make_counts_wrong_still_fails_the_request(event: bytes, error: str) -> None:
    first, *others = events(*CHUNKS)
    assert parse(first, event, *others).row["error"].startswith(error)


def test_a_stream_that_ends_with_an_unknown_message_quotes_it() -> None:
    parsed = parse(*events(text(" a"), '{"detail": "worker died"}'))
    assert parsed.row["error"].startswith("truncated: ")
    assert 'an event that is no chunk: {"detail": "worker died"}' in parsed.row["error"]


def chat(**choice: Any) -> str:
    return json.dumps({"object": "chat.completion.chunk", "choices": [{"index": 0, **choice}]})


def lines(*data: str, before: str = "data: ", after: str = "\n\n") -> list[bytes]:
    return [f"{before}{each}{after}".encode() for each in data]


ROLE = {"role": "assistant", "content": ""}
# One chunk of each stream per read; the second number is the read of the first token.
STREAMS: dict[str, tuple[PromptForm, list[bytes], int]] = {
    # OpenAI has no public source. After the types of the package openai 3.54.0: the chunk's keys,
    # and in its stream options a null usage in all chunks but the last, and the padding
    # `obfuscation`. That the first chunk has the role and an empty content is
    # not verified.
    "openai chat": (
        "messages",
        lines(
            *(
                f'{{"choices": [{{"index": 0, "delta": {delta}, "finish_reason": {finish}}}], '
                '"usage": null, "obfuscation": "x7Q", "service_tier": "default"}'
                for delta, finish in [
                    ('{"role": "assistant", "content": "", "refusal": null}', "null"),
                    *[('{"content": " a"}', "null")] * 4,
                    ("{}", '"length"'),
                ]
            ),
            f'{{"choices": [], {USAGE}, "obfuscation": ""}}',
            "[DONE]",
        ),
        2,
    ),
    # sglang, commit 004c82e0: entrypoints/openai/serving_completions.py, without continuous usage.
    # Null values are written, except in the last chunk.
    "sglang completions": (
        "ids",
        lines(
            *(
                f'{{"id":"1","object":"text_completion","created":1,"choices":[{{"index":0,"text":'
                f'"{each}","logprobs":null,"finish_reason":{finish},"matched_stop":null}}],'
                '"model":"m","usage":null}'
                for each, finish in [(" a", "null"), ("", "null"), ("c", "null"), ("d", '"length"')]
            ),
            f'{{"id":"1","choices":[],"model":"m",{USAGE}}}',
            "[DONE]",
        ),
        1,
    ),
    # sglang, commits 002897c2 and 4a55fdba: entrypoints/openai/serving_chat.py and sse_utils.py. A
    # delta has no null values but that of reasoning_content. The chunk with finish_reason is
    # separate.
    "sglang chat": (
        "messages",
        lines(
            *(
                chat(
                    delta={"reasoning_content": None, **delta},
                    logprobs=None,
                    finish_reason=finish,
                    matched_stop=None,
                )
                for delta, finish in [
                    (ROLE, None),
                    *[({"content": " a"}, None)] * 4,
                    ({}, "length"),
                ]
            ),
            FINAL,
            "[DONE]",
        ),
        2,
    ),
    # text-generation-inference, commit 03fe626a: router/src/chat.rs. Every chunk has the role. axum
    # 0.6 (axum/src/response/sse.rs, commit 017e3c62) writes no space after the colon, and an empty
    # comment after 15 s without an event.
    "tgi chat": (
        "messages",
        [
            b":\n\n" + each
            for each in lines(
                *[chat(delta={"role": "assistant", "content": " a"}, finish_reason=None)] * 3,
                chat(delta={"role": "assistant", "content": " a"}, finish_reason="length"),
                FINAL,
                "[DONE]",
                before="data:",
            )
        ],
        1,
    ),
    # text-generation-inference, commit 003eaec0: router/src/server.rs. The finish_reason is an
    # empty text until the last chunk, which has a text, the reason and the usage.
    "tgi completions": (
        "text",
        lines(
            text(" a", ""),
            text("", ""),
            text(" c", ""),
            f'{{"object":"text_completion","choices":[{{"index":0,"text":" d","logprobs":null,'
            f'"finish_reason":"length"}}],{USAGE}}}',
            "[DONE]",
            before="data:",
        ),
        1,
    ),
    # TensorRT-LLM, commit 01bf1923: serve/postprocess_handlers.py. The first chunk has a space
    # before the line end, and no value is null. An empty content can have a token.
    "tensorrt-llm chat": (
        "messages",
        [
            *lines(chat(delta={"role": "assistant"}), after=" \n\n"),
            *lines(
                chat(delta={"content": " a", "reasoning_content": ""}),
                chat(delta={"content": "", "reasoning_content": ""}),
                chat(delta={"content": "é", "reasoning_content": ""}),
                chat(delta={"content": " d", "reasoning_content": ""}, finish_reason="length"),
                FINAL,
                "[DONE]",
            ),
        ],
        2,
    ),
    # transformers 5.19.0: cli/serving/chat_completion.py, completion.py and utils.py. No value is
    # null, the usage is in the last chunk, and there is no marker.
    "transformers chat": (
        "messages",
        lines(
            chat(delta={"role": "assistant"}),
            *[chat(delta={"content": " a"})] * 4,
            f'{{"choices":[{{"delta":{{}},"finish_reason":"length","index":0}}],{USAGE}}}',
        ),
        2,
    ),
    "transformers completions": (
        "text",
        lines(
            *['{"choices":[{"text":" a","index":0}],"object":"text_completion"}'] * 4,
            f'{{"choices":[{{"text":"","finish_reason":"length","index":0}}],{USAGE}}}',
        ),
        1,
    ),
    # vLLM 0.32.0: entrypoints/openai/chat_completion/serving.py, with a parser of reasonings and
    # continuous usage. No value is null. The token that ends the reasoning has no chunk of its own.
    "vllm chat with reasoning": (
        "messages",
        lines(
            *(
                json.dumps(
                    {
                        "object": "chat.completion.chunk",
                        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
                        "usage": {
                            "prompt_tokens": 7,
                            "completion_tokens": tokens,
                            "total_tokens": 7 + tokens,
                            "completion_tokens_details": {"reasoning_tokens": min(tokens, 2)},
                        },
                    }
                )
                for tokens, delta, finish in [
                    (0, ROLE, None),
                    (1, {"reasoning": "a"}, None),
                    (2, {"reasoning": " b"}, None),
                    (3, {"content": " c"}, None),
                    (4, {"content": " d"}, "length"),
                ]
            ),
            f'{{"object":"chat.completion.chunk","choices":[],{USAGE}}}',
            "[DONE]",
        ),
        2,
    ),
    # llama.cpp: after what xllamacpp 2026.10.11549 sent with `speculative.types` NGRAM_SIMPLE. Each
    # token of a step is an event of its own. The last chunk has the usage and the timings.
    "llama.cpp completions with speculative decoding": (
        "ids",
        lines(
            *[text(each) for each in ("4", " ", "1", " ")],
            f'{{"choices":[{{"text":"","index":0,"logprobs":null,"finish_reason":"length"}}],{USAGE},'
            '"timings":{"predicted_n":4,"predicted_ms":817.761,"draft_n":3,"draft_n_accepted":2}}',
            "[DONE]",
        ),
        1,
    ),
    # LiteLLM's proxy, from what users show in BerriAI/litellm#8450 and #28735: the usage comes
    # after the last chunk, with a choice.
    "litellm chat": (
        "messages",
        lines(
            chat(delta={"content": " a", "role": "assistant"}),
            *[chat(delta={"content": " a"})] * 3,
            chat(delta={}, finish_reason="length"),
            f'{{"choices":[{{"index":0,"delta":{{}}}}],{USAGE}}}',
            "[DONE]",
        ),
        1,
    ),
    # OpenRouter has no public source. Its documentation has the comments; that the usage has a
    # choice with the role is not verified.
    "openrouter chat": (
        "messages",
        [
            b": OPENROUTER PROCESSING\n\n",
            b": OPENROUTER PROCESSING\n\n",
            *lines(
                chat(delta=ROLE, finish_reason=None, native_finish_reason=None),
                *[chat(delta={"role": "assistant", "content": "", "reasoning": "a"})] * 4,
                chat(delta=ROLE, finish_reason="length", native_finish_reason="MAX_TOKENS"),
                f'{{"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}}}}],{USAGE}}}',
                "[DONE]",
            ),
        ],
        4,
    ),
}


def test_what_streams_say_about_reasoning_and_drafts() -> None:
    form, reads, _ = STREAMS["vllm chat with reasoning"]
    row = parse(*reads, form=form).row
    assert (row["first_token_ns"], row["first_output_token_ns"]) == (200, 400)
    assert (row["reasoning_tokens"], row["reasoning_tokens_estimated"]) == (2, False)
    form, reads, _ = STREAMS["llama.cpp completions with speculative decoding"]
    row = parse(*reads, form=form).row
    assert (row["draft_tokens"], row["accepted_draft_tokens"]) == (3, 2)
    form, reads, _ = STREAMS["openrouter chat"]
    row = parse(*reads, form=form).row
    # Its four tokens are all of the reasoning, and only its chunks say so.
    assert (row["first_output_token_ns"], row["draft_tokens"]) == (None, None)
    assert (row["reasoning_tokens"], row["reasoning_tokens_estimated"]) == (4, True)


def test_an_empty_finish_reason_ends_no_stream() -> None:
    """As TGI has it in every chunk: a connection that is cut later must not pass for complete."""
    cut = parse(*events(*[text(" a", "")] * 3))
    assert cut.row["error"].startswith("truncated: ")


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_of_each_server_has_its_four_tokens(name: str) -> None:
    form, reads, first = STREAMS[name]
    parsed = parse(*reads, form=form)
    assert tokens_of(parsed) == [(100 * read, 1) for read in range(first, first + 4)]
    assert parsed.events_skipped == 0
