"""What an endpoint can't be asked: servers that refuse a key, a form, a length or a path."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.scripted_server import Answer, Request, completion, data, refusal, scripted_server
from servegrid.cli.main import main
from servegrid.client import Measurement, measure
from servegrid.errors import ConfigError, LoadError
from servegrid.records import parquet
from servegrid.study.endpoint import Endpoint, check_extras, split_url
from servegrid.study.grid import Workload

BURST = Workload("burst", 2, 9, 5, 2, warmup_waves=0, timeout_s=20, idle_timeout_s=10)
ALL_KEYS = {"ignore_eos", "min_tokens", "temperature"}


@pytest.fixture
def tokenizer(word_tokenizer: Path) -> Path:
    return word_tokenizer


def run(
    respond: Callable[[Request], Answer],
    tokenizer: Path | None = None,
    workload: Workload = BURST,
    path: str = "",
    **endpoint: Any,
) -> tuple[Measurement, list[Request]]:
    with scripted_server(respond) as server:
        base_url, api_path = split_url(server.url + path)
        given = Endpoint(base_url, "m", api_path=api_path, **endpoint)
        measurement = measure(given, workload, tokenizer, "s")
    return measurement, server.requests


def refusing(message: str, *keys: str, status: int = 400) -> Callable[[Request], Answer]:
    """Refuses a request that has one of these keys."""
    return lambda request: (
        refusal(message, status)
        if any(key in request.body or key in request.body["stream_options"] for key in keys)
        else completion(request)
    )


REFUSALS = [
    # OpenAI's models that reason
    (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        ("max_tokens",),
    ),
    (
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default "
        "(1) value is supported.",
        ("temperature",),
    ),
    # transformers serve names all keys at once
    (
        "Unexpected fields in the request: {'min_tokens', 'ignore_eos'}",
        ("min_tokens", "ignore_eos"),
    ),
    ("Unknown parameter: 'stream_options.continuous_usage_stats'.", ("continuous_usage_stats",)),
]
GENERIC = [("Bad Request", keys) for _, keys in REFUSALS] + [
    ("invalid", ("max_tokens", "temperature", "ignore_eos")),
    ("", ("min_tokens",)),
]


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(("message", "keys"), REFUSALS + GENERIC)
def test_only_the_keys_that_a_server_refuses_are_left_out(
    message: str, keys: tuple[str, ...], status: int
) -> None:
    measurement, requests = run(refusing(message, *keys, status=status))
    assert measurement.errors == [None, None]
    sent = requests[-1].body
    length_key = "max_completion_tokens" if "max_tokens" in keys else "max_tokens"
    optional = set(keys) - {"max_tokens"}
    assert sent[length_key] == 5
    assert sent.keys() & {*ALL_KEYS, "max_tokens", "max_completion_tokens"} == (
        ALL_KEYS - optional | {length_key}
    )
    assert measurement.facts["length_key"] == length_key
    assert measurement.facts["keys_refused"] == sorted(optional)


def test_a_refusal_of_everything_is_one_error_with_the_servers_reason() -> None:
    with pytest.raises(LoadError, match=r"refuses the request .HTTP 400: no such tenant") as caught:
        run(lambda request: refusal("no such tenant"))
    assert "\n" not in str(caught.value)


def test_the_reason_of_a_fastapi_server_is_quoted_without_its_json() -> None:
    detail = "Unexpected fields in the request: {'top_k'}"
    with pytest.raises(LoadError) as caught:
        run(lambda request: data({"detail": detail}, 422))
    assert f"(HTTP 422: {detail})." in str(caught.value)


def test_the_probe_asks_for_as_many_tokens_as_the_longest_request() -> None:
    """A server may refuse many tokens, or as few as one."""
    workload = replace(BURST, output_len=20, output_spread=0.5)
    _, (probe, *others) = run(completion, workload=workload)
    assert probe.body["max_tokens"] == 30
    assert all(request.body["max_tokens"] <= 30 for request in others)

    with pytest.raises(LoadError, match="max_tokens is too large"):
        run(
            lambda request: (
                refusal("max_tokens is too large: 30. This model supports at most 29.")
                if 30 in request.body.values()
                else completion(request)
            ),
            workload=workload,
        )


@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_token_ids_that_a_server_does_not_understand_become_text(
    status: int, tokenizer: Path
) -> None:
    def respond(request: Request) -> Answer:
        if isinstance(request.body["prompt"], str):
            return completion(request, prompt_tokens=9)
        return refusal("list object has no attribute 'strip'", status)

    measurement, requests = run(respond, tokenizer)
    assert measurement.errors == [None, None]
    assert measurement.facts["prompt_form"] == "text"
    assert measurement.facts["keys_refused"] == []
    assert isinstance(requests[-1].body["prompt"], str)


def test_a_server_that_fails_for_text_too_still_gets_token_ids(tokenizer: Path) -> None:
    measurement, _ = run(lambda request: refusal("out of memory", 500), tokenizer)
    assert measurement.facts["prompt_form"] == "ids"
    assert measurement.errors == ["http_status: 500 out of memory"] * 2


@pytest.mark.parametrize(
    ("url", "base", "api_path"),
    [
        ("http://h:8000", "http://h:8000", "/v1"),
        ("http://h:8000/", "http://h:8000", "/v1"),
        ("http://h/v1/", "http://h", "/v1"),
        ("https://h/openai", "https://h/openai", "/v1"),
        ("https://h/openai/v1", "https://h/openai", "/v1"),
        ("https://h/api/v3", "https://h/api", "/v3"),
        ("https://h/v1beta/openai/", "https://h", "/v1beta/openai"),
        ("http://h/v1/chat/completions", "http://h", "/v1"),
        ("http://h/v1/completions", "http://h", "/v1"),
        ("http://h/v1/models", "http://h", "/v1"),
        ("http://h/team/a/chat/completions/", "http://h/team/a", ""),
        ("http://h/chat/completions", "http://h", ""),
        ("http://[::1]:8000/v1", "http://[::1]:8000", "/v1"),
    ],
)
def test_a_url_gives_the_base_and_the_paths_of_the_api(url: str, base: str, api_path: str) -> None:
    assert split_url(url) == (base, api_path)


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("path", ["/api/v3", "/openai/v1/chat/completions", "/x/completions"])
def test_requests_go_to_the_path_of_the_url(path: str, api: Any, tokenizer: Path) -> None:
    measurement, requests = run(
        lambda request: completion(request, prompt_tokens=9), tokenizer, path=path, api=api
    )
    assert measurement.errors == [None, None]
    prefix = path.removesuffix("/completions").removesuffix("/chat")
    operation = "/chat/completions" if api == "chat" else "/completions"
    assert {request.path for request in requests} == {prefix + operation}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_named_with_its_target(status: int) -> None:
    target = "https://me:secret@other.example/v1/completions?token=secret"
    with pytest.raises(LoadError) as caught:
        run(lambda request: data("", status, Location=target))
    message = str(caught.value)
    assert f"redirects to https://other.example/v1/completions (HTTP {status})" in message
    assert "secret" not in message


def test_a_redirect_during_the_load_is_named_too() -> None:
    def respond(request: Request) -> Answer:
        probe = request.headers["X-Request-Id"].endswith("probe")
        return completion(request) if probe else data("", 302, Location="/login?x=1")

    assert run(respond)[0].errors == ["http_status: 302 redirects to /login"] * 2


EXTRAS: dict[str, Any] = {
    "extra_body": {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 1},
    "extra_headers": {"X-Tenant": "lab"},
}


def test_extra_keys_and_headers_are_part_of_every_request() -> None:
    measurement, requests = run(completion, **EXTRAS)
    assert measurement.errors == [None, None]
    for request in requests:
        assert request.body["chat_template_kwargs"] == {"enable_thinking": False}
        assert request.body["temperature"] == 1
        assert request.headers["X-Tenant"] == "lab"


def test_servegrid_load_sends_and_records_extra_keys_and_headers(tmp_path: Path) -> None:
    out = tmp_path / "cell.parquet"
    words = ["--model", "m", "--concurrency", "1", "--requests", "1", "--protocol", "burst"]
    words += ["--input-len", "9", "--output-len", "5", "--output", str(out)]
    words += ["--extra-body", json.dumps(EXTRAS["extra_body"]), "--extra-header", "X-Tenant: lab"]
    with scripted_server(completion) as server:
        assert main(["load", "--url", f"{server.url}/v1/completions", *words]) == 0
    assert server.requests[-1].headers["X-Tenant"] == "lab"
    assert pq.read_table(out)["error"].to_pylist() == [None]
    record = parquet.read_record(out)
    assert {key: record["endpoint"][key] for key in EXTRAS} == EXTRAS


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        ({"max_tokens": 5}, {}, "extra_body: servegrid sets the key `max_tokens` itself"),
        ({"stream": False}, {}, "extra_body: servegrid sets the key `stream` itself"),
        ({}, {"Content-Length": "5"}, "extra_headers: `Content-Length`: servegrid sets this"),
        ({}, {"api-key": "abc"}, "`api-key` may carry a secret, and headers are recorded. Use"),
        ({}, {"Authorization": "Bearer x"}, "`Authorization` may carry a secret"),
        (
            {},
            {"X-Y": "a\r\nX-Z: b"},
            "`X-Y` is not a valid name of an HTTP header, or its value is not printable",
        ),
        ({}, {"X Y": "a"}, "`X Y` is not a valid name of an HTTP header"),
    ],
)
def test_what_must_not_be_added_is_refused(
    body: dict[str, Any], headers: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_extras(body, headers)
