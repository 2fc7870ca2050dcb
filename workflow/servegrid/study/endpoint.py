"""Where an OpenAI-compatible server answers: what the engines give and the load needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

Api = Literal["completions", "chat"]
"""Which of its APIs is asked: /v1/completions, or /v1/chat/completions."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    `base_url` ends where the API's own paths, such as `/v1/models`, begin, and has no trailing
    slash (`http://127.0.0.1:4711`). With `socket`, the server listens on that Unix socket and
    `base_url` only names the host in the requests.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    socket: str | None = None
    api: Api = "completions"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class External:
    """An endpoint that somebody else has brought up, as a study names it.

    `model` is the name under which it is served, `engine` and `version` say by what.
    `api_key_env` names the environment variable with the API key, which is written nowhere.
    """

    url: str
    model: str
    engine: str
    api: Api = "completions"
    version: str | None = None
    api_key_env: str | None = None


def base_of(url: str) -> str:
    """The `base_url` of a URL as people write it, with or without the API's `/v1`."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def key_in(variable: str, environment: Mapping[str, str]) -> str | None:
    """The API key in an environment variable; None where it holds none that can be sent."""
    key = environment.get(variable, "").strip()
    return key if key and key.isascii() and key.isprintable() else None
