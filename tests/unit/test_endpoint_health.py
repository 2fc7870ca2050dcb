"""Readiness of external endpoints: judged by what bring-up proved. All servers are scripted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.scripted_server import Answer, Request, completion, data, refusal, scripted_server
from servegrid.engines import Site, external, start_engine
from servegrid.errors import EngineError
from servegrid.study.config import parse_study
from servegrid.study.endpoint import Endpoint
from servegrid.study.grid import Deployment
from servegrid.telemetry import server as telemetry
from servegrid.telemetry.server import check_health, counter_reader, find_health, read_gauges

MODELS = {"data": [{"id": "m"}]}


def deployment(url: str, tokenizer: Path, **endpoint: Any) -> Deployment:
    entry = {
        "model": "small",
        "tokenizer": str(tokenizer),
        "quantization": "fp16",
        "engine": "external",
        "gpu": "cpu",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "endpoint": {"url": url, "model": "m", "engine": "sglang", **endpoint},
    }
    workload = {"concurrency": 1, "input_len": 8, "output_len": 4}
    return parse_study({"study": "s", "workload": workload, "deployments": [entry]}).deployments[0]


def paths(answers: dict[str, Answer]) -> Callable[[Request], Answer]:
    """GET answers by path, else 404; every completion works."""
    return lambda request: (
        completion(request)
        if request.method == "POST"
        else answers.get(request.path, data("", 404))
    )


HANGING = Answer([(0.0, b"{")], headers={"Content-Length": "9"}, before_s=0.6)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "BRING_UP_TIMEOUT_S", 0.3)
    monkeypatch.setattr(external, "BRING_UP_TIMEOUT_S", 0.3)
    monkeypatch.setattr(telemetry, "HTTP_TIMEOUT_S", 0.3)


@pytest.fixture
def tokenizer(word_tokenizer: Path) -> Path:
    return word_tokenizer


@pytest.mark.parametrize("status", [401, 403, 404, 405, 500, 503])
@pytest.mark.parametrize(
    ("models", "expected"),
    [(data(MODELS), "/v1/models"), (data("", 404), None), (data("", 401), None), (HANGING, None)],
)
def test_an_endpoint_that_answers_a_completion_is_judged_by_what_works(
    status: int, models: Answer, expected: str | None, tokenizer: Path
) -> None:
    answers = {"/health": data("", status), "/v1/models": models}
    with (
        scripted_server(paths(answers)) as server,
        start_engine(deployment(server.url, tokenizer), Site(tokenizer)) as engine,
    ):
        assert engine.endpoint.health_path == expected
        assert engine.facts["health_path"] == expected
        assert engine.healthy()
        # What did not work at the bring-up does not count later.
        answers["/health"] = data("", 418)
        assert engine.healthy()


def test_a_loss_of_health_names_path_status_and_seconds(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"/health": data("ok"), "/v1/models": data(MODELS)}
    with (
        scripted_server(paths(answers)) as server,
        start_engine(deployment(server.url, tokenizer), Site(tokenizer)) as engine,
    ):
        answers["/health"] = data("", 503)
        assert not engine.healthy()
        endpoint = engine.endpoint
    printed = capsys.readouterr().out
    assert re.search(r"is not healthy: GET /health: HTTP 503 after \d\.\d s", printed)
    assert re.fullmatch(
        r"GET /health: Connection refused after \d\.\d s", str(check_health(endpoint))
    )


def test_a_slow_health_check_gets_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "BRING_UP_TIMEOUT_S", 5.0)
    answers = {"/health": Answer(before_s=0.4)}
    with scripted_server(paths(answers)) as server:
        endpoint = find_health(Endpoint(server.url, "m"))
        assert endpoint.health_path == "/health"
        assert 1.2 <= endpoint.health_timeout_s < 4
        assert check_health(endpoint).ok
        answers["/health"] = Answer(before_s=endpoint.health_timeout_s + 1)
        lost = check_health(endpoint)
    assert not lost.ok and lost.status is None and lost.seconds >= 1.2


def test_without_any_way_a_connection_shows_health(tokenizer: Path) -> None:
    with scripted_server(paths({})) as server:
        endpoint = find_health(Endpoint(server.url, "m"))
        assert endpoint.health_path is None and check_health(endpoint).ok
    assert re.fullmatch(
        r"connecting: Connection refused after \d\.\d s", str(check_health(endpoint))
    )


def test_a_failed_test_request_also_names_what_the_models_answered(tokenizer: Path) -> None:
    def respond(request: Request) -> Answer:
        return refusal("loading", 503)

    with (
        scripted_server(respond) as server,
        pytest.raises(EngineError) as caught,
        start_engine(deployment(server.url, tokenizer), Site(tokenizer)),
    ):
        pass
    assert "http_status: 503 loading (GET /v1/models: HTTP 503)" in str(caught.value)


@pytest.mark.parametrize(
    "page",
    [
        b'vllm:num_requests_running{model="\xff\xfe"} 1\n',
        b"\x1f\x8b\x08\x00\x00",
        b'vllm:num_requests_running{model_name="a} 1.0\n',
        b"vllm:num_requests_running{ 1.0\n",
        b"vllm:num_requests_running one\n",
        b"vllm:num_requests_running\n",
        b"vllm:x{a=b,,} } 1\n",
        b"# TYPE vllm:x\nvllm:x\x00 1\n",
    ],
)
def test_malformed_metrics_are_null_and_told_once(
    page: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"/metrics": Answer([(0.0, page)], media_type="text/plain")}
    with scripted_server(paths(answers)) as server:
        endpoint = Endpoint(server.url, "m")
        read = counter_reader(endpoint)
        assert read(0) is None and read(3) is None
        assert read_gauges(endpoint) == {}
    warning = capsys.readouterr().err
    assert warning.count(f"{server.url}/metrics is malformed") == 1 and warning.isascii()


def test_metrics_that_are_no_numbers_are_left_out() -> None:
    page = b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 2\nvllm:x +Inf\n"
    with scripted_server(paths({"/metrics": Answer([(0.0, page)])})) as server:
        assert read_gauges(Endpoint(server.url, "m")) == {"waiting": 2.0}
