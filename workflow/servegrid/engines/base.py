"""The interface of an engine, and the settings of the site that it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from servegrid.study.endpoint import Endpoint


@dataclass(frozen=True)
class Site:
    """Where an engine runs. It does not change any result.

    `models` is the cache folder of the demo's models. `socket` is `tcp` (loopback, with an API key)
    or `unix` (in a folder that only this user may enter). `startup_s` is the time in seconds within
    which the engine must start. `revisions` are the commits of models of the Hugging Face Hub, from
    the study's lock file.
    """

    models: Path
    revisions: Mapping[str, str] = field(default_factory=dict)
    socket: Literal["tcp", "unix"] = "tcp"
    startup_s: float = 1800.0


class Engine(Protocol):
    """A running engine that serves one deployment."""

    @property
    def endpoint(self) -> Endpoint:
        """Where the engine answers requests."""

    @property
    def facts(self) -> dict[str, Any]:
        """The resolved configuration (version, arguments, KV cache size), as JSON data."""

    def pids(self) -> list[int]:
        """The engine's processes, for telemetry; none for an external engine."""

    def healthy(self) -> bool:
        """Whether the engine still answers."""
