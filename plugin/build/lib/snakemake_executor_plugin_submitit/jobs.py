"""What the executor reads from a Snakemake job: pure functions of its properties."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface


def allocation_of(job: JobExecutorInterface) -> str | None:
    """The allocation that the job is to share, or None where it gets one of its own."""
    wanted = job.resources.get("allocation")
    return str(wanted) if wanted else None


def job_order(job: JobExecutorInterface) -> int:
    """The job's place among those of its allocation: its resource `order`, 0 without."""
    order = job.resources.get("order", 0)
    if isinstance(order, Integral) and 0 <= int(order) < 10**6:
        return int(order)
    raise WorkflowError(f"{job.name}: resources.order: {order!r} is not a number from 0 to 999999.")


def key_of(job: JobExecutorInterface) -> str:
    """The same for the same job in every run, another one as soon as its params differ."""
    identity = [str(job.get_target_spec()), repr(params_of(job))]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def params_of(job: JobExecutorInterface) -> dict[str, Any]:
    """The named params of a job; a group has none."""
    return {} if job.is_group() else dict(job.params.items())


def log_of(job: JobExecutorInterface) -> str | None:
    """The first log file of the rule, absolute; None for a group or where there is none."""
    logs = [] if job.is_group() else list(job.log)
    return str(Path(logs[0]).absolute()) if logs else None


def argv_of(command: str) -> tuple[str, ...]:
    """The arguments of a `… python -m snakemake …` command line."""
    words = shlex.split(command)
    return tuple(words[words.index("snakemake") + 1 :])


def plain(value: Any, where: str) -> Any:
    """The value as JSON data. Raises WorkflowError, naming `where`, where it is none."""
    if value is None or isinstance(value, str | bool):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each, where) for each in value]
    raise WorkflowError(
        f"{where}: `{type(value).__name__}` cannot be handed to the service of an allocation. "
        "Use numbers, text, lists and mappings."
    )
