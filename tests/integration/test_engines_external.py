"""An external endpoint: llama.cpp's server, started by the test and not by servegrid."""

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

from helpers.demo_model import DemoModel
from helpers.faulty_server import MODEL, FaultScript, start_faulty_server
from servegrid.analysis import tables
from servegrid.cli.main import main
from servegrid.engines import Site, start_engine
from servegrid.errors import EngineError
from servegrid.records import parquet
from servegrid.run import service
from servegrid.run.trial import measure_trial
from servegrid.study.config import parse_study
from servegrid.study.grid import Deployment, Study

VARIABLE = "LLAMACPP_KEY"
KEY = "the-key-that-nobody-may-see"
SERVED = "smollm2"

pytestmark = pytest.mark.crowded


@contextmanager
def llama_server(gguf: Path, keys: list[str]) -> Iterator[str]:
    """The URL of a llama.cpp server that the test starts; it is not an engine of servegrid."""
    settings = {
        "model.path": str(gguf),
        "model_alias": [SERVED],
        "n_parallel": 4,
        "n_ctx": 4 * 512,
        "fit_params": False,
        "n_gpu_layers": 0,
        # Two servers share few cores, and llama.cpp's threads wait by spinning.
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
    """The URLs of a server that requires an API key (True) and of one that does not (False)."""
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
    """Restores the test's cores: a cell pins its process, which is here the test's."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("affinity")
@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_cells_of_an_external_endpoint_are_measured_without_telemetry(
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
        monkeypatch.setenv(f"{VARIABLE}_URL", urls[locked])
    external_study = study(f"{urls[locked]}/v1/", api=api, version="b1", **key)
    resources = {"max_concurrency": 2, "startup_s": 60}
    with service.serve("a", {"spec": external_study.trials[0].spec_json}, resources) as served:
        assert served.healthy()
        info = Path(served.env[service.INFO_VARIABLE])
        monkeypatch.setenv(service.INFO_VARIABLE, str(info))
        for trial in external_study.trials:
            folder = tmp_path / trial.id
            requests, samples = folder / "requests.parquet", folder / "telemetry.parquet"
            assert measure_trial(trial, requests, samples, last_attempt=True) == "ok"
        assert KEY not in info.read_text(encoding="utf-8")
    assert httpx.get(f"{urls[locked]}/health").status_code == 200, "the server still runs"

    rows = tables.gather_trials(external_study.trials, tmp_path)
    assert rows["verdict"].tolist() == ["ok", "ok"]
    assert set(rows["engine"]) == {"llama-server"} and set(rows["engine_version"]) == {"b1"}
    assert set(rows["gpu"]) == {"a100-40gb"} and set(rows["gpu_count"]) == {2}
    unknown = ["memory_peak_bytes", "power_w_mean", "gpu_utilization_mean", "waiting_mean"]
    assert rows[unknown].isna().all().all()
    # A busy machine can break other rules. With completions, the server may have cached a first
    # token; with chat, it caches the beginning of the template.
    broken = {rule for rules in rows["invalid_rules"].dropna() for rule in rules}
    assert "tokens" not in broken
    if api == "chat":
        assert rows["prefix_hit_tokens"].min() > 0 and "prefix_cache" not in broken
    for trial in external_study.trials:
        written = (tmp_path / trial.id / "requests.parquet").read_bytes()
        record = parquet.read_record(tmp_path / trial.id / "requests.parquet")
        assert KEY not in json.dumps(record) and KEY.encode() not in written
        assert pq.read_table(tmp_path / trial.id / "telemetry.parquet").num_rows == 0
        assert record["engine"]["external"] is True
        assert record["client"]["salt"].startswith(f"{trial.digest}-")
        responses = pq.read_table(tmp_path / trial.id / "requests.parquet").to_pylist()
        assert [sum(response["chunk_tokens"]) for response in responses] == [6, 6]
        assert {response["completion_tokens"] for response in responses} == {6}
        # The chat template adds 30 tokens to the user's message.
        added = {"completions": 0, "chat": TEMPLATE_TOKENS}[api]
        prompt_tokens = {response["prompt_tokens"] for response in responses}
        assert prompt_tokens == {trial.workload.input_len + added}
        assert record["client"]["prompt_tokens_added"] == added
        assert record["client"]["prompt_form"] == {"completions": "ids", "chat": "messages"}[api]
    assert KEY not in "".join(capfd.readouterr())


TEMPLATE_TOKENS = 30
"""The tokens that SmolLM2's chat template adds to the first message: see the next test."""


def test_the_chat_template_adds_30_tokens(demo_model: DemoModel) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model.folder / "tokenizer.json"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    token_ids = tokenizer.encode(f"{text}<|im_start|>assistant\n", add_special_tokens=False).ids
    assert len(token_ids) - 1 == TEMPLATE_TOKENS


def refusal(deployment: Deployment, demo_model: DemoModel) -> str:
    with (
        pytest.raises(EngineError) as caught,
        start_engine(deployment, Site(models=demo_model.models)),
    ):
        pass
    message = str(caught.value)
    assert message.startswith(f"deployment `{deployment.name}`: ") and "\n" not in message
    return message


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_missing_or_wrong_api_key_is_reported_with_its_variable(
    urls: dict[bool, str], demo_model: DemoModel, monkeypatch: pytest.MonkeyPatch, api: str
) -> None:
    keyed = deployment(urls[True], api=api, api_key_env=VARIABLE)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert f"the variable {VARIABLE} contains no API key. Export it" in refusal(keyed, demo_model)
    monkeypatch.setenv(VARIABLE, "another-key")
    monkeypatch.setenv(f"{VARIABLE}_URL", urls[True])
    message = refusal(keyed, demo_model)
    assert f"refuses the API key in {VARIABLE} (HTTP 401). Export the right key" in message
    assert "another-key" not in message
    message = refusal(deployment(urls[True], api=api), demo_model)
    assert "requires an API key (HTTP 401)" in message and "`endpoint.api_key_env`" in message


def test_an_unknown_model_is_reported_with_the_models_that_are_served(
    urls: dict[bool, str], demo_model: DemoModel
) -> None:
    message = refusal(deployment(urls[False], model="mixtral"), demo_model)
    assert f"does not serve `mixtral`. It serves `{SERVED}`. Correct `endpoint.model`" in message


def test_an_unreachable_endpoint_is_reported(demo_model: DemoModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    message = refusal(deployment(f"http://127.0.0.1:{port}"), demo_model)
    assert f"http://127.0.0.1:{port} does not answer (Connection refused)" in message


@pytest.mark.parametrize(
    ("script", "message"),
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
def test_an_endpoint_that_cannot_be_benchmarked_is_refused_at_the_start(
    script: FaultScript, message: str, demo_model: DemoModel
) -> None:
    with start_faulty_server(script) as server:
        faulty = deployment(server.endpoint.base_url, model=MODEL)
        assert message in refusal(faulty, demo_model)


def test_an_external_engine_has_no_processes_here(
    urls: dict[bool, str], demo_model: DemoModel
) -> None:
    before = psutil.Process().children()
    with start_engine(deployment(urls[False]), Site(models=demo_model.models)) as engine:
        assert engine.pids() == []
        assert psutil.Process().children() == before
        assert engine.healthy()


def test_a_killed_endpoint_is_not_healthy(demo_model: DemoModel) -> None:
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


def test_servegrid_load_measures_the_chat_api(
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
    assert {row["prompt_tokens"] for row in rows} == {12 + TEMPLATE_TOKENS}
    assert {row["completion_tokens"] for row in rows} == {5}
    assert parquet.read_record(out)["endpoint"]["api"] == "chat"
    capsys.readouterr()
    assert main(words) == 2
    assert "Name the model's tokenizer.json" in capsys.readouterr().err
