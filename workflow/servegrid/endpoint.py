"""Where an OpenAI-compatible server answers: what the engines give and the load needs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Self


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    `base_url` has no path and no trailing slash (`http://127.0.0.1:4711`). With `socket`, the
    server listens on that Unix socket and `base_url` only names the host in the requests.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    socket: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))
