"""The process of the mock server with faults. Tests start it through `faulty_server`.

The event loop and the responses without a fault are those of `servegrid.mock_server`.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from servegrid.mock_server.responses import (
    EVENT_STREAM,
    JSON,
    ResponseScript,
    TimedResponse,
    error_response,
    format_head,
    parse_token_counts,
    script_from_json,
    stream_events,
    usage_object,
)
from servegrid.mock_server.server import MockServerLoop, serve

Fault = Literal[
    "status",  # responds with `status`
    "refuse_key",  # responds with 400 if the request has `refused_key`
    "refuse_ids",  # responds with 422 if the prompt is not a text
    "reset",  # RST after `fault_after` chunks
    "close",  # FIN after `fault_after` chunks, in the middle of the response
    "end_early",  # a valid HTTP end after `fault_after` chunks, without [DONE]
    "malformed_json",
    "malformed_chunk",  # the size of an HTTP chunk is not a number
    "error_object",  # an error inside the stream after `fault_after` chunks
    "stall",  # nothing more after `fault_after` chunks
    "fewer_tokens",
    "wrong_prompt_usage",
    "not_a_stream",  # the full response as one JSON object
]


@dataclass(frozen=True)
class FaultScript(ResponseScript):
    """How responses are framed, and which completions have the fault.

    `fault_on` is a regular expression that is searched in X-Request-Id.
    """

    framing: Literal["chunked", "length", "close"] = "chunked"
    piece_bytes: int = 0
    """Bytes per send, with `itl_s` between the pieces; 0 sends each event at once."""
    close_after: Literal["", "announced", "silently"] = ""
    accept_after_s: float = 0.0
    fault: Fault | None = None
    fault_on: str = r"/\d+$"
    fault_after: int = 0
    status: int = 500
    refused_key: str = ""


def respond(script: FaultScript, request_id: str, body: Mapping[str, Any]) -> TimedResponse:
    """The response to one completion."""
    fault = script.fault if re.search(script.fault_on, request_id) else None
    if script.fault == "refuse_key" and _has_key(body, script.refused_key):
        return error_response(400, f"Extra inputs are not permitted: {script.refused_key}")
    if fault == "status":
        return error_response(script.status, f"mock status {script.status}")
    if script.fault == "refuse_ids" and not isinstance(body["prompt"], str):
        return error_response(422, "prompt: data did not match any variant")
    prompt, tokens, continuous_usage = parse_token_counts(body)
    tokens -= fault == "fewer_tokens"
    prompt += fault == "wrong_prompt_usage"
    if fault == "not_a_stream":
        answer = {"choices": [{"text": "x"}], "usage": usage_object(prompt, tokens)}
        data = json.dumps(answer).encode()
        return TimedResponse([(0.0, format_head(200, JSON, len(data)) + data)])
    return _with_fault(script, fault, stream_events(script, prompt, tokens, continuous_usage))


def _with_fault(
    script: FaultScript, fault: str | None, events: list[tuple[float, str]]
) -> TimedResponse:
    end: Literal["keep", "close", "reset", "hang"] = "keep"
    if script.framing == "close" or script.close_after:
        end = "close"
    terminated = True
    cut = script.fault_after
    at = events[min(cut, len(events) - 1)][0]
    if fault in ("reset", "close", "stall", "end_early"):
        events = events[:cut]
        terminated = fault == "end_early"
        end = {"reset": "reset", "close": "close", "stall": "hang", "end_early": end}[fault]
    elif fault == "error_object":
        error = {"error": {"message": "mock failure", "type": "ServerError", "code": 500}}
        events = [*events[:cut], (at, json.dumps(error)), (at, "[DONE]")]
    elif fault == "malformed_json":
        events = [*events[:cut], (at, '{"choices": ['), (at, "[DONE]")]
    if not events and not terminated:
        return TimedResponse([(script.ttft_s, b"")], end)
    # Events that are due at the same time are sent in one piece, as servers do at the end.
    grouped = [
        (due, [f"data: {text}{script.newline * 2}".encode() for _, text in group])
        for due, group in itertools.groupby(events, key=lambda event: event[0])
    ]
    if script.framing == "length":
        body = b"".join(b"".join(texts) for _, texts in grouped)
        return TimedResponse(
            [(grouped[-1][0], format_head(200, EVENT_STREAM, len(body)) + body)], end
        )
    chunked = script.framing == "chunked"
    closing = script.framing == "close" or script.close_after == "announced"
    first = format_head(200, EVENT_STREAM, None if chunked else -1, closing)
    pieces = [
        (due, b"".join(b"%x\r\n%s\r\n" % (len(text), text) if chunked else text for text in texts))
        for due, texts in grouped
    ]
    if fault == "malformed_chunk":
        pieces.append((pieces[-1][0], b"zz\r\n\r\n"))
    elif chunked and terminated:
        pieces.append((pieces[-1][0], b"0\r\n\r\n"))
    pieces[0] = (pieces[0][0], first + pieces[0][1])
    pieces = [
        (due, b"".join(data for _, data in group))
        for due, group in itertools.groupby(pieces, key=lambda piece: piece[0])
    ]
    if script.piece_bytes:
        pieces = _in_small_pieces(pieces, script)
    return TimedResponse(pieces, end)


def _in_small_pieces(
    pieces: list[tuple[float, bytes]], script: FaultScript
) -> list[tuple[float, bytes]]:
    body, size = b"".join(data for _, data in pieces), script.piece_bytes
    return [
        (script.ttft_s + number * script.itl_s, body[start : start + size])
        for number, start in enumerate(range(0, len(body), size))
    ]


def _has_key(data: Any, key: str) -> bool:
    return isinstance(data, Mapping) and (
        key in data or any(_has_key(value, key) for value in data.values())
    )


if __name__ == "__main__":
    script = script_from_json(FaultScript, sys.argv[1])
    serve(MockServerLoop(script, respond, script.accept_after_s))
