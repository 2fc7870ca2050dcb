"""What one bring-up serves, and how a study says it. Pure: no file is touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from servegrid.errors import ConfigError
from servegrid.study.endpoint import External

EMULATED = "emulated"
"""The engine that needs neither hardware nor models."""
EXTERNAL = "external"
"""The engine of which only the endpoint is known: somebody else has brought it up."""
CPU = "cpu"
"""The kind of node without GPUs."""


@dataclass(frozen=True)
class Deployment:
    """What one bring-up serves: model × quantization × GPU kind × GPU count × arguments.

    Of an external one the user says all that, and where its `endpoint` is; nobody else knows.
    Its `checkpoint` is then empty.
    """

    name: str
    model: str
    checkpoint: str
    tokenizer: str
    quantization: str
    engine: str
    gpu: str
    gpu_count: int
    max_model_len: int
    max_num_seqs: int
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    endpoint: External | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """All of it as plain JSON data; without `endpoint` where there is none."""
        spec = asdict(self)
        if self.endpoint is None:
            del spec["endpoint"]
        return spec

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The inverse of `spec`."""
        endpoint = spec.get("endpoint")
        return cls(**{**spec, "endpoint": None if endpoint is None else External(**endpoint)})

    @property
    def digest(self) -> str:
        return digest_of(self.spec)

    @property
    def allocation(self) -> str:
        """The name of its allocations: another one as soon as anything in it changes."""
        return f"{self.name}.{self.digest[:8]}"

    @property
    def environment(self) -> str:
        """Whose Python it runs in: that of its kind of node, or the main process's."""
        return "main" if self.engine in (EMULATED, EXTERNAL) else "kind"

    @property
    def node_kind(self) -> str:
        """The kind of node that its allocations take: where it is external, only the load runs."""
        return CPU if self.engine == EXTERNAL else self.gpu

    @property
    def node_gpus(self) -> int:
        """The GPUs that its allocations take."""
        return 0 if self.engine == EXTERNAL else self.gpu_count


def canonical(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data, equal text, on every machine."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(data: Any) -> str:
    """The first 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:16]


def deployment_of(entry: Mapping[str, Any], where: str) -> Deployment:
    """The deployment of an entry that fits the schema; `where` it stands, for messages.

    Raises ConfigError where a CPU deployment has GPUs or the other way round, where only one of
    `engine: external` and `endpoint` is there, and where weights or tokenizer are missing.
    """
    on_cpu = entry["gpu"] == CPU
    gpu_count = entry.get("gpu_count", 0 if on_cpu else 1)
    if on_cpu != (gpu_count == 0):
        raise ConfigError(
            f"{where}.gpu_count: {gpu_count} does not go with gpu `{entry['gpu']}`. "
            "`cpu` has 0 GPUs, every other kind at least 1."
        )
    external = entry["engine"] == EXTERNAL
    (_refuse_unfitting_external if external else _refuse_unfitting)(entry, where)
    endpoint = External(**entry["endpoint"]) if external else None
    gpus = CPU if on_cpu else f"{gpu_count}x{entry['gpu']}"
    engine = f"{EXTERNAL}-{endpoint.engine}" if endpoint else entry["engine"]
    parts = (entry["model"], entry["quantization"], engine, gpus)
    return Deployment(
        name=entry.get("name", "_".join(parts)),
        model=entry["model"],
        checkpoint=entry.get("checkpoint", ""),
        tokenizer=entry["tokenizer"] if "tokenizer" in entry else entry["checkpoint"],
        quantization=entry["quantization"],
        engine=entry["engine"],
        gpu=entry["gpu"],
        gpu_count=gpu_count,
        max_model_len=entry["max_model_len"],
        max_num_seqs=entry.get("max_num_seqs", 256),
        engine_args=entry.get("engine_args", {}),
        endpoint=endpoint,
    )


def _refuse_unfitting(entry: Mapping[str, Any], where: str) -> None:
    if "checkpoint" not in entry:
        raise ConfigError(
            f"{where}: `checkpoint` is missing: the engine `{entry['engine']}` serves the weights "
            "that it names."
        )
    if "endpoint" in entry:
        raise ConfigError(
            f"{where}.endpoint: servegrid brings `{entry['engine']}` up itself. Remove the key, "
            f"or write `engine: {EXTERNAL}` to measure what is up there."
        )


def _refuse_unfitting_external(entry: Mapping[str, Any], where: str) -> None:
    for key, purpose in (
        ("endpoint", "where it answers"),
        ("tokenizer", "a folder with its tokenizer.json, by which prompts are cut to length"),
        ("max_num_seqs", "how many requests it works on at once, which it cannot be asked"),
    ):
        if key not in entry:
            raise ConfigError(f"{where}: the engine `{EXTERNAL}` needs `{key}`: {purpose}.")
    for key in ("checkpoint", "engine_args"):
        if key in entry:
            raise ConfigError(
                f"{where}.{key}: nothing is brought up for the engine `{EXTERNAL}`. Remove the key."
            )
