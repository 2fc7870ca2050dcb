"""Conversations on a scripted server: what each request carries, held against a history by hand."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.scripted_server import EVENT_STREAM, Answer, Request, refusal, scripted_server
from servegrid.client import Measurement, measure
from servegrid.study.config import parse_study
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload
from servegrid.study.source import Source

ANSWER = (7001, 7002, 7003)
"""The token ids of every answer."""
LOOP = Workload(
    *("closed_loop", 2, 20, 3, 14),
    source=Source("random", turns=3),
    warmup_waves=0,
    timeout_s=20,
    idle_timeout_s=10,
)


def answer(request: Request, with_ids: bool = True) -> Answer:
    """Three tokens, one per chunk; with their ids if the request asks for them."""
    prompt, chat = request.body.get("prompt"), "messages" in request.body
    tokens = request.body["max_tokens"]
    texts = [" Loire", " and", " Rhone"][:tokens]
    chunks: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        choice: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
        if with_ids and request.body.get("return_token_ids"):
            choice["token_ids"] = [ANSWER[number]]
        chunks.append({"choices": [{"index": 0, **choice}]})
    chunks[-1]["choices"][0]["finish_reason"] = "length"
    if chat:
        words = [message["content"].split() for message in request.body["messages"]]
        count = sum(map(len, words)) + 4 * len(words)  # a template that adds four per message
    else:
        assert prompt is not None
        count = len(prompt.split() if isinstance(prompt, str) else prompt)
    chunks.append(
        {"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": tokens}}
    )
    events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
    return Answer([*((0.001, each) for each in events), (0.0, b"data: [DONE]\n\n")], 200, EVENT_STREAM)


def name_of(request: Request) -> tuple[int, int]:
    """The conversation and the turn of a request."""
    conversation, _, turn = request.headers["X-Request-Id"].rpartition("/")[2].partition(".")
    return int(conversation), int(turn)


def measured_requests(requests: list[Request]) -> dict[tuple[int, int], Request]:
    return {
        name_of(each): each for each in requests if "probe" not in each.headers["X-Request-Id"]
        and "warmup" not in each.headers["X-Request-Id"]
    }


def test_each_turn_carries_all_turns_and_answers_before_it() -> None:
    with scripted_server(answer) as server:
        measured = measure(Endpoint(server.url, "m"), LOOP, None, "cell")
    rows = measured.requests.to_pylist()
    print(measured.facts)
    for row in rows: print({k: row[k] for k in ("conversation","turn","user","error","sent_tokens","prompt_tokens","shared_tokens","request_id")})
    assert measured.errors == [None] * 14
