"""Conversations on a scripted server: what each request carries, held against a history by hand."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.faulty_server import FaultScript, start_faulty_server
from helpers.scripted_server import EVENT_STREAM, Answer, Request, refusal, scripted_server
from helpers.sources import DEPLOYMENT
from helpers.tokenizing import make_tokenizer
from servegrid.client import Measurement, measure
from servegrid.errors import LoadError
from servegrid.study.config import parse_study
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Workload
from servegrid.study.source import Source
from servegrid.study.tokenizer import open_tokenizer

ANSWER = (7001, 7002, 7003)
"""The token ids of every answer."""
SLOW_THINKERS = 10
"""With this seed, both users think for 1.2 times the mean after their first requests."""
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
        sent = [message["content"].encode() for message in request.body["messages"]]
        count = sum(map(len, sent)) + 4 * len(sent)  # a template that adds four per message
    else:
        assert prompt is not None
        count = len(prompt.split() if isinstance(prompt, str) else prompt)
    chunks.append({"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": tokens}})
    events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
    return Answer(
        [*((0.001, each) for each in events), (0.0, b"data: [DONE]\n\n")], 200, EVENT_STREAM
    )


def sent_turns(requests: list[Request]) -> dict[tuple[int, int], Request]:
    """The measured requests by their conversation and turn."""
    names = [each.headers["X-Request-Id"].rpartition("/")[2] for each in requests]
    found = {}
    for name, request in zip(names, requests, strict=True):
        conversation, dot, turn = name.partition(".")
        if dot:
            found[int(conversation), int(turn)] = request
    return found


def run(workload: Workload, **more: Any) -> tuple[Measurement, dict[tuple[int, int], Request]]:
    """Measure on a scripted server; returns also what it received."""
    respond = more.pop("respond", answer)
    with scripted_server(respond) as server:
        endpoint = Endpoint(server.url, "m", **more.pop("endpoint", {}))
        tokenizer = more.pop("tokenizer", None)
        measured = measure(endpoint, workload, tokenizer, "cell", **more)
        return measured, sent_turns(server.requests)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_turn_carries_all_turns_and_answers_before_it(processes: int) -> None:
    cpu_sets = [sorted(os.sched_getaffinity(0))] * processes
    measured, sent = run(LOOP, cpu_sets=cpu_sets)
    rows = measured.requests.to_pylist()
    assert measured.errors == [None] * 14
    assert {(row["conversation"], row["turn"]) for row in rows} == sent.keys()
    for (conversation, turn), request in sent.items():
        prompt = request.body["prompt"]
        # Turns of 20 tokens and answers of 3: the prompts have 20, 43 and 66 tokens.
        assert len(prompt) == 20 + 23 * (turn - 1)
        assert request.body["max_tokens"] == 3
        if turn > 1:
            before = sent[conversation, turn - 1].body["prompt"]
            assert prompt[: len(before) + 3] == [*before, *ANSWER]
    for row in rows:
        turn = row["turn"]
        assert row["prompt_tokens"] == row["sent_tokens"] == 20 + 23 * (turn - 1)
        # Everything of the earlier turns but the last token of the answer.
        assert row["shared_tokens"] == (0 if turn == 1 else 23 * (turn - 1) - 1)
    firsts = [sent[conversation, 1].body["prompt"] for conversation, turn in sent if turn == 1]
    assert len({tuple(prompt) for prompt in firsts}) == len(firsts)
    # Of the first conversations, that of user 0 has one turn and that of user 1 has two.
    assert (0, 2) not in sent and (1, 2) in sent and (1, 3) not in sent
    assert measured.facts["conversations_cut"] == 0


def test_each_user_plays_one_conversation_after_another_and_thinks_in_between() -> None:
    measured, _ = run(replace(LOOP, think_time_s=0.05))
    rows = sorted(measured.requests.to_pylist(), key=lambda row: row["sent_ns"])
    by_user = defaultdict(list)
    for row in rows:
        by_user[row["user"]].append(row)
    thinks = []
    for played in by_user.values():
        for before, row in itertools.pairwise(played):
            same = row["conversation"] == before["conversation"]
            assert row["turn"] == (before["turn"] + 1 if same else 1)
            thinks.append((row["scheduled_ns"] - before["done_ns"]) / 1e9)
            assert row["sent_ns"] >= row["scheduled_ns"]
    assert len(thinks) == 12 and min(thinks) > 0
    assert 0.01 < sum(thinks) / len(thinks) < 0.15  # exponential with mean 0.05


def test_a_prompt_is_built_while_the_user_thinks() -> None:
    """That takes milliseconds, and the users think for 0.36 s at least."""
    measured, _ = run(replace(LOOP, requests=4, think_time_s=0.3, seed=SLOW_THINKERS))
    assert measured.errors == [None] * 4
    assert measured.facts["prepare_waits"] == 0
    assert measured.facts["send_lag_ns_p50"] < 2e6


def test_without_ids_the_history_has_the_text_of_the_answers(tmp_path: Path) -> None:
    def without_ids(request: Request) -> Answer:
        return answer(request, with_ids=False)

    folder = make_tokenizer(tmp_path / "tokenizer")
    encode = open_tokenizer(folder).encode
    text = replace(LOOP, source=Source("text", turns=3))
    measured, sent = run(text, tokenizer=folder, respond=without_ids)
    assert measured.errors == [None] * 14
    for (conversation, turn), request in sent.items():
        if turn > 1:
            before = sent[conversation, turn - 1].body["prompt"]
            history = [*before, *encode(" Loire and Rhone").ids]
            assert request.body["prompt"][: len(history)] == history


CHATS = [
    [("user", "Name a river."), ("assistant", "The Seine."), ("user", "And another one?")],
    [("system", "Be brief."), ("user", "Count."), ("assistant", "1"), ("user", "On.")],
    [("user", "Once only.")],
]


def test_a_chat_of_a_file_carries_the_servers_answers_and_not_those_of_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in CHATS]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    keys = {"protocol": "closed_loop", "concurrency": 1, "input_len": 90, "output_len": 3}
    source = {"kind": "file", "path": str(path), "turns": "all"}
    study = parse_study(
        {
            "study": "s",
            "workload": {**keys, "requests_per_user": 4, "source": source, "warmup_waves": 0},
            "deployments": [DEPLOYMENT],
        }
    )
    measured, sent = run(
        study.trials[0].workload,
        tokenizer=make_tokenizer(tmp_path / "tokenizer"),
        source_file=path,
        endpoint={"api": "chat"},
    )
    assert measured.errors == [None] * len(sent)
    for (conversation, turn), request in sent.items():
        messages = [(each["role"], each["content"]) for each in request.body["messages"]]
        row = next(row for row in CHATS if messages[0] in row)
        own = [each for each in row if each[0] != "assistant"]
        if turn == 1:
            assert messages == own[: len(messages)] and messages[-1][0] == "user"
        else:
            before = sent[conversation, turn - 1].body
            # Each byte is a token: the recorded answers have 10 and 1, and output_len is 3.
            words = " ".join(["Loire", "and", "Rhone"][: before["max_tokens"]])
            assert messages == [
                *((each["role"], each["content"]) for each in before["messages"]),
                ("assistant", f" {words}"),
                own[-1],
            ]
            assert before["max_tokens"] == (3 if "Seine" in str(row) else 1)
        assert request.body["cache_salt"] == "cell"


def test_after_a_failed_turn_the_user_begins_the_next_conversation() -> None:
    def fail_once(request: Request) -> Answer:
        if request.headers["X-Request-Id"].endswith("/1.1"):
            return refusal("overloaded", 503)
        return answer(request)

    measured, sent = run(replace(LOOP, concurrency=1, requests=6), respond=fail_once)
    assert list(sent) == [(0, 1), (1, 1), (2, 1), (2, 2), (2, 3), (3, 1)]
    failed = [row for row in measured.requests.to_pylist() if row["error"]]
    assert [(row["conversation"], row["turn"]) for row in failed] == [(1, 1)]
    assert failed[0]["error"].startswith("http_status: 503")


def test_a_turn_that_was_cut_off_after_its_last_token_has_failed() -> None:
    fault = FaultScript(fault="close", fault_after=4, fault_on=r"/1\.1$")
    with start_faulty_server(fault) as server:
        measured = measure(server.endpoint, replace(LOOP, concurrency=1, requests=4), None, "cell")
    rows = measured.requests.to_pylist()
    assert [(row["conversation"], row["turn"]) for row in rows] == [(0, 1), (1, 1), (2, 1), (2, 2)]
    assert [row["error"] is None for row in rows] == [True, False, True, True]
    assert rows[1]["error"].startswith("truncated")
    # The mock server names no token ids, and there is no tokenizer: only the number is right.
    assert rows[3]["sent_tokens"] == rows[3]["prompt_tokens"] == 20 + 3 + 20


def test_a_load_by_time_ends_in_the_middle_of_conversations() -> None:
    loop = replace(LOOP, requests=None, duration_s=0.5, think_time_s=0.02)
    measured, sent = run(replace(loop, source=Source("random", turns=1000)))
    rows = measured.requests.to_pylist()
    assert {row["error"] for row in rows} == {None}
    assert len(rows) == len(sent) > 8
    start_ns = min(row["scheduled_ns"] for row in rows)
    assert max(row["sent_ns"] for row in rows) < start_ns + 0.6e9
    assert max(turn for _, turn in sent) < 1000


def test_a_timeout_fails_the_turns_that_users_still_think_about() -> None:
    measured, sent = run(replace(LOOP, think_time_s=100.0, timeout_s=0.4))
    assert measured.errors[:2] == [None, None] and len(sent) == 2
    failed = measured.requests.to_pylist()[2:]
    assert {row["error"] for row in failed} == {
        "timeout: the workload's timeout passed before the request was sent"
    }
    assert len(failed) == 2 and {row["sent_ns"] for row in failed} == {None}


def test_a_composer_that_is_killed_is_an_error() -> None:
    others = set(psutil.Process().children())

    def kill_helper(request: Request) -> Answer:
        if request.headers["X-Request-Id"].endswith(".1"):
            for child in set(psutil.Process().children()) - others:
                child.kill()
        return answer(request)

    with pytest.raises(LoadError, match="was killed from outside"):
        run(LOOP, respond=kill_helper)
    assert set(psutil.Process().children()) == others


def test_a_server_that_refuses_the_key_for_token_ids_gets_none() -> None:
    def refuse(request: Request) -> Answer:
        if "return_token_ids" in request.body:
            return refusal("extra inputs are not permitted: return_token_ids")
        return answer(request)

    measured, sent = run(LOOP, respond=refuse)
    assert measured.facts["keys_refused"] == ["return_token_ids"]
    assert measured.errors == [None] * 14 == [None] * len(sent)
