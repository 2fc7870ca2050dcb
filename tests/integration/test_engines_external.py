"""An endpoint that is already up, measured as it is: llama.cpp's server, which the test started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from conftest import DemoModel
from helpers.faulty_server import MODEL, FaultScript, start_faulty_server
from servegrid.analysis import tables
from servegrid.cli.main import main
from servegrid.engines import Site, start_engine
from servegrid.errors import EngineError
from servegrid.records import parquet
from servegrid.run import service
from servegrid.study.config import parse_study
from servegrid.study.grid import Deployment, Study

VARIABLE = "LLAMACPP_KEY"
KEY = "the-key-that-nobody-may-see"
SERVED = "smollm2"


@contextmanager
def llama_server(gguf: Path, keys: list[str]) -> Iterator[str]:
    """The URL of llama.cpp's server in a process that is the test's, not an engine of ours."""
    settings = {
        "model.path": str(gguf),
        "model_alias": [SERVED],
        "n_parallel": 4,
        "n_ctx": 4 * 512,
        "fit_params": False,
        "n_gpu_layers": 0,
        # Two servers on few cores: threads that wait for each other spin.
        "cpuparams.n_threads": 1,
        "cpuparams_batch.n_threads": 1,
        "cache_ram_mib": 0,
        "endpoint_metrics": True,
        "ui": False,
        "hostnames": ["127.0.0.1"],
        "port": 0,
        "api_keys": keys,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "servegrid.engines.llamacpp_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with process.stdin as stream:
            json.dump(settings, stream)
        url: str = json.loads(process.stdout.readline())["address"]
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def urls(demo_model: DemoModel) -> Iterator[dict[bool, str]]:
    """The URLs of a server that wants a key (True) and of one that wants none."""
    with llama_server(demo_model.gguf, [KEY]) as locked, llama_server(demo_model.gguf, []) as free:
        yield {True: locked, False: free}


def study(url: str, **endpoint: Any) -> Study:
    """Bursts of 2 requests of 12 and of 40 prompt tokens, 6 output tokens each."""
    return parse_study(
        {
            "study": "external",
            "workload": {"concurrency": 2, "input_len": [12, 40], "output_len": 6},
            "deployments": [
                {
                    "model": "smollm2-135m-instruct",
                    "tokenizer": "demo:smollm2-135m-instruct",
                    "quantization": "q4_1",
                    "engine": "external",
                    "gpu": "a100-40gb",
                    "gpu_count": 2,
                    "max_model_len": 512,
                    "max_num_seqs": 4,
                    "endpoint": {"url": url, "model": SERVED, "engine": "llama-server", **endpoint},
                }
            ],
        }
    )


def deployment(url: str, **endpoint: Any) -> Deployment:
    return study(url, **endpoint).deployments[0]


@pytest.fixture
def affinity() -> Iterator[None]:
    """A cell keeps its process to the client's cores, and here that is the test's."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("affinity")
@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_its_cells_are_measured_and_only_what_is_known_of_it_is_told(
    urls: dict[bool, str],
    api: str,
    locked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    key = {"api_key_env": VARIABLE} if locked else {}
    if locked:
        monkeypatch.setenv(VARIABLE, KEY)
    of = study(f"{urls[locked]}/v1/", api=api, version="b1", **key)
    resources = {"max_concurrency": 2, "startup_s": 60}
    with service.serve("a", {"spec": of.trials[0].spec_json}, resources) as served:
        assert served.healthy()
        handover = Path(served.env[service.INFO_VARIABLE])
        monkeypatch.setenv(service.INFO_VARIABLE, str(handover))
        for trial in of.trials:
            folder = tmp_path / trial.id
            requests, samples = folder / "requests.parquet", folder / "telemetry.parquet"
            assert trial.measure_trial(trial, requests, samples, last_attempt=True) == "ok"
        assert KEY not in handover.read_text()
    assert httpx.get(f"{urls[locked]}/health").status_code == 200, "it was left as it was"

    rows = tables.gather(of.trials, tmp_path)
    assert rows["verdict"].tolist() == ["ok", "ok"]
    assert set(rows["engine"]) == {"llama-server"} and set(rows["engine_version"]) == {"b1"}
    assert set(rows["gpu"]) == {"a100-40gb"} and set(rows["gpu_count"]) == {2}
    unknown = ["memory_peak_bytes", "power_w_mean", "gpu_utilization_mean", "waiting_mean"]
    assert rows[unknown].isna().all().all()
    # What else a busy machine does to a cell is not looked at here. Of completions the server may
    # well have kept a first token; of a chat it keeps what the template puts before each.
    reasons = "".join(rows["invalid_reason"].dropna())
    assert "tokens:" not in reasons
    if api == "chat":
        assert rows["prefix_hit_tokens"].min() > 0 and "prefix_cache:" not in reasons
    for trial in of.trials:
        written = (tmp_path / trial.id / "requests.parquet").read_bytes()
        record = parquet.read_record(tmp_path / trial.id / "requests.parquet")
        assert KEY not in json.dumps(record) and KEY.encode() not in written
        assert pq.read_table(tmp_path / trial.id / "telemetry.parquet").num_rows == 0
        assert record["engine"]["external"] is True
        assert record["client"]["salt"].startswith(f"{trial.digest}-")
        told = pq.read_table(tmp_path / trial.id / "requests.parquet").to_pylist()
        assert [sum(each["chunk_tokens"]) for each in told] == [6, 6]
        assert {each["completion_tokens"] for each in told} == {6}
        # The model's template says more to it than the user did, in 30 tokens.
        added = {"completions": 0, "chat": TEMPLATE_TOKENS}[api]
        assert {each["prompt_tokens"] for each in told} == {trial.workload.input_len + added}
        assert record["client"]["prompt_tokens_added"] == added
        assert record["client"]["prompt_form"] == {"completions": "ids", "chat": "messages"}[api]
    assert KEY not in "".join(capfd.readouterr())


TEMPLATE_TOKENS = 30
"""What the template of SmolLM2 puts around a first message of the user: see the next test."""


def test_the_template_has_the_tokens_that_the_server_adds(demo_model: DemoModel) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model.folder / "tokenizer.json"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    whole = tokenizer.encode(f"{text}<|im_start|>assistant\n", add_special_tokens=False).ids
    assert len(whole) - 1 == TEMPLATE_TOKENS


def refusal(deployment: Deployment, demo_model: DemoModel) -> str:
    with (
        pytest.raises(EngineError) as caught,
        start_engine(deployment, Site(models=demo_model.models)),
    ):
        pass
    told = str(caught.value)
    assert told.startswith(f"deployment `{deployment.name}`: ") and "\n" not in told
    return told


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_key_that_is_missing_or_wrong_is_told_with_its_variable(
    urls: dict[bool, str], demo_model: DemoModel, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    keyed = deployment(urls[True], api=api, api_key_env=VARIABLE)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert f"the variable {VARIABLE} holds no API key. Export it" in refusal(keyed, demo_model)
    monkeypatch.setenv(VARIABLE, "another-key")
    told = refusal(keyed, demo_model)
    assert f"refuses the API key in {VARIABLE} (HTTP 401). Export the variable" in told
    assert "another-key" not in told
    told = refusal(deployment(urls[True], api=api), demo_model)
    assert "wants an API key (HTTP 401)" in told and "`endpoint.api_key_env`" in told


def test_a_model_that_it_does_not_serve_is_told_with_those_that_it_does(
    urls: dict[bool, str], demo_model: DemoModel
) -> None:
    told = refusal(deployment(urls[False], model="mixtral"), demo_model)
    assert f"serves no `mixtral`, but `{SERVED}`. Correct `endpoint.model`" in told


def test_an_endpoint_that_is_not_there_is_told(demo_model: DemoModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    told = refusal(deployment(f"http://127.0.0.1:{port}"), demo_model)
    assert f"http://127.0.0.1:{port} does not answer (Connection refused)" in told


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (FaultScript(usage="none"), "failed: usage_missing: the stream has no usage"),
        (
            FaultScript(fault="fewer_tokens"),
            "failed: wrong_completion_tokens: 3 generated, 4 requested",
        ),
        (
            FaultScript(fault="not_a_stream"),
            "failed: malformed: the response is not an event stream",
        ),
    ],
)
def test_an_endpoint_that_does_not_do_what_measuring_needs_is_refused_before_it(
    script: FaultScript, told: str, demo_model: DemoModel
) -> None:
    with start_faulty_server(script) as server:
        of = deployment(server.endpoint.base_url, model=MODEL)
        assert told in refusal(of, demo_model)


def test_nothing_of_it_is_ours(urls: dict[bool, str], demo_model: DemoModel) -> None:
    before = psutil.Process().children()
    with start_engine(deployment(urls[False]), Site(models=demo_model.models)) as engine:
        assert engine.pids() == []
        assert psutil.Process().children() == before
        assert engine.healthy()


def test_an_endpoint_that_has_gone_is_not_healthy(demo_model: DemoModel) -> None:
    with (
        start_faulty_server(FaultScript()) as server,
        start_engine(
            deployment(server.endpoint.base_url, model=MODEL), Site(models=demo_model.models)
        ) as engine,
    ):
        assert engine.healthy()
        server.process.kill()
        server.process.wait()
        assert not engine.healthy()


def test_the_command_measures_a_chat(
    urls: dict[bool, str],
    demo_model: DemoModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    out = tmp_path / "cell.parquet"
    words = [
        *(
            "load",
            "--url",
            urls[True],
            "--model",
            SERVED,
            "--api",
            "chat",
            "--concurrency",
            "2",
        ),
        *("--requests", "4", "--input-len", "12", "--output-len", "5", "--protocol", "burst"),
        *("--api-key-env", VARIABLE, "--output", str(out)),
    ]
    assert main([*words, "--tokenizer", str(demo_model.folder)]) == 0
    rows = pq.read_table(out).to_pylist()
    assert {each["prompt_tokens"] for each in rows} == {12 + TEMPLATE_TOKENS}
    assert {each["completion_tokens"] for each in rows} == {5}
    assert parquet.read_record(out)["endpoint"]["api"] == "chat"
    capsys.readouterr()
    assert main(words) == 2
    assert "Name the model's tokenizer.json" in capsys.readouterr().err
