"""The process of the scripted server with faults; tests start it through `scripted`.

What it does without a fault is `servegrid.mock_server`, and so is the loop.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from servegrid.mock_server import responses as scripted
from servegrid.mock_server.responses import (
    JSON,
    STREAM,
    Answer,
    error,
    events_of,
    head,
    numbers_of,
    usage,
)
from servegrid.mock_server.server import Loop, serve

Fault = Literal[
    "status",  # answers `status`
    "refuse_key",  # answers 400 where the request has `refused_key`
    "refuse_ids",  # answers 422 where the prompt is no text
    "reset",  # RST after `fault_after` chunks
    "close",  # FIN after `fault_after` chunks, the response unfinished
    "end_early",  # a well-formed end after `fault_after` chunks, without the stream's own end
    "malformed_json",
    "malformed_chunk",  # the size of an HTTP chunk is no number
    "error_object",  # an error inside the stream after `fault_after` chunks
    "stall",  # nothing more after `fault_after` chunks
    "fewer_tokens",
    "wrong_prompt_usage",
    "not_a_stream",  # the whole answer as one JSON object
]


@dataclass(frozen=True)
class Script(scripted.Script):
    """How the answers are framed, and to which of the completions the fault happens.

    `fault_on` is searched in X-Request-Id.
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


def answer(script: Script, request_id: str, body: Mapping[str, Any]) -> Answer:
    """The answer to one completion."""
    fault = script.fault if re.search(script.fault_on, request_id) else None
    if script.fault == "refuse_key" and _has_key(body, script.refused_key):
        return error(400, f"Extra inputs are not permitted: {script.refused_key}")
    if fault == "status":
        return error(script.status, f"scripted status {script.status}")
    if script.fault == "refuse_ids" and not isinstance(body["prompt"], str):
        return error(422, "prompt: data did not match any variant")
    prompt, asked, asks_continuous = numbers_of(body)
    asked -= fault == "fewer_tokens"
    prompt += fault == "wrong_prompt_usage"
    if fault == "not_a_stream":
        whole = json.dumps({"choices": [{"text": "x"}], "usage": usage(prompt, asked)}).encode()
        return Answer([(0.0, head(200, JSON, len(whole)) + whole)])
    return _with_fault(script, fault, events_of(script, prompt, asked, asks_continuous))


def _with_fault(script: Script, fault: str | None, events: list[tuple[float, str]]) -> Answer:
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
        told = {"error": {"message": "scripted failure", "type": "ServerError", "code": 500}}
        events = [*events[:cut], (at, json.dumps(told)), (at, "[DONE]")]
    elif fault == "malformed_json":
        events = [*events[:cut], (at, '{"choices": ['), (at, "[DONE]")]
    if not events and not terminated:
        return Answer([(script.ttft_s, b"")], end)
    # What is due at one time goes out in one piece, as servers do with the last chunks.
    grouped = [
        (due, [f"data: {text}{script.newline * 2}".encode() for _, text in group])
        for due, group in itertools.groupby(events, key=lambda event: event[0])
    ]
    if script.framing == "length":
        body = b"".join(b"".join(texts) for _, texts in grouped)
        return Answer([(grouped[-1][0], head(200, STREAM, len(body)) + body)], end)
    chunked = script.framing == "chunked"
    closing = script.framing == "close" or script.close_after == "announced"
    first = head(200, STREAM, None if chunked else -1, closing)
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
    return Answer(pieces, end)


def _in_small_pieces(
    pieces: list[tuple[float, bytes]], script: Script
) -> list[tuple[float, bytes]]:
    whole, size = b"".join(data for _, data in pieces), script.piece_bytes
    return [
        (script.ttft_s + number * script.itl_s, whole[start : start + size])
        for number, start in enumerate(range(0, len(whole), size))
    ]


def _has_key(data: Any, key: str) -> bool:
    return isinstance(data, Mapping) and (
        key in data or any(_has_key(each, key) for each in data.values())
    )


if __name__ == "__main__":
    script = scripted.from_json(Script, sys.argv[1])
    serve(Loop(script, answer, script.accept_after_s))
