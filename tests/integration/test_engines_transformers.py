"""`transformers serve` as an external endpoint: it knows no `ignore_eos` and no token ids."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from helpers.demo_model import DemoModel
from servegrid.analysis import tables
from servegrid.engines import Site, start_engine
from servegrid.errors import EngineError
from servegrid.records import parquet
from servegrid.run import service
from servegrid.run.trial import measure_trial
from servegrid.study.config import parse_study
from servegrid.study.grid import Study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.crowded,
    pytest.mark.chaos,
    pytest.mark.timeout(600),
]

SERVED = "org/smollm2"
COMMIT = "0" * 40
START_S = 300
TEMPLATE_TOKENS = 30
"""What SmolLM2's chat template adds: see test_engines_external.py."""
VOCABULARY = 49152
NEVER_STOP = json.dumps({"eos_token_id": -1})
"""No token has this id, so every response has the requested length."""


def write_cache(home: Path, model: Path) -> None:
    """A Hugging Face cache in `home` that has the model: the server lists what is in it."""
    folder = home / "hub" / f"models--{SERVED.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)


@pytest.fixture(scope="module")
def url(demo_model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for all tests; it is not an engine of servegrid."""
    home = tmp_path_factory.mktemp("hf")
    write_cache(home, demo_model.folder)
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (home / "log").open("w", encoding="utf-8")
    with (
        log,
        subprocess.Popen(
            [sys.executable, "-c", start, "serve", SERVED, *options],
            env=environment,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            wait_for_server(f"http://127.0.0.1:{port}", process, home / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def wait_for_server(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when it is healthy: it loads the model before it listens."""
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text("utf-8")[
            -4000:
        ]
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)


def study(url: str, output_len: int = 6, **endpoint: Any) -> Study:
    """One burst of 2 requests with 12 prompt tokens."""
    return parse_study(
        {
            "study": "external",
            "workload": {"concurrency": 2, "input_len": 12, "output_len": output_len},
            "deployments": [
                {
                    "model": "smollm2-135m-instruct",
                    "tokenizer": "demo:smollm2-135m-instruct",
                    "quantization": "bf16",
                    "engine": "external",
                    "gpu": "cpu",
                    "max_model_len": 512,
                    "max_num_seqs": 4,
                    "endpoint": {
                        "url": url,
                        "model": SERVED,
                        "engine": "transformers-serve",
                        **endpoint,
                    },
                }
            ],
        }
    )


@pytest.fixture
def affinity() -> Iterator[None]:
    """Restores the test's cores: a cell pins its process, which is here the test's."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def measure(
    study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Mapping[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The row of the study's only cell, its record, and its requests."""
    (trial,) = study.trials
    requests = folder / trial.id / "requests.parquet"
    resources = {"max_concurrency": 2, "startup_s": 60}
    with service.serve("a", {"spec": trial.spec_json}, resources) as served:
        assert served.healthy()
        monkeypatch.setenv(service.INFO_VARIABLE, served.env[service.INFO_VARIABLE])
        samples = requests.with_name("telemetry.parquet")
        assert measure_trial(trial, requests, samples, last_attempt=True) == "ok"
    row = tables.gather_trials(study.trials, folder).to_dict("records")[0]
    return row, parquet.read_record(requests), pq.read_table(requests).to_pylist()


@pytest.mark.usefixtures("affinity")
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_cell_has_the_counts_of_the_server(
    url: str, api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = study(url, api=api, extra_body={"generation_config": NEVER_STOP})
    row, record, responses = measure(exact, tmp_path, monkeypatch)
    added = {"completions": 0, "chat": TEMPLATE_TOKENS}[api]
    assert [each["prompt_tokens"] for each in responses] == [12 + added] * 2
    assert [each["completion_tokens"] for each in responses] == [6, 6]
    assert [sum(each["chunk_tokens"]) for each in responses] == [6, 6]
    # What the server says without a stream, about a prompt of one token.
    path, prompt = {
        "completions": ("completions", {"prompt": "Hello"}),
        "chat": ("chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    }[api]
    more = {"max_tokens": 6, "temperature": 0, "generation_config": NEVER_STOP}
    body = {"model": SERVED, **prompt, **more}
    usage = httpx.post(f"{url}/v1/{path}", json=body, timeout=120).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1 + added, 6)

    client = record["client"]
    assert client["prompt_form"] == {"completions": "text", "chat": "messages"}[api]
    assert set(client["keys_refused"]) == {"ignore_eos", "min_tokens"}
    assert (record["engine"]["health_path"], row["output_len_exact"]) == ("/health", True)
    assert "tokens" not in (row["invalid_rules"] if row["invalid_rules"] is not None else [])


@pytest.mark.usefixtures("affinity")
def test_responses_that_stop_early_are_measured_where_the_study_allows_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A quarter of all tokens end a response: 60 tokens without one of them are very unlikely.
    stop = json.dumps({"eos_token_id": list(range(0, VOCABULARY, 4))})
    early = study(url, 60, output_len_exact=False, extra_body={"generation_config": stop})
    row, record, responses = measure(early, tmp_path, monkeypatch)
    counts = [each["completion_tokens"] for each in responses]
    assert all(1 <= count < 60 for count in counts)
    assert [sum(each["chunk_tokens"]) for each in responses] == counts
    assert (record["client"]["stopped_early"], row["output_len_exact"]) == (2, False)
    assert row["completion_tokens_mean"] == sum(counts) / 2


def refusal(study: Study, demo_model: DemoModel) -> str:
    with (
        pytest.raises(EngineError) as caught,
        start_engine(study.deployments[0], Site(models=demo_model.models)),
    ):
        pass
    return str(caught.value)


def test_an_early_stop_is_refused_with_what_the_study_can_allow(
    url: str, demo_model: DemoModel
) -> None:
    stop = json.dumps({"eos_token_id": list(range(VOCABULARY))})
    message = refusal(study(url, extra_body={"generation_config": stop}), demo_model)
    assert "failed: wrong_completion_tokens: 1 generated, 4 requested" in message
    assert "set `endpoint.output_len_exact: false`" in message


def test_what_it_does_not_support_is_refused_with_its_own_words(
    url: str, demo_model: DemoModel
) -> None:
    message = refusal(study(url, extra_body={"top_k": 5}), demo_model)
    assert "HTTP 422: Unexpected fields in the request: {'top_k'}" in message
    message = refusal(study(url, model="org/another"), demo_model)
    assert f"does not serve `org/another`. It serves `{SERVED}`. Correct" in message
