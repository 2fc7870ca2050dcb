"""External deployments: their configuration, API keys and health, without a real server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.deployments import EXTERNAL_ENTRY
from helpers.tokenizing import make_tokenizer
from servegrid.client.requests import http_client, sent_key
from servegrid.doctor.models import check_deployment_models
from servegrid.doctor.profile import Profile, count_nodes
from servegrid.doctor.resources import build_request
from servegrid.engines.external import resolve_endpoint
from servegrid.errors import ConfigError, EngineError, ModelError
from servegrid.run import service
from servegrid.run.preflight import check_ready
from servegrid.run.service import AllocationInfo, check_allocated_gpus
from servegrid.run.trial import prompt_salt
from servegrid.study.config import load_study, parse_study
from servegrid.study.endpoint import (
    Endpoint,
    ExternalEndpoint,
    api_key_for,
    split_url,
)
from servegrid.study.grid import Study, Trial
from servegrid.telemetry.server import http_get, is_healthy

CONFIG = Path(__file__).parents[2] / "config"
ENTRY = EXTERNAL_ENTRY


def study(**changes: Any) -> Study:
    """A study of ENTRY with `changes`; the value None removes a key."""
    entry = {key: value for key, value in (ENTRY | changes).items() if value is not None}
    workload = {"concurrency": 4, "input_len": 31}
    return parse_study({"study": "s", "workload": workload, "deployments": [entry]})


def keyed(**endpoint: Any) -> Study:
    return study(endpoint=ENTRY["endpoint"] | endpoint)


def test_the_name_contains_the_server_software_and_the_endpoint_is_kept() -> None:
    (trial,) = study().trials
    deployment = trial.deployment
    assert deployment.name == "mistral-7b_fp16_external-sglang_2xa100-40gb"
    assert deployment.endpoint == ExternalEndpoint("http://sirocco14:30000/v1", "default", "sglang")
    assert (deployment.gpu, deployment.gpu_count, deployment.checkpoint) == ("a100-40gb", 2, "")
    again = Trial.from_spec(json.loads(trial.spec_json))
    assert again == trial and again.digest == trial.digest
    assert keyed(api="chat").trials[0].digest != trial.digest


def test_the_load_client_runs_on_a_node_without_gpus_with_the_main_python() -> None:
    (deployment,) = study().deployments
    assert (deployment.node_kind, deployment.node_gpus) == ("cpu", 0)
    assert deployment.environment == "main"
    check_allocated_gpus(deployment, {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": ""})


def test_the_doctor_checks_the_tokenizer_and_requests_no_gpu(tmp_path: Path) -> None:
    (deployment,) = study().deployments
    make_tokenizer(tmp_path)
    found = list(check_deployment_models(deployment, lambda *_: tmp_path, tmp_path, tmp_path))
    assert [each.found for each in found] == [f"tokenizer {tmp_path}", "tokenizer encodes text"]
    kinds = {"cpu": {"gpus_of_node": 1}}
    assert count_nodes(deployment, kinds["cpu"]) == 1
    profile = Profile(Path("p/config.yaml"), {}, None, kinds)
    assert build_request(profile, "cpu", [deployment]).needs_gpus is False


def test_the_specification_of_other_deployments_has_no_endpoint() -> None:
    (trial,) = study(engine="vllm", checkpoint="org/m", endpoint=None).trials
    assert list(trial.spec["deployment"]) == [
        *("name", "model", "checkpoint", "tokenizer", "quantization", "engine", "gpu"),
        *("gpu_count", "max_model_len", "max_num_seqs", "engine_args"),
    ]
    assert (trial.deployment.node_kind, trial.deployment.node_gpus) == ("a100-40gb", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": None}, "the engine `external` needs `endpoint`. Add the key"),
        ({"tokenizer": None}, "the engine `external` needs `tokenizer`"),
        ({"max_num_seqs": None}, "the engine `external` needs `max_num_seqs`"),
        ({"checkpoint": "org/m"}, "deployments[0].checkpoint: the engine `external` does not use"),
        ({"engine_args": {"a": 1}}, "[0].engine_args: the engine `external` does not use"),
        ({"engine": "vllm", "checkpoint": "org/m"}, "endpoint: servegrid starts the engine `vllm`"),
        ({"engine": "vllm", "endpoint": None}, "deployments[0]: `checkpoint` is missing"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        study(**changes)


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ({"url": "sirocco14:30000"}, "endpoint.url: 'sirocco14:30000' is not a URL"),
        ({"url": "http://user:secret@host"}, "without a key in it"),
        ({"url": "http://host/v1?key=secret"}, "without a key in it"),
        ({"api": "responses"}, "'responses' is not one of `completions`, `chat`"),
        ({"engine": "emulated"}, "endpoint.engine: 'emulated' is not a name"),
        ({"api_key": "secret"}, "unknown key `api_key`. Did you mean `api_key_env`?"),
        ({"api_key_env": "sk-secret"}, "Name of the environment variable"),
    ],
)
def test_invalid_endpoints_are_refused(endpoint: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        keyed(**endpoint)


def test_the_example_uses_both_apis_of_one_server() -> None:
    first, second = load_study(CONFIG / "external.yaml").deployments
    assert first.endpoint is not None and second.endpoint is not None
    assert second.endpoint == replace(first.endpoint, api="chat")
    assert first.endpoint.api_key_env == "LLAMACPP_KEY"


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/openai/v1", "https://host/openai"),
    ],
)
def test_a_url_may_end_with_v1(url: str, base: str) -> None:
    assert split_url(url)[0] == base


def test_the_api_key_comes_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    (deployment,) = keyed(api_key_env="SGLANG_KEY", api="chat").deployments
    monkeypatch.setenv("SGLANG_KEY", " secret\n")
    monkeypatch.setenv("SGLANG_KEY_URL", "http://sirocco14:30000/v1")
    assert resolve_endpoint(deployment) == Endpoint(
        "http://sirocco14:30000", "default", "secret", api="chat"
    )
    assert resolve_endpoint(study().deployments[0]).api_key is None


ALLOWED = [
    ("http://host:8000", "http://host:8000/openai/v1"),
    ("https://Host.example", "https://host.example:443/v1"),
    ("http://[::1]:80", "http://[::1]/v1"),
]
REFUSED = [
    ("https://host.example", "http://host.example"),  # anybody on the way could read the key
    ("https://host.example", "https://host.example.attacker.example"),
    ("https://host.example", "https://host.example@attacker.example"),
    ("https://host.example", "https://attacker.example/https://host.example"),
    ("https://host.example", "https://host.example:8443"),
    ("host.example", "host.example"),
    ("https://host.example:99999", "https://host.example:99999"),
]


@pytest.mark.parametrize(("allowed", "url"), ALLOWED)
def test_an_api_key_goes_to_the_server_that_its_owner_names(allowed: str, url: str) -> None:
    assert api_key_for(url, "KEY", {"KEY": "secret", "KEY_URL": allowed}) == "secret"


@pytest.mark.parametrize(("allowed", "url"), REFUSED)
def test_an_api_key_goes_to_no_other_server(allowed: str, url: str) -> None:
    with pytest.raises(ConfigError, match="as KEY_URL says, and not for") as caught:
        api_key_for(url, "KEY", {"KEY": "secret", "KEY_URL": allowed})
    assert "secret" not in str(caught.value)


def test_a_study_cannot_send_any_variable_of_the_environment_to_its_own_server() -> None:
    with pytest.raises(ConfigError, match=r"TOKEN_URL is not set\. Export the URL of the server"):
        api_key_for("https://attacker.example", "TOKEN", {"TOKEN": "secret"})


def test_a_missing_tokenizer_is_not_called_a_checkpoint(tmp_path: Path) -> None:
    missing = study(tokenizer=str(tmp_path / "none"))
    with pytest.raises(ModelError, match=rf"tokenizer `{tmp_path}/none`: there is no file"):
        check_ready(missing, tmp_path)


def test_a_missing_api_key_is_reported_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path)
    keyed_study = study(
        tokenizer=str(tmp_path), endpoint=ENTRY["endpoint"] | {"api_key_env": "SGLANG_KEY"}
    )
    monkeypatch.setenv("SGLANG_KEY", "secret")
    with pytest.raises(EngineError, match=r"the variable SGLANG_KEY_URL is not set"):
        check_ready(keyed_study, tmp_path)
    monkeypatch.setenv("SGLANG_KEY_URL", "http://sirocco14:30000")
    check_ready(keyed_study, tmp_path)
    monkeypatch.setenv("SGLANG_KEY", " ")
    with pytest.raises(
        EngineError, match=r"the variable SGLANG_KEY contains no API key\. Export it"
    ):
        check_ready(keyed_study, tmp_path)


def test_the_allocation_info_contains_the_name_of_the_key_variable_but_not_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = AllocationInfo(
        endpoint=Endpoint("http://sirocco14:30000", "default", "secret", api="chat"),
        deployment_digest="d",
        tokenizer=tmp_path,
        telemetry=tmp_path / "telemetry.jsonl",
        process=(1, 0.0),
        engine={},
        environment={},
        cpu_sets=[[0]],
        calibration=None,
        api_key_env="SGLANG_KEY",
    )
    file = tmp_path / "allocation.json"
    given.write(file)
    assert "secret" not in file.read_text()
    monkeypatch.setenv(service.INFO_VARIABLE, str(file))
    monkeypatch.setenv("SGLANG_KEY", "secret")
    monkeypatch.setenv("SGLANG_KEY_URL", "http://sirocco14:30000")
    assert asdict(AllocationInfo.read()) == asdict(replace(given, process=[1, 0.0]))  # type: ignore[arg-type]
    monkeypatch.delenv("SGLANG_KEY")
    with pytest.raises(
        EngineError,
        match="This job lacks the environment of its allocation: the variable SGLANG_KEY",
    ):
        AllocationInfo.read()


def test_an_external_endpoint_gets_new_prompts_each_time() -> None:
    (trial,) = study().trials
    first, second = prompt_salt(trial), prompt_salt(trial)
    assert first != second and {each[:16] for each in (first, second)} == {trial.digest}
    (ours,) = study(engine="vllm", checkpoint="org/m", endpoint=None).trials
    assert prompt_salt(ours) == ours.digest


def test_the_client_keeps_no_cookies() -> None:
    """A sticky load balancer would send the whole workload to one replica."""

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("cookie"))
        return httpx.Response(200, headers={"set-cookie": "replica=3; path=/"})

    seen: list[str | None] = []
    endpoint = Endpoint("http://sirocco14:30000", "default", "secret")
    with http_client(endpoint, httpx.MockTransport(respond)) as client:
        for _ in range(2):
            client.get("/v1/models")
        assert sent_key(client) == "secret"
    assert seen == [None, None]


@contextmanager
def serving(statuses: dict[str, int]) -> Iterator[str]:
    """A server that answers the paths in `statuses` with their status, and all others with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.get(self.path, 404))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({"/health": 200}, True),
        ({"/health": 503, "/v1/models": 200}, False),
        ({"/v1/models": 200}, True),
        ({"/health": 405, "/v1/models": 200}, True),
        ({"/v1/models": 500}, False),
        ({}, False),
    ],
)
def test_health_comes_from_the_health_path_or_else_from_the_models(
    statuses: dict[str, int], expected: bool
) -> None:
    with serving(statuses) as url:
        assert is_healthy(Endpoint(url, "m")) is expected


def test_an_endpoint_may_have_a_path_prefix() -> None:
    with serving({"/openai/v1/models": 200}) as url:
        assert http_get(Endpoint(f"{url}/openai", "m"), "/v1/models")[0] == 200
