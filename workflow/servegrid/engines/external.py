"""An endpoint that already runs elsewhere: servegrid checks it, and never starts or stops it.

Its processes and GPUs are unknown, so no telemetry of this node is recorded for it.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import json
import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from servegrid.client import measure
from servegrid.client.requests import RequestRefused
from servegrid.engines.base import Site
from servegrid.errors import ConfigError, EngineError, LoadError
from servegrid.study import models
from servegrid.study.deployment import Deployment
from servegrid.study.endpoint import Endpoint, ExternalEndpoint, api_key_for, split_url
from servegrid.study.grid import Workload
from servegrid.telemetry.server import (
    BRING_UP_TIMEOUT_S,
    check_health,
    describe_failure,
    find_health,
    http_get,
)

KEY_STATUSES = (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
TEST_WORKLOAD = Workload("burst", 1, 8, 4, 1, warmup_waves=0, timeout_s=60.0, idle_timeout_s=30.0)
"""One short request; it shows whether the endpoint streams and reports its token counts."""
MAX_LISTED = 10


@dataclass(frozen=True)
class ExternalEngine:
    """An endpoint that runs before the allocation starts and after it ends."""

    endpoint: Endpoint
    facts: dict[str, Any]
    errors: None = None

    def pids(self) -> list[int]:
        return []

    def healthy(self) -> bool:
        found = check_health(self.endpoint)
        if not found.ok:
            print(f"{self.endpoint.base_url} is not healthy: {found}", flush=True)
        return found.ok


@contextlib.contextmanager
def start_engine(deployment: Deployment, site: Site) -> Iterator[ExternalEngine]:
    """See `servegrid.engines.start_engine`. Raises EngineError if the endpoint fails a check.

    The endpoint must stream the answer to a short request with its token counts. If it lists its
    models, the model must be among them. The way in which it shows its health now is the one that
    counts later.
    """
    started = time.monotonic()
    external, endpoint = _external(deployment), resolve_endpoint(deployment)
    models_problem = _check_reachable(deployment, external, endpoint)
    client = _send_test_request(deployment, external, endpoint, site, models_problem)
    endpoint = find_health(endpoint)
    facts = {
        "engine": external.engine,
        "version": external.version,
        "external": True,
        "url": external.url,
        "served_model": external.model,
        "api": external.api,
        "prompt_form": client["prompt_form"],
        "health_path": endpoint.health_path,
        "bring_up_s": {"engine": round(time.monotonic() - started, 3)},
    }
    yield ExternalEngine(endpoint, facts)


def resolve_endpoint(deployment: Deployment) -> Endpoint:
    """The endpoint of an external deployment, with its API key from the environment.

    Raises EngineError if the environment has no API key for this endpoint.
    """
    external = _external(deployment)
    key = None
    if external.api_key_env is not None:
        try:
            key = api_key_for(external.url, external.api_key_env, os.environ)
        except ConfigError as error:
            raise EngineError(f"deployment `{deployment.name}`: {error}") from None
    base_url, api_path = split_url(external.url)
    return Endpoint(
        base_url,
        external.model,
        key,
        api=external.api,
        api_path=api_path,
        extra_body=external.extra_body or {},
        extra_headers=external.extra_headers or {},
        ca_file=external.ca_file,
        verify_tls=external.verify_tls is not False,
        output_len_exact=external.output_len_exact,
    )


def _external(deployment: Deployment) -> ExternalEndpoint:
    assert deployment.endpoint is not None
    return deployment.endpoint


def _check_reachable(
    deployment: Deployment, external: ExternalEndpoint, endpoint: Endpoint
) -> str | None:
    """Why its list of models is of no use; None if it lists the model.

    Raises EngineError if the server does not answer at all, or lists only other models.
    """
    where = f"deployment `{deployment.name}`: {external.url}"
    try:
        status, body = http_get(endpoint, endpoint.models_path, BRING_UP_TIMEOUT_S)
    except (TimeoutError, ConnectionResetError, http.client.HTTPException) as error:
        return f"GET {endpoint.models_path}: {describe_failure(error)}"
    except OSError as error:
        remedy = "Start the server, or correct `endpoint.url`."
        if isinstance(error, ssl.SSLCertVerificationError):
            remedy = "Name the certificates of its authority in `endpoint.ca_file`."
        raise EngineError(
            f"{where} does not answer ({describe_failure(error)}). {remedy}"
        ) from error
    if status != http.HTTPStatus.OK:
        return f"GET {endpoint.models_path}: HTTP {status}"
    names = _model_names(body)
    if names and external.model not in names:
        shown = ", ".join(f"`{name}`" for name in names[:MAX_LISTED])
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        raise EngineError(
            f"{where} does not serve `{external.model}`. It serves {shown}{more}. "
            "Correct `endpoint.model`."
        )
    return None


def _model_names(body: bytes) -> list[str]:
    """The model names in the answer of GET /v1/models; empty if it has another format."""
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _send_test_request(
    deployment: Deployment,
    external: ExternalEndpoint,
    endpoint: Endpoint,
    site: Site,
    models_problem: str | None,
) -> dict[str, Any]:
    """The client's facts about a short request. Raises EngineError if the request fails."""
    where = f"deployment `{deployment.name}`: {external.url}"
    tokenizer = models.locate(deployment.tokenizer, site.models, site.revisions, "tokenizer")
    try:
        measurement = measure(endpoint, TEST_WORKLOAD, tokenizer, f"bring-up-{time.time_ns()}")
    except RequestRefused as error:
        if error.status in KEY_STATUSES:
            raise EngineError(_key_error(deployment, external, error.status)) from error
        raise EngineError(f"deployment `{deployment.name}`: {error}") from error
    except LoadError as error:
        raise EngineError(f"deployment `{deployment.name}`: {error}") from error
    (failure,) = measurement.errors
    if failure is not None:
        raise EngineError(
            f"{where} answers, but a request with {TEST_WORKLOAD.input_len} prompt tokens and "
            f"{TEST_WORKLOAD.output_len} output tokens failed: {failure}"
            f"{f' ({models_problem})' if models_problem else ''}. The server must stream "
            f"its responses, {_needed_tokens(endpoint)}, and "
            "report the token usage at the end (`stream_options.include_usage`)."
        )
    return measurement.facts


def _needed_tokens(endpoint: Endpoint) -> str:
    if not endpoint.output_len_exact:
        return "generate at least one token and no more than requested"
    return (
        "generate exactly the requested number of tokens (`ignore_eos`; if it cannot, set "
        "`endpoint.output_len_exact: false`)"
    )


def _key_error(deployment: Deployment, external: ExternalEndpoint, status: int) -> str:
    where = f"deployment `{deployment.name}`: {external.url}"
    if external.api_key_env is None:
        return (
            f"{where} requires an API key (HTTP {status}). Export the key in an environment "
            "variable and set `endpoint.api_key_env` to the variable's name."
        )
    return (
        f"{where} refuses the API key in {external.api_key_env} (HTTP {status}). Export the right "
        "key in this variable."
    )
