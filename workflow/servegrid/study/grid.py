"""Expands a configuration to deployments, cells and trials. Pure: reads and writes no files."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from servegrid.study.source import NEEDS_FILE, Source, parse_source, uniform_half_width

__all__ = ["Deployment", "Study", "Trial", "Workload", "canonical_json", "digest_json", "expand"]

SPEC_FORMAT = 3
"""Raise this number when the meaning of a specification changes. Older cells are then stale."""

Protocol = Literal["burst", "closed_loop", "poisson", "constant", "trace"]
"""`constant` exists only in imported results of other clients; a study cannot name it."""
Prompts = Literal["distinct", "identical"]

CONCURRENCY_PROTOCOLS: tuple[Protocol, ...] = ("burst", "closed_loop")
"""The protocols whose workloads have a concurrency; the others have a request rate."""
OPEN_LOOPS: tuple[Protocol, ...] = ("poisson", "constant", "trace")
"""The protocols whose requests are due at a rate, no matter how many requests are in flight."""
WHOLE_RUN: tuple[Protocol, ...] = ("burst", "trace")
"""The protocols whose metrics come from all requests: they have no stationary part."""


@dataclass(frozen=True)
class Workload:
    """The requests of one cell.

    `burst` sends waves of `concurrency` requests; each wave starts when the last one has ended.
    `closed_loop` keeps `concurrency` users active; each sends the next request after a think time
    (exponential, mean `think_time_s`). `poisson` sends at `request_rate`, no matter how many
    requests are in flight; `constant` does so at equal intervals, and `trace` at the times of the
    `source`, with `request_rate` as their mean. `requests` is the number of
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
    source: Source | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """All fields as plain JSON data. The key `source` is left out if it is None."""
        spec = asdict(self)
        del spec["source"]
        return spec if self.source is None else spec | {"source": self.source.spec}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The inverse of `spec`."""
        source = spec.get("source")
        return cls(**{**spec, "source": None if source is None else Source.from_spec(source)})

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
        """The concurrency, or for an open loop the request rate."""
        value = self.concurrency if self.request_rate is None else self.request_rate
        assert value is not None
        return value

    @property
    def max_output_len(self) -> int:
        """The largest output length of its requests, in tokens."""
        if (longest := self._longest("output")) is not None:
            return longest
        return self.output_len + round(self.output_len * self.output_spread)

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
        letter = "c" if self.request_rate is None else "r"
        intensity = f"{letter}{self.intensity:g}"
        return f"{self.protocol}-{intensity}-i{self.input_len}-o{self.output_len}"


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
    source_files: Mapping[str, str] = field(default_factory=dict)
    """The path of each file that a workload takes its requests from, by its SHA-256."""

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

    def source_file(self, trial: Trial) -> str:
        """The path of the file that the trial takes its requests from; empty if there is none."""
        source = trial.workload.source
        digest = "" if source is None or source.file is None else source.file.sha256
        return self.source_files.get(digest, "")

    def position(self, trial: Trial) -> int:
        """The position of `trial` in the order of its bring-up, from 0.

        The order is random, with the drift checks in between, so that changes over time (the
        temperature, other jobs on the node) do not look like effects of the workload. The seed
        comes from the study, so the same study always has the same order.
        """
        return self._positions[trial.id]

    def max_concurrency(self, deployment: Deployment) -> int:
        """The highest concurrency of the deployment's workloads.

        `poisson` workloads count as `max_running`: the engine runs no more requests at once.
        """
        return max(
            trial.workload.concurrency or deployment.max_running
            for trial in self.trials
            if trial.deployment.name == deployment.name
        )

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
            for number, drift_check in enumerate(drift_checks.get((deployment, bring_up), [])):
                order.insert(number * len(group) // (DRIFT_CHECKS - 1) + number, drift_check)
            positions |= {trial.id: position for position, trial in enumerate(order)}
        return positions


def _by_bring_up(trials: Sequence[Trial]) -> dict[tuple[str, int], list[Trial]]:
    """The trials by deployment and bring-up."""
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.deployment.name, trial.bring_up), []).append(trial)
    return groups


MAX_TRIALS = 1_000_000
DRIFT_CHECKS = 3
"""Drift checks per bring-up: one at the start, one in the middle, one at the end."""
DRIFT_CHECK_MIN_TRIALS = 9
"""A bring-up with at least this many trials has drift checks by default."""


def _check_size(config: Mapping[str, Any]) -> None:
    """Raise ConfigError if there would be more than MAX_TRIALS trials, before they are made."""
    total = 0
    for entry in config["deployments"]:
        keys = {**config["workload"], **entry.get("workload", {})}
        product: int = keys.get("trials", 1) * keys.get("bring_ups", 1)
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


def expand(config: Mapping[str, Any]) -> Study:
    """All trials and drift checks of a configuration that matches the schema.

    Raises ConfigError if two deployments have the same name, a deployment is not valid (see
    `parse_deployment`), a prompt and its output are longer than `max_model_len`, or `include` and
    `exclude` leave no cell. The error names the key.
    """
    _check_size(config)
    _check_prompt_mix(config.get("capacity", {}))
    trials: list[Trial] = []
    names: dict[str, int] = {}
    with_drift_checks: dict[str, bool | None] = {}
    for position, variant, suffix in _variants(config["deployments"]):
        where = f"deployments[{position}]"
        keys = {**config["workload"], **variant.get("workload", {})}
        workloads = _expand_workloads(keys, where)
        deployment = parse_deployment(variant, where)
        deployment = replace(deployment, name=deployment.name + suffix)
        first = names.setdefault(deployment.name, position)
        if first != position:
            raise ConfigError(
                f"{where}: the name `{deployment.name}` is already that of deployments[{first}]. "
                "Remove one of the two, or give one a different `name`."
            )
        _check_prompts_fit(deployment, workloads, where)
        _check_prompt_form(deployment, workloads, where)
        trials += [
            Trial(deployment, workload, number, bring_up=bring_up)
            for bring_up in range(1, keys.get("bring_ups", 1) + 1)
            for workload in workloads
            for number in range(1, keys.get("trials", 1) + 1)
        ]
        with_drift_checks[deployment.name] = keys.get("drift_checks")
    kept = tuple(trial for trial in trials if _is_selected(trial, config))
    if not config.get("allow_emulated_mix", False):
        _check_emulated_mix(kept)
    if not kept:
        raise ConfigError(
            f"include, exclude: the filters remove all {len(trials)} trials. Change the filters."
        )
    study = Study(config["study"], kept)
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


def _variants(
    entries: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[int, Mapping[str, Any], str]]:
    """Each entry once per value of its `prefix_caching`: position, entry, suffix of the name."""
    for position, entry in enumerate(entries):
        plain = {key: value for key, value in entry.items() if key != "prefix_caching"}
        arguments = entry.get("engine_args", {})
        for enabled in _as_list(entry.get("prefix_caching", False)):
            if "prefix_caching" in entry:
                _check_prefix_caching(entry, f"deployments[{position}]")
            if enabled:
                arguments = {**arguments, **_PREFIX_CACHING[entry["engine"]]}
                yield position, {**plain, "engine_args": arguments}, "-prefix_caching"
            else:
                yield position, plain, ""


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
    if wanted or (wanted is None and len(trials) >= DRIFT_CHECK_MIN_TRIALS):
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
    return [
        Workload(
            protocol=protocol,
            source=source,
            concurrency=None if protocol == "poisson" else intensity,
            request_rate=intensity if protocol == "poisson" else None,
            input_len=input_len,
            output_len=output_len,
            requests=_requests(keys, protocol, intensity),
            duration_s=None if protocol == "burst" else keys.get("duration_s"),
            think_time_s=keys.get("think_time_s", 0.0) if protocol == "closed_loop" else 0.0,
            **{key: keys[key] for key in _COPIED if key in keys},
        )
        for protocol in _as_list(keys.get("protocol", "burst"))
        for output_len in _as_list(keys.get("output_len", 100))
        for input_len, intensity in itertools.product(
            _as_list(keys["input_len"]),
            _as_list(keys["request_rate" if protocol == "poisson" else "concurrency"]),
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
    if protocol == "poisson":
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
        needed = "request_rate" if protocol == "poisson" else "concurrency"
        if needed not in keys:
            raise ConfigError(
                f"{where}: the protocol `{protocol}` needs `{needed}`. "
                f"Add `{needed}` under `workload`."
            )


_COPIED = ("output_spread", "prompts", "warmup_waves", "seed", "timeout_s", "idle_timeout_s")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_prompts_fit(deployment: Deployment, workloads: Sequence[Workload], where: str) -> None:
    for workload in workloads:
        source = workload.source
        if source is not None and source.file is not None and source.kind != "file":
            continue  # its longest prompt need not have its longest output; rows fit one by one
        if workload.max_input_len + workload.max_output_len > deployment.max_model_len:
            raise ConfigError(
                f"{where}: input_len {workload.max_input_len} plus output_len "
                f"{workload.max_output_len} is more than max_model_len {deployment.max_model_len} "
                f"of `{deployment.name}`. Shorten the prompt, or raise max_model_len if the model "
                "supports it."
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
