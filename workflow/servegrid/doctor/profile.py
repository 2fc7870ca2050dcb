"""Reads a profile as the workflow reads it, and checks what needs no Slurm."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from servegrid.doctor.report import Finding, Group
from servegrid.errors import ConfigError
from servegrid.study.grid import Deployment, Study
from servegrid.study.nodes import capacity_problem, nodes_problem
from servegrid.study.text import pluralize

EXECUTOR = "submitit"
CLUSTERS = ("slurm", "local")
MINUTES = {"s": 1 / 60, "m": 1.0, "h": 60.0, "d": 1440.0, "w": 10080.0}
CPU = "cpu"


@dataclass(frozen=True)
class Profile:
    """A folder of profiles/: Snakemake's options, and the parameters of each kind of node."""

    file: Path
    options: Mapping[str, Any]
    kinds_file: Path | None
    kinds: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Raises ConfigError, with file and key, if a file cannot be read."""
        file = folder if folder.suffix in (".yaml", ".yml") else folder / "config.yaml"
        options = _load_mapping(file, "--profile")
        path = options.get("submitit-kinds")
        if path is None:
            return cls(file, options, None, {})
        kinds_file = Path(str(path))
        kinds = _load_mapping(kinds_file, f"{file}: submitit-kinds")
        for kind, parameters in kinds.items():
            if not isinstance(parameters, dict):
                raise ConfigError(
                    f"{kinds_file}: {kind}: is not a mapping of parameters. "
                    "Write indented lines below it, as `slurm_partition: NAME`."
                )
        return cls(file, options, kinds_file, kinds)

    @property
    def cluster(self) -> str | None:
        """The profile's cluster; None if the executor chooses."""
        return self.options.get("submitit-cluster")

    def resources(self, rule: str) -> dict[str, Any]:
        """The resources that the profile sets for the jobs of a rule."""
        found = _parse_resources(self.options.get("default-resources"))
        per_rule = self.options.get("set-resources")
        if isinstance(per_rule, dict):
            return found | _parse_resources(per_rule.get(rule))
        parts = [str(each).partition(":") for each in per_rule or ()]
        return found | _parse_resources([rest for name, _, rest in parts if name == rule])


def parse_minutes(value: Any) -> float | None:
    """Minutes from a number of minutes or Snakemake's `1h30m`; None if it is neither."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    text = str(value).strip().lower()
    if not re.fullmatch(r"(\d+(\.\d+)?\s*([smhdw][a-z]*)?\s*)+", text):
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhdw]?)", text)
    return sum(float(number) * MINUTES[unit or "m"] for number, unit in parts)


def check_profile(profile: Profile) -> Iterator[Finding]:
    """Check the options that decide where a study runs, and the kinds of nodes."""
    group = Group("profile")
    executor = profile.options.get("executor")
    if executor != EXECUTOR:
        yield group.fail(
            str(profile.file),
            f"executor is {executor or 'not set'}",
            f"Write `executor: {EXECUTOR}`: only this executor runs many cells per engine start.",
        )
    elif profile.cluster not in (None, *CLUSTERS):
        yield group.fail(
            str(profile.file),
            f"submitit-cluster is `{profile.cluster}`",
            f"Write `submitit-cluster: slurm`, or use one of: {', '.join(CLUSTERS)}.",
        )
    else:
        cluster = profile.cluster or "slurm if it is installed, else local"
        yield group.ok(str(profile.file), f"executor {executor}, cluster {cluster}")
    if profile.kinds_file is not None:
        yield from _check_kinds(group, profile, str(profile.kinds_file))
    elif profile.cluster == "slurm":
        yield group.warn(
            str(profile.file),
            "no submitit-kinds: Slurm starts every allocation on any node of its default partition",
            "Set submitit-kinds to a file with the kinds of nodes, as in "
            "profiles/plafrim/config.yaml.",
        )


def _check_kinds(group: Group, profile: Profile, file: str) -> Iterator[Finding]:
    validate_kind = _import_validation()
    if validate_kind is None:
        yield group.warn(
            file,
            "the Snakemake plugin is not installed: the keys of the kinds are not checked",
            "Install snakemake-executor-plugin-submitit.",
        )
    problems = [
        (kind, problem)
        for kind, parameters in profile.kinds.items()
        for problem in (validate_kind(parameters) if validate_kind else ())
    ]
    for kind, problem in problems:
        yield group.fail(file, f"{kind}.{problem.key}: {problem.problem}", problem.remedy)
    if not profile.kinds:
        yield group.fail(file, "contains no kind", "Describe at least one kind of node.")
    elif not problems:
        yield group.ok(file, f"kinds {', '.join(map(str, profile.kinds))}")


class _Problem(Protocol):
    """snakemake_executor_plugin_submitit.kinds.Problem."""

    @property
    def key(self) -> str: ...
    @property
    def problem(self) -> str: ...
    @property
    def remedy(self) -> str: ...


def _import_validation() -> Callable[[Mapping[Any, Any]], Iterable[_Problem]] | None:
    """The executor plugin's own check of a kind; None if the plugin is not installed."""
    try:
        from snakemake_executor_plugin_submitit.kinds import validate_kind
    except ImportError:
        return None
    return validate_kind


def check_study(profile: Profile, study: Study, file: Path) -> Iterator[Finding]:
    """Check that the profile has the study's kinds of nodes, and how many nodes they need."""
    group = Group("study")
    by_kind: dict[str, list[Deployment]] = {}
    for deployment in study.deployments:
        by_kind.setdefault(deployment.node_kind, []).append(deployment)
    yield group.ok(
        str(file),
        f"{pluralize(len(study.deployments), 'deployment')}, "
        f"{pluralize(len(study.trials), 'trial')}, on {', '.join(by_kind)}",
    )
    for kind, deployments in by_kind.items():
        if profile.kinds and kind not in profile.kinds:
            names = ", ".join(deployment.name for deployment in deployments)
            yield group.fail(
                f"kind {kind}",
                f"not in {profile.kinds_file}, but needed by {names}",
                f"Add `{kind}` to that file, or set `gpu` in {file} to one of its kinds: "
                f"{', '.join(map(str, profile.kinds))}.",
            )
        else:
            yield _check_node_count(group, profile, kind, deployments, file)


def _check_node_count(
    group: Group, profile: Profile, kind: str, deployments: Sequence[Deployment], file: Path
) -> Finding:
    parameters = profile.kinds.get(kind, {})
    most = max(deployments, key=lambda each: each.node_gpus)
    nodes, place = count_nodes(most, parameters), f"{profile.kinds_file}: {kind}"
    if few := capacity_problem(most.node_gpus, nodes, parameters.get("gpus_of_node"), place):
        problem, _, remedy = few.partition(". ")
        return group.fail(f"kind {kind}", problem, remedy)
    large = [each for each in deployments if count_nodes(each, parameters) > 1]
    problems = [nodes_problem(each, count_nodes(each, parameters)) for each in large]
    if refused := [problem for problem in problems if problem]:
        return group.warn(
            f"kind {kind}",
            f"one node has {parameters.get('gpus_of_node')} GPUs: {refused[0]} Such cells will "
            f"fail ({pluralize(len(refused), 'deployment')}); the others will run",
            f"Add these deployments to `exclude` in {file}, or use a kind with more GPUs per "
            "node. If the nodes have more, correct gpus_of_node.",
        )
    if large and "interface" not in parameters:
        return group.fail(
            f"kind {kind}",
            f"{pluralize(len(large), 'deployment')} on several nodes, but the kind does not name "
            "the network between them",
            f"Set `interface` of `{kind}` in {profile.kinds_file}, to a name such as ib0 or to a "
            "network such as 10.7.0.0/16 (`ip -br address` on a node shows both).",
        )
    if large:
        nodes = max(count_nodes(deployment, parameters) for deployment in large)
        return group.ok(f"kind {kind}", f"defined; up to {nodes} nodes per deployment")
    return group.ok(
        f"kind {kind}", f"defined; {pluralize(len(deployments), 'deployment')}, one node each"
    )


def count_nodes(deployment: Deployment, parameters: Mapping[str, Any]) -> int:
    """The number of nodes that a deployment gets with the parameters of a kind."""
    per_node = get_number(parameters, "gpus_of_node", 0)
    if per_node and "nodes" not in parameters:
        return max(1, math.ceil(deployment.node_gpus / per_node))
    return max(1, int(get_number(parameters, "nodes", 1)))


def get_number(parameters: Mapping[str, Any], key: str, default: float) -> float:
    """A number of a kind; the default if it is missing or no number, which is a finding."""
    value = parameters.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(parameters[key]) if is_number else default


def _load_mapping(file: Path, key: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{key}: {file} cannot be read ({error.strerror}). Correct the path; it is relative "
            "to the current folder."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key}: {file} is not valid YAML: {reason}. Correct it.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{key}: {file} is not a mapping of keys. Write `key: value` lines.")
    return loaded


def _parse_resources(value: Any) -> dict[str, Any]:
    """Resources as a mapping, or as Snakemake's list of `name=value`."""
    if isinstance(value, dict):
        return value
    pairs = (str(each).partition("=") for each in value or ())
    return {name: int(each) if each.isdecimal() else each for name, _, each in pairs}
