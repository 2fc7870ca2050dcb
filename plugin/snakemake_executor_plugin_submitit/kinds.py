"""The keys of a kinds file: what a site can say about each kind of node.

Other programs can use this module to check a kinds file before a run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from snakemake_executor_plugin_submitit.container import find_problem


@dataclass(frozen=True)
class Key:
    """A key of a kind: the types and the smallest value that it accepts, and its meaning."""

    types: tuple[type, ...]
    meaning: str
    minimum: int = 0


_NUMBER, _TEXT = (int, float), (str,)
_MEMORY = (str, int)

KIND_KEYS: Mapping[str, Key] = {
    "timeout_min": Key(_NUMBER, "time limit of an allocation in minutes; replaces `runtime`"),
    "signal_delay_s": Key((int,), "seconds before the time limit at which Slurm warns"),
    "nodes": Key((int,), "nodes of an allocation"),
    "gpus_of_node": Key(
        (int,), "GPUs that one node has; a job that needs more gets several nodes", minimum=1
    ),
    "gpus_per_node": Key(
        (int, str), "GPUs to request per node, such as `2` or `a100:2`; `0` requests none"
    ),
    "interface": Key(
        _TEXT,
        "network between the nodes of an allocation: the name of an interface, such as `ib0`, or "
        "an IPv4 network, such as `10.7.0.0/16`",
    ),
    "cpus_per_task": Key((int,), "CPUs of an allocation; replaces the resource and `threads`"),
    "mem_gb": Key(_NUMBER, "memory per node in GiB; replaces `mem_mb`"),
    "python": Key(_TEXT, "Python interpreter of the allocation"),
    "container": Key(
        (dict,),
        "container in which the Python runs: `image`, `runtime` (`apptainer`, `singularity`, "
        "`pyxis`), `binds` (folders)",
    ),
    "setup": Key((list,), "shell lines that run before the allocation's process"),
    "srun_args": Key((list,), "additional arguments of `srun`"),
    "slurm_account": Key(_TEXT, "`--account`"),
    "slurm_additional_parameters": Key((dict,), "any other options of `sbatch`, as a mapping"),
    "slurm_comment": Key(_TEXT, "`--comment`"),
    "slurm_constraint": Key(_TEXT, "`--constraint`"),
    "slurm_exclude": Key(_TEXT, "`--exclude`"),
    "slurm_exclusive": Key((bool, str), "`--exclusive`"),
    "slurm_gres": Key(_TEXT, "`--gres`; replaces `gpus`"),
    "slurm_mem": Key(_MEMORY, "`--mem`; replaces `mem_mb`"),
    "slurm_mem_per_cpu": Key(_MEMORY, "`--mem-per-cpu`; replaces `mem_mb`"),
    "slurm_mem_per_gpu": Key(_MEMORY, "`--mem-per-gpu`; replaces `mem_mb`"),
    "slurm_nodelist": Key(_TEXT, "`--nodelist`"),
    "slurm_partition": Key(_TEXT, "`--partition`"),
    "slurm_qos": Key(_TEXT, "`--qos`"),
    "slurm_wckey": Key(_TEXT, "`--wckey`"),
}

_TYPE_NAMES = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "a number",
    list: "a list",
    str: "text",
}
_EXAMPLES = {dict: "`option: value` lines below it", list: "a list, as `[a, b]`"}


@dataclass(frozen=True)
class Problem:
    """A key of a kind that cannot be used: what is wrong, and the remedy."""

    key: str
    problem: str
    remedy: str


def validate_kind(parameters: Mapping[Any, Any]) -> list[Problem]:
    """All problems of the parameters of one kind; empty if the kind is valid.

    >>> [each.problem for each in validate_kind({"nodes": "two", "slurm_qos": "long"})]
    ["'two' is not a number"]
    """
    found = (_validate(str(key), value) for key, value in parameters.items())
    return [problem for problem in found if problem]


def _validate(name: str, value: Any) -> Problem | None:
    key = KIND_KEYS.get(name)
    if key is None:
        near = difflib.get_close_matches(name, KIND_KEYS, n=1)
        hint = f"Did you mean `{near[0]}`? " if near else ""
        return Problem(name, f"unknown key `{name}`", f"{hint}Valid keys: {', '.join(KIND_KEYS)}.")
    # Python takes True for an int, a person does not.
    if not isinstance(value, key.types) or (isinstance(value, bool) and bool not in key.types):
        expected = " or ".join(dict.fromkeys(_TYPE_NAMES[each] for each in key.types))
        example = next((_EXAMPLES[each] for each in key.types if each in _EXAMPLES), None)
        if example is None:
            quoted = f"it in quotes, as `{name}: '2'`"
            example = quoted if key.types == _TEXT else f"`{name}: 2`"
        return Problem(name, f"{value!r} is not {expected}", f"Write {example}.")
    if name == "container" and isinstance(value, dict) and (found := find_problem(value)):
        return Problem(name, *found)
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float) and value < key.minimum:
        problem = f"{value!r} is less than {key.minimum}"
        return Problem(name, problem, f"Write {key.minimum} or more.")
    return None
