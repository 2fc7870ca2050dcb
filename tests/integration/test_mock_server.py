"""The scripted server that ships with the package: what it answers, what it logs, and its end."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from servegrid.mock_server.process import Server, running
from servegrid.mock_server.responses import MODEL, Script

COMPLETIONS = "/v1/completions"


def client_of(server: Server) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=server.endpoint.socket)
    return httpx.Client(base_url=server.endpoint.base_url, transport=transport, timeout=20)


def events_in(text: str) -> list[Any]:
    *events, last = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert last == "[DONE]"
    return [json.loads(each) for each in events]


def test_each_piece_is_sent_at_its_time_after_the_request_was_read() -> None:
    with running(Script(ttft_s=0.05, itl_s=0.01)) as server, client_of(server) as client:
        client.post(COMPLETIONS, json={"prompt": [1, 2], "max_tokens": 4, "stream": True})
        log = server.log()
    ((name, sent),) = log.sent.items()
    assert name == "#0"
    due = [log.read[name] + after * 1_000_000 for after in (50, 60, 70, 80)]
    late = [time - each for time, each in zip(sent, due, strict=True)]
    assert min(late) >= 0


def test_completions_that_come_later_can_be_slower() -> None:
    with running(Script(slower_s=0.05)) as server, client_of(server) as client:
        for _ in range(3):
            client.post(COMPLETIONS, json={"prompt": "one", "max_tokens": 1})
        log = server.log()
    after = [log.sent[name][0] - log.read[name] for name in ("#0", "#1", "#2")]
    assert all(later >= number * 50_000_000 for number, later in enumerate(after))


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [({"max_tokens": 3}, 3), ({"max_completion_tokens": 2}, 2), ({}, 16)],
)
def test_a_text_as_prompt_is_answered_too(asked: dict[str, int], tokens: int) -> None:
    with running(Script()) as server, client_of(server) as client:
        response = client.post(COMPLETIONS, json={"prompt": "hello", "stream": True} | asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events_in(response.text)
    assert [len(event["choices"]) for event in told] == [1] * tokens + [0]
    assert told[-1]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": tokens,
        "total_tokens": 5 + tokens,
    }


def test_its_metrics_are_the_gauges_and_what_the_completions_have_added() -> None:
    script = Script(gauges=(("vllm:num_requests_waiting", 2.0),), counters=(("hits_total", 16.0),))
    with running(script) as server, client_of(server) as client:
        before = client.get("/metrics").text
        for _ in range(2):
            client.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 1})
        after = client.get("/metrics").text
    assert before == "vllm:num_requests_waiting 2.0\nhits_total 0.0\n"
    assert after == "vllm:num_requests_waiting 2.0\nhits_total 32.0\n"


def test_what_any_client_may_ask_it_is_answered() -> None:
    with running(Script()) as server, client_of(server) as client:
        assert client.get("/health").status_code == 200
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == [MODEL]
        for refused in (
            client.get("/version"),
            client.post("/tokenize", json={"prompt": "x"}),
            client.post(COMPLETIONS, content=b"{"),
        ):
            assert refused.status_code in (400, 404)
            assert refused.json()["error"]["message"]
        assert server.log().requests == []


def test_requests_are_told_apart_whatever_they_are_called() -> None:
    with running(Script()) as server, client_of(server) as client:
        for headers in ({"X-Request-Id": "a"}, {}, {"X-Request-Id": "a"}):
            client.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 2}, headers=headers)
        log = server.log()
    assert list(log.sent) == list(log.read) == ["a", "#1", "a#2"]
    times = [time for name in log.sent for time in (log.read[name], *log.sent[name])]
    assert all(one <= other for one, other in pairwise(times))


def test_on_a_unix_socket_nothing_stays(tmp_path: Path) -> None:
    script = Script(unix_socket=str(tmp_path / "socket"))
    with running(script) as server, client_of(server) as client:
        assert client.get("/health").status_code == 200
    assert list(tmp_path.iterdir()) == []
    assert server.process.returncode == 0


def test_it_ends_even_while_a_client_takes_nothing() -> None:
    asked = json.dumps({"prompt": [1], "max_tokens": 100_000})
    with contextlib.ExitStack() as stack:
        with running(Script()) as server, client_of(server) as client:
            port = str(httpx.URL(server.endpoint.base_url).port)
            stuck = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", STUCK, port, asked], stdout=subprocess.PIPE)
            )
            stack.callback(stuck.kill)
            assert stuck.stdout is not None and stuck.stdout.read(1)
            with pytest.raises(httpx.ReadTimeout):  # it waits for room for those 25 MB
                client.get("/health", timeout=3)
        assert stuck.poll() is None
        assert server.process.returncode == 0


STUCK = """
import socket, sys, time
body = sys.argv[2].encode()
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
head = f"POST /v1/completions HTTP/1.1\\r\\ncontent-length: {len(body)}\\r\\n\\r\\n"
connection.sendall(head.encode() + body)
print("!", flush=True)
time.sleep(99)
"""
