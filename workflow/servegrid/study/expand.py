"""Expands a configuration to deployments, cells and trials. Pure: reads and writes no files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from servegrid.errors import ConfigError
from servegrid.study.deployment import EMULATED, Deployment, parse_deployment
from servegrid.study.grid import (
    DRIFT_CHECKS,
    FRONTIER,
    SWEEP,
    SWEEP_FRACTIONS,
    Study,
    Trial,
    Workload,
    by_bring_up,
    saturation_trial_of,
)
from servegrid.study.limits import MAX_INTEGER
from servegrid.study.recorded_users import check_users_from
from servegrid.study.settings import expand_sweep
from servegrid.study.workloads import as_list, check_used, expand_workloads, protocols_of

MAX_TRIALS = 1_000_000
MAX_NAME = 180
"""A file's name has at most 255 bytes, and up to 60 follow the name of a deployment or a study."""
SEARCH_TRIALS = 3
"""Default of `trials` in a search. Only cells near a limit of the SLO need more than one."""
DRIFT_CHECK_MIN_TRIALS = 9
"""A bring-up with at least this many trials has drift checks by default."""
STUDY_TABLES = frozenset(
    {"capacity", "cells", "drift_checks", "findings", "frontier"}
    | {"published", "saturation", "slo", "summary"}
)
"""The tables of the whole study in `results/tables/`. A deployment's table there has its name."""
_PREFIX_CACHING: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"enable_prefix_caching": True},
    "llamacpp": {"cache_prompt": True, "slot_prompt_similarity": 0.1},
}
"""The arguments that switch the prefix cache of an engine on. Servegrid's default is off."""
PREFIX_CACHING_SUFFIX = "-prefix_caching"
"""What is added to the name of a deployment whose prefix cache is on."""


def expand(config: Mapping[str, Any]) -> Study:
    """All trials and drift checks of a configuration that matches the schema.

    Raises ConfigError if a deployment has the name of another one or of a table of the whole study,
    a deployment is not valid (see `parse_deployment`), all prompts with their outputs are longer
    than `max_model_len`, a filter of `include` or `exclude` matches nothing, or they leave no cell.
    The error names the key.
    """
    _check_size(config)
    _check_prompt_mix(config.get("capacity", {}))
    check_users_from(config.get("capacity", {}))
    _check_slo_classes(config.get("slo", {}))
    trials: list[Trial] = []
    keys: dict[str, Mapping[str, Any]] = {}
    positions: dict[str, int] = {}
    for position, variant, suffix in _expand_entries(config["deployments"]):
        where = f"deployments[{position}]"
        deployment = parse_deployment(variant, where)
        deployment = replace(deployment, name=deployment.name + suffix)
        name = deployment.name
        _check_name(name, positions, where)
        positions[name] = position
        keys[name] = {**config["workload"], **variant.get("workload", {})}
        trials += _expand_trials(deployment, keys[name], where)
        check_used(variant.get("workload", {}), protocols_of(keys[name]), f"{where}.workload")
    check_used(
        config["workload"],
        {each for of_one in keys.values() for each in protocols_of(of_one)},
        "workload",
    )
    _check_filters(config, trials)
    kept = tuple(trial for trial in trials if _is_selected(trial, config))
    if not config.get("allow_emulated_mix", False):
        _check_emulated_mix(kept)
    if not kept:
        raise ConfigError(
            f"include, exclude: the filters remove all {len(trials)} trials. Change the filters."
        )
    if any(trial.workload.rate_fraction is not None for trial in kept):
        kept = _add_saturation_trials(kept)
    ordered = {name for name, each in keys.items() if each.get("order") == "light_to_heavy"}
    searched = {name for name, each in keys.items() if each.get("grid") == FRONTIER}
    drift_checks = (
        drift_check
        for (name, _), group in by_bring_up(kept).items()
        # Drift checks of a search's few cells would cost as much as the cells.
        for drift_check in _drift_checks(
            group, keys[name].get("drift_checks", False if name in searched else None)
        )
    )
    return Study(
        config["study"],
        kept,
        tuple(drift_checks),
        light_to_heavy=frozenset(ordered),
        pruned=frozenset(name for name in keys if keys[name].get("prune", name in ordered)),
        searched=frozenset(searched),
    )


def _expand_entries(
    entries: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[int, Mapping[str, Any], str]]:
    """Each deployment of the entries: the position of its entry, its keys, its name's suffix."""
    for position, entry in enumerate(entries):
        where = f"deployments[{position}]"
        for swept in expand_sweep(entry, where):
            for variant, suffix in _variants(swept.entry, where):
                yield position, variant, suffix


def _check_name(name: str, positions: Mapping[str, int], where: str) -> None:
    """Raise ConfigError if another deployment has the name, or a table of the whole study.

    Or if files named after it would have too long a name.
    """
    if len(name) > MAX_NAME:
        raise ConfigError(
            f"{where}: the name `{name[:40]}…` has {len(name)} characters, and at most {MAX_NAME} "
            "are possible, because folders and files are named after it. Give the deployment a "
            "shorter `name`, which starts the names of a sweep."
        )
    if name in positions:
        raise ConfigError(
            f"{where}: the name `{name}` is already that of deployments[{positions[name]}]. "
            "Remove one of the two, or give one a different `name`."
        )
    if name in STUDY_TABLES:
        raise ConfigError(
            f"{where}: the name `{name}` is that of a table of the whole study in "
            "results/tables/. Give the deployment a different `name`."
        )


def _expand_trials(deployment: Deployment, keys: Mapping[str, Any], where: str) -> list[Trial]:
    """The trials of a deployment whose workloads have these keys."""
    workloads = expand_workloads(keys, where)
    _check_prompts_fit(deployment, workloads, where)
    _check_prompt_form(deployment, workloads, where)
    _check_cell_names(workloads, where)
    _check_requests(workloads, where)
    if keys.get("grid") == FRONTIER:
        _check_searched(keys, where)
    return [
        Trial(deployment, workload, number, bring_up=bring_up)
        for bring_up in range(1, keys.get("bring_ups", 1) + 1)
        for workload in workloads
        for number in range(1, _trials(keys) + 1)
    ]


def _check_size(config: Mapping[str, Any]) -> None:
    """Raise ConfigError if there would be more than MAX_TRIALS trials, before they are made."""
    total = 0
    for entry in config["deployments"]:
        keys = {**config["workload"], **entry.get("workload", {})}
        product: int = _trials(keys) * keys.get("bring_ups", 1)
        product *= math.prod(map(len, entry.get("sweep", {}).values()))
        for key in ("protocol", "output_len", "input_len"):
            product *= len(value) if isinstance(value := keys.get(key), list) else 1
        product *= len(as_list(keys.get("source", {}).get("speedup", 1)))
        levels = [keys[key] for key in ("concurrency", "request_rate") if key in keys]
        levels = [[*SWEEP_FRACTIONS] if level == SWEEP else level for level in levels]
        product *= sum(len(value) if isinstance(value, list) else 1 for value in levels) or 1
        product *= len(as_list(entry.get("prefix_caching", False)))
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
    for protocol in {"profile", "trace"} & set(as_list(keys.get("protocol", "burst"))):
        raise ConfigError(
            f"{where}: `grid: frontier` has no largest load to search with the protocol "
            f"`{protocol}`. Remove `grid`, or write another protocol."
        )


def _add_saturation_trials(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """`trials` and, after those of each deployment, the trials that its rates are fractions of."""
    by_deployment: dict[str, dict[str, Trial]] = {}
    for trial in trials:
        by_deployment.setdefault(trial.deployment.name, {})[trial.id] = trial
    for group in by_deployment.values():
        for trial in list(group.values()):
            if trial.workload.rate_fraction is not None:
                group.setdefault(saturation_trial_of(trial).id, saturation_trial_of(trial))
    return tuple(trial for group in by_deployment.values() for trial in group.values())


def _variants(entry: Mapping[str, Any], where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The entry once per value of its `prefix_caching`: the entry, and the suffix of its name."""
    plain = {key: value for key, value in entry.items() if key != "prefix_caching"}
    if "prefix_caching" in entry:
        _check_prefix_caching(entry, where)
    for enabled in as_list(entry.get("prefix_caching", False)):
        if enabled:
            arguments = {**entry.get("engine_args", {}), **_PREFIX_CACHING[entry["engine"]]}
            yield {**plain, "engine_args": arguments}, PREFIX_CACHING_SUFFIX
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
    for workload in workloads:
        kind = "text" if workload.source is None else workload.source.kind
        if kind == "file" and deployment.engine == EMULATED:
            raise ConfigError(
                f"{where}: workload.source: an emulated engine has no tokenizer, which counts the "
                "tokens of a file. Use another engine, or another kind of source."
            )
        if deployment.is_chat and workload.source is not None and workload.source.needs_ids:
            raise ConfigError(
                f"{where}: workload.source: random ids, `prefix_len` and `hash_ids` are token ids, "
                "but a chat takes text. Use `kind: text` without a prefix, or `api: completions`."
            )


def _check_cell_names(workloads: Sequence[Workload], where: str) -> None:
    """Raise ConfigError if two cells have one name: only one of them would be measured."""
    found: dict[str, Workload] = {}
    for workload in workloads:
        other = found.setdefault(workload.cell, workload)
        if other is not workload:
            loads = " and ".join(f"{_load_of(each):.15g}" for each in (other, workload))
            raise ConfigError(
                f"{where}: the loads {loads} of `workload` give two cells the same name "
                f"`{workload.cell}`: a name has six digits of the load, or four of a trace's rate. "
                "Remove one of the two."
            )


def _load_of(workload: Workload) -> float:
    """What the study says of its load: the `speedup` of a trace, else the intensity."""
    source = workload.source
    return source.speedup if source and workload.protocol == "trace" else workload.intensity


def _check_requests(workloads: Sequence[Workload], where: str) -> None:
    """Raise ConfigError if a cell has more requests than a table can count."""
    for workload in workloads:
        requests = workload.requests
        if requests is None:
            requests = math.ceil((workload.request_rate or 0) * (workload.duration_s or 0))
        if requests > MAX_INTEGER:
            raise ConfigError(
                f"{where}: `{workload.cell}` has {requests:,} requests, and at most "
                f"{MAX_INTEGER:,} are possible. Lower the load, `requests_per_user` or "
                "`duration_s`."
            )


def _check_emulated_mix(trials: Sequence[Trial]) -> None:
    by_emulation = {trial.deployment.engine == "emulated": trial.deployment for trial in trials}
    if len(by_emulation) > 1:
        raise ConfigError(
            f"deployments: `{by_emulation[True].name}` is emulated and "
            f"`{by_emulation[False].name}` is not; tables and figures would mix their results. "
            "Split the study in two, or set `allow_emulated_mix: true`."
        )


def _check_filters(config: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Raise ConfigError if a filter matches nothing, because of a misspelled model for example.

    A list may have values that no cell has, so that several studies can share a filter.
    """
    for name in ("include", "exclude"):
        for number, conditions in enumerate(config.get(name, [])):
            for key, values in conditions.items():
                known = {_property(trial, key) for trial in trials} - {None}
                if known.isdisjoint(as_list(values)):
                    wanted = " or ".join(f"`{each}`" for each in as_list(values))
                    listed = ", ".join(f"`{each}`" for each in sorted(known)) or "none"
                    raise ConfigError(
                        f"{name}[{number}].{key}: no cell has the value {wanted}. Correct or "
                        f"remove it. Values of the study: {listed}."
                    )


def _is_selected(trial: Trial, config: Mapping[str, Any]) -> bool:
    include, exclude = config.get("include"), config.get("exclude", [])
    included = include is None or any(_matches(trial, each) for each in include)
    return included and not any(_matches(trial, each) for each in exclude)


def _matches(trial: Trial, conditions: Mapping[str, Any]) -> bool:
    return all(_property(trial, key) in as_list(value) for key, value in conditions.items())


def _property(trial: Trial, key: str) -> Any:
    if key == "deployment":
        return trial.deployment.name
    owner = trial.deployment if hasattr(trial.deployment, key) else trial.workload
    return getattr(owner, key)
