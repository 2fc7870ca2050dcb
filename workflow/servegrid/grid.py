"""From a study's configuration to deployments, cells and trials. Pure: no file is touched."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from servegrid.errors import ConfigError

SPEC_FORMAT = 1
"""Raise it when the meaning of a specification changes: old cells are then stale."""

Protocol = Literal["burst", "steady"]
Prompts = Literal["distinct", "identical"]


@dataclass(frozen=True)
class Deployment:
    """What one bring-up serves: model × quantization × GPU kind × GPU count × arguments."""

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
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def allocation(self) -> str:
        """The name of its allocations: another one as soon as anything in it changes."""
        return f"{self.name}.{digest_of(asdict(self))[:8]}"

    @property
    def environment(self) -> str:
        """Whose Python it runs in: that of its kind of node, or the main process's."""
        return "main" if self.engine == "emulated" else "kind"


@dataclass(frozen=True)
class Load:
    """What is put on a deployment in one cell.

    `requests` counts the measured requests: a burst sends them in waves of `concurrency`,
    each wave when the one before has ended; steady keeps `concurrency` of them in flight.
    Times are seconds.
    """

    protocol: Protocol
    concurrency: int
    input_len: int
    output_len: int
    requests: int
    prompts: Prompts = "distinct"
    warmup_waves: int = 1
    seed: int = 0
    timeout_s: float = 600.0
    stall_s: float = 120.0

    @property
    def cell(self) -> str:
        """The cell's readable name within its deployment."""
        return f"{self.protocol}-c{self.concurrency}-i{self.input_len}-o{self.output_len}"


@dataclass(frozen=True)
class Trial:
    """One repeat of one cell: the unit that is measured, recorded and rerun."""

    deployment: Deployment
    load: Load
    number: int

    @property
    def id(self) -> str:
        return f"{self.deployment.name}/{self.load.cell}/trial-{self.number}"

    @property
    def spec(self) -> dict[str, Any]:
        """All that decides the result, as plain JSON data."""
        return {
            "format": SPEC_FORMAT,
            "deployment": asdict(self.deployment),
            "load": asdict(self.load),
            "trial": self.number,
        }

    @property
    def spec_json(self) -> str:
        return canonical(self.spec)

    @property
    def digest(self) -> str:
        return digest_of(self.spec)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Trial:
        """The inverse of `spec`."""
        return cls(Deployment(**spec["deployment"]), Load(**spec["load"]), spec["trial"])


def canonical(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data, equal text, on every machine."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(data: Any) -> str:
    """The first 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """One grid: its trials in the order of the configuration."""

    name: str
    trials: tuple[Trial, ...]

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """The deployments that have at least one trial, in order."""
        return tuple({trial.deployment.name: trial.deployment for trial in self.trials}.values())

    def trial(self, deployment: str, cell: str, number: int | str) -> Trial:
        """The trial of that place. Raises KeyError where the study has none."""
        return self._by_id[f"{deployment}/{cell}/trial-{number}"]

    @cached_property
    def _by_id(self) -> dict[str, Trial]:
        return {trial.id: trial for trial in self.trials}


def expand(config: Mapping[str, Any]) -> Study:
    """All trials of a configuration that fits the schema.

    Raises ConfigError, naming the key, where two deployments have the same name, a CPU
    deployment has GPUs, a prompt and its output are longer than `max_model_len`, or nothing
    is left after `include` and `exclude`.
    """
    trials: list[Trial] = []
    names: dict[str, int] = {}
    for position, entry in enumerate(config["deployments"]):
        where = f"deployments[{position}]"
        keys = {**config["load"], **entry.get("load", {})}
        loads = _loads(keys)
        deployment = _deployment(entry, where)
        first = names.setdefault(deployment.name, position)
        if first != position:
            raise ConfigError(
                f"{where}: deployments[{first}] has the name `{deployment.name}` as well. "
                "Remove one, or give one of them a `name` of its own."
            )
        _refuse_too_long(deployment, loads, where)
        numbers = range(1, keys.get("trials", 1) + 1)
        trials += [Trial(deployment, load, number) for load in loads for number in numbers]
    kept = tuple(trial for trial in trials if _kept(trial, config))
    if not config.get("mix_emulated", False):
        _refuse_mixed(kept)
    if not kept:
        raise ConfigError(
            f"include, exclude: none of the {len(trials)} cells and trials is left. "
            "Loosen the filters."
        )
    return Study(config["study"], kept)


def _deployment(entry: Mapping[str, Any], where: str) -> Deployment:
    on_cpu = entry["gpu"] == "cpu"
    gpu_count = entry.get("gpu_count", 0 if on_cpu else 1)
    if on_cpu != (gpu_count == 0):
        raise ConfigError(
            f"{where}.gpu_count: {gpu_count} does not go with gpu `{entry['gpu']}`. "
            "`cpu` has 0 GPUs, every other kind at least 1."
        )
    gpus = "cpu" if on_cpu else f"{gpu_count}x{entry['gpu']}"
    parts = (entry["model"], entry["quantization"], entry["engine"], gpus)
    return Deployment(
        name=entry.get("name", "_".join(parts)),
        model=entry["model"],
        checkpoint=entry["checkpoint"],
        tokenizer=entry.get("tokenizer", entry["checkpoint"]),
        quantization=entry["quantization"],
        engine=entry["engine"],
        gpu=entry["gpu"],
        gpu_count=gpu_count,
        max_model_len=entry["max_model_len"],
        max_num_seqs=entry.get("max_num_seqs", 256),
        arguments=entry.get("arguments", {}),
    )


def _loads(keys: Mapping[str, Any]) -> list[Load]:
    protocol = keys.get("protocol", "burst")
    lists = (_listed(keys[key]) for key in ("input_len", "concurrency"))
    return [
        Load(
            protocol=protocol,
            concurrency=concurrency,
            input_len=input_len,
            output_len=output_len,
            requests=concurrency * keys.get("requests_per_user", 1),
            **{key: keys[key] for key in _COPIED if key in keys},
        )
        for output_len in _listed(keys.get("output_len", 100))
        for input_len, concurrency in itertools.product(*lists)
    ]


_COPIED = ("prompts", "warmup_waves", "seed", "timeout_s", "stall_s")


def _listed(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


def _refuse_too_long(deployment: Deployment, loads: Sequence[Load], where: str) -> None:
    for load in loads:
        if load.input_len + load.output_len > deployment.max_model_len:
            raise ConfigError(
                f"{where}: input_len {load.input_len} plus output_len {load.output_len} is more "
                f"than max_model_len {deployment.max_model_len} of `{deployment.name}`. "
                "Shorten the prompt or raise max_model_len (as far as the model goes)."
            )


def _refuse_mixed(trials: Sequence[Trial]) -> None:
    by_emulation = {trial.deployment.engine == "emulated": trial.deployment for trial in trials}
    if len(by_emulation) > 1:
        raise ConfigError(
            f"deployments: `{by_emulation[True].name}` is emulated and "
            f"`{by_emulation[False].name}` is not, and their figures would stand side by side. "
            "Make two studies of it, or set `mix_emulated: true`."
        )


def _kept(trial: Trial, config: Mapping[str, Any]) -> bool:
    include, exclude = config.get("include"), config.get("exclude", [])
    wanted = include is None or any(_matches(trial, each) for each in include)
    return wanted and not any(_matches(trial, each) for each in exclude)


def _matches(trial: Trial, wanted: Mapping[str, Any]) -> bool:
    return all(
        _property(trial, key) in (value if isinstance(value, list) else [value])
        for key, value in wanted.items()
    )


def _property(trial: Trial, key: str) -> Any:
    if key == "deployment":
        return trial.deployment.name
    owner = trial.deployment if hasattr(trial.deployment, key) else trial.load
    return getattr(owner, key)
