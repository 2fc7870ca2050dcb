"""What an engine is, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from servegrid.study.endpoint import Endpoint


@dataclass(frozen=True)
class Site:
    """Where an engine runs, as opposed to what it serves.

    `socket` is `tcp` (loopback, with an API key) or `unix` (in a folder that only this user may
    enter), `startup_s` the limit of a bring-up in seconds, `models` the cache folder of the
    demo's models.
    """

    models: Path
    socket: Literal["tcp", "unix"] = "tcp"
    startup_s: float = 1800.0


class Engine(Protocol):
    """An engine that is up and serves one deployment."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers."""

    @property
    def facts(self) -> dict[str, Any]:
        """What it really uses, as plain JSON data for the records."""

    def pids(self) -> list[int]:
        """The processes that serve, for telemetry; none where they are somebody else's."""

    def healthy(self) -> bool:
        """Whether it still serves."""
