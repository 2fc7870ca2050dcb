"""Endpoints: addresses of OpenAI-compatible servers, for the engines and the load client."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from servegrid.errors import ConfigError

Api = Literal["completions", "chat"]
"""The API to use: /v1/completions or /v1/chat/completions."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    `base_url` is the part before the API's paths, such as `/v1/models`, without a trailing slash
    (`http://127.0.0.1:4711`). `api_path` is the prefix of the API's paths. `socket` is the Unix
    socket that the server listens on, if any; `base_url` then only gives the host name in the
    requests. `extra_body` and `extra_headers` are added to every completion. `started_here` says
    that servegrid has started the server, so it is known what it can be asked.

    With `https`, the certificates in `ca_file` are trusted too; with `verify_tls` false, all are.
    GET `health_path` answers 200 within `health_timeout_s` while the server works; if it is None,
    only a connection shows that. `output_len_exact` is that of `ExternalEndpoint`. With `adapters`,
    requests name these LoRA adapters in turn, instead of the model.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    socket: str | None = None
    api: Api = "completions"
    api_path: str = "/v1"
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    extra_headers: Mapping[str, str] = field(default_factory=dict)
    started_here: bool = False
    ca_file: str | None = None
    verify_tls: bool = True
    health_path: str | None = "/health"
    health_timeout_s: float = 5.0
    output_len_exact: bool = True
    adapters: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))  # from JSON it is a list

    def adapter(self, number: int) -> str | None:
        """The LoRA adapter that request `number` names, from 0; None if there are none."""
        return self.adapters[number % len(self.adapters)] if self.adapters else None

    @property
    def models_path(self) -> str:
        """The path of the list of models, after `base_url`."""
        return f"{self.api_path}/models"

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
    `extra_body` and `extra_headers` are added to every completion. `ca_file` and `verify_tls` are
    those of `Endpoint`. If `output_len_exact` is false, a response may have fewer tokens than
    requested: such a server ignores `ignore_eos`.
    """

    url: str
    model: str
    engine: str
    api: Api = "completions"
    version: str | None = None
    api_key_env: str | None = None
    extra_body: Mapping[str, Any] | None = None
    extra_headers: Mapping[str, str] | None = None
    ca_file: str | None = None
    verify_tls: bool | None = None
    output_len_exact: bool = True

    @property
    def spec(self) -> dict[str, Any]:
        """All fields as plain JSON data, without those that were added later and are not set.

        So a study that does not use them keeps its identity, and its cells are not measured again.
        """
        spec = {
            key: value
            for key, value in asdict(self).items()
            if value is not None or key not in _LATER
        }
        if self.output_len_exact:
            del spec["output_len_exact"]
        return spec


_LATER = ("extra_body", "extra_headers", "ca_file", "verify_tls")
_OPERATIONS = re.compile(r"/+(chat/+completions|completions|models)/*$")
_VERSION = re.compile(r"v\d+\w*")
_OWN_KEYS = frozenset(
    {
        *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "min_tokens"),
        *("ignore_eos", "stream", "stream_options", "n", "best_of"),
    }
)
_OWN_HEADERS = frozenset(
    {
        *("accept", "accept-encoding", "connection", "content-length", "content-type", "expect"),
        *("host", "te", "transfer-encoding", "upgrade", "x-request-id"),
    }
)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SECRET_HEADER = re.compile(r"auth|cookie|key|passw|secret|token", re.IGNORECASE)


def split_url(url: str) -> tuple[str, str]:
    """`base_url` and `api_path` of an endpoint's URL.

    The API's paths start at the version in the URL's path (`/openai/v1`, `/api/v3`,
    `/v1beta/openai`). Without a version they start with `/v1`. A URL of one operation
    (`…/chat/completions`) names the API's paths exactly.

    >>> split_url("https://host/openai")
    ('https://host/openai', '/v1')
    >>> split_url("https://host/api/v3/chat/completions")
    ('https://host/api', '/v3')
    """
    scheme, separator, rest = url.partition("://")
    operation = _OPERATIONS.search(rest)
    host, *segments = (rest[: operation.start()] if operation else rest).rstrip("/").split("/")
    versions = [index for index, part in enumerate(segments) if _VERSION.fullmatch(part)]
    at = versions[-1] if versions else len(segments)
    base = "/".join([host, *segments[:at]]).rstrip("/")
    path = "".join(f"/{part}" for part in segments[at:] if part)
    return f"{scheme}{separator}{base}", path or ("" if operation else "/v1")


def check_extras(body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
    """Raise ConfigError, which names the key, if these must not be added to a request."""
    for key in body:
        if key in _OWN_KEYS:
            raise ConfigError(f"extra_body: servegrid sets the key `{key}` itself. Remove it.")
    for name, value in headers.items():
        where = f"extra_headers: `{name}`"
        if not _HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()):
            raise ConfigError(
                f"{where} is not a valid name of an HTTP header, or its value is not printable "
                "ASCII. Correct it."
            )
        if name.lower() in _OWN_HEADERS:
            raise ConfigError(f"{where}: servegrid sets this header itself. Remove it.")
        if _SECRET_HEADER.search(name):
            raise ConfigError(
                f"{where} may carry a secret, and headers are recorded. Use `api_key_env`."
            )


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
