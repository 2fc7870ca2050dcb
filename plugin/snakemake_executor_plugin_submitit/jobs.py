"""Pure functions of a Snakemake job: what the executor reads from it."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.jobs import JobExecutorInterface


def allocation_name(job: JobExecutorInterface) -> str | None:
    """The allocation that the job shares; None if it is submitted alone."""
    name = job.resources.get("allocation")
    return str(name) if name else None


def job_order(job: JobExecutorInterface) -> int:
    """The job's position in its allocation: its resource `order`, 0 without one.

    Raises WorkflowError if it is not an integer from 0 to 999999.
    """
    order = job.resources.get("order", 0)
    if isinstance(order, Integral) and 0 <= int(order) < 10**6:
        return int(order)
    raise WorkflowError(
        f"{job.name}: resources.order: {order!r} is not an integer from 0 to 999999. "
        "Correct it in the rule."
    )


def job_seconds(job: JobExecutorInterface, resource: str) -> float | None:
    """The seconds of a resource, `expected_s` or `expected_start_s`; None if the job has none.

    Raises WorkflowError if it is not a number, 0 or more.
    """
    seconds = job.resources.get(resource)
    if seconds is None:
        return None
    if isinstance(seconds, Real) and 0 <= float(seconds) < math.inf:
        return float(seconds)
    raise WorkflowError(
        f"{job.name}: resources.{resource}: {seconds!r} is not a number of seconds, 0 or more. "
        "Correct it in the rule, or leave it out."
    )


def job_key(job: JobExecutorInterface) -> str:
    """Identifies the job: the same in every run, a different one if its params change."""
    identity = [str(job.get_target_spec()), repr(job_params(job))]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def job_params(job: JobExecutorInterface) -> dict[str, Any]:
    """The named params of a job. A group has none."""
    return {} if job.is_group() else dict(job.params.items())


def job_log(job: JobExecutorInterface) -> str | None:
    """The absolute path of the rule's first log file; None for a group or without a log."""
    logs = [] if job.is_group() else list(job.log)
    return str(Path(logs[0]).absolute()) if logs else None


def parse_arguments(command: str) -> tuple[str, ...]:
    """Snakemake's arguments in a command line `… python -m snakemake …`."""
    words = shlex.split(command)
    return tuple(words[words.index("snakemake") + 1 :])


def to_json_data(value: Any, location: str) -> Any:
    """The value as JSON data. Raises WorkflowError, with `location`, if that is impossible."""
    if value is None or isinstance(value, str | bool):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json_data(each, f"{location}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json_data(each, location) for each in value]
    raise WorkflowError(
        f"{location}: a `{type(value).__name__}` cannot be passed to the service of an "
        "allocation. Use numbers, text, lists and mappings."
    )
