"""What the executor will ask Slurm for, for one kind of node. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servegrid.doctor.site import CPU, Profile, minutes_of, nodes_of
from servegrid.study.deployment import EMULATED
from servegrid.study.grid import Deployment

RULE = "measure"
COPIED = ("nodes", "cpus_per_task", "slurm_partition", "slurm_account", "slurm_constraint")
UNITS_MB = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclass(frozen=True)
class Gpus:
    """GPUs of one node: a type, where one is named, and how many."""

    kind: str | None
    count: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.count}" if self.kind else f"{self.count}"


@dataclass(frozen=True)
class Demand:
    """One allocation of a kind, as far as it can be compared with nodes and partitions."""

    kind: str
    values: Mapping[str, Any]
    gpus: Gpus | None
    """None where no GPU is asked for."""
    wants_gpus: bool
    """Whether the engine needs GPUs, asked for or not."""
    most_nodes: int = 1
    """Of the deployments that may take several."""

    @property
    def partition(self) -> str | None:
        return self._text("slurm_partition")

    @property
    def constraint(self) -> str | None:
        return self._text("slurm_constraint")

    @property
    def minutes(self) -> float | None:
        return minutes_of(self.values["timeout_min"]) if "timeout_min" in self.values else None

    @property
    def cpus(self) -> int:
        wanted = str(self.values.get("cpus_per_task", 1))
        return int(wanted) if wanted.isdecimal() else 1

    @property
    def memory_mb(self) -> float:
        """Of a node; 0 where all of it or none in particular is asked for."""
        if "mem_gb" in self.values:
            return float(self.values["mem_gb"]) * 1024
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", str(self.values.get("slurm_mem", 0)))
        return float(found[1]) * UNITS_MB[found[2] or "M"] if found else 0.0

    def _text(self, key: str) -> str | None:
        return str(self.values[key]) if self.values.get(key) else None

    def sbatch(self) -> list[str]:
        """The options of sbatch that submitit would write into the job's script."""
        values = self.values
        options = {"nodes": values.get("nodes", self.most_nodes), "cpus-per-task": self.cpus}
        if self.minutes is not None:
            options["time"] = math.ceil(self.minutes)
        if "mem_gb" in values:
            options["mem"] = f"{round(self.memory_mb)}M"
        if values.get("gpus_per_node"):
            options["gpus-per-node"] = values["gpus_per_node"]
        elif self.gpus and "slurm_gres" not in values:
            options["gpus-per-node"] = self.gpus
        options |= {
            key.removeprefix("slurm_").replace("_", "-"): value
            for key, value in values.items()
            if key.startswith("slurm_")
            and key != "slurm_additional_parameters"
            and value is not False
        }
        options |= values.get("slurm_additional_parameters", {})
        return [
            f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()
        ]


def demand_of(profile: Profile, kind: str, deployments: Sequence[Deployment]) -> Demand:
    """What is asked for a kind; `deployments` are those of the study, if there is one."""
    parameters = profile.kinds.get(kind, {})
    resources = profile.resources(RULE)
    values = {key: resources[key] for key in (*COPIED, "slurm_qos") if key in resources}
    if "runtime" in resources:
        values["timeout_min"] = resources["runtime"]
    values |= parameters
    of_node = [math.ceil(each.node_gpus / nodes_of(each, values)) for each in deployments]
    wants_gpus = any(of_node) if deployments else kind != CPU
    unknown = int(parameters.get("gpus_of_node", 1)) if wants_gpus else 0
    return Demand(
        kind=kind,
        values=values,
        gpus=_asked(values, max(of_node, default=unknown)),
        wants_gpus=wants_gpus,
        most_nodes=max(
            (nodes_of(each, values) for each in deployments if each.engine == EMULATED),
            default=1,
        ),
    )


def gpus_of(text: str) -> list[Gpus]:
    """GPUs of a GRES such as `gpu:a100:2(S:0-1),nvme:1`."""
    found = []
    for each in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = each.strip().split(":")
        if name == "gpu":
            count = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
            found.append(Gpus(rest[0] if rest else None, count))
    return found


def _asked(values: Mapping[str, Any], of_study: int) -> Gpus | None:
    """A kind's own words win over the number of GPUs that the study wants."""
    if "slurm_gres" in values:
        listed = gpus_of(str(values["slurm_gres"]))
        return listed[0] if listed else None
    if "gpus_per_node" in values:
        kind, _, count = str(values["gpus_per_node"]).rpartition(":")
        number = int(count) if count.isdecimal() else 1
        return Gpus(kind or None, number) if number else None
    return Gpus(None, of_study) if of_study else None
