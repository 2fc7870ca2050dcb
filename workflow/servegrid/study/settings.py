"""Sweeps over settings of an engine: one entry of `deployments` becomes several. Pure."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servegrid.errors import ConfigError
from servegrid.study.deployment import CPU, EXTERNAL, REPLICAS, VLLM, parse_deployment
from servegrid.study.limits import MAX_INTEGER
from servegrid.study.parallelism import DATA, PIPELINE, PREFILL_CONTEXT, TENSOR

KEYS = ("max_num_seqs", "max_model_len", REPLICAS)
"""Keys of a deployment that a sweep can change; all other names are arguments of the engine."""
_COUNTS = (TENSOR, PIPELINE, DATA, PREFILL_CONTEXT)
"""Arguments of vLLM that count GPUs."""
_CLOSE = 0.85
"""How alike a name must be to one of KEYS to be taken for a slip."""


@dataclass(frozen=True)
class SweptEntry:
    """One entry of `deployments` after its sweep is expanded.

    `base` is the name that the first of them would have without the sweep, `settings` are the swept
    values; empty without a sweep.
    """

    entry: Mapping[str, Any]
    base: str
    settings: Mapping[str, Any]


def expand_sweep(entry: Mapping[str, Any], where: str) -> list[SweptEntry]:
    """The entries that `entry` stands for: one per combination of its swept values.

    Each is named after the deployment and its values: `NAME_max_num_seqs-64`. Raises ConfigError,
    which names the place `where`, if a setting cannot be swept or is also set without the sweep.
    """
    plain = {key: value for key, value in entry.items() if key != "sweep"}
    swept: Mapping[str, Sequence[Any]] = entry.get("sweep", {})
    if not swept:
        return [SweptEntry(plain, "", {})]
    _check_settings(entry, swept, where)
    found: list[SweptEntry] = []
    for values in itertools.product(*swept.values()):
        settings = dict(zip(swept, values, strict=True))
        changed = _with_settings(plain, settings)
        plain_name = parse_deployment(changed, where).name
        if REPLICAS in settings:  # the name says it already
            plain_name = plain_name.removesuffix(f"_{REPLICAS}-{settings[REPLICAS]}")
        name = "_".join([plain_name, *(f"{key}-{_word(each)}" for key, each in settings.items())])
        base = found[0].base if found else plain_name
        found.append(SweptEntry(changed | {"name": name}, base, settings))
    return found


def swept_settings(config: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The base and the settings of each deployment of a valid study that comes from a sweep."""
    return {
        each.entry["name"]: (each.base, each.settings)
        for position, entry in enumerate(config["deployments"])
        for each in expand_sweep(entry, f"deployments[{position}]")
        if each.settings
    }


def _with_settings(entry: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(entry.get("engine_args", {}))
    arguments |= {key: value for key, value in settings.items() if key not in KEYS}
    found = dict(entry) | {key: value for key, value in settings.items() if key in KEYS}
    if TENSOR in arguments and entry["gpu"] != CPU and entry["engine"] == VLLM:
        # The deployment's key for it is the number of all GPUs.
        others = [arguments.get(key, 1) for key in (PIPELINE, DATA, PREFILL_CONTEXT)]
        others.append(found.get(REPLICAS, 1))
        found["gpu_count"] = arguments.pop(TENSOR) * math.prod(others)
    return found | {"engine_args": arguments}


def _word(value: Any) -> str:
    """A value in a name: `on` and `off` for booleans."""
    return ("on" if value else "off") if isinstance(value, bool) else f"{value}"


def _check_settings(
    entry: Mapping[str, Any], swept: Mapping[str, Sequence[Any]], where: str
) -> None:
    if entry["engine"] == EXTERNAL:
        raise ConfigError(
            f"{where}.sweep: the engine `{EXTERNAL}` has no sweep, because servegrid does not "
            "start it. Write one deployment per server."
        )
    others = {"name", "model", "checkpoint", "tokenizer", "quantization", "engine", "gpu"}
    others |= {"gpu_count", "engine_args", "endpoint", "workload", "sweep"}
    others |= {"api", "chat_template", "lora", "network"}
    for key in swept:
        if key in others:
            raise ConfigError(
                f"{where}.sweep: `{key}` is no setting of the engine. Write one deployment per "
                f"`{key}`, or sweep one of {', '.join(KEYS)} or an argument of the engine."
            )
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=_CLOSE)
        if near and key not in KEYS:
            raise ConfigError(f"{where}.sweep: unknown setting `{key}`. Did you mean `{near[0]}`?")
        if key in entry or key in entry.get("engine_args", {}):
            raise ConfigError(
                f"{where}.sweep.{key}: the deployment sets `{key}` itself too. Remove one of the "
                "two."
            )
    _check_counts(swept, where)
    if TENSOR in swept and "gpu_count" in entry:
        raise ConfigError(
            f"{where}.sweep.{TENSOR}: the number of GPUs follows from it. Remove `gpu_count`."
        )


def _check_counts(swept: Mapping[str, Sequence[Any]], where: str) -> None:
    """Raise ConfigError if a value is no count where the deployment's own key must be one."""
    for key in (each for each in swept if each in (*KEYS, *_COUNTS)):
        for value in swept[key]:
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or not 1 <= value <= MAX_INTEGER:
                raise ConfigError(
                    f"{where}.sweep.{key}: {value!r} is not a whole number of at least 1. Correct "
                    "it."
                )
