"""The keys of a kinds file: what a site may say about each kind of node.

Pure: other programs use it to check a kinds file before a run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KIND_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "timeout_min": (int, float),
    "signal_delay_s": int,
    "nodes": int,
    "gpus_of_node": int,  # GPUs per node: a job that needs more gets several nodes
    "gpus_per_node": (int, str),  # 0: don't ask for GPUs, the nodes come with theirs
    "cpus_per_task": int,
    "mem_gb": (int, float),
    "python": str,
    "setup": list,
    "srun_args": list,
    "slurm_account": str,
    "slurm_additional_parameters": dict,
    "slurm_comment": str,
    "slurm_constraint": str,
    "slurm_exclude": str,
    "slurm_exclusive": (bool, str),
    "slurm_gres": str,
    "slurm_mem": (str, int),
    "slurm_mem_per_cpu": (str, int),
    "slurm_mem_per_gpu": (str, int),
    "slurm_nodelist": str,
    "slurm_partition": str,
    "slurm_qos": str,
    "slurm_wckey": str,
}
"""Each key with the types of its value."""

_NAMES = {
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


def check_kind(parameters: Mapping[Any, Any]) -> Iterator[Problem]:
    """All problems of one kind's parameters."""
    for key, value in parameters.items():
        if key not in KIND_KEYS:
            near = difflib.get_close_matches(str(key), KIND_KEYS, n=1)
            meant = f"Did you mean `{near[0]}`? " if near else ""
            yield Problem(
                str(key), f"unknown key `{key}`", f"{meant}Valid keys: {', '.join(KIND_KEYS)}."
            )
        elif problem := _check_value(key, value):
            yield problem


def _check_value(key: str, value: Any) -> Problem | None:
    types = KIND_KEYS[key]
    types = types if isinstance(types, tuple) else (types,)
    # True is an int for Python, and not for a person.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join(dict.fromkeys(_NAMES[each] for each in types))
        example = next((_EXAMPLES[each] for each in types if each in _EXAMPLES), None)
        if example is None:
            example = f"it in quotes, as `{key}: '2'`" if types == (str,) else f"`{key}: 2`"
        return Problem(key, f"{value!r} is not {wanted}", f"Write {example}.")
    least = 1 if key == "gpus_of_node" else 0
    if isinstance(value, int | float) and not isinstance(value, bool) and value < least:
        return Problem(key, f"{value!r} is less than {least}", f"Write {least} or more.")
    return None
