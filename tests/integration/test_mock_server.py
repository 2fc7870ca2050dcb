"""The mock server that ships with the package: its responses, its log, and its end."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from servegrid.mock_server.process import MockServer, start_mock_server
from servegrid.mock_server.responses import MODEL, ResponseScript

COMPLETIONS = "/v1/completions"


def http_client(server: MockServer) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=server.endpoint.socket)
    return httpx.Client(base_url=server.endpoint.base_url, transport=transport, timeout=20)


def parse_events(text: str) -> list[Any]:
    *events, last = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


def test_no_piece_is_sent_before_it_is_due() -> None:
    with (
        start_mock_server(ResponseScript(ttft_s=0.05, itl_s=0.01)) as server,
        http_client(server) as client,
    ):
        client.post(COMPLETIONS, json={"prompt": [1, 2], "max_tokens": 4, "stream": True})
        log = server.log()
    ((name, sent),) = log.sent.items()
    assert name == "#0"
    due = [log.read[name] + after * 1_000_000 for after in (50, 60, 70, 80)]
    late = [sent_ns - due_ns for sent_ns, due_ns in zip(sent, due, strict=True)]
    assert min(late) >= 0


def test_later_completions_can_be_slower() -> None:
    with (
        start_mock_server(ResponseScript(slowdown_s=0.05)) as server,
        http_client(server) as client,
    ):
        for _ in range(3):
            client.post(COMPLETIONS, json={"prompt": "one", "max_tokens": 1})
        log = server.log()
    after = [log.sent[name][0] - log.read[name] for name in ("#0", "#1", "#2")]
    assert all(later >= number * 50_000_000 for number, later in enumerate(after))


@pytest.mark.parametrize(
    ("limit", "tokens"),
    [({"max_tokens": 3}, 3), ({"max_completion_tokens": 2}, 2), ({}, 16)],
)
def test_a_text_prompt_gets_a_completion(limit: dict[str, int], tokens: int) -> None:
    with start_mock_server(ResponseScript()) as server, http_client(server) as client:
        response = client.post(COMPLETIONS, json={"prompt": "hello", "stream": True} | limit)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = parse_events(response.text)
    assert [len(event["choices"]) for event in events] == [1] * tokens + [0]
    assert events[-1]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": tokens,
        "total_tokens": 5 + tokens,
    }


def test_metrics_show_the_gauges_and_the_counters_grown_by_completions() -> None:
    script = ResponseScript(
        gauges=(("vllm:num_requests_waiting", 2.0),), counters=(("hits_total", 16.0),)
    )
    with start_mock_server(script) as server, http_client(server) as client:
        before = client.get("/metrics").text
        for _ in range(2):
            client.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 1})
        after = client.get("/metrics").text
    assert before == "vllm:num_requests_waiting 2.0\nhits_total 0.0\n"
    assert after == "vllm:num_requests_waiting 2.0\nhits_total 32.0\n"


def test_every_path_has_a_response() -> None:
    with start_mock_server(ResponseScript()) as server, http_client(server) as client:
        assert client.get("/health").status_code == 200
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [MODEL]
        for refused in (
            client.get("/version"),
            client.post("/tokenize", json={"prompt": "x"}),
            client.post(COMPLETIONS, content=b"{"),
        ):
            assert refused.status_code in (400, 404)
            assert refused.json()["error"]["message"]
        assert server.log().requests == []


def test_requests_with_the_same_or_no_id_are_logged_separately() -> None:
    with start_mock_server(ResponseScript()) as server, http_client(server) as client:
        for headers in ({"X-Request-Id": "a"}, {}, {"X-Request-Id": "a"}):
            client.post(COMPLETIONS, json={"prompt": [1], "max_tokens": 2}, headers=headers)
        log = server.log()
    assert list(log.sent) == list(log.read) == ["a", "#1", "a#2"]
    times = [time for name in log.sent for time in (log.read[name], *log.sent[name])]
    assert all(one <= other for one, other in pairwise(times))


def test_the_unix_socket_is_removed_at_the_end(tmp_path: Path) -> None:
    script = ResponseScript(unix_socket=str(tmp_path / "socket"))
    with start_mock_server(script) as server, http_client(server) as client:
        assert client.get("/health").status_code == 200
    assert list(tmp_path.iterdir()) == []
    assert server.process.returncode == 0


def test_it_ends_even_if_a_client_does_not_read() -> None:
    body = json.dumps({"prompt": [1], "max_tokens": 100_000})
    with contextlib.ExitStack() as stack:
        with start_mock_server(ResponseScript()) as server, http_client(server) as client:
            port = str(httpx.URL(server.endpoint.base_url).port)
            stuck = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", STUCK, port, body], stdout=subprocess.PIPE)
            )
            stack.callback(stuck.kill)
            assert stuck.stdout is not None and stuck.stdout.read(1)
            with pytest.raises(httpx.ReadTimeout):  # it waits to send those 25 MB
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


PATHS = (COMPLETIONS, "/v1/models", "/metrics", "/log", "/HEALTH", "//health", "/health/log")


def test_with_a_key_every_path_but_the_health_check_wants_it() -> None:
    with start_mock_server(ResponseScript(), api_key="secret") as server:
        with http_client(server) as client:
            for path in PATHS:
                for key in (None, "Bearer", "Bearer secre", "Bearer secret2", "secret", "Bearer é"):
                    headers = {} if key is None else {"Authorization": key.encode("latin-1")}
                    refused = client.request("POST", path, headers=headers)
                    assert refused.status_code == 401, (path, key)
            assert client.get("/health").status_code == 200
        assert server.log().requests == []  # the client sends the key
        assert "secret" not in " ".join(psutil.Process(server.process.pid).cmdline())


HOSTILE = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "no path": b"GET\r\n\r\n",
    "no length": b"POST /log HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    "negative length": b"POST /log HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    "huge length": b"POST /log HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n",
    "a number of 9000 digits": b"POST /log HTTP/1.1\r\ncontent-length: "
    + b"9" * 9000
    + b"\r\n\r\n",
    "foreign digits": "POST /log HTTP/1.1\r\ncontent-length: ٣\r\n\r\n".encode(),
    "endless head": b"GET /log HTTP/1.1\r\n" + b"x: y\r\n" * 20_000,
    "no object": b"POST /v1/completions HTTP/1.1\r\ncontent-length: 2\r\n\r\n[]",
    "deep JSON": b"POST /v1/completions HTTP/1.1\r\ncontent-length: 60000\r\n\r\n" + b"[" * 60000,
}


@pytest.mark.parametrize("key", [None, "secret"])
def test_hostile_requests_end_their_own_connection_only(key: str | None) -> None:
    with start_mock_server(ResponseScript(), api_key=key) as server:
        address = ("127.0.0.1", httpx.URL(server.endpoint.base_url).port)
        for name, data in HOSTILE.items():
            with (
                socket.create_connection(address, timeout=10) as connection,
                contextlib.suppress(ConnectionError),
            ):
                connection.sendall(data)
                status = connection.recv(16)[9:12]
                assert status == b"400" or (key is not None and status == b"401"), name
        assert server.log().requests == []
        assert server.process.poll() is None
