"""The sampler reads gauges of a fake server and of the real llama.cpp."""

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

from helpers.serving import http_client
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
GAUGES = {"running": 5, "waiting": 3, "kv_cache_usage": 0.125, "preemptions": 2}

Row = dict[str, Any]


class Scripted(BaseHTTPRequestHandler):
    """Answers PAGE to requests with the key once `open` is set; with `narrow`, only by name."""

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
    """A server that can return selected metrics, like vLLM, and one that always returns all."""
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


def with_gauges(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "running" in row]


def test_gauges_are_in_rows_of_the_engine_and_null_in_the_rows_between(
    scripted: tuple[Endpoint, type[Scripted]], tmp_path: Path
) -> None:
    endpoint, handler = scripted
    handler.open.set()
    file = tmp_path / "telemetry.jsonl"
    with sampler.Sampler([os.getpid()], file, endpoint, hz=HZ):
        rows = rows_when(file, lambda rows: len(with_gauges(rows)) >= 3)
        (process,) = (each for each in psutil.Process().children() if str(file) in each.cmdline())
        visible_to_others = [*process.cmdline(), *process.environ().values()]
    assert KEY not in " ".join(visible_to_others)
    assert {row["device"] for row in rows} == {"engine"}
    for row in with_gauges(rows):
        assert row | GAUGES == row
        assert row["memory_bytes"] > 0
    assert len(with_gauges(rows)) < len(rows) / 2
    assert not [row for row in rows if "running" not in row and row.keys() & GAUGES.keys()]


def test_a_slow_answer_delays_no_sample(
    scripted: tuple[Endpoint, type[Scripted]], tmp_path: Path
) -> None:
    endpoint, handler = scripted
    file = tmp_path / "telemetry.jsonl"
    with sampler.Sampler([os.getpid()], file, endpoint, hz=HZ):
        assert handler.asked.wait(60)
        asked = len(sampler.read_samples(file, 0, 0, time.monotonic_ns()))
        rows = rows_when(file, lambda rows: len(rows) >= asked + 20)
        assert with_gauges(rows) == []
        handler.open.set()
        rows_when(file, lambda rows: with_gauges(rows) != [])


def test_gauges_of_a_dead_server_are_null(tmp_path: Path) -> None:
    gone = Endpoint("http://127.0.0.1", "m", KEY, socket=str(tmp_path / "gone"))
    file = tmp_path / "telemetry.jsonl"
    with sampler.Sampler([os.getpid()], file, gone, hz=HZ):
        rows = rows_when(file, lambda rows: len(rows) >= 30)
    assert with_gauges(rows) == []


def test_running_and_waiting_requests_of_llamacpp_are_sampled_and_all_are_counted(
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
        http_client(endpoint) as client,
        sampler.Sampler([os.getpid()], file, endpoint),
        ThreadPoolExecutor(20) as pool,
    ):
        rows_when(file, lambda rows: with_gauges(rows) != [])
        answers = pool.map(
            lambda n: client.post("/v1/completions", json=body | {"prompt": [1000 + n] * 20}),
            range(20),
        )
        assert [answer.status_code for answer in answers] == [200] * 20
        after = counters(20)
        rows = rows_when(file, lambda rows: with_gauges(rows)[-1]["running"] == 0)
    assert before and after
    increases = {name: after[name] - before[name] for name in after}
    assert increases["llamacpp:tokens_predicted_total"] == 20 * 60
    assert increases["llamacpp:prompt_tokens_total"] == 20 * 20
    assert max(row["running"] for row in with_gauges(rows)) == 16
    assert max(row["waiting"] for row in with_gauges(rows)) == 4
    assert "kv_cache_usage" not in with_gauges(rows)[0]
