"""The machine and the software that a trial ran on, as plain data for its record."""

from __future__ import annotations

import os
import platform
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")


def use_safe_path() -> None:
    """Let no Python that this process starts import modules from its working directory.

    `python -m` and `python -c` search there first. The working directory of a study can contain
    files of a stranger's bundle, or of another member of a group.
    """
    os.environ["PYTHONSAFEPATH"] = "1"


def describe_node() -> dict[str, Any]:
    """The node, its processor and memory, the Slurm job, Python and all installed packages."""
    return {
        "node": socket.gethostname(),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "job": {name: os.environ[name] for name in JOB_VARIABLES if name in os.environ},
        "python": platform.python_version(),
        "packages": {
            package.name: package.version
            for package in sorted(metadata.distributions(), key=lambda package: package.name)
        },
    }


def _cpu_model() -> str | None:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None
