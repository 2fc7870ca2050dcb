"""Runs programs with a time limit. A failure is a result, not an exception."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TIMEOUT_S = 20.0
INHERITED = (
    *("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_"),
    *("SACCT_", "SCANCEL_", "SINFO_", "SQUEUE_"),
)
"""What a Slurm job inherits, and what changes the output of Slurm's programs."""


@dataclass(frozen=True)
class CommandResult:
    """The result of a program. `status` is None if it did not start or did not end in time."""

    status: int | None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == 0

    @property
    def message(self) -> str:
        """The last two lines of its error output, else of its output, as one line."""
        text = self.stderr.strip() or self.stdout.strip()
        lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        return " ".join(lines[-2:]) or f"exit status {self.status} without a message"


RunCommand = Callable[[Sequence[str]], CommandResult]


def run_command(command: Sequence[str], timeout_s: float = TIMEOUT_S) -> CommandResult:
    """Run a program as if this process were not inside a Slurm job."""
    # Like submitit, but SLURM_CONF stays: it says where Slurm's configuration is.
    env = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith(INHERITED)
    }
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return CommandResult(None, stderr=f"no answer within {timeout_s:g} s", seconds=timeout_s)
    except OSError as error:
        return CommandResult(None, stderr=f"cannot be run ({error.strerror})")
    seconds = time.monotonic() - start
    return CommandResult(done.returncode, done.stdout, done.stderr, seconds)
