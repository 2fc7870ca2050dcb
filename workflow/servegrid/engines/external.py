"""An endpoint that somebody else has brought up: looked at and asked, never started or ended.

Its processes and GPUs are not known, so that nothing of this node is attributed to them.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from servegrid.client import measure
from servegrid.client.requests import RequestRefused
from servegrid.engines.base import Site
from servegrid.errors import EngineError, LoadError
from servegrid.study import models
from servegrid.study.deployment import Deployment
from servegrid.study.endpoint import Endpoint, ExternalEndpoint, normalize_base_url, read_api_key
from servegrid.study.grid import Workload
from servegrid.telemetry.server import NOT_FOUND_STATUSES, MODELS_PATH, http_get, is_healthy

KEY_REFUSED = (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
SHORT_LOAD = Workload("burst", 1, 8, 4, 1, warmup_waves=0, timeout_s=120.0, idle_timeout_s=60.0)
"""One short request, by which an endpoint shows that it streams and counts."""
LISTED = 10


@dataclass(frozen=True)
class AlreadyUp:
    """An endpoint that was up before its allocation, and will be up after it."""

    endpoint: Endpoint
    facts: dict[str, Any]

    def pids(self) -> list[int]:
        return []

    def healthy(self) -> bool:
        return is_healthy(self.endpoint)


@contextlib.contextmanager
def start_engine(deployment: Deployment, site: Site) -> Iterator[AlreadyUp]:
    """See `servegrid.engines.start_engine`; EngineError where the endpoint does not do what it must.

    It must answer, list the model, take the key, and answer a short request as a stream that
    says how many tokens it has.
    """
    started = time.monotonic()
    external, endpoint = _external(deployment), resolve_endpoint(deployment)
    _refuse_unready(deployment, external, endpoint)
    client = _answered(deployment, external, endpoint, site)
    facts = {
        "engine": external.engine,
        "version": external.version,
        "external": True,
        "url": external.url,
        "served_model": external.model,
        "api": external.api,
        "prompt_form": client["prompt_form"],
        "bring_up_s": {"engine": round(time.monotonic() - started, 3)},
    }
    yield AlreadyUp(endpoint, facts)


def resolve_endpoint(deployment: Deployment) -> Endpoint:
    """Where an external deployment answers, with its API key from the environment.

    Raises EngineError where the variable of the key holds none.
    """
    external = _external(deployment)
    key = None
    if external.api_key_env is not None:
        key = read_api_key(external.api_key_env, os.environ)
        if key is None:
            raise EngineError(
                f"deployment `{deployment.name}`: the variable {external.api_key_env} holds no API "
                "key. Export it first: it is read from there and written nowhere."
            )
    return Endpoint(normalize_base_url(external.url), external.model, key, api=external.api)


def _external(deployment: Deployment) -> ExternalEndpoint:
    assert deployment.endpoint is not None
    return deployment.endpoint


def _refuse_unready(deployment: Deployment, external: ExternalEndpoint, endpoint: Endpoint) -> None:
    """Raise EngineError where it does not answer, refuses the key or does not list the model."""
    where = f"deployment `{deployment.name}`: {external.url}"
    try:
        status, body = http_get(endpoint, MODELS_PATH)
    except (OSError, http.client.HTTPException) as error:
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise EngineError(
            f"{where} does not answer ({detail}). Start it, or correct `endpoint.url`."
        ) from error
    if status in KEY_REFUSED:
        raise EngineError(_key_refused(deployment, external, status))
    if status in NOT_FOUND_STATUSES and is_healthy(endpoint):
        return
    if status != http.HTTPStatus.OK:
        raise EngineError(
            f"{where} is not ready: {MODELS_PATH} is answered with HTTP {status}. Wait until it "
            "is up, or correct `endpoint.url`."
        )
    names = _names_in(body)
    if names and external.model not in names:
        shown = ", ".join(f"`{name}`" for name in names[:LISTED])
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        raise EngineError(
            f"{where} serves no `{external.model}`, but {shown}{more}. Correct `endpoint.model`."
        )


def _names_in(body: bytes) -> list[str]:
    """The names of the models in a list of them; none where it is no such list."""
    try:
        return [str(each["id"]) for each in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _answered(
    deployment: Deployment, external: ExternalEndpoint, endpoint: Endpoint, site: Site
) -> dict[str, Any]:
    """What the client says of a short request. Raises EngineError where that fails."""
    where = f"deployment `{deployment.name}`: {external.url}"
    tokenizer = models.locate(deployment.tokenizer, site.models)
    try:
        measurement = measure(endpoint, SHORT_LOAD, tokenizer, f"bring-up-{time.time_ns()}")
    except RequestRefused as error:
        if error.status in KEY_REFUSED:
            raise EngineError(_key_refused(deployment, external, error.status)) from error
        raise EngineError(f"deployment `{deployment.name}`: {error}") from error
    except LoadError as error:
        raise EngineError(f"deployment `{deployment.name}`: {error}") from error
    (failure,) = measurement.errors
    if failure is not None:
        raise EngineError(
            f"{where} answers, but a request of {SHORT_LOAD.input_len} prompt and "
            f"{SHORT_LOAD.output_len} output tokens failed: {failure}. servegrid needs answers "
            "that are streamed, have the length asked for, and end with their usage."
        )
    return measurement.facts


def _key_refused(deployment: Deployment, external: ExternalEndpoint, status: int) -> str:
    where = f"deployment `{deployment.name}`: {external.url}"
    if external.api_key_env is None:
        return (
            f"{where} wants an API key (HTTP {status}). Export a variable that holds it and name "
            "that as `endpoint.api_key_env`."
        )
    return (
        f"{where} refuses the API key in {external.api_key_env} (HTTP {status}). Export the "
        "variable with the right one."
    )
