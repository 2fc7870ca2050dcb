"""The interface of an engine, and the settings of the site that it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from servegrid.study.endpoint import Endpoint


class Nodes(Protocol):
    """The nodes of an allocation, by rank; rank 0 runs the cells. See the executor plugin."""

    rank: int
    hosts: Sequence[str]
    addresses: Sequence[str]
    interface: str
    failure: str | None
    """Why a part of the engine on another node does not work any more; None as long as all do."""

    def send(self, message: Any, rank: int | None = None) -> None:
        """Send JSON data to one node, or from the first node to all others."""

    def receive(self, limit_s: float) -> tuple[int, Any] | None:
        """The next message and the rank of its sender; None if none comes in time."""

    def clock_offset_ns(self, rank: int) -> tuple[int, int] | None:
        """The clock of another node minus that of the first one, and its uncertainty, in ns."""


@dataclass(frozen=True)
class Site:
    """Where an engine runs. It does not change any result.

    `models` is the cache folder of the demo's models. `socket` is `tcp` (loopback, with an API key)
    or `unix` (in a folder that only this user may enter). `startup_s` is the time in seconds within
    which the engine must start. `revisions` are the commits of models of the Hugging Face Hub, from
    the study's lock file. `nodes` is None if there is one node.
    """

    models: Path
    revisions: Mapping[str, str] = field(default_factory=dict)
    socket: Literal["tcp", "unix"] = "tcp"
    startup_s: float = 1800.0
    nodes: Nodes | None = None


class EnginePart(Protocol):
    """What runs of an engine on a node other than the first."""

    def pids(self) -> list[int]:
        """Its processes, for telemetry."""

    def healthy(self) -> bool:
        """Whether all of them still run."""


class Engine(Protocol):
    """A running engine that serves one deployment."""

    @property
    def endpoint(self) -> Endpoint:
        """Where the engine answers requests."""

    @property
    def facts(self) -> dict[str, Any]:
        """The resolved configuration (version, arguments, KV cache size), as JSON data."""

    @property
    def errors(self) -> Path | None:
        """The file to which its processes write their errors; None if it has none."""

    def pids(self) -> list[int]:
        """The engine's processes, for telemetry; none for an external engine."""

    def healthy(self) -> bool:
        """Whether the engine still answers."""
