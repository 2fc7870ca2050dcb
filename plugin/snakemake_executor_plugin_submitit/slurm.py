"""Asks Slurm's programs about this process's user, whatever the environment says."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

TIMEOUT_S = 60.0
DEFAULTS = ("SQUEUE_", "SCANCEL_", "SACCT_", "SLURM_CLUSTERS")
"""The variables with which people change what Slurm's programs show. sbatch doesn't get them."""


@dataclass(frozen=True)
class Answer:
    """What a program has printed; None, with the reason, if it has failed."""

    text: str | None
    error: str = ""


def ask(program: str, *arguments: str, clusters: str | None = None) -> Answer:
    """Run a program of Slurm; `clusters` names another cluster than that of this machine."""
    selected = [f"--clusters={clusters}"] if clusters else []
    try:
        done = subprocess.run(
            [program, *selected, *arguments],
            env=without_defaults(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"{program}: no answer within {TIMEOUT_S:.0f} s")
    except OSError as error:
        return Answer(None, f"{program}: cannot be run ({error.strerror})")
    if done.returncode:
        message = " ".join((done.stderr or done.stdout).split())
        return Answer(None, message or f"{program}: exit status {done.returncode}")
    return Answer(done.stdout)


def without_defaults(environ: Mapping[str, str]) -> dict[str, str]:
    """
    >>> without_defaults({"SQUEUE_PARTITION": "debug", "SLURM_CONF": "/etc/slurm.conf"})
    {'SLURM_CONF': '/etc/slurm.conf'}
    """
    return {name: value for name, value in environ.items() if not name.startswith(DEFAULTS)}


def user_filter() -> list[str]:
    """The option that limits squeue to this user's jobs.

    Slurm refuses a user ID that the machine does not know. Then there is no filter, and squeue
    shows the jobs of all users.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return []
    return [f"--user={os.getuid()}"]
