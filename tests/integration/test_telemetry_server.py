"""The sampler beside a server: one that is scripted, and the real llama.cpp."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import psutil
import pytest

from helpers.serving import client_of
from servegrid.study.endpoint import Endpoint
from servegrid.telemetry import sampler, server

HZ = 20.0
KEY = "sk-the-key-of-this-allocation"
PAGE = b"""\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 5.0
vllm:num_requests_waiting{engine="0"} 3.0
vllm:kv_cache_usage_perc{engine="0"} 0.125
vllm:num_preemptions_total{engine="0"} 2.0
"""
TOLD = {"running": 5, "waiting": 3, "kv_cache_usage": 0.125, "preemptions": 2}

Row = dict[str, Any]


class Scripted(BaseHTTPRequestHandler):
    """Tells PAGE to who has the key, once `open` is set; with `narrow`, only to who asks for it."""

    open: threading.Event
    asked: threading.Event
    narrow: bool

    def do_GET(self) -> None:
        self.asked.set()
        self.open.wait(60)
        path, _, query = self.path.partition("?")
        few = parse_qs(query).get("name[]", [])
        there = path == "/metrics" or (self.narrow and "vllm:num_requests_running" in few)
        allowed = self.headers["Authorization"] == f"Bearer {KEY}"
        page = PAGE if bool(few) is self.narrow else b""
        self.send_response((200 if there else 404) if allowed else 401)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["some", "all"])
def scripted(request: pytest.FixtureRequest) -> Iterator[tuple[Endpoint, type[Scripted]]]:
    """A server that tells some of its metrics alone, as vLLM does, and one that tells all."""
    handler = type("OfThisTest", (Scripted,), {"narrow": request.param})
    handler.open, handler.asked = threading.Event(), threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        serving = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        serving.start()
        try:
            yield Endpoint(f"http://127.0.0.1:{httpd.server_port}", "m", KEY), handler
        finally:
            handler.open.set()
            httpd.shutdown()
            serving.join()


def rows_when(file: Path, ready: Callable[[list[Row]], bool]) -> list[Row]:
    deadline = time.monotonic() + 60
    while not ready(rows := sampler.read_samples(file, 0, 0, time.monotonic_ns())):
        assert time.monotonic() < deadline, rows[-3:]
        time.sleep(0.02)
    return rows


def told(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "running" in row]


def test_what_the_server_says_stands_in_a_row_of_the_engine_and_is_null_in_between(
    scripted: tuple[Endpoint, type[Scripted]], tmp_path: Path
) -> None:
    endpoint, handler = scripted
    handler.open.set()
    file = tmp_path / "telemetry.jsonl"
    with sampler.Sampler([os.getpid()], file, endpoint, hz=HZ):
        rows = rows_when(file, lambda rows: len(told(rows)) >= 3)
        (process,) = (each for each in psutil.Process().children() if str(file) in each.cmdline())
        seen_by_others = [*process.cmdline(), *process.environ().values()]
    assert KEY not in " ".join(seen_by_others)
    assert {row["device"] for row in rows} == {"engine"}
    for row in told(rows):
        assert row | TOLD == row
        assert row["memory_bytes"] > 0
    assert len(told(rows)) < len(rows) / 2
    assert not [row for row in rows if "running" not in row and row.keys() & TOLD.keys()]


def test_a_slow_answer_delays_no_sample(
    scripted: tuple[Endpoint, type[Scripted]], tmp_path: Path
) -> None:
    endpoint, handler = scripted
    file = tmp_path / "telemetry.jsonl"
    with sampler.Sampler([os.getpid()], file, endpoint, hz=HZ):
        assert handler.asked.wait(60)
        asked = len(sampler.read_samples(file, 0, 0, time.monotonic_ns()))
        rows = rows_when(file, lambda rows: len(rows) >= asked + 20)
        assert told(rows) == []
        handler.open.set()
        rows_when(file, lambda rows: told(rows) != [])


def test_a_server_that_has_gone_leaves_its_values_null(tmp_path: Path) -> None:
    gone = Endpoint("http://127.0.0.1", "m", KEY, socket=str(tmp_path / "gone"))
    file = tmp_path / "telemetry.jsonl"
    with sampler.Sampler([os.getpid()], file, gone, hz=HZ):
        rows = rows_when(file, lambda rows: len(rows) >= 30)
    assert told(rows) == []


def test_llamacpps_requests_are_seen_to_run_and_to_wait_and_counted_to_the_last(
    llamacpp_endpoint: tuple[Endpoint, Path], tmp_path: Path
) -> None:
    """20 requests of 20 + 60 tokens on 16 slots."""
    endpoint, _ = llamacpp_endpoint
    file = tmp_path / "telemetry.jsonl"
    body = {
        "model": endpoint.model,
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
    }
    counters = server.counter_reader(endpoint)
    before = counters(0)
    with (
        client_of(endpoint) as client,
        sampler.Sampler([os.getpid()], file, endpoint),
        ThreadPoolExecutor(20) as pool,
    ):
        rows_when(file, lambda rows: told(rows) != [])
        answers = pool.map(
            lambda n: client.post("/v1/completions", json=body | {"prompt": [1000 + n] * 20}),
            range(20),
        )
        assert [answer.status_code for answer in answers] == [200] * 20
        after = counters(20)
        rows = rows_when(file, lambda rows: told(rows)[-1]["running"] == 0)
    assert before and after
    grown = {name: after[name] - before[name] for name in after}
    assert grown["llamacpp:tokens_predicted_total"] == 20 * 60
    assert grown["llamacpp:prompt_tokens_total"] == 20 * 20
    assert max(row["running"] for row in told(rows)) == 16
    assert max(row["waiting"] for row in told(rows)) == 4
    assert "kv_cache_usage" not in told(rows)[0]
