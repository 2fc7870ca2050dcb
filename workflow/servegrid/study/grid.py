"""From a study's configuration to deployments, cells and trials. Pure: no file is touched."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from servegrid.errors import ConfigError
from servegrid.study.deployment import Deployment, canonical, deployment_of, digest_of

__all__ = ["Deployment", "Study", "Trial", "Workload", "canonical", "digest_of", "expand"]

SPEC_FORMAT = 3
"""Raise it when the meaning of a specification changes: old cells are then stale."""

Protocol = Literal["burst", "closed_loop", "poisson"]
Prompts = Literal["distinct", "identical"]


@dataclass(frozen=True)
class Workload:
    """What is put on a deployment in one cell.

    A burst sends waves of `concurrency` requests, each wave when the one before has ended; steady
    keeps `concurrency` users busy, each of whom sends again `think_time_s` (mean, exponential) after
    an answer; poisson sends at `request_rate`, however many are in flight then. `requests` counts
    the measured requests; it is None where `duration_s` says for how long they are sent.
    `output_len` is their mean: each asks for that many tokens, or by up to the share
    `output_spread` more or fewer. Times are seconds.
    """

    protocol: Protocol
    concurrency: int | None
    input_len: int
    output_len: int
    requests: int | None
    request_rate: float | None = None
    duration_s: float | None = None
    think_time_s: float = 0.0
    output_spread: float = 0.0
    prompts: Prompts = "distinct"
    warmup_waves: int = 1
    seed: int = 0
    timeout_s: float = 600.0
    idle_timeout_s: float = 120.0

    @property
    def intensity(self) -> float:
        """How much is asked at once: the concurrency, or the rate of an open loop."""
        value = self.concurrency if self.request_rate is None else self.request_rate
        assert value is not None
        return value

    @property
    def longest_output(self) -> int:
        """The most output tokens that one of its requests asks for."""
        return self.output_len + round(self.output_len * self.output_spread)

    @property
    def cell(self) -> str:
        """The cell's readable name within its deployment."""
        letter = "c" if self.request_rate is None else "r"
        intensity = f"{letter}{self.intensity:g}"
        return f"{self.protocol}-{intensity}-i{self.input_len}-o{self.output_len}"


@dataclass(frozen=True)
class Trial:
    """One repeat of one cell: the unit that is measured, recorded and rerun.

    A sentinel repeats a cell to show whether the node stays the same; it is no result by itself.
    """

    deployment: Deployment
    workload: Workload
    number: int
    drift_check: bool = False

    @property
    def cell(self) -> str:
        """The name of its cell within the deployment; a sentinel's is one of its own."""
        return f"sentinel-{self.workload.cell}" if self.drift_check else self.workload.cell

    @property
    def id(self) -> str:
        return f"{self.deployment.name}/{self.cell}/trial-{self.number}"

    @property
    def spec(self) -> dict[str, Any]:
        """All that decides the result, as plain JSON data."""
        return {
            "format": SPEC_FORMAT,
            "deployment": self.deployment.spec,
            "workload": asdict(self.workload),
            "trial": self.number,
            "drift_check": self.drift_check,
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
        deployment, workload = (
            Deployment.from_spec(spec["deployment"]),
            Workload(**spec["workload"]),
        )
        return cls(deployment, workload, spec["trial"], spec["drift_check"])


@dataclass(frozen=True)
class Study:
    """One grid: its trials in the order of the configuration, and the sentinels beside them."""

    name: str
    trials: tuple[Trial, ...]
    drift_checks: tuple[Trial, ...] = ()

    @property
    def measured(self) -> tuple[Trial, ...]:
        """All that is measured: the trials and the sentinels."""
        return self.trials + self.drift_checks

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """The deployments that have at least one trial, in order."""
        return tuple({trial.deployment.name: trial.deployment for trial in self.trials}.values())

    def trial(self, deployment: str, cell: str, number: int | str) -> Trial:
        """The trial of that place. Raises KeyError where the study has none."""
        return self._by_id[f"{deployment}/{cell}/trial-{number}"]

    def position(self, trial: Trial) -> int:
        """When its turn is among all of its deployment: at random, the sentinels in between.

        At random, so that what changes with time on a node, its temperature or its neighbours,
        does not look like an effect of the load. The same study has the same order.
        """
        return self._positions[trial.id]

    def max_concurrency(self, deployment: Deployment) -> int:
        """The most requests that are in flight at once, as far as the study knows.

        An open loop has as many as come; the engine works on `max_num_seqs` of them.
        """
        return max(
            trial.workload.concurrency or deployment.max_num_seqs
            for trial in self.trials
            if trial.deployment.name == deployment.name
        )

    @cached_property
    def _by_id(self) -> dict[str, Trial]:
        return {trial.id: trial for trial in self.measured}

    @cached_property
    def _positions(self) -> dict[str, int]:
        positions: dict[str, int] = {}
        for deployment in self.deployments:
            trials, drift_checks = (
                [each for each in group if each.deployment.name == deployment.name]
                for group in (self.trials, self.drift_checks)
            )
            seed = f"{self.name}/{deployment.name}/{trials[0].workload.seed}"
            order = random.Random(seed).sample(trials, len(trials))
            for place, drift_check in enumerate(drift_checks):
                order.insert(place * len(trials) // (DRIFT_CHECKS - 1) + place, drift_check)
            positions |= {trial.id: place for place, trial in enumerate(order)}
        return positions


DRIFT_CHECKS = 3
"""How often a sentinel is measured: at the start, in the middle and at the end."""
DRIFT_CHECKS_FROM = 9
"""With fewer trials in a deployment sentinels would be a large part of the work."""


def expand(config: Mapping[str, Any]) -> Study:
    """All trials of a configuration that fits the schema.

    Raises ConfigError, naming the key, where two deployments have the same name, one does
    not fit together (see `deployment_of`), a prompt and its output are longer than
    `max_model_len`, or nothing is left after `include` and `exclude`.
    """
    trials: list[Trial] = []
    names: dict[str, int] = {}
    watched: dict[str, bool | None] = {}
    for position, entry in enumerate(config["deployments"]):
        where = f"deployments[{position}]"
        keys = {**config["workload"], **entry.get("workload", {})}
        workloads = _loads(keys, where)
        deployment = deployment_of(entry, where)
        first = names.setdefault(deployment.name, position)
        if first != position:
            raise ConfigError(
                f"{where}: deployments[{first}] has the name `{deployment.name}` as well. "
                "Remove one, or give one of them a `name` of its own."
            )
        _refuse_too_long(deployment, workloads, where)
        numbers = range(1, keys.get("trials", 1) + 1)
        trials += [
            Trial(deployment, workload, number) for workload in workloads for number in numbers
        ]
        watched[deployment.name] = keys.get("drift_checks")
    kept = tuple(trial for trial in trials if _kept(trial, config))
    if not config.get("allow_emulated_mix", False):
        _refuse_mixed(kept)
    if not kept:
        raise ConfigError(
            f"include, exclude: none of the {len(trials)} cells and trials is left. "
            "Loosen the filters."
        )
    study = Study(config["study"], kept)
    drift_checks = (
        drift_check
        for deployment in study.deployments
        for drift_check in _drift_checks(deployment, kept, watched[deployment.name])
    )
    return replace(study, drift_checks=tuple(drift_checks))


def _drift_checks(
    deployment: Deployment, trials: Sequence[Trial], wanted: bool | None
) -> Iterator[Trial]:
    """Of the deployment's loads the one in the middle by prompt length, then by intensity."""
    own = [trial for trial in trials if trial.deployment.name == deployment.name]
    if wanted or (wanted is None and len(own) >= DRIFT_CHECKS_FROM):
        first = own[0].workload
        workloads = {
            (each.workload.input_len, each.workload.intensity): each.workload
            for each in own
            if (each.workload.protocol, each.workload.output_len)
            == (first.protocol, first.output_len)
        }
        middle = workloads[sorted(workloads)[(len(workloads) - 1) // 2]]
        for number in range(1, DRIFT_CHECKS + 1):
            yield Trial(deployment, middle, number, drift_check=True)


def _loads(keys: Mapping[str, Any], where: str) -> list[Workload]:
    _refuse_unfitting(keys, where)
    return [
        Workload(
            protocol=protocol,
            concurrency=None if protocol == "poisson" else intensity,
            request_rate=intensity if protocol == "poisson" else None,
            input_len=input_len,
            output_len=output_len,
            requests=_requests(keys, protocol, intensity),
            duration_s=None if protocol == "burst" else keys.get("duration_s"),
            think_time_s=keys.get("think_time_s", 0.0) if protocol == "closed_loop" else 0.0,
            **{key: keys[key] for key in _COPIED if key in keys},
        )
        for protocol in _listed(keys.get("protocol", "burst"))
        for output_len in _listed(keys.get("output_len", 100))
        for input_len, intensity in itertools.product(
            _listed(keys["input_len"]),
            _listed(keys["request_rate" if protocol == "poisson" else "concurrency"]),
        )
    ]


LEAST_IN_STATIONARY_PART = 64
"""Requests between the first and the last of each user, where a study does not say how many:
as many as the 90th percentile needs."""


def _requests(keys: Mapping[str, Any], protocol: Protocol, intensity: float) -> int | None:
    """How many requests a load has; None where its duration says so."""
    if protocol == "burst":
        return int(intensity) * int(keys.get("requests_per_user", 1))
    if keys.get("duration_s") is not None:
        return None
    if protocol == "poisson":
        return 2 * LEAST_IN_STATIONARY_PART
    if "requests_per_user" in keys:
        return int(intensity) * int(keys["requests_per_user"])
    return 2 * int(intensity) + max(LEAST_IN_STATIONARY_PART, 6 * int(intensity))


def _refuse_unfitting(keys: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError where a protocol lacks the key that its cells come from."""
    protocols = _listed(keys.get("protocol", "burst"))
    for protocol in protocols:
        needed = "request_rate" if protocol == "poisson" else "concurrency"
        if needed not in keys:
            raise ConfigError(f"{where}: the protocol `{protocol}` needs `{needed}`.")
    if "closed_loop" in protocols and keys.get("duration_s") and keys.get("warmup_waves", 1) == 0:
        raise ConfigError(
            f"{where}: a steady load with duration_s needs `warmup_waves` of at least 1: they "
            "show how many requests to hold ready. Or give requests_per_user instead."
        )


_COPIED = ("output_spread", "prompts", "warmup_waves", "seed", "timeout_s", "idle_timeout_s")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _refuse_too_long(deployment: Deployment, workloads: Sequence[Workload], where: str) -> None:
    for workload in workloads:
        if workload.input_len + workload.longest_output > deployment.max_model_len:
            raise ConfigError(
                f"{where}: input_len {workload.input_len} plus output_len {workload.longest_output} is "
                f"more than max_model_len {deployment.max_model_len} of `{deployment.name}`. "
                "Shorten the prompt or raise max_model_len (as far as the model goes)."
            )


def _refuse_mixed(trials: Sequence[Trial]) -> None:
    by_emulation = {trial.deployment.engine == "emulated": trial.deployment for trial in trials}
    if len(by_emulation) > 1:
        raise ConfigError(
            f"deployments: `{by_emulation[True].name}` is emulated and "
            f"`{by_emulation[False].name}` is not, and their figures would stand side by side. "
            "Make two studies of it, or set `allow_emulated_mix: true`."
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
    owner = trial.deployment if hasattr(trial.deployment, key) else trial.workload
    return getattr(owner, key)
