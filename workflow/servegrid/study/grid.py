"""Expands a configuration to deployments, cells and trials. Pure: reads and writes no files."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, Self

from servegrid.errors import ConfigError
from servegrid.study.deployment import (
    EMULATED,
    Deployment,
    canonical_json,
    digest_json,
    parse_deployment,
)
from servegrid.study.settings import expand_sweep
from servegrid.study.source import NEEDS_FILE, Source, parse_source, uniform_half_width

__all__ = ["Deployment", "Study", "Trial", "Workload", "canonical_json", "digest_json", "expand"]

SPEC_FORMAT = 3
"""Raise this number when the meaning of a specification changes. Older cells are then stale."""

Protocol = Literal["burst", "closed_loop", "poisson", "constant", "gamma", "profile", "trace"]
"""`constant` exists only in imported results of other clients; a study cannot name it."""
Prompts = Literal["distinct", "identical"]

CONCURRENCY_PROTOCOLS: tuple[Protocol, ...] = ("burst", "closed_loop")
"""The protocols whose workloads have a concurrency; the others have a request rate."""
OPEN_LOOPS: tuple[Protocol, ...] = ("poisson", "constant", "gamma", "profile", "trace")
"""The protocols whose requests are due at a rate, no matter how many requests are in flight."""
SWEEP = "sweep"
"""The `request_rate` that stands for SWEEP_FRACTIONS of the rate at saturation."""
SWEEP_FRACTIONS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3)
"""Fixed, so that the names of the cells are known before the rate is (docs/adr/0012)."""
_LATER_KEYS = ("burstiness", "rate_profile", "rate_fraction", "source")
"""Keys of a workload that its specification has only if they are set: older cells stay the same."""


@dataclass(frozen=True)
class Workload:
    """The requests of one cell.

    `burst` sends waves of `concurrency` requests; each wave starts when the last one has ended.
    `closed_loop` keeps `concurrency` users active; each sends the next request after a think time
    (exponential, mean `think_time_s`). `poisson` sends at `request_rate`, no matter how many
    requests are in flight; `constant` does so at equal intervals. `gamma` has gamma-distributed
    intervals of the shape `burstiness`. `profile` is a Poisson process whose rate follows
    `rate_profile`: factors of `request_rate` at equal distances over `duration_s`, with straight
    lines between them. `trace` sends at the times of the `source`, with `request_rate` as their
    mean. With `rate_fraction`, the rate is this fraction of the rate at saturation,
    which is measured first. `requests` is the number of
    measured requests; if it is None, requests are sent for `duration_s`. `output_len` is the mean
    output length; the lengths of a cell vary by up to the fraction `output_spread`. Without a
    `source`, prompts are texts of `input_len` tokens from the corpus. Times are in seconds.
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
    burstiness: float | None = None
    rate_profile: tuple[float, ...] | None = None
    rate_fraction: float | None = None
    source: Source | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """All fields as plain JSON data; those of _LATER_KEYS only if they are set."""
        values = ((key, getattr(self, key)) for key in _WORKLOAD_KEYS)  # asdict is slow
        spec = {key: value for key, value in values if value is not None or key not in _LATER_KEYS}
        return spec if self.source is None else spec | {"source": self.source.spec}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The inverse of `spec`."""
        profile, source = spec.get("rate_profile"), spec.get("source")
        parsed = {
            "rate_profile": None if profile is None else tuple(profile),
            "source": None if source is None else Source.from_spec(source),
        }
        return cls(**{**spec, **parsed})

    @property
    def has_stationary_part(self) -> bool:
        """Whether it can settle: not a burst, and not a load that changes on purpose."""
        return self.protocol not in ("burst", "profile", "trace")

    @property
    def has_fixed_lengths(self) -> bool:
        """Whether all requests have `input_len` tokens, and `output_len` but for its spread."""
        return self.source is None or self.source.has_fixed_lengths

    @property
    def is_open_loop(self) -> bool:
        """Whether requests are due at a rate; their latencies then start when they are due."""
        return self.protocol in OPEN_LOOPS

    @property
    def intensity(self) -> float:
        """The concurrency, or for an open loop the request rate, or its fraction of saturation."""
        values = (self.request_rate, self.concurrency, self.rate_fraction)
        return next(value for value in values if value is not None)

    @property
    def max_output_len(self) -> int:
        """The largest output length of its requests, in tokens."""
        if (longest := self._longest("output")) is not None:
            return longest
        return self.output_len + round(self.output_len * self.output_spread)

    def asks_at_least(self, other: Workload) -> bool:
        """Whether it has at least as many users and as long prompts, and all else is the same."""
        if self.intensity < other.intensity or self.input_len < other.input_len:
            return False
        load = {"concurrency", "request_rate", "input_len", "requests"}
        mine, others = vars(self), vars(other)
        return all(mine[key] == others[key] for key in mine.keys() - load)

    @property
    def max_input_len(self) -> int:
        """The largest prompt length of its requests, in tokens."""
        longest = self._longest("input")
        return self.input_len if longest is None else longest

    def _longest(self, what: Literal["input", "output"]) -> int | None:
        """The largest length that the source has; None if it is that of the workload."""
        source = self.source or Source()
        if source.file is not None and source.kind != "file":
            return getattr(source.file, f"max_{what}_len")  # type: ignore[no-any-return]
        drawn = source.input_lens if what == "input" else source.output_lens
        if drawn is None:
            return None
        mean = self.input_len if what == "input" else self.output_len
        if drawn.shape != "uniform":
            return drawn.max
        return min(drawn.max, round(mean * (1 + uniform_half_width(drawn.cv))))

    @property
    def cell(self) -> str:
        """The name of the cell within its deployment."""
        letter = "x" if self.rate_fraction else "c" if self.request_rate is None else "r"
        intensity = f"{letter}{self.rate_fraction or self.intensity:g}"
        return f"{self.protocol}-{intensity}-i{self.input_len}-o{self.output_len}"


_WORKLOAD_KEYS = tuple(field.name for field in fields(Workload))


@dataclass(frozen=True)
class Trial:
    """One repeat of a cell: the unit that is measured, recorded and rerun.

    A drift check repeats a cell to show whether the node stays the same. It is not a result.
    """

    deployment: Deployment
    workload: Workload
    number: int
    drift_check: bool = False
    bring_up: int = 1
    """The engine is started anew, in an allocation of its own, for each of these numbers."""

    @property
    def unsupported(self) -> str | None:
        """Why it cannot work, whatever the engine does; None if that is not known before."""
        workload, longest = self.workload, self.deployment.max_model_len
        source = workload.source
        if source is not None and source.file is not None and source.kind != "file":
            return None  # its longest prompt need not have its longest output; rows fit one by one
        if not longest or workload.max_input_len + workload.max_output_len <= longest:
            return None  # imported results do not say it
        return (
            f"input_len {workload.max_input_len} plus output_len {workload.max_output_len} is more "
            f"than max_model_len {longest}"
        )

    @property
    def label(self) -> str:
        """Its number, and that of its bring-up from the second one on: `1`, `1-bring_up-2`."""
        return f"{self.number}" + (f"-bring_up-{self.bring_up}" if self.bring_up > 1 else "")

    @property
    def allocation(self) -> str:
        """The name of its allocations. It changes with every change of the deployment."""
        name = self.deployment.name
        bring_up = f".bring_up-{self.bring_up}" if self.bring_up > 1 else ""
        return f"{name}{bring_up}.{self.deployment.digest[:8]}"

    @property
    def cell(self) -> str:
        """The name of its cell within the deployment. Drift checks have a prefix."""
        return f"drift_check-{self.workload.cell}" if self.drift_check else self.workload.cell

    @property
    def id(self) -> str:
        """Its identity in the study, and its folder in `results/cells/`."""
        return f"{self.deployment.name}/{self.cell}/trial-{self.label}"

    @property
    def spec(self) -> dict[str, Any]:
        """Everything that affects the result, as plain JSON data.

        The first bring-up is not named, so more bring-ups change no trial that was measured.
        """
        bring_up = {"bring_up": self.bring_up} if self.bring_up > 1 else {}
        return bring_up | {
            "format": SPEC_FORMAT,
            "deployment": self.deployment.spec,
            "workload": self.workload.spec,
            "trial": self.number,
            "drift_check": self.drift_check,
        }

    @property
    def spec_json(self) -> str:
        """The canonical JSON of `spec`."""
        return canonical_json(self.spec)

    @property
    def digest(self) -> str:
        """The digest of `spec`."""
        return digest_json(self.spec)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Trial:
        """The inverse of `spec`."""
        deployment = Deployment.from_spec(spec["deployment"])
        workload = Workload.from_spec(spec["workload"])
        bring_up = spec.get("bring_up", 1)
        return cls(deployment, workload, spec["trial"], spec["drift_check"], bring_up)


@dataclass(frozen=True)
class Study:
    """One grid: its trials in the order of the configuration, and its drift checks."""

    name: str
    trials: tuple[Trial, ...]
    drift_checks: tuple[Trial, ...] = ()
    light_to_heavy: frozenset[str] = frozenset()
    """The deployments whose trials run in this order; the others run in random order."""
    pruned: frozenset[str] = frozenset()
    """The deployments of which hopeless workloads are not tried."""
    searched: frozenset[str] = frozenset()
    """The names of the deployments with `grid: frontier`: only cells that a search needs run."""
    source_files: Mapping[str, str] = field(default_factory=dict)
    """The path of each file that a workload takes its requests from, by its SHA-256."""

    @property
    def unsupported(self) -> tuple[Trial, ...]:
        """The trials that get the verdict `unsupported` without being submitted."""
        return tuple(trial for trial in self.trials if trial.unsupported)

    @property
    def all_trials(self) -> tuple[Trial, ...]:
        """The trials and the drift checks."""
        return self.trials + self.drift_checks

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """The deployments that have at least one trial, in the order of the configuration."""
        return tuple({trial.deployment.name: trial.deployment for trial in self.trials}.values())

    def trial(self, deployment: str, cell: str, label: int | str) -> Trial:
        """The trial with these names. Raises KeyError if the study does not contain it."""
        return self._by_id[f"{deployment}/{cell}/trial-{label}"]

    def by_id(self, identity: str) -> Trial:
        """The trial with this `Trial.id`. Raises KeyError if the study does not contain it."""
        return self._by_id[identity]

    def prunes(self, trial: Trial) -> int:
        """1 if hopeless workloads of the trial's deployment are not tried, else 0."""
        return int(trial.deployment.name in self.pruned)

    def source_file(self, trial: Trial) -> str:
        """The path of the file that the trial takes its requests from; empty if there is none."""
        source = trial.workload.source
        digest = "" if source is None or source.file is None else source.file.sha256
        return self.source_files.get(digest, "")

    def position(self, trial: Trial) -> int:
        """The position of `trial` in the order of its bring-up, from 0.

        The order is random, with the drift checks in between, so that changes over time (the
        temperature, other jobs on the node) do not look like effects of the workload. The seed
        comes from the study, so the same study always has the same order. With `order:
        light_to_heavy`, the first trials of all cells run before the second ones, each by the
        tokens in flight.
        """
        return self._positions[trial.id]

    def saturation_trial(self, trial: Trial) -> Trial | None:
        """The trial that finds the rate at saturation for `trial`; None if it needs none."""
        if trial.workload.rate_fraction is None:
            return None
        return self._by_id[_saturation_trial(trial).id]

    def max_concurrency(self, deployment: Deployment) -> int:
        """The highest concurrency of the deployment's workloads.

        Open loops count as `max_running`: the engine runs no more requests at once.
        """
        return self._max_concurrencies[deployment.name]

    @cached_property
    def _max_concurrencies(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for trial in self.trials:
            name, concurrency = trial.deployment.name, trial.workload.concurrency
            concurrency = concurrency or trial.deployment.max_running
            found[name] = max(concurrency, found.get(name, 0))
        return found

    @cached_property
    def _saturation_ids(self) -> set[str]:
        waiting = (trial for trial in self.trials if trial.workload.rate_fraction is not None)
        return {_saturation_trial(trial).id for trial in waiting}

    @cached_property
    def _by_id(self) -> dict[str, Trial]:
        return {trial.id: trial for trial in self.all_trials}

    @cached_property
    def _positions(self) -> dict[str, int]:
        positions: dict[str, int] = {}
        trials, drift_checks = (_by_bring_up(group) for group in (self.trials, self.drift_checks))
        for (deployment, bring_up), group in trials.items():
            seed = f"{self.name}/{deployment}/{group[0].workload.seed}"
            seed += f"/{bring_up}" if bring_up > 1 else ""
            order = random.Random(seed).sample(group, len(group))
            if deployment in self.light_to_heavy:
                order = sorted(group, key=_weight)
            for number, drift_check in enumerate(drift_checks.get((deployment, bring_up), [])):
                order.insert(number * len(group) // (DRIFT_CHECKS - 1) + number, drift_check)
            # Others wait for the rate at saturation, so it is found first. The sort is stable.
            order.sort(key=lambda trial: trial.id not in self._saturation_ids)
            positions |= {trial.id: position for position, trial in enumerate(order)}
        return positions


def _weight(trial: Trial) -> tuple[float, ...]:
    """A sort key: if a workload asks for at least as much as another, it comes later."""
    workload = trial.workload
    tokens = workload.intensity * (workload.input_len + workload.output_len)
    return trial.number, workload.is_open_loop, tokens, workload.input_len


def _saturation_trial(trial: Trial) -> Trial:
    """The trial whose throughput is the rate at saturation: a closed loop that fills the engine.

    As many users as the engine runs requests at once keep it busy, so no higher rate can be served.
    """
    users = trial.deployment.max_running
    keys = {
        key: getattr(trial.workload, key) for key in ("input_len", "output_len", "source", *_COPIED)
    }
    requests = _requests({}, "closed_loop", users)
    workload = Workload("closed_loop", concurrency=users, requests=requests, **keys)
    return Trial(trial.deployment, workload, number=1)


def _add_saturation_trials(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """`trials` and, after those of each deployment, the trials that its rates are fractions of."""
    by_deployment: dict[str, dict[str, Trial]] = {}
    for trial in trials:
        by_deployment.setdefault(trial.deployment.name, {})[trial.id] = trial
    for group in by_deployment.values():
        for trial in list(group.values()):
            if trial.workload.rate_fraction is not None:
                group.setdefault(_saturation_trial(trial).id, _saturation_trial(trial))
    return tuple(trial for group in by_deployment.values() for trial in group.values())


def _check_searched(keys: Mapping[str, Any], where: str) -> None:
    """A search chooses the order itself, and needs rates that are known before it starts."""
    for key in ("order", "prune"):
        if key in keys:
            raise ConfigError(
                f"{where}: `grid: frontier` chooses the order of the cells itself. Remove `{key}`."
            )
    if keys.get("request_rate") == SWEEP:
        raise ConfigError(
            f"{where}: `grid: frontier` searches among given rates. Replace `request_rate: sweep` "
            "by a list of rates, or remove `grid`."
        )


def _by_bring_up(trials: Sequence[Trial]) -> dict[tuple[str, int], list[Trial]]:
    """The trials by deployment and bring-up."""
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.deployment.name, trial.bring_up), []).append(trial)
    return groups


MAX_TRIALS = 1_000_000
FRONTIER = "frontier"
"""The value of `grid` with which the largest load that meets the SLO is searched."""
SEARCH_TRIALS = 3
"""Default of `trials` in a search. Only cells near a limit of the SLO need more than one."""
DRIFT_CHECKS = 3
"""Drift checks per bring-up: one at the start, one in the middle, one at the end."""
DRIFT_CHECK_MIN_TRIALS = 9
"""A bring-up with at least this many trials has drift checks by default."""


def _check_size(config: Mapping[str, Any]) -> None:
    """Raise ConfigError if there would be more than MAX_TRIALS trials, before they are made."""
    total = 0
    for entry in config["deployments"]:
        keys = {**config["workload"], **entry.get("workload", {})}
        product: int = _trials(keys) * keys.get("bring_ups", 1)
        product *= math.prod(map(len, entry.get("sweep", {}).values()))
        for key in ("protocol", "output_len", "input_len"):
            product *= len(value) if isinstance(value := keys.get(key), list) else 1
        product *= len(_as_list(keys.get("source", {}).get("speedup", 1)))
        levels = [keys[key] for key in ("concurrency", "request_rate") if key in keys]
        product *= sum(len(value) if isinstance(value, list) else 1 for value in levels) or 1
        product *= len(_as_list(entry.get("prefix_caching", False)))
        total += product
    if total > MAX_TRIALS:
        raise ConfigError(
            f"deployments: the study has more than {MAX_TRIALS:,} trials. Lower `trials`, or split "
            "the study."
        )


def _trials(keys: Mapping[str, Any]) -> int:
    default = SEARCH_TRIALS if keys.get("grid") == FRONTIER else 1
    trials: int = keys.get("trials", default)
    return trials


def _check_prompt_mix(capacity: Mapping[str, Any]) -> None:
    """Raise ConfigError if it is not clear which prompts the plan's users send."""
    lengths = [each["input_len"] for each in capacity.get("prompt_mix", ())]
    if lengths and "input_len" in capacity:
        raise ConfigError(
            "capacity: `input_len` and `prompt_mix` exclude each other. Remove one of the two."
        )
    if len(set(lengths)) < len(lengths):
        raise ConfigError(
            "capacity.prompt_mix: an `input_len` occurs twice. Give each length one share."
        )


def _check_slo_classes(slo: Mapping[str, Any]) -> None:
    """Raise ConfigError if `slo` has both limits and classes with limits."""
    classes = [name for name, value in slo.items() if isinstance(value, Mapping)]
    limits = [name for name in slo if name not in classes]
    if classes and limits:
        raise ConfigError(
            f"slo: `{limits[0]}` is a limit and `{classes[0]}` is a class of users. Move "
            f"`{limits[0]}` into the classes that it is for."
        )


def expand(config: Mapping[str, Any]) -> Study:
    """All trials and drift checks of a configuration that matches the schema.

    Raises ConfigError if two deployments have the same name, a deployment is not valid (see
    `parse_deployment`), all prompts with their outputs are longer than `max_model_len`, or
    `include` and `exclude` leave no cell. The error names the key.
    """
    _check_size(config)
    _check_prompt_mix(config.get("capacity", {}))
    _check_slo_classes(config.get("slo", {}))
    trials: list[Trial] = []
    names: dict[str, int] = {}
    with_drift_checks: dict[str, bool | None] = {}
    ordered: set[str] = set()
    pruned: set[str] = set()
    searched: set[str] = set()
    entries = [
        (position, variant, suffix)
        for position, entry in enumerate(config["deployments"])
        for each in expand_sweep(entry, f"deployments[{position}]")
        for variant, suffix in _variants(each.entry, f"deployments[{position}]")
    ]
    for position, variant, suffix in entries:
        where = f"deployments[{position}]"
        keys = {**config["workload"], **variant.get("workload", {})}
        workloads = _expand_workloads(keys, where)
        deployment = parse_deployment(variant, where)
        deployment = replace(deployment, name=deployment.name + suffix)
        first = names.get(deployment.name)
        if first is not None:
            raise ConfigError(
                f"{where}: the name `{deployment.name}` is already that of deployments[{first}]. "
                "Remove one of the two, or give one a different `name`."
            )
        names[deployment.name] = position
        _check_prompts_fit(deployment, workloads, where)
        _check_prompt_form(deployment, workloads, where)
        trials += [
            Trial(deployment, workload, number, bring_up=bring_up)
            for bring_up in range(1, keys.get("bring_ups", 1) + 1)
            for workload in workloads
            for number in range(1, _trials(keys) + 1)
        ]
        is_searched = keys.get("grid") == FRONTIER
        if is_searched:
            _check_searched(keys, where)
            searched.add(deployment.name)
        # Drift checks of a few cells would cost as much as the cells.
        with_drift_checks[deployment.name] = keys.get(
            "drift_checks", False if is_searched else None
        )
        if keys.get("order") == "light_to_heavy":
            ordered.add(deployment.name)
        if keys.get("prune", deployment.name in ordered):
            pruned.add(deployment.name)
    kept = tuple(trial for trial in trials if _is_selected(trial, config))
    if not config.get("allow_emulated_mix", False):
        _check_emulated_mix(kept)
    if not kept:
        raise ConfigError(
            f"include, exclude: the filters remove all {len(trials)} trials. Change the filters."
        )
    if any(trial.workload.rate_fraction is not None for trial in kept):
        kept = _add_saturation_trials(kept)
    study = Study(
        config["study"],
        kept,
        light_to_heavy=frozenset(ordered),
        pruned=frozenset(pruned),
        searched=frozenset(searched),
    )
    drift_checks = (
        drift_check
        for (deployment, _), group in _by_bring_up(kept).items()
        for drift_check in _drift_checks(group, with_drift_checks[deployment])
    )
    return replace(study, drift_checks=tuple(drift_checks))


_PREFIX_CACHING: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"enable_prefix_caching": True},
    "llamacpp": {"cache_prompt": True, "slot_prompt_similarity": 0.1},
}
"""The arguments that switch the prefix cache of an engine on. Servegrid's default is off."""


def _variants(entry: Mapping[str, Any], where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The entry once per value of its `prefix_caching`: the entry, and the suffix of its name."""
    plain = {key: value for key, value in entry.items() if key != "prefix_caching"}
    if "prefix_caching" in entry:
        _check_prefix_caching(entry, where)
    for enabled in _as_list(entry.get("prefix_caching", False)):
        if enabled:
            arguments = {**entry.get("engine_args", {}), **_PREFIX_CACHING[entry["engine"]]}
            yield {**plain, "engine_args": arguments}, "-prefix_caching"
        else:
            yield plain, ""


def _check_prefix_caching(entry: Mapping[str, Any], where: str) -> None:
    engine = entry["engine"]
    if engine not in _PREFIX_CACHING:
        known = " and ".join(f"`{each}`" for each in _PREFIX_CACHING)
        raise ConfigError(
            f"{where}.prefix_caching: servegrid sets it only for {known}, not for `{engine}`. "
            "Remove the key."
        )
    for key in _PREFIX_CACHING[engine]:
        if key in entry.get("engine_args", {}):
            raise ConfigError(
                f"{where}.engine_args.{key}: `prefix_caching` sets it already. Remove one of the "
                "two."
            )


def _drift_checks(trials: Sequence[Trial], wanted: bool | None) -> Iterator[Trial]:
    """The workload in the middle of a bring-up's grid, by prompt length, then intensity."""
    trials = [trial for trial in trials if not trial.unsupported]
    if (trials and wanted) or (wanted is None and len(trials) >= DRIFT_CHECK_MIN_TRIALS):
        first = trials[0].workload
        workloads = {
            (each.workload.input_len, each.workload.intensity): each.workload
            for each in trials
            if (each.workload.protocol, each.workload.output_len)
            == (first.protocol, first.output_len)
        }
        middle = workloads[sorted(workloads)[(len(workloads) - 1) // 2]]
        for number in range(1, DRIFT_CHECKS + 1):
            yield replace(trials[0], workload=middle, number=number, drift_check=True)


def _expand_workloads(keys: Mapping[str, Any], where: str) -> list[Workload]:
    source = parse_source(keys["source"], f"{where}: workload.source") if "source" in keys else None
    if source is not None and source.kind == "trace":
        return _expand_trace(keys, source, where)
    if source is not None and source.file is not None and source.kind not in NEEDS_FILE:
        _check_absent(keys, ("input_len", "output_len", "output_spread"), "the file", where)
        keys = {
            **keys,
            "input_len": source.file.input_len,
            "output_len": source.file.output_len,
        }
    _check_workload_keys(keys, where)
    workloads = _expand_lengths(keys, source)
    if source is not None:
        _check_source_fits(source, workloads, where)
    return workloads


def _expand_lengths(keys: Mapping[str, Any], source: Source | None) -> list[Workload]:
    is_sweep = keys.get("request_rate") == SWEEP
    rates = list(SWEEP_FRACTIONS) if is_sweep else _as_list(keys.get("request_rate"))
    return [
        Workload(
            protocol=protocol,
            source=source,
            concurrency=None if protocol in OPEN_LOOPS else intensity,
            request_rate=intensity if protocol in OPEN_LOOPS and not is_sweep else None,
            input_len=input_len,
            output_len=output_len,
            requests=_requests(keys, protocol, intensity),
            duration_s=None if protocol == "burst" else keys.get("duration_s"),
            think_time_s=keys.get("think_time_s", 0.0) if protocol == "closed_loop" else 0.0,
            burstiness=float(keys["burstiness"]) if protocol == "gamma" else None,
            rate_profile=tuple(keys["rate_profile"]) if protocol == "profile" else None,
            rate_fraction=intensity if protocol in OPEN_LOOPS and is_sweep else None,
            **{key: keys[key] for key in _COPIED if key in keys},
        )
        for protocol in _as_list(keys.get("protocol", "burst"))
        for output_len in _as_list(keys.get("output_len", 100))
        for input_len, intensity in itertools.product(
            _as_list(keys["input_len"]),
            rates if protocol in OPEN_LOOPS else _as_list(keys["concurrency"]),
        )
    ]


def _expand_trace(keys: Mapping[str, Any], source: Source, where: str) -> list[Workload]:
    """One workload per `speedup`: the trace has the lengths, the times and their number."""
    absent = ("input_len", "output_len", "output_spread", "concurrency", "request_rate")
    more = ("requests_per_user", "duration_s", "think_time_s", "prompts")
    _check_absent(keys, (*absent, *more), "the trace", where)
    if _as_list(keys.get("protocol", "trace")) != ["trace"]:
        raise ConfigError(
            f"{where}: workload.source: a trace has its own times, so its protocol is `trace`. "
            "Write `protocol: trace`, or remove `protocol`."
        )
    facts = source.file
    assert facts is not None
    if facts.rows < 2 or not facts.span_s:
        raise ConfigError(
            f"{where}: workload.source: the trace has {facts.rows} rows within "
            f"{facts.span_s:g} s, so it has no rate. Name a longer trace, or raise `first_s`."
        )
    rate = (facts.rows - 1) / facts.span_s
    return [
        Workload(
            protocol="trace",
            concurrency=None,
            request_rate=float(f"{speedup * rate:.4g}"),
            input_len=facts.input_len,
            output_len=facts.output_len,
            requests=facts.rows,
            source=replace(source, speedup=float(speedup)),
            **{key: keys[key] for key in _COPIED if key in keys},
        )
        for speedup in _as_list(keys["source"].get("speedup", 1.0))
    ]


def _check_absent(keys: Mapping[str, Any], absent: Sequence[str], owner: str, where: str) -> None:
    for key in absent:
        if key in keys:
            raise ConfigError(
                f"{where}: workload.{key}: comes from {owner} of `workload.source`. Remove the key."
            )


def _check_source_fits(source: Source, workloads: Sequence[Workload], where: str) -> None:
    """Raise ConfigError if a workload cannot take its requests from the source."""
    for workload in workloads:
        place = f"{where}: workload.source"
        if workload.prompts == "identical" and (source.kind == "file" or source.prefix_len):
            raise ConfigError(
                f"{place}: its prompts differ, so they are not `identical`. Remove `prompts`."
            )
        if workload.prompts == "identical" and not source.has_fixed_lengths:
            raise ConfigError(f"{place}: prompts of different lengths are not `identical`.")
        if source.output_lens is not None and workload.output_spread:
            raise ConfigError(
                f"{place}.output_lens: `output_spread` is a second distribution. Remove one of the "
                "two."
            )
        if source.prefix_len >= workload.input_len:
            raise ConfigError(
                f"{place}.prefix_len: {source.prefix_len} leaves nothing of input_len "
                f"{workload.input_len}, which includes the prefix. Shorten the prefix."
            )
        for key, drawn, mean in (
            ("input_lens", source.input_lens, workload.input_len),
            ("output_lens", source.output_lens, workload.output_len),
        ):
            if drawn is not None and drawn.max < mean:
                raise ConfigError(f"{place}.{key}.max: {drawn.max} is less than the mean {mean}.")
        rows = source.file.rows if source.kind == "file" and source.file else None
        if rows is not None and (workload.requests or 1) > rows:
            raise ConfigError(
                f"{place}: the file has {rows} usable rows, and `{workload.cell}` needs "
                f"{workload.requests}: no row is sent twice. Lower `concurrency` or "
                "`requests_per_user`, or add rows."
            )


MIN_STATIONARY_REQUESTS = 64
"""Default number of requests between the first and the last one of each user. The 90th
percentile needs this many samples."""
OPEN_LOOP_REQUESTS = 2000
"""Default number of requests of an open loop. With fewer, a load of 90% of the server's capacity
often looks like overload (docs/statistics.md)."""


def _requests(keys: Mapping[str, Any], protocol: Protocol, intensity: float) -> int | None:
    """The number of requests of a workload; None if it has a duration instead."""
    if protocol == "burst":
        return int(intensity) * int(keys.get("requests_per_user", 1))
    if keys.get("duration_s") is not None:
        return None
    if protocol in OPEN_LOOPS:
        return OPEN_LOOP_REQUESTS
    if "requests_per_user" in keys:
        return int(intensity) * int(keys["requests_per_user"])
    return 2 * int(intensity) + max(MIN_STATIONARY_REQUESTS, 6 * int(intensity))


def _check_workload_keys(keys: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError if a key that a protocol needs is missing."""
    protocols = _as_list(keys.get("protocol", "burst"))
    if "input_len" not in keys:
        raise ConfigError("workload: `input_len` is missing. Prompt length in tokens.")
    for protocol in protocols:
        if protocol == "trace":
            raise ConfigError(
                f"{where}: the protocol `trace` needs a trace. Add `source` under `workload`, "
                "with `kind: trace` and `path`."
            )
        needed = ["request_rate" if protocol in OPEN_LOOPS else "concurrency"]
        needed += {"gamma": ["burstiness"], "profile": ["rate_profile", "duration_s"]}.get(
            protocol, []
        )
        for key in needed:
            if key not in keys:
                raise ConfigError(
                    f"{where}: the protocol `{protocol}` needs `{key}`. "
                    f"Add `{key}` under `workload`."
                )
    for key, protocol in (("burstiness", "gamma"), ("rate_profile", "profile")):
        if key in keys and protocol not in protocols:
            raise ConfigError(
                f"{where}: `{key}` is only for the protocol `{protocol}`. Write "
                f"`protocol: {protocol}`, or remove `{key}`."
            )
    if "profile" in protocols and keys["request_rate"] == SWEEP:
        raise ConfigError(
            f"{where}: the protocol `profile` needs a number as `request_rate`: its rate changes, "
            "so it has no saturation. Run a sweep with `poisson` first."
        )
    if "profile" in protocols and not any(keys["rate_profile"]):
        raise ConfigError(f"{where}: `rate_profile` has no factor above 0. Add one.")


_COPIED = ("output_spread", "prompts", "warmup_waves", "seed", "timeout_s", "idle_timeout_s")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_prompts_fit(deployment: Deployment, workloads: Sequence[Workload], where: str) -> None:
    """Raise ConfigError if no workload fits. Single ones that do not are `unsupported`."""
    problems = [Trial(deployment, workload, 1).unsupported for workload in workloads]
    if all(problems):
        raise ConfigError(
            f"{where}: {problems[0]} of `{deployment.name}`, and no other workload fits, either. "
            "Shorten the prompt, or raise max_model_len if the model supports it."
        )


def _check_prompt_form(deployment: Deployment, workloads: Sequence[Workload], where: str) -> None:
    """Raise ConfigError if the deployment cannot get the prompts in a form that it takes."""
    is_chat = deployment.endpoint is not None and deployment.endpoint.api == "chat"
    for workload in workloads:
        kind = "text" if workload.source is None else workload.source.kind
        if kind == "file" and deployment.engine == EMULATED:
            raise ConfigError(
                f"{where}: workload.source: an emulated engine has no tokenizer, which counts the "
                "tokens of a file. Use another engine, or another kind of source."
            )
        if is_chat and workload.source is not None and workload.source.needs_ids:
            raise ConfigError(
                f"{where}: workload.source: random ids, `prefix_len` and `hash_ids` are token ids, "
                "but a chat takes text. Use `kind: text` without a prefix, or `api: completions`."
            )


def _check_emulated_mix(trials: Sequence[Trial]) -> None:
    by_emulation = {trial.deployment.engine == "emulated": trial.deployment for trial in trials}
    if len(by_emulation) > 1:
        raise ConfigError(
            f"deployments: `{by_emulation[True].name}` is emulated and "
            f"`{by_emulation[False].name}` is not; tables and figures would mix their results. "
            "Split the study in two, or set `allow_emulated_mix: true`."
        )


def _is_selected(trial: Trial, config: Mapping[str, Any]) -> bool:
    include, exclude = config.get("include"), config.get("exclude", [])
    included = include is None or any(_matches(trial, each) for each in include)
    return included and not any(_matches(trial, each) for each in exclude)


def _matches(trial: Trial, conditions: Mapping[str, Any]) -> bool:
    return all(_property(trial, key) in _as_list(value) for key, value in conditions.items())


def _property(trial: Trial, key: str) -> Any:
    if key == "deployment":
        return trial.deployment.name
    owner = trial.deployment if hasattr(trial.deployment, key) else trial.workload
    return getattr(owner, key)
