"""Endpoints: addresses of OpenAI-compatible servers, for the engines and the load client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Self
from urllib.parse import urlsplit

from servegrid.errors import ConfigError

Api = Literal["completions", "chat"]
"""The API to use: /v1/completions or /v1/chat/completions."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    `base_url` is the part before the API's paths, such as `/v1/models`, without a trailing slash
    (`http://127.0.0.1:4711`). `socket` is the Unix socket that the server listens on, if any;
    `base_url` then only gives the host name in the requests.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    socket: str | None = None
    api: Api = "completions"

    def to_json(self) -> str:
        """All fields as JSON, including the API key."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class ExternalEndpoint:
    """The endpoint of a server that somebody else has started, as the study describes it.

    `model` is the name of the model on the server. `engine` and `version` describe the server.
    `api_key_env` is the environment variable with the API key; the key itself is never written.
    """

    url: str
    model: str
    engine: str
    api: Api = "completions"
    version: str | None = None
    api_key_env: str | None = None


def normalize_base_url(url: str) -> str:
    """The `base_url` of `url`, which may end with the API's `/v1`."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def read_api_key(variable: str, environment: Mapping[str, str]) -> str | None:
    """The API key in an environment variable; None if it is empty or cannot be sent by HTTP."""
    key = environment.get(variable, "").strip()
    return key if key and key.isascii() and key.isprintable() else None


def api_key_for(url: str, variable: str, environment: Mapping[str, str]) -> str:
    """The API key in `variable`, if the variable `<variable>_URL` allows that it goes to `url`.

    A study may come from a stranger. It names a variable and a URL, but only the user's own
    environment brings the two together: scheme, host and port of both URLs must be equal.
    Raises ConfigError if there is no key, or if it is for another server.
    """
    key = read_api_key(variable, environment)
    if key is None:
        raise ConfigError(
            f"the variable {variable} contains no API key. Export it first. servegrid never writes "
            "the key to a file."
        )
    allowed = environment.get(f"{variable}_URL", "").strip()
    if not allowed:
        raise ConfigError(
            f"the variable {variable}_URL is not set. Export the URL of the server that the API "
            f"key in {variable} is for. servegrid sends the key to no other server."
        )
    if (origin := _origin(allowed)) is None or origin != _origin(url):
        raise ConfigError(
            f"the API key in {variable} is for {allowed}, as {variable}_URL says, and not for "
            f"{url}. servegrid sends it to no other server. Correct `endpoint.url` or "
            "`endpoint.api_key_env`."
        )
    return key


def _origin(url: str) -> tuple[str, str | None, int | None] | None:
    """Scheme, host and port (RFC 6454), None if `url` has none."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname, port) if parts.scheme and parts.hostname else None
