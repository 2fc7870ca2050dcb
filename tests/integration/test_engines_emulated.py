"""The emulated engine with the real client: its timing and each of its faults."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from servegrid.client import Measurement, measure
from servegrid.engines import Engine, Site, start_engine
from servegrid.errors import EngineError, LoadError, NotServableError
from servegrid.records.verdict import decide_verdict
from servegrid.study.config import load_study
from servegrid.study.grid import Workload

ROOT = Path(__file__).parents[2]
MISTRAL = load_study(ROOT / "config/rehearsal.yaml").deployments[0]
SITE = Site(models=Path("nowhere"))
QUICK = {"timing": "inria-2024", "time_scale": 0.05}


def workload(concurrency: int = 4, input_len: int = 31, **changes: Any) -> Workload:
    fixed = {"protocol": "burst", "output_len": 100, "warmup_waves": 0, "idle_timeout_s": 1.0}
    return Workload(
        concurrency=concurrency,
        input_len=input_len,
        **({"requests": concurrency} | fixed | changes),
    )


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    arguments = QUICK | getattr(request, "param", {})
    with start_engine(replace(MISTRAL, engine_args=arguments), SITE) as engine:
        yield engine


def with_fault(kind: str, **when: int) -> Any:
    faults = [{"kind": kind, **when}]
    return pytest.mark.parametrize("engine", [{"faults": faults}], indirect=True)


def verdict(engine: Engine, measured: Measurement) -> str:
    return decide_verdict(measured.errors, engine.healthy()).name


def measured(engine: Engine, wanted: Workload) -> Measurement:
    return measure(engine.endpoint, wanted, None, "salt")


@pytest.mark.parametrize(
    ("concurrency", "input_len", "published"), [(1, 31, 1.8), (8, 480, 3.0), (32, 31, 4.2)]
)
def test_a_burst_takes_the_published_time(
    engine: Engine, concurrency: int, input_len: int, published: float
) -> None:
    result = measured(engine, workload(concurrency, input_len))
    assert result.errors == [None] * concurrency
    rows = result.requests.to_pylist()
    assert {row["prompt_tokens"] for row in rows} == {input_len}
    assert {row["completion_tokens"] for row in rows} == {100}
    took = (max(row["done_ns"] for row in rows) - min(row["sent_ns"] for row in rows)) / 1e9
    # It can only be late: by its timers, and on a busy machine.
    assert published * 0.05 - 0.002 < took < published * 0.05 + 0.5
    assert engine.facts["engine"] == "emulated"
    assert engine.facts["time_scale"] == 0.05


def test_a_closed_loop_is_not_faster_than_a_single_request(engine: Engine) -> None:
    result = measured(engine, workload(4, protocol="closed_loop", requests=16))
    e2el = [(row["token_ns"][-1] - row["sent_ns"]) / 1e9 for row in result.requests.to_pylist()]
    assert len(e2el) == 16
    assert min(e2el) > 1.8 * 0.05 - 0.002  # never faster than alone


def test_replicas_share_the_load_behind_one_endpoint() -> None:
    """16 requests of 480 tokens. In the article, 8 take 3.0 s on two V100, and 16 take 4.2 s."""
    arguments = {"timing": "inria-2024", "time_scale": 0.2, "replicas": 2}
    with start_engine(replace(MISTRAL, gpu_count=4, engine_args=arguments), SITE) as engine:
        result = measured(engine, workload(16, 480))
    assert result.errors == [None] * 16
    rows = result.requests.to_pylist()
    took = (max(row["done_ns"] for row in rows) - min(row["sent_ns"] for row in rows)) / 1e9
    assert 3.0 * 0.2 - 0.002 < took < 4.2 * 0.2 - 0.002
    assert engine.facts["data_parallel_size"] == 2


@with_fault("http_500", concurrency=4)
def test_http_500(engine: Engine) -> None:
    assert verdict(engine, measured(engine, workload(2))) == "ok"
    result = measured(engine, workload(4))
    assert verdict(engine, result) == "http_error"
    assert "Internal server error (emulated)" in str(result.errors[0])


@with_fault("refuse", input_len=63)
def test_refused_connections(engine: Engine) -> None:
    assert verdict(engine, measured(engine, workload(2))) == "ok"
    assert verdict(engine, measured(engine, workload(2, 63))) == "http_error"


@with_fault("stall", concurrency=2)
def test_stalled_responses(engine: Engine) -> None:
    result = measured(engine, workload(2))
    assert verdict(engine, result) == "timeout"
    assert len(result.requests["token_ns"].to_pylist()[0]) == 1


@with_fault("die", concurrency=2)
def test_an_engine_that_dies(engine: Engine) -> None:
    assert engine.healthy()
    assert verdict(engine, measured(engine, workload(2))) == "server_died"


@with_fault("oom", concurrency=2)
def test_an_engine_that_runs_out_of_memory(engine: Engine) -> None:
    result = measured(engine, workload(2))
    assert "CUDA out of memory (emulated)" in str(result.errors[0])
    deadline = time.monotonic() + 5
    while engine.healthy() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert verdict(engine, result) == "oom"


@pytest.mark.parametrize("engine", [{"timing": "inria-2024", "time_scale": 0.001}], indirect=True)
def test_workloads_outside_the_table_are_not_served(engine: Engine) -> None:
    result = measured(engine, workload(1, 3000))
    assert verdict(engine, result) == "http_error"
    assert "The table has no value for 1 requests with prompts of 3000" in str(result.errors[0])


def test_a_start_that_runs_out_of_memory() -> None:
    deployment = replace(MISTRAL, engine_args=QUICK | {"faults": [{"kind": "oom_at_start"}]})
    with (
        pytest.raises(NotServableError, match="did not start: out of memory") as raised,
        start_engine(deployment, SITE),
    ):
        pass
    assert raised.value.verdict == "oom_at_start"


def test_a_slow_start() -> None:
    faults = [{"kind": "slow_start", "seconds": 0.3}]
    deployment = replace(MISTRAL, engine_args=QUICK | {"faults": faults})
    began = time.monotonic()
    with start_engine(deployment, SITE):
        assert time.monotonic() - began > 0.3
    with (
        pytest.raises(EngineError, match=r"did not start within 0\.1 s"),
        start_engine(deployment, replace(SITE, startup_s=0.1)),
    ):
        pass


def test_requests_without_the_api_key_are_refused(engine: Engine) -> None:
    other = replace(engine.endpoint, api_key="other")
    with pytest.raises(LoadError, match="key"):
        measure(other, workload(), None, "salt")


def test_it_serves_on_a_unix_socket_and_leaves_nothing_behind() -> None:
    deployment = replace(MISTRAL, engine_args=QUICK)
    with start_engine(deployment, replace(SITE, socket="unix")) as engine:
        assert engine.pids() == [os.getpid()]
        assert verdict(engine, measured(engine, workload())) == "ok"
        path = engine.endpoint.socket
        assert path is not None
    assert not Path(path).exists()
    with start_engine(deployment, SITE) as engine:
        url = httpx.URL(engine.endpoint.base_url)
    with socket.socket() as probe:
        assert probe.connect_ex((url.host, url.port or 80)) != 0
