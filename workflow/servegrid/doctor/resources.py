"""The resources that the executor will request from Slurm for one kind of node. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servegrid.doctor.profile import CPU, Profile, count_nodes, get_number, parse_minutes
from servegrid.study.grid import Deployment
from servegrid.study.nodes import nodes_problem

RULE = "measure"
COPIED = ("nodes", "cpus_per_task", "slurm_partition", "slurm_account", "slurm_constraint")
MEMORY = {"mem_gb", "slurm_mem", "slurm_mem_per_cpu", "slurm_mem_per_gpu"}
SUBMITIT = {"open-mode": "append", "wckey": "submitit"}
"""Options that submitit adds to every job unless the kind has others."""
UNITS_MB = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


@dataclass(frozen=True)
class Gpus:
    """GPUs of one node: their type (None: any) and their number."""

    type: str | None
    count: int

    def __str__(self) -> str:
        return f"{self.type}:{self.count}" if self.type else f"{self.count}"


@dataclass(frozen=True)
class ResourceRequest:
    """An allocation on one kind of node, as far as it can be compared with what Slurm has.

    `gpus` is None if no GPU is requested. `needs_gpus` says whether the engine needs GPUs,
    requested or not. `max_nodes` is the largest number of nodes of one deployment.
    """

    kind: str
    values: Mapping[str, Any]
    gpus: Gpus | None
    needs_gpus: bool
    max_nodes: int = 1

    @property
    def partition(self) -> str | None:
        return self._text("slurm_partition")

    @property
    def constraint(self) -> str | None:
        return self._text("slurm_constraint")

    @property
    def minutes(self) -> float | None:
        return parse_minutes(self.values["timeout_min"]) if "timeout_min" in self.values else None

    @property
    def cpus(self) -> int:
        cpus = str(self.values.get("cpus_per_task", 1))
        return int(cpus) if cpus.isdecimal() else 1

    @property
    def memory_mb(self) -> float:
        """Memory per node; 0 if all of it or no particular amount is requested."""
        if "mem_gb" in self.values:
            return get_number(self.values, "mem_gb", 0) * 1024
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", str(self.values.get("slurm_mem", 0)))
        return float(found[1]) * UNITS_MB[found[2] or "M"] if found else 0.0

    @property
    def clusters(self) -> str | None:
        """The clusters of Slurm, separated by commas; None: that of this machine."""
        additional = self.values.get("slurm_additional_parameters")
        found = additional.get("clusters") if isinstance(additional, dict) else None
        return str(found) if found else None

    def _text(self, key: str) -> str | None:
        return str(self.values[key]) if self.values.get(key) else None

    def sbatch_options(self) -> list[str]:
        """The options of sbatch that submitit would write into the batch script."""
        values = self.values
        options = SUBMITIT | {
            "nodes": values.get("nodes", self.max_nodes),
            "cpus-per-task": self.cpus,
        }
        if self.minutes is not None:
            options["time"] = math.ceil(self.minutes)
            delay = values.get("signal_delay_s", min(60, self.minutes * 60 / 4))
            options["signal"] = f"USR2@{int(delay)}"
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
        additional = values.get("slurm_additional_parameters")
        options |= additional if isinstance(additional, dict) else {}
        return [
            f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()
        ]


def build_request(
    profile: Profile, kind: str, deployments: Sequence[Deployment]
) -> ResourceRequest:
    """The request for a kind; `deployments` are those of the study on this kind, if there are any.

    Without a study, a kind other than `cpu` is taken to need the GPUs of one node.
    """
    parameters = profile.kinds.get(kind, {})
    resources = profile.resources(RULE)
    values = {key: resources[key] for key in (*COPIED, "slurm_qos") if key in resources}
    if "runtime" in resources:
        values["timeout_min"] = resources["runtime"]
    if "mem_mb" in resources and not MEMORY & parameters.keys():
        values["slurm_mem"] = f"{resources['mem_mb']}M"
    values |= parameters
    per_node = [math.ceil(each.node_gpus / count_nodes(each, values)) for each in deployments]
    needs_gpus = any(per_node) if deployments else kind != CPU
    default = int(get_number(parameters, "gpus_of_node", 1)) if needs_gpus else 0
    return ResourceRequest(
        kind=kind,
        values=values,
        gpus=_requested_gpus(values, max(per_node, default=default)),
        needs_gpus=needs_gpus,
        max_nodes=max(
            (
                nodes
                for each in deployments
                if nodes_problem(each, nodes := count_nodes(each, values)) is None
            ),
            default=1,
        ),
    )


def parse_gres(text: str) -> list[Gpus]:
    """The GPUs of a GRES such as `gpu:a100:2(S:0-1),nvme:1`."""
    found = []
    for each in re.sub(r"\([^)]*\)", "", text).split(","):
        name, *rest = each.strip().split(":")
        if name == "gpu":
            count = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
            found.append(Gpus(rest[0] if rest else None, count))
    return found


def _requested_gpus(values: Mapping[str, Any], study_gpus: int) -> Gpus | None:
    """The kind's own GPUs, else the number of GPUs that the study needs."""
    if "slurm_gres" in values:
        listed = parse_gres(str(values["slurm_gres"]))
        return listed[0] if listed else None
    if "gpus_per_node" in values:
        gpu_type, _, count = str(values["gpus_per_node"]).rpartition(":")
        number = int(count) if count.isdecimal() else 1
        return Gpus(gpu_type or None, number) if number else None
    return Gpus(None, study_gpus) if study_gpus else None
