"""The profile as the workflow reads it, and what can be checked without Slurm."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from servegrid.doctor.report import Finding, Group
from servegrid.errors import ConfigError
from servegrid.study.deployment import EMULATED
from servegrid.study.grid import Deployment, Study

EXECUTOR = "submitit"
CLUSTERS = ("slurm", "local")
MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0, "d": 1440.0, "w": 10080.0}
CPU = "cpu"


@dataclass(frozen=True)
class Profile:
    """One folder of profiles/: Snakemake's options, and the kinds of nodes by name."""

    file: Path
    options: Mapping[str, Any]
    kinds_file: Path | None
    kinds: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Profile:
        """Raises ConfigError, naming file and key, where a file or a value cannot be read."""
        file = folder if folder.suffix in (".yaml", ".yml") else folder / "config.yaml"
        options = _mapping(file, "--profile")
        named = options.get("submitit-kinds")
        if named is None:
            return cls(file, options, None, {})
        kinds_file = Path(str(named))
        kinds = _mapping(kinds_file, f"{file}: submitit-kinds")
        for kind, parameters in kinds.items():
            if not isinstance(parameters, dict):
                raise ConfigError(
                    f"{kinds_file}: {kind}: is not a mapping of parameters. "
                    "Write them below it, indented, as `slurm_partition: NAME`."
                )
        return cls(file, options, kinds_file, kinds)

    @property
    def cluster(self) -> str | None:
        """As the profile says it; None leaves it to the executor."""
        return self.options.get("submitit-cluster")

    def resources(self, rule: str) -> dict[str, Any]:
        """What the profile asks of Slurm for the jobs of a rule."""
        found = _assignments(self.options.get("default-resources"))
        of_rules = self.options.get("set-resources")
        if isinstance(of_rules, dict):
            return found | _assignments(of_rules.get(rule))
        listed = [str(each).partition(":") for each in of_rules or ()]
        return found | _assignments([rest for name, _, rest in listed if name == rule])


def minutes_of(value: Any) -> float | None:
    """Minutes from a number of them or from Snakemake's `1h30m`; None where it is neither."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    text = str(value).strip().lower()
    if not re.fullmatch(r"(\d+(\.\d+)?\s*([smhdw][a-z]*)?\s*)+", text):
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", text)
    return sum(float(number) * MINUTES[unit or "m"] for number, unit in parts)


def judge_profile(profile: Profile) -> Iterator[Finding]:
    """The options that decide where a study runs."""
    group = Group("profile")
    executor = profile.options.get("executor")
    if executor != EXECUTOR:
        yield group.fail(
            str(profile.file),
            f"executor is {executor or 'not set'}",
            f"Write `executor: {EXECUTOR}`: no other one brings an engine up for many cells.",
        )
    elif profile.cluster not in (None, *CLUSTERS):
        yield group.fail(
            str(profile.file),
            f"submitit-cluster is `{profile.cluster}`",
            f"Write `submitit-cluster: slurm`, or one of: {', '.join(CLUSTERS)}.",
        )
    else:
        cluster = profile.cluster or "slurm where it is installed, else local"
        yield group.ok(str(profile.file), f"executor {executor}, cluster {cluster}")
    if profile.kinds_file is not None:
        yield from _judge_kinds(group, profile)
    elif profile.cluster == "slurm":
        yield group.warn(
            str(profile.file),
            "no submitit-kinds: every allocation goes to the default partition, to any node",
            "Name a file of kinds, as profiles/plafrim/config.yaml does.",
        )


def _judge_kinds(group: Group, profile: Profile) -> Iterator[Finding]:
    check_kind = _plugin_check()
    if check_kind is None:
        yield group.warn(
            f"{profile.kinds_file}",
            "the Snakemake plugin is not installed, so the keys of the kinds are not checked",
            "Install snakemake-executor-plugin-submitit.",
        )
    problems = [
        (kind, problem)
        for kind, parameters in profile.kinds.items()
        for problem in (check_kind(parameters) if check_kind else ())
    ]
    for kind, problem in problems:
        yield group.fail(
            f"{profile.kinds_file}", f"{kind}.{problem.key}: {problem.problem}", problem.remedy
        )
    if not profile.kinds:
        yield group.fail(
            f"{profile.kinds_file}", "no kinds in it", "Describe at least one kind of node."
        )
    elif not problems:
        yield group.ok(f"{profile.kinds_file}", f"kinds {', '.join(map(str, profile.kinds))}")


def _plugin_check() -> Callable[[Mapping[str, Any]], Iterable[Any]] | None:
    """The executor plugin's own check of a kind; None if the plugin is not installed."""
    try:
        from snakemake_executor_plugin_submitit.kinds import check_kind
    except ImportError:
        return None
    return check_kind


def judge_study(profile: Profile, study: Study, file: Path) -> Iterator[Finding]:
    """Whether the profile knows the kinds that the study names, and how many nodes they take."""
    group = Group("study")
    by_kind: dict[str, list[Deployment]] = {}
    for deployment in study.deployments:
        by_kind.setdefault(deployment.node_kind, []).append(deployment)
    yield group.ok(
        str(file),
        f"{len(study.deployments)} deployments, {len(study.trials)} cells and trials, "
        f"on {', '.join(by_kind)}",
    )
    for kind, deployments in by_kind.items():
        if profile.kinds and kind not in profile.kinds:
            names = ", ".join(each.name for each in deployments)
            yield group.fail(
                f"kind {kind}",
                f"not in {profile.kinds_file}, but needed by {names}",
                f"Describe `{kind}` there, or write one of its kinds as `gpu` in {file}: "
                f"{', '.join(map(str, profile.kinds))}.",
            )
        else:
            yield from _judge_nodes(group, kind, profile.kinds.get(kind, {}), deployments, file)


def _judge_nodes(
    group: Group,
    kind: str,
    parameters: Mapping[str, Any],
    deployments: Sequence[Deployment],
    file: Path,
) -> Iterator[Finding]:
    most = parameters.get("gpus_of_node")
    several = [each for each in deployments if nodes_of(each, parameters) > 1]
    refused = [each.name for each in several if each.engine != EMULATED]
    if refused:
        yield group.warn(
            f"kind {kind}",
            f"more GPUs than the {most} of one node: {', '.join(refused)}. servegrid brings an "
            "engine up on one node only: these cells will fail, the others go on",
            f"`exclude` them in {file}, or name a kind with more GPUs in a node. If the nodes "
            "have more, correct gpus_of_node.",
        )
    elif several:
        nodes = max(nodes_of(each, parameters) for each in several)
        yield group.ok(f"kind {kind}", f"defined; up to {nodes} nodes for one deployment")
    else:
        yield group.ok(f"kind {kind}", f"defined; one node for each of its {len(deployments)}")


def nodes_of(deployment: Deployment, parameters: Mapping[str, Any]) -> int:
    """How many nodes a deployment takes where a kind has so many GPUs in each."""
    most = parameters.get("gpus_of_node")
    if most and "nodes" not in parameters:
        return max(1, math.ceil(deployment.node_gpus / int(most)))
    return max(1, int(parameters.get("nodes", 1)))


def _mapping(file: Path, key: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(
            f"{key}: {file} cannot be read ({error.strerror}). Correct the path; it is relative "
            "to the folder in which you type the command."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{key}: {file} is not valid YAML: {words}. Correct it.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{key}: {file} is not a mapping of keys. Write `key: value` lines.")
    return loaded


def _assignments(value: Any) -> dict[str, Any]:
    """Resources from Snakemake's two ways to write them: a mapping, or a list of `name=value`."""
    if isinstance(value, dict):
        return value
    pairs = (str(each).partition("=") for each in value or ())
    return {name: int(each) if each.isdecimal() else each for name, _, each in pairs}
