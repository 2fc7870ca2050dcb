"""What a study consists of: workloads, trials, and the study itself. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, Self

from servegrid.study.deployment import Deployment, canonical_json, digest_json, digest_text
from servegrid.study.source import Source, uniform_half_width

__all__ = ["Deployment", "Study", "Trial", "Workload", "canonical_json", "digest_json"]

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

FRONTIER = "frontier"
"""The value of `grid` with which the largest load that meets the SLO is searched."""

DRIFT_CHECKS = 3
"""Drift checks per bring-up: one at the start, one in the middle, one at the end."""

MIN_STATIONARY_REQUESTS = 64
"""Default number of requests between the first and the last one of each user. The 90th
percentile needs this many samples."""
OPEN_LOOP_REQUESTS = 2000
"""Default number of requests of an open loop. With fewer, a load of 90% of the server's capacity
often looks like overload (docs/statistics.md)."""
COPIED_KEYS = ("output_spread", "prompts", "warmup_waves", "seed", "timeout_s", "idle_timeout_s")


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
        """The largest prompt length of its requests, in tokens, with the history of a turn."""
        longest = self._longest("input")
        longest = self.input_len if longest is None else longest
        return round(self._with_history(longest, self.max_output_len, self._drawn_turns))

    @property
    def mean_input_len(self) -> float:
        """The mean prompt length of its requests, in tokens, with the history of a turn."""
        # The mean of the turns 1 to n is the one in their middle.
        return self._with_history(self.input_len, self.output_len, (self._drawn_turns + 1) / 2)

    @property
    def _drawn_turns(self) -> int:
        """The turns of a conversation whose turns have `input_len` tokens; 1 without turns."""
        turns = 1 if self.source is None else self.source.turns
        is_file = self.source is not None and self.source.kind == "file"
        return 1 if turns == "all" or is_file else turns

    @staticmethod
    def _with_history(input_len: int, output_len: int, turn: float) -> float:
        """The prompt of a turn, from 1: all turns up to it and all answers before it."""
        return turn * input_len + (turn - 1) * output_len

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
        with_history = workload.source is not None and workload.source.has_turns
        return (
            f"{'the last turn of a conversation: ' if with_history else ''}"
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

    # Kept, because Snakemake asks for it, and for the digest of all trials.
    @cached_property
    def spec_json(self) -> str:
        """The canonical JSON of `spec`."""
        return canonical_json(self.spec)

    @property
    def digest(self) -> str:
        """The digest of `spec`."""
        return digest_text(self.spec_json)

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
    """The deployments of which dominated workloads are not tried."""
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
        """1 if dominated workloads of the trial's deployment are not tried, else 0."""
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
        return self._by_id[saturation_trial_of(trial).id]

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

    @property
    def has_rate_fractions(self) -> bool:
        """Whether a trial waits for the rate at saturation."""
        return any(trial.workload.rate_fraction is not None for trial in self.trials)

    @cached_property
    def _saturation_ids(self) -> set[str]:
        waiting = (trial for trial in self.trials if trial.workload.rate_fraction is not None)
        return {saturation_trial_of(trial).id for trial in waiting}

    @cached_property
    def _by_id(self) -> dict[str, Trial]:
        return {trial.id: trial for trial in self.all_trials}

    @cached_property
    def _positions(self) -> dict[str, int]:
        positions: dict[str, int] = {}
        trials, drift_checks = (by_bring_up(group) for group in (self.trials, self.drift_checks))
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


def saturation_trial_of(trial: Trial) -> Trial:
    """The trial whose throughput is the rate at saturation: a closed loop that fills the engine.

    As many users as the engine runs requests at once keep it busy, so no higher rate can be served.
    """
    users = trial.deployment.max_running
    copied = ("input_len", "output_len", "source", *COPIED_KEYS)
    keys = {key: getattr(trial.workload, key) for key in copied}
    requests = count_requests({}, "closed_loop", users)
    workload = Workload("closed_loop", concurrency=users, requests=requests, **keys)
    return Trial(trial.deployment, workload, number=1)


def by_bring_up(trials: Sequence[Trial]) -> dict[tuple[str, int], list[Trial]]:
    """The trials by deployment and bring-up."""
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.deployment.name, trial.bring_up), []).append(trial)
    return groups


def count_requests(
    keys: Mapping[str, Any], protocol: Protocol, intensity: float, turns: float = 1.0
) -> int | None:
    """The number of requests of a workload; None if it has a duration instead.

    By default, users have as many conversations of `turns` requests as they would have requests.
    """
    if protocol == "burst":
        return int(intensity) * int(keys.get("requests_per_user", 1))
    if keys.get("duration_s") is not None:
        return None
    if protocol in OPEN_LOOPS:
        return OPEN_LOOP_REQUESTS
    if "requests_per_user" in keys:
        return int(intensity) * int(keys["requests_per_user"])
    start_and_end, between = 2 * int(intensity) * turns, 6 * int(intensity) * turns
    return math.ceil(start_and_end + max(MIN_STATIONARY_REQUESTS, between))
